//! Following the intentions, and what answers where none matches.
//!
//! A list of intentions that got shorter may be a list that the token may not see whole any more, and with default
//! allow a `deny` that is out of sight lets callers in. So what vanished is asked about by name, which Consul refuses
//! to a token without rights. And the default is asked for by a call that no intention can mean.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::de::IgnoredAny;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    Message,
    intentions::{Listed, leave_nothing_to_the_default, vanished},
    state::Policy,
};
use crate::{
    catalog::model::IntentionAction,
    consul::{
        Answer, Client, ConsulError, Event, Request, Watch,
        answers::IntentionCheck,
        judge::Doubt,
        position::{Pace, PaceLimits},
        watch::WatchStatus,
    },
    telemetry::log::chain,
};

/// How often the default is asked for. It changes only with a restart of Consul's agents or with a config entry.
const DEFAULT_EVERY: Duration = Duration::from_secs(30);

/// Of the destinations whose intentions vanished, how many are asked about.
const ASKED_ABOUT: usize = 4;

/// Neither a caller nor a callee.
const NOBODY: &str = "sidestep-asks-for-the-default";

/// What the intentions' watch and its owner know.
struct Follower {
    client: Client,
    before: Option<Arc<Policy>>,
    /// Read, and not yet known to be right.
    unsettled: Option<Answer<Arc<Listed>>>,
    /// As last settled, to ask for the default again.
    settled: Option<Answer<Arc<Listed>>>,
    pace: Pace,
    settle_at: Instant,
}

/// Sends each new policy, for ever. `status` says whether what is listed could be made sure of.
pub(super) async fn follow(
    client: Client,
    mut watch: Watch<Listed>,
    status: Arc<Mutex<WatchStatus>>,
    into: mpsc::Sender<Message>,
) {
    let mut follower = Follower {
        client,
        before: None,
        unsettled: None,
        settled: None,
        pace: Pace::new(PaceLimits::default(), Instant::now()),
        settle_at: Instant::now() + DEFAULT_EVERY,
    };
    loop {
        tokio::select! {
            event = watch.next() => match event {
                Event::Changed(answer) => follower.unsettled = Some(answer),
                // They are in the watch's status.
                Event::Doubtful(_) | Event::Failed(_) => continue,
            },
            () = sleep_until(follower.settle_at) => {}
        }
        let settled = follower.settle().await;
        {
            let mut status = status.lock();
            if settled.is_ok() {
                status.good_at = Some(Instant::now());
            }
            status.problem = settled.as_ref().err().cloned();
        }
        if let Ok(Some(policy)) = settled
            && into.send(Message::Policy(policy)).await.is_err()
        {
            return;
        }
    }
}

impl Follower {
    /// The policy, if it is another than before.
    async fn settle(&mut self) -> Result<Option<Arc<Policy>>, String> {
        let Some(answer) = self.unsettled.clone().or_else(|| self.settled.clone()) else {
            self.settle_at = Instant::now() + DEFAULT_EVERY;
            return Ok(None);
        };
        match self.policy(&answer).await {
            Ok(policy) => {
                self.unsettled = None;
                self.settled = Some(answer);
                self.pace.after_answer(Instant::now(), 0.0);
                self.settle_at =
                    Instant::now() + DEFAULT_EVERY.mul_f64(0.75 + fastrand::f64() / 2.0);
                if self.before.as_deref() == Some(&policy) {
                    return Ok(None);
                }
                let policy = Arc::new(policy);
                self.before = Some(Arc::clone(&policy));
                Ok(Some(policy))
            }
            Err(problem) => {
                self.settle_at = Instant::now() + self.pace.after_failure(fastrand::f64());
                Err(problem)
            }
        }
    }

    async fn policy(&self, answer: &Answer<Arc<Listed>>) -> Result<Policy, String> {
        let listed = &answer.body;
        if let Some(before) = &self.before {
            for name in vanished(&before.intentions, &listed.intentions, ASKED_ABOUT) {
                self.may_be_seen(&name).await?;
            }
        }
        let mut policy = Policy {
            intentions: listed.intentions.clone(),
            default: None,
            problems: listed.problems.clone(),
        };
        if !leave_nothing_to_the_default(&listed.intentions) {
            match self.default().await {
                Ok(action) => policy.default = Some(action),
                Err(error) if error.is_refused() => {
                    policy.default = by_header(answer.default_acl_policy.as_deref());
                    if policy.default.is_none() {
                        policy.problems.push(format!(
                            "the default policy is not known: {}; policy.default holds",
                            chain(&error)
                        ));
                    }
                }
                Err(error) => return Err(chain(&error).to_string()),
            }
        }
        Ok(policy)
    }

    /// Whether the intentions of a destination may be seen, so that none of them being listed means that there is none.
    async fn may_be_seen(&self, destination: &str) -> Result<(), String> {
        let request = Request::to(&["v1", "connect", "intentions", "match"])
            .with("by", "destination")
            .with("name", destination);
        match self.client.get::<IgnoredAny>(&request).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_refused() => Err(Doubt::LostRights.to_string()),
            Err(error) => Err(chain(&error).to_string()),
        }
    }

    async fn default(&self) -> Result<IntentionAction, ConsulError> {
        let request = Request::to(&["v1", "connect", "intentions", "check"])
            .with("source", NOBODY)
            .with("destination", NOBODY);
        let answer = self.client.get::<IntentionCheck>(&request).await?;
        Ok(if answer.body.allowed {
            IntentionAction::Allow
        } else {
            IntentionAction::Deny
        })
    }
}

fn by_header(policy: Option<&str>) -> Option<IntentionAction> {
    match policy? {
        "allow" => Some(IntentionAction::Allow),
        "deny" => Some(IntentionAction::Deny),
        _ => None,
    }
}
