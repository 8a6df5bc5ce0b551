//! Virtual addresses: one of each family per service, the same for the same name, never two services on one.
//!
//! The address follows from the service's name; where names collide, the order of names decides. What was
//! given out is remembered in a state file, so that a later service moves nobody, and an address whose service
//! went away is held back for a while: clients may still have it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::model::{ServiceName, Snapshot};
use crate::{stable_hash::fnv1a, state_file};

/// Where addresses are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VipPools {
    /// `capture.ipv4_range`
    pub ipv4: Ipv4Net,
    /// `capture.ipv6_range`
    pub ipv6: Ipv6Net,
}

impl VipPools {
    /// The range that an address is in, if it is in one.
    pub fn range_of(&self, address: IpAddr) -> Option<String> {
        self.contain(address).then(|| match address.to_canonical() {
            IpAddr::V4(_) => self.ipv4.to_string(),
            IpAddr::V6(_) => self.ipv6.to_string(),
        })
    }

    /// Whether an address is in one of them.
    pub fn contain(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(v4) => self.ipv4.contains(&v4),
            IpAddr::V6(v6) => self.ipv6.contains(&v6),
        }
    }
}

/// Gives out addresses. One per agent.
#[derive(Debug)]
pub struct VipAllocator {
    pools: VipPools,
    state_file: Option<PathBuf>,
    quarantine: Duration,
    given: BTreeMap<ServiceName, Given>,
    /// The state file says something else than `given`.
    is_unsaved: bool,
    /// The last assignment had no problem.
    is_settled: bool,
}

/// What one service has, or had until `freed_at`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ipv4: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ipv6: Option<Ipv6Addr>,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    freed_at: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    version: u32,
    services: BTreeMap<ServiceName, Given>,
}

const STATE_VERSION: u32 = 1;

/// What an assignment gave.
#[derive(Debug, Default)]
pub struct Assigned {
    /// Addresses of every service of the snapshot.
    pub addresses: BTreeMap<ServiceName, BTreeSet<IpAddr>>,
    /// What went wrong beside: an address claimed twice, a full range, a state file that cannot be written.
    pub problems: Vec<VipProblem>,
}

/// Something is wrong with virtual addresses; the rest of the assignment holds.
#[derive(Debug, thiserror::Error)]
pub enum VipProblem {
    /// Two services claim one explicit address; the first by name has it.
    #[error("services {owner} and {refused} both claim the address {address}: {owner} has it")]
    ClaimedTwice {
        /// The address.
        address: IpAddr,
        /// Who has it.
        owner: ServiceName,
        /// Who does not.
        refused: ServiceName,
    },
    /// A service outside the mesh cannot be where addresses are virtual; it is not called there.
    #[error("the destination of {service}, {address}, is in {range}, whose addresses are virtual")]
    VirtualDestination {
        /// The service.
        service: ServiceName,
        /// Where it is said to be.
        address: IpAddr,
        /// The range.
        range: String,
    },
    /// No address is left.
    #[error(
        "no free address for {service} in {range}: widen the range or shorten catalog.vip_quarantine"
    )]
    Exhausted {
        /// Who goes without.
        service: ServiceName,
        /// The range.
        range: String,
    },
    /// What was given out could not be remembered; it holds until the agent ends.
    #[error("remember virtual addresses in {}", path.display())]
    NotSaved {
        /// The state file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state file was damaged; it was moved aside and addresses follow from names again.
    #[error("state file {} is damaged and was moved to {}", path.display(), aside.display())]
    Damaged {
        /// The state file.
        path: PathBuf,
        /// Where it is now.
        aside: PathBuf,
        /// What was wrong with it.
        #[source]
        source: io::Error,
    },
}

impl VipAllocator {
    /// Reads the state file, if there is one. A damaged one is moved aside and reported, not fatal.
    pub fn new(
        pools: VipPools,
        state_file: Option<PathBuf>,
        quarantine: Duration,
    ) -> (Self, Option<VipProblem>) {
        let (given, problem) = match state_file.as_deref().map(read_state) {
            None | Some(Ok(None)) => (BTreeMap::new(), None),
            Some(Ok(Some(given))) => (given, None),
            Some(Err(source)) => {
                let path = state_file.clone().unwrap_or_default();
                let aside = state_file::move_aside(&path);
                (
                    BTreeMap::new(),
                    Some(VipProblem::Damaged {
                        path,
                        aside,
                        source,
                    }),
                )
            }
        };
        (
            Self {
                pools,
                state_file,
                quarantine,
                given,
                is_unsaved: false,
                is_settled: false,
            },
            problem,
        )
    }

    /// For [`crate::fuzzing`]: an allocator that finds `state` in its file.
    ///
    /// # Errors
    /// If the file would count as damaged.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn with_state(pools: VipPools, state: &[u8]) -> io::Result<Self> {
        Ok(Self {
            pools,
            state_file: None,
            quarantine: Duration::ZERO,
            given: parse_state(state)?,
            is_unsaved: false,
            is_settled: false,
        })
    }

    /// Gives every service of `snapshot` its addresses: the explicit ones if it has any, else its own.
    pub fn assign(&mut self, snapshot: &Snapshot, now: SystemTime) -> Assigned {
        let before = self.given.clone();
        let mut assigned = Assigned::default();
        let claimed = claim_explicit(snapshot, self.pools, &mut assigned);
        self.free_gone(snapshot, now);
        let mut taken = claimed;
        self.drop_conflicting(&mut taken);
        for (name, service) in &snapshot.services {
            if !service.explicit_addresses.is_empty() {
                continue;
            }
            let given = self.give(name, &mut taken, &mut assigned.problems);
            assigned.addresses.insert(name.clone(), given);
        }
        self.is_unsaved |= before != self.given;
        assigned.problems.extend(self.save());
        self.is_settled = assigned.problems.is_empty();
        assigned
    }

    /// Whether the same services with the same explicit addresses would be assigned what they were last, without a
    /// word. What is held back is then let go with the next assignment.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// Writes the state file if it says something else. What could not be written is tried again next time.
    fn save(&mut self) -> Option<VipProblem> {
        let path = self.state_file.clone().filter(|_| self.is_unsaved)?;
        let written = write_state(&path, &self.given);
        self.is_unsaved = written.is_err();
        let source = written.err()?;
        Some(VipProblem::NotSaved { path, source })
    }

    /// Marks what has no service any more, and forgets what was marked long enough ago.
    fn free_gone(&mut self, snapshot: &Snapshot, now: SystemTime) {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let quarantine = self.quarantine.as_secs();
        self.given.retain(|name, given| {
            let here = snapshot
                .services
                .get(name)
                .is_some_and(|s| s.explicit_addresses.is_empty());
            if here {
                given.freed_at = None;
                return true;
            }
            let freed_at = *given.freed_at.get_or_insert(now);
            // A clock that went backwards must not free early.
            now < freed_at.saturating_add(quarantine)
        });
    }

    /// Takes what was given out, without what an operator claimed meanwhile or a new range leaves out.
    ///
    /// An address that a damaged state file gave to two services stays with the first by name.
    fn drop_conflicting(&mut self, taken: &mut BTreeSet<IpAddr>) {
        let pools = self.pools;
        for given in self.given.values_mut() {
            given.ipv4 = given.ipv4.filter(|a| {
                pools.ipv4.contains(a) && !a.is_broadcast() && taken.insert(IpAddr::V4(*a))
            });
            given.ipv6 = given
                .ipv6
                .filter(|a| pools.ipv6.contains(a) && taken.insert(IpAddr::V6(*a)));
        }
    }

    fn give(
        &mut self,
        name: &ServiceName,
        taken: &mut BTreeSet<IpAddr>,
        problems: &mut Vec<VipProblem>,
    ) -> BTreeSet<IpAddr> {
        let VipPools { ipv4, ipv6 } = self.pools;
        let given = self.given.entry(name.clone()).or_insert(Given {
            ipv4: None,
            ipv6: None,
            freed_at: None,
        });
        if given.ipv4.is_none() {
            given.ipv4 = probe(
                name,
                u128::from(host_count(32 - ipv4.prefix_len())),
                |host| {
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "host is below the range's size"
                    )]
                    let address = Ipv4Addr::from_bits(ipv4.network().to_bits() | host as u32);
                    (!address.is_broadcast() && taken.insert(IpAddr::V4(address)))
                        .then_some(address)
                },
            );
            if given.ipv4.is_none() {
                let (service, range) = (name.clone(), ipv4.to_string());
                problems.push(VipProblem::Exhausted { service, range });
            }
        }
        if given.ipv6.is_none() {
            given.ipv6 = probe(
                name,
                u128::from(host_count(128 - ipv6.prefix_len())),
                |host| {
                    let address = Ipv6Addr::from_bits(ipv6.network().to_bits() | host);
                    taken.insert(IpAddr::V6(address)).then_some(address)
                },
            );
            if given.ipv6.is_none() {
                let (service, range) = (name.clone(), ipv6.to_string());
                problems.push(VipProblem::Exhausted { service, range });
            }
        }
        let both = [given.ipv4.map(IpAddr::V4), given.ipv6.map(IpAddr::V6)];
        both.into_iter().flatten().collect()
    }
}

/// How many hosts a range with so many host bits has, its first and last address left out; at most 2^63.
fn host_count(bits: u8) -> u64 {
    1_u64
        .checked_shl(u32::from(bits))
        .unwrap_or(1 << 63)
        .min(1 << 63)
        .saturating_sub(2)
}

/// Tries the host that the name's hash falls on, then the next ones, until `take` takes one.
fn probe<T>(name: &ServiceName, hosts: u128, take: impl FnMut(u128) -> Option<T>) -> Option<T> {
    let first = u128::from(spread(fnv1a(name.as_str().as_bytes()))).checked_rem(hosts)?;
    (first..hosts)
        .chain(0..first)
        .map(|host| host + 1)
        .find_map(take)
}

/// FNV's low bits differ little between names that differ in the last character; this mixes them.
fn spread(hash: u64) -> u64 {
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

fn claim_explicit(
    snapshot: &Snapshot,
    pools: VipPools,
    assigned: &mut Assigned,
) -> BTreeSet<IpAddr> {
    let mut claims: BTreeMap<(IpAddr, Claim), &ServiceName> = BTreeMap::new();
    for (name, service) in &snapshot.services {
        let claim = service
            .destination()
            .map_or(Claim::Whole, |destination| Claim::Port(destination.port));
        let canonical = service.explicit_addresses.iter().map(IpAddr::to_canonical);
        for address in canonical {
            if service.destination().is_some()
                && let Some(range) = pools.range_of(address)
            {
                assigned.problems.push(VipProblem::VirtualDestination {
                    service: name.clone(),
                    address,
                    range,
                });
                continue;
            }
            let others = claims.range((address, Claim::Whole)..=(address, Claim::Port(u16::MAX)));
            let owner = others
                .filter(|((_, other), owner)| **owner != name && claim.conflicts_with(*other))
                .map(|(_, owner)| *owner)
                .min();
            if let Some(owner) = owner {
                assigned.problems.push(VipProblem::ClaimedTwice {
                    address,
                    owner: owner.clone(),
                    refused: name.clone(),
                });
                continue;
            }
            claims.insert((address, claim), name);
            assigned
                .addresses
                .entry(name.clone())
                .or_default()
                .insert(address);
        }
    }
    claims.into_keys().map(|(address, _)| address).collect()
}

/// What of an address a service claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    /// All of it: it is virtual.
    Whole,
    /// One port of a host outside the mesh.
    Port(u16),
}

impl Claim {
    fn conflicts_with(self, other: Self) -> bool {
        self == other || self == Self::Whole || other == Self::Whole
    }
}

fn read_state(path: &Path) -> io::Result<Option<BTreeMap<ServiceName, Given>>> {
    let bytes = state_file::read(path)?;
    bytes.as_deref().map(parse_state).transpose()
}

fn parse_state(bytes: &[u8]) -> io::Result<BTreeMap<ServiceName, Given>> {
    let state: StateFile = serde_json::from_slice(bytes)?;
    if state.version != STATE_VERSION {
        let message = format!("version {}: expected {STATE_VERSION}", state.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(state.services)
}

fn write_state(path: &Path, given: &BTreeMap<ServiceName, Given>) -> io::Result<()> {
    let state = StateFile {
        version: STATE_VERSION,
        services: given.clone(),
    };
    state_file::write(path, &serde_json::to_vec_pretty(&state)?)
}

#[cfg(test)]
mod tests;
