//! Is what Consul answers the truth, or only looks like it? Pure.
//!
//! A token that lost its rights, a server that lost its leader: both are answered with status 200. What was known
//! before then stays.

use std::{fmt, time::Duration};

use super::Answer;

/// Something that can be said not to be there any more.
pub trait Content {
    /// Whether it says that there is nothing.
    fn is_empty(&self) -> bool;
}

/// What to do with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Take,
    /// Ask at once again, without waiting for a change, and judge that.
    AskAgain,
    /// What was known before stays.
    Keep(Doubt),
}

/// Why an answer is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// The token may not see (all of) it any more.
    LostRights,
    /// The server that answered has no leader.
    NoLeader,
    /// The server that answered has not heard of its leader for too long.
    Stale(Duration),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LostRights => f.write_str(
                "the answer is empty or filtered as for a token without rights: does the token in \
                 consul.token_file still have the rights that the agent needs?",
            ),
            Self::NoLeader => f.write_str("the Consul server that answered knows no leader"),
            Self::Stale(age) => write!(
                f,
                "the Consul server that answered has not heard of its leader for {} ms",
                age.as_millis()
            ),
        }
    }
}

/// What is known of the answer that was taken last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Before {
    /// Whether it said that there is nothing.
    pub was_empty: bool,
    /// Whether something was left out of it for lack of rights.
    pub was_filtered: bool,
}

/// Judges an answer with status 200. `before` is `None` until one was taken; `waited` says whether it is that of a
/// blocking query; `stale_max` is how old it may be.
///
/// - An answer that turned empty while the query waited says nothing: rights are checked when the query begins, and
///   what it finds at its end is filtered by those of then, without a sign in versions before 1.11.
/// - Where there was something and now there is nothing, one sign of lost rights is enough: Consul says that it left
///   something out (1.11 and later), or the answer was never looked up (index 1 or none, no leader known: how Consul
///   answers `/v1/health/connect` without `service:read`).
/// - Where Consul says for the first time that it left something out, rights were lost, whatever is left.
/// - Without a leader, or too old, an answer is no news. But where nothing is known yet, it is better than nothing.
pub fn judge<T: Content>(
    before: Option<Before>,
    answer: &Answer<T>,
    waited: bool,
    stale_max: Duration,
) -> Verdict {
    let is_empty = answer.body.is_empty();
    let no_leader = answer.known_leader == Some(false);
    let never_looked_up = no_leader && answer.index.is_none_or(|index| index <= 1);
    let Some(before) = before else {
        return match (is_empty, answer.filtered_by_acls, never_looked_up) {
            (true, true, _) | (true, _, true) => Verdict::Keep(Doubt::LostRights),
            (true, false, false) if no_leader => Verdict::Keep(Doubt::NoLeader),
            (true, false, false) | (false, _, _) => Verdict::Take,
        };
    };
    if answer.filtered_by_acls && (!before.was_filtered || (is_empty && !before.was_empty)) {
        return Verdict::Keep(Doubt::LostRights);
    }
    if is_empty && !before.was_empty && never_looked_up {
        return Verdict::Keep(Doubt::LostRights);
    }
    if no_leader {
        return Verdict::Keep(Doubt::NoLeader);
    }
    match answer.last_contact {
        Some(age) if age > stale_max => Verdict::Keep(Doubt::Stale(age)),
        Some(_) | None if waited && is_empty && !before.was_empty => Verdict::AskAgain,
        Some(_) | None => Verdict::Take,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STALE_MAX: Duration = Duration::from_secs(10);

    const SOME: Option<Before> = Some(Before {
        was_empty: false,
        was_filtered: false,
    });
    const EMPTY: Option<Before> = Some(Before {
        was_empty: true,
        was_filtered: false,
    });
    const PART: Option<Before> = Some(Before {
        was_empty: false,
        was_filtered: true,
    });

    /// How many things it says there are.
    #[derive(Debug)]
    struct Items(usize);

    impl Content for Items {
        fn is_empty(&self) -> bool {
            self.0 == 0
        }
    }

    fn answer(items: usize, index: u64, known_leader: bool, filtered: bool) -> Answer<Items> {
        Answer {
            body: Items(items),
            index: Some(index),
            known_leader: Some(known_leader),
            last_contact: Some(Duration::ZERO),
            filtered_by_acls: filtered,
            default_acl_policy: None,
            content_hash: None,
        }
    }

    #[test]
    fn lost_rights_are_told_from_emptiness() {
        use Doubt::{LostRights, NoLeader};
        use Verdict::{AskAgain, Keep, Take};
        let table = [
            // what was known, what is answered, what it means
            (SOME, answer(0, 40, true, false), Take),
            (SOME, answer(0, 1, false, false), Keep(LostRights)),
            (SOME, answer(0, 40, true, true), Keep(LostRights)),
            (SOME, answer(1, 40, true, true), Keep(LostRights)),
            (SOME, answer(0, 40, false, false), Keep(NoLeader)),
            (SOME, answer(2, 40, false, false), Keep(NoLeader)),
            (SOME, answer(2, 40, true, false), Take),
            // Of a token that never saw all, what it sees counts; but not that all of it is gone.
            (PART, answer(1, 41, true, true), Take),
            (PART, answer(1, 41, true, false), Take),
            (PART, answer(0, 41, true, true), Keep(LostRights)),
            (EMPTY, answer(0, 41, true, false), Take),
            (EMPTY, answer(1, 41, true, false), Take),
            // The first answer.
            (None, answer(0, 40, true, false), Take),
            (None, answer(1, 40, true, true), Take),
            (None, answer(0, 1, false, false), Keep(LostRights)),
            (None, answer(0, 40, true, true), Keep(LostRights)),
            (None, answer(0, 40, false, false), Keep(NoLeader)),
            (None, answer(3, 40, false, false), Take),
        ];
        for (before, answer, expected) in table {
            assert_eq!(
                judge(before, &answer, false, STALE_MAX),
                expected,
                "{before:?} and then {answer:?}"
            );
            let expected = match expected {
                Take if before == SOME && answer.body.is_empty() => AskAgain,
                Take | AskAgain | Keep(_) => expected,
            };
            assert_eq!(judge(before, &answer, true, STALE_MAX), expected);
        }
    }

    #[test]
    fn an_old_answer_is_no_news() {
        let age = STALE_MAX + Duration::from_millis(1);
        let old = Answer {
            last_contact: Some(age),
            ..answer(1, 40, true, false)
        };
        assert_eq!(
            judge(SOME, &old, true, STALE_MAX),
            Verdict::Keep(Doubt::Stale(age))
        );
        assert_eq!(judge(None, &old, true, STALE_MAX), Verdict::Take);
        assert_eq!(judge(SOME, &old, true, age), Verdict::Take);
    }

    proptest! {
        #[test]
        fn nothing_vanishes_by_a_query_that_waited(
            index in proptest::option::of(0_u64..3), leader in proptest::option::of(any::<bool>()), filtered: bool,
        ) {
            let answer = Answer { index, known_leader: leader, ..answer(0, 0, true, filtered) };
            prop_assert_ne!(judge(SOME, &answer, true, STALE_MAX), Verdict::Take);
        }

        #[test]
        fn nothing_vanishes_without_a_leader_or_with_a_filter(
            index in proptest::option::of(0_u64..3), leader in proptest::option::of(any::<bool>()),
            filtered: bool, was_filtered: bool, contact in proptest::option::of(0_u64..20_000),
        ) {
            let answer = Answer {
                index,
                known_leader: leader,
                last_contact: contact.map(Duration::from_millis),
                ..answer(0, 0, true, filtered)
            };
            let before = Some(Before { was_empty: false, was_filtered });
            if judge(before, &answer, false, STALE_MAX) == Verdict::Take {
                prop_assert!(!filtered && leader != Some(false));
                prop_assert!(contact.is_none_or(|age| age <= 10_000));
            }
        }
    }
}
