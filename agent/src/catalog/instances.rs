//! Whose the addresses of instances are, where connections to them are captured (`capture.instances`). Pure.
//!
//! Who finds instances himself, by SRV records or in the list that a database's nodes tell their clients, calls one at
//! the address and port that it registered. He has chosen it, so its health does not matter here: it decides only
//! between two that claim the same.

use std::{
    collections::{BTreeMap, HashSet, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    destination::is_outside,
    model::{Health, Instance, Service, ServiceName},
};

/// How many problems are told one by one.
const TOLD: usize = 20;

/// Every address of one version of the catalog at which an instance is called.
#[derive(Debug, Default)]
pub struct InstanceAddresses {
    owners: BTreeMap<SocketAddr, Owner>,
}

/// Whose an address is.
#[derive(Debug)]
pub struct Owner {
    /// The service; the first by name, if there is a rival.
    pub service: ServiceName,
    /// The instance at the address.
    pub instance: Arc<Instance>,
    /// Another service with an instance there: whose intentions decide cannot be told, so nobody is called.
    pub rival: Option<ServiceName>,
}

impl InstanceAddresses {
    /// The addresses of the instances of `services`, but for those that `is_virtual` says are a service's already.
    ///
    /// At which tunnels are taken nobody is captured: a Connect-native application listens there itself, for peers that
    /// speak TLS with it.
    pub fn new<'a>(
        services: impl Iterator<Item = &'a Arc<Service>> + Clone,
        is_virtual: impl Fn(SocketAddr) -> bool,
    ) -> Self {
        let in_mesh = services.filter(|service| service.destination().is_none());
        let instances = in_mesh.flat_map(|service| {
            let all = service.instances.iter();
            all.map(move |instance| (&service.name, instance))
        });
        let tunnels: HashSet<SocketAddr> = instances
            .clone()
            .map(|(_, instance)| instance.tunnel)
            .collect();
        let mut owners = BTreeMap::new();
        for (service, instance) in instances {
            // One that stands in for this service is called as what it is.
            if instance.target.is_some() {
                continue;
            }
            let address = instance.address();
            if !is_usable(address) || tunnels.contains(&address) || is_virtual(address) {
                continue;
            }
            match owners.entry(address) {
                Entry::Vacant(free) => {
                    free.insert(Owner::new(service, instance));
                }
                Entry::Occupied(mut taken) => taken.get_mut().meet(service, instance),
            }
        }
        Self { owners }
    }

    /// Whose `address` is, if it is one.
    pub fn at(&self, address: SocketAddr) -> Option<&Owner> {
        self.owners.get(&address)
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (SocketAddr, &Owner)> {
        self.owners.iter().map(|(address, owner)| (*address, owner))
    }

    /// What differs from `before` as far as the kernel knows it: those that are new or otherwise, and those that are gone.
    /// One walk along both.
    pub fn since<'a>(&'a self, before: &Self) -> (Vec<(SocketAddr, &'a Owner)>, Vec<SocketAddr>) {
        let (mut new, mut gone) = (vec![], vec![]);
        let mut before = before.all().peekable();
        for (address, owner) in self.all() {
            while let Some((old, _)) = before.next_if(|(old, _)| *old < address) {
                gone.push(old);
            }
            let same = before.next_if(|(old, _)| *old == address);
            if !same.is_some_and(|(_, before)| before.is_same_in_kernel(owner)) {
                new.push((address, owner));
            }
        }
        gone.extend(before.map(|(old, _)| old));
        (new, gone)
    }

    /// What is wrong with them, for people.
    pub fn problems(&self) -> Vec<String> {
        let contested = self.all().filter_map(|(address, owner)| {
            let (service, rival) = (&owner.service, owner.rival.as_ref()?);
            Some(format!(
                "services {service} and {rival} both have an instance at {address}: connections to it are refused"
            ))
        });
        let mut lines: Vec<String> = contested.collect();
        let more = lines.len().saturating_sub(TOLD);
        if more > 0 {
            lines.truncate(TOLD);
            lines.push(format!(
                "the same holds of {more} more addresses of instances"
            ));
        }
        lines
    }
}

impl Owner {
    fn new(service: &ServiceName, instance: &Arc<Instance>) -> Self {
        Self {
            service: service.clone(),
            instance: Arc::clone(instance),
            rival: None,
        }
    }

    fn is_same_in_kernel(&self, other: &Self) -> bool {
        self.service == other.service && self.rival.is_some() == other.rival.is_some()
    }

    /// One that fails its checks has lost its address to one that does not: schedulers give addresses away again before
    /// who had one is deregistered. Of a service's own, the first has it: two registrations of one application.
    fn meet(&mut self, service: &ServiceName, instance: &Arc<Instance>) {
        let [before, now] =
            [&self.instance, instance].map(|instance| instance.health == Health::Critical);
        if before && !now {
            *self = Self::new(service, instance);
        } else if before == now && self.service != *service {
            self.rival.get_or_insert_with(|| service.clone());
        }
    }
}

/// Whether another host, or this one at an outside address, can be called there.
fn is_usable(address: SocketAddr) -> bool {
    let is_link_local = matches!(address.ip(), IpAddr::V4(v4) if v4.is_link_local());
    address.port() != 0 && !is_link_local && is_outside(address.ip()).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::catalog::{
        destination::Destination,
        model::{META_ADDRESS, Ports, ServiceDefaults, Target, Weights},
    };

    fn instance(id: &str, address: &str) -> Instance {
        let address: SocketAddr = address.parse().unwrap();
        Instance {
            id: id.parse().unwrap(),
            node: "b".parse().unwrap(),
            tunnel: (address.ip(), 15_443).into(),
            local: ([127, 0, 0, 1], address.port()).into(),
            port: address.port(),
            tags: vec![],
            meta: BTreeMap::new(),
            health: Health::Passing,
            weights: Weights::default(),
            target: None,
        }
    }

    fn critical(id: &str, address: &str) -> Instance {
        Instance {
            health: Health::Critical,
            ..instance(id, address)
        }
    }

    fn service(name: &str, instances: Vec<Instance>) -> Arc<Service> {
        Arc::new(Service {
            name: name.parse().unwrap(),
            instances: instances.into_iter().map(Arc::new).collect(),
            explicit_addresses: BTreeSet::new(),
            ports: Ports::Any,
            defaults: ServiceDefaults::default(),
        })
    }

    fn addresses(services: &[Arc<Service>]) -> InstanceAddresses {
        InstanceAddresses::new(services.iter(), |_| false)
    }

    /// As `address service/instance`, with a rival behind it.
    fn told(addresses: &InstanceAddresses) -> Vec<String> {
        let line = |(address, owner): (SocketAddr, &Owner)| {
            let rival = owner.rival.as_ref().map(|rival| format!(" or {rival}"));
            let (service, id) = (&owner.service, &owner.instance.id);
            format!("{address} {service}/{id}{}", rival.unwrap_or_default())
        };
        addresses.all().map(line).collect()
    }

    #[test]
    fn an_instance_is_called_at_what_it_registered() {
        let elsewhere = |id: &str, registered: &str| {
            let meta = BTreeMap::from([(META_ADDRESS.to_owned(), registered.to_owned())]);
            Instance {
                meta,
                ..instance(id, "192.0.2.1:80")
            }
        };
        let all = addresses(&[service(
            "db",
            vec![
                instance("1", "192.0.2.1:5432"),
                instance("2", "[2001:db8::2]:5432"),
                elsewhere("3", "198.51.100.3:6432"),
                elsewhere("4", "[::ffff:198.51.100.4]:6432"),
                elsewhere("5", "no address"),
            ],
        )]);
        let expected = [
            "192.0.2.1:80 db/5",
            "192.0.2.1:5432 db/1",
            "198.51.100.3:6432 db/3",
            "198.51.100.4:6432 db/4",
            "[2001:db8::2]:5432 db/2",
        ];
        assert_eq!(told(&all), expected);
        assert!(all.problems().is_empty());
    }

    #[test]
    fn what_is_no_instance_of_the_mesh_at_an_outside_address_is_left_alone() {
        let stand_in = Instance {
            target: Some(Target {
                service: "other".parse().unwrap(),
                datacenter: "dc2".into(),
                sni: None,
            }),
            ..instance("stands-in", "192.0.2.2:80")
        };
        let native = Instance {
            port: 15_443,
            ..instance("native", "192.0.2.3:15443")
        };
        let odd = [
            "127.0.0.1:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "224.0.0.1:80",
            "240.0.0.9:80",
            "192.0.2.4:0",
            "[::1]:80",
            "[fe80::1]:80",
        ];
        let odd = odd.iter().map(|address| instance(address, address));
        // Another one's tunnel, though this one's node takes its own elsewhere.
        let tunnel = Instance {
            tunnel: ([192, 0, 2, 3], 21_000).into(),
            ..instance("at-a-tunnel", "192.0.2.3:15443")
        };
        let instances = [stand_in, native, tunnel].into_iter().chain(odd).collect();
        let destination = Destination::read(&["192.0.2.7".to_owned()], 443).unwrap();
        let defaults = ServiceDefaults {
            destination: Some(destination.clone().into()),
            ..ServiceDefaults::default()
        };
        let outside = Service {
            instances: vec![Arc::new(instance("1", "192.0.2.8:443"))],
            ..Service::outside("api".parse().unwrap(), &destination, defaults)
        };
        let services = [service("db", instances), outside.into()];
        assert_eq!(told(&addresses(&services)), Vec::<String>::new());

        let one = [service("db", vec![instance("1", "192.0.2.1:80")])];
        let virtual_too = InstanceAddresses::new(one.iter(), |address| address.port() == 80);
        assert!(virtual_too.all().next().is_none());
    }

    #[test]
    fn two_services_at_one_address_are_refused_there_unless_one_is_failing() {
        let at = "192.0.2.1:80";
        let well = |name: &str, id: &str| service(name, vec![instance(id, at)]);
        let failing = |name: &str, id: &str| service(name, vec![critical(id, at)]);
        let table = [
            (vec![well("a", "1"), well("b", "2")], "a/1 or b"),
            (
                vec![well("a", "1"), well("b", "2"), well("c", "3")],
                "a/1 or b",
            ),
            (vec![failing("a", "1"), failing("b", "2")], "a/1 or b"),
            (vec![failing("a", "1"), well("b", "2")], "b/2"),
            (vec![well("a", "1"), failing("b", "2")], "a/1"),
            (
                vec![failing("a", "1"), failing("b", "2"), well("c", "3")],
                "c/3",
            ),
            (
                vec![failing("a", "1"), well("b", "2"), well("c", "3")],
                "b/2 or c",
            ),
            (
                vec![service("a", vec![instance("1", at), instance("2", at)])],
                "a/1",
            ),
            (
                vec![service("a", vec![critical("1", at), instance("2", at)])],
                "a/2",
            ),
        ];
        for (services, expected) in table {
            let all = addresses(&services);
            assert_eq!(told(&all), [format!("{at} {expected}")]);
            assert_eq!(all.problems().len(), usize::from(expected.contains("or")));
        }
    }

    #[test]
    fn many_problems_are_counted() {
        let both = ["a", "b"].map(|name| {
            let instances = (1..=25).map(|n| instance(&n.to_string(), &format!("192.0.2.{n}:80")));
            service(name, instances.collect())
        });
        let problems = addresses(&both).problems();
        assert_eq!(problems.len(), TOLD + 1);
        assert!(
            problems[0].contains("a and b both have an instance at 192.0.2.1:80"),
            "{problems:?}"
        );
        assert!(problems[TOLD].contains("of 5 more"), "{problems:?}");
    }

    #[test]
    fn only_what_the_kernel_knows_makes_a_difference() {
        let of = |id: &str, name: &str| {
            addresses(&[
                service(name, vec![instance(id, "192.0.2.1:80")]),
                service("web", vec![instance("1", "192.0.2.2:80")]),
            ])
        };
        let changes = |before: &InstanceAddresses, now: &InstanceAddresses| {
            let (new, gone) = now.since(before);
            let new: Vec<String> = new.iter().map(|(at, _)| at.to_string()).collect();
            let gone = gone.iter().map(ToString::to_string).collect();
            (new, gone)
        };
        let none = || (vec![], Vec::<String>::new());
        let db = of("1", "db");
        assert_eq!(changes(&db, &of("2", "db")), none(), "another instance");
        let first = || vec!["192.0.2.1:80".to_owned()];
        assert_eq!(
            changes(&db, &of("1", "other")),
            (first(), vec![]),
            "service"
        );
        let without = addresses(&[service("web", vec![instance("1", "192.0.2.2:80")])]);
        assert_eq!(changes(&db, &without), (vec![], first()));
        assert_eq!(changes(&without, &db), (first(), vec![]));
        let contested = addresses(&[
            service("db", vec![instance("1", "192.0.2.1:80")]),
            service("rival", vec![instance("1", "192.0.2.1:80")]),
            service("web", vec![instance("1", "192.0.2.2:80")]),
        ]);
        assert_eq!(changes(&db, &contested), (first(), vec![]), "refused");

        let hosts = |all: &[u8]| {
            let instances = all.iter();
            let instances = instances.map(|n| instance(&n.to_string(), &format!("192.0.2.{n}:80")));
            addresses(&[service("db", instances.collect())])
        };
        let both = hosts(&[2, 3, 5, 8, 9]);
        let (new, gone) = changes(&both, &hosts(&[1, 3, 4, 8]));
        assert_eq!(new, ["192.0.2.1:80", "192.0.2.4:80"]);
        assert_eq!(gone, ["192.0.2.2:80", "192.0.2.5:80", "192.0.2.9:80"]);
        assert_eq!(changes(&both, &hosts(&[])).1.len(), 5);
    }
}
