//! What is known of a host's addresses, from answers that come, stay away or say nothing. Pure.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use tokio::time::Instant;

use crate::dns::lookup::{Family, Found};

/// However short an answer holds, it is not asked for again before.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// However long an answer holds, it is asked for again by then.
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// What is not there is asked for again by then.
const ABSENT_PAUSE: Duration = Duration::from_secs(30);

/// The longest pause after answers that stayed away. The first is [`PAUSE_MIN`], and each is twice as long.
const FAILED_PAUSE_MAX: Duration = Duration::from_secs(30);

/// How long addresses are kept that nobody has confirmed. Source: RFC 8767, section 5, which has one to three days.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// The addresses of a host, by family.
#[derive(Debug, Default)]
pub(super) struct Known {
    ipv4: Kept,
    ipv6: Kept,
}

/// Of one family, as last said.
#[derive(Debug, Default)]
struct Kept {
    addresses: Vec<IpAddr>,
    good_at: Option<Instant>,
    failures: u32,
    problem: Option<String>,
}

/// What may be connected to, and what is wrong beside.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Usable {
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) problem: Option<String>,
}

impl Known {
    /// Takes what was said about one family, or why nothing was. Says when to ask again.
    pub(super) fn take(
        &mut self,
        family: Family,
        said: Result<Found, String>,
        now: Instant,
    ) -> Instant {
        let kept = match family {
            Family::Ipv4 => &mut self.ipv4,
            Family::Ipv6 => &mut self.ipv6,
        };
        now + kept.take(said, now)
    }

    /// Whether it is known if there are any: something was said, or could not be, about both families.
    pub(super) fn is_told(&self) -> bool {
        let is_told = |kept: &Kept| kept.good_at.is_some() || kept.problem.is_some();
        is_told(&self.ipv4) && is_told(&self.ipv6)
    }

    /// What may be connected to, but for what `check` refuses.
    pub(super) fn usable(&self, check: impl Fn(IpAddr) -> Result<(), String>) -> Usable {
        let mut usable = Usable::default();
        let mut problems = vec![];
        for kept in [&self.ipv4, &self.ipv6] {
            for address in &kept.addresses {
                match check(*address) {
                    Ok(()) => {
                        usable.addresses.insert(address.to_canonical());
                    }
                    Err(problem) => problems.push(format!("{address} is refused: {problem}")),
                }
            }
        }
        // That nobody tells of one family is no problem while there are addresses of the other.
        let of_family = |kept: &Kept| {
            let matters = !kept.addresses.is_empty() || usable.addresses.is_empty();
            kept.problem.clone().filter(|_| matters)
        };
        let failed = of_family(&self.ipv4).or_else(|| of_family(&self.ipv6));
        if let Some(failed) = failed {
            let kept = if usable.addresses.is_empty() {
                ""
            } else {
                "; the addresses from before are kept"
            };
            problems.push(format!("{failed}{kept}"));
        } else if usable.addresses.is_empty() && problems.is_empty() && self.is_told() {
            problems.push("there is no such host, or it has no address".to_owned());
        }
        usable.problem = (!problems.is_empty()).then(|| problems.join("; "));
        usable
    }
}

impl Kept {
    /// Returns the pause until the next question.
    fn take(&mut self, said: Result<Found, String>, now: Instant) -> Duration {
        match said {
            Ok(found) => {
                self.addresses = found.addresses;
                self.good_at = Some(now);
                self.failures = 0;
                self.problem = None;
                found
                    .ttl
                    .map_or(ABSENT_PAUSE, |ttl| ttl.clamp(PAUSE_MIN, PAUSE_MAX))
            }
            Err(problem) => {
                if self.good_at.is_none_or(|good_at| now - good_at >= KEPT) {
                    self.addresses.clear();
                }
                self.problem = Some(problem);
                let pause = PAUSE_MIN * 2_u32.saturating_pow(self.failures.min(5));
                self.failures = self.failures.saturating_add(1);
                pause.min(FAILED_PAUSE_MAX)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(addresses: &[&str], ttl: u64) -> Found {
        Found {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ttl: (!addresses.is_empty()).then_some(Duration::from_secs(ttl)),
        }
    }

    fn silent() -> Result<Found, String> {
        Err("no answer".to_owned())
    }

    fn seconds(known: &mut Known, family: Family, said: Result<Found, String>) -> u64 {
        let now = Instant::now();
        (known.take(family, said, now) - now).as_secs()
    }

    /// Addresses, and the problem if there is one.
    fn usable(known: &Known) -> (Vec<String>, Option<String>) {
        let usable = known.usable(|_| Ok(()));
        let addresses = usable.addresses.iter().map(ToString::to_string).collect();
        (addresses, usable.problem)
    }

    fn told(addresses: &[&str], problem: Option<&str>) -> (Vec<String>, Option<String>) {
        let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
        (addresses, problem.map(str::to_owned))
    }

    #[test]
    fn an_answer_holds_as_long_as_it_says_within_bounds() {
        for (ttl, expected) in [(0, 1), (1, 1), (60, 60), (86_400, 3600)] {
            let mut known = Known::default();
            let pause = seconds(&mut known, Family::Ipv4, Ok(found(&["192.0.2.1"], ttl)));
            assert_eq!(pause, expected);
        }
        let mut known = Known::default();
        assert_eq!(seconds(&mut known, Family::Ipv6, Ok(found(&[], 0))), 30);
    }

    #[test]
    fn who_does_not_answer_is_asked_less_and_less() {
        let mut known = Known::default();
        let pauses: Vec<u64> = (0..8)
            .map(|_| seconds(&mut known, Family::Ipv4, silent()))
            .collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30]);
        seconds(&mut known, Family::Ipv4, Ok(found(&[], 0)));
        assert_eq!(seconds(&mut known, Family::Ipv4, silent()), 1);
    }

    #[test]
    fn a_new_answer_replaces_the_one_before() {
        let mut known = Known::default();
        seconds(
            &mut known,
            Family::Ipv4,
            Ok(found(&["192.0.2.1", "192.0.2.2"], 5)),
        );
        seconds(&mut known, Family::Ipv6, Ok(found(&["2001:db8::1"], 5)));
        let all = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
        assert_eq!(usable(&known), told(&all, None));
        seconds(&mut known, Family::Ipv4, Ok(found(&["192.0.2.3"], 5)));
        assert_eq!(usable(&known), told(&["192.0.2.3", "2001:db8::1"], None));
        seconds(&mut known, Family::Ipv6, Ok(found(&[], 0)));
        seconds(&mut known, Family::Ipv4, Ok(found(&[], 0)));
        let absent = "there is no such host, or it has no address";
        assert_eq!(usable(&known), told(&[], Some(absent)));
    }

    #[test]
    fn the_last_good_answer_is_kept_for_a_day() {
        let mut known = Known::default();
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        known.take(Family::Ipv4, Ok(found(&["192.0.2.1"], 5)), begun);
        known.take(Family::Ipv6, Ok(found(&[], 5)), begun);
        let day = KEPT.as_secs();
        for time in [5, 3600, day - 1] {
            known.take(Family::Ipv4, silent(), after(time));
            let problem = "no answer; the addresses from before are kept";
            assert_eq!(usable(&known), told(&["192.0.2.1"], Some(problem)));
        }
        known.take(Family::Ipv4, silent(), after(day));
        assert_eq!(usable(&known), told(&[], Some("no answer")));
        known.take(Family::Ipv4, Ok(found(&["192.0.2.2"], 5)), after(day + 1));
        assert_eq!(usable(&known), told(&["192.0.2.2"], None));
    }

    #[test]
    fn one_family_is_enough() {
        let mut known = Known::default();
        assert!(!known.is_told());
        seconds(&mut known, Family::Ipv6, silent());
        assert!(!known.is_told());
        assert_eq!(usable(&known), told(&[], Some("no answer")));
        seconds(&mut known, Family::Ipv4, Ok(found(&["192.0.2.1"], 5)));
        assert!(known.is_told());
        assert_eq!(usable(&known), told(&["192.0.2.1"], None));
    }

    #[test]
    fn what_is_refused_is_told() {
        let mut known = Known::default();
        let said = Ok(found(&["127.0.0.1", "192.0.2.1"], 5));
        seconds(&mut known, Family::Ipv4, said);
        let check = |address: IpAddr| {
            if address.is_loopback() {
                Err("loopback".to_owned())
            } else {
                Ok(())
            }
        };
        let usable = known.usable(check);
        assert_eq!(usable.addresses.len(), 1);
        let problem = usable.problem.unwrap();
        assert_eq!(problem, "127.0.0.1 is refused: loopback");
    }
}
