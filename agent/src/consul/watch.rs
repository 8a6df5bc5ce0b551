//! Following one answer of Consul as it changes, by blocking queries.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};

use super::{
    Answer, Client, ConsulError, Request,
    judge::{Before, Content, Doubt, Verdict, judge},
    position::{Pace, PaceLimits, Position},
};
use crate::telemetry::log::chain;

/// How a watch asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchSettings {
    /// How long Consul may wait for a change. Consul takes at most 10 minutes.
    pub wait: Duration,
    /// Whether any server may answer, not only the leader: cheaper, and goes on without a leader.
    pub stale: bool,
    /// How old such an answer may be.
    pub stale_max: Duration,
    /// Whether the node's Consul agent answers from its own cache: it then says of every answer that there is no
    /// leader.
    pub from_agent: bool,
    /// Between two requests where Consul's answer has neither index nor hash to wait on.
    pub poll: Duration,
    /// Between two requests otherwise.
    pub pace: PaceLimits,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self {
            wait: Duration::from_secs(300),
            stale: true,
            stale_max: Duration::from_secs(10),
            from_agent: false,
            poll: Duration::from_secs(10),
            pace: PaceLimits::default(),
        }
    }
}

/// What came of a request.
#[derive(Debug)]
pub enum Event<T> {
    /// The content is another than before, or the first.
    Changed(Answer<Arc<T>>),
    /// An answer that is not believed: what was known stays. Asked again after a pause.
    Doubtful(Doubt),
    /// No answer: what was known stays. Asked again after a pause.
    Failed(ConsulError),
}

/// How a watch fares, for operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchStatus {
    /// What is asked for.
    pub path: String,
    /// When the last answer came that was believed.
    pub good_at: Option<Instant>,
    /// Why it is not up to date, since then.
    pub problem: Option<String>,
}

impl WatchStatus {
    /// How old what is known is; `None` if nothing is.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.good_at.map(|good_at| now - good_at)
    }
}

/// Follows what `request` is answered, from now on and for ever.
#[derive(Debug)]
pub struct Watch<T> {
    client: Client,
    request: Request,
    settings: WatchSettings,
    position: Position,
    asked_at: Instant,
    pace: Pace,
    not_before: Option<Instant>,
    /// The leader is to answer: another server's answer was too old.
    from_leader: bool,
    /// The index of the last answer that was believed.
    index: Option<u64>,
    last: Option<Answer<Arc<T>>>,
    status: Arc<Mutex<WatchStatus>>,
}

impl<T: DeserializeOwned + PartialEq + Content> Watch<T> {
    /// Asks nothing before [`Self::next`].
    pub fn new(client: Client, request: Request, settings: WatchSettings) -> Self {
        let status = WatchStatus {
            path: request.to_string(),
            good_at: None,
            problem: None,
        };
        Self {
            client,
            request,
            settings,
            position: Position::Unknown,
            asked_at: Instant::now(),
            pace: Pace::new(settings.pace, Instant::now()),
            not_before: None,
            from_leader: false,
            index: None,
            last: None,
            status: Arc::new(Mutex::new(status)),
        }
    }

    /// How it fares; to be read also while [`Self::next`] waits.
    pub fn status(&self) -> Arc<Mutex<WatchStatus>> {
        Arc::clone(&self.status)
    }

    /// What was answered last and believed.
    pub fn last(&self) -> Option<&Answer<Arc<T>>> {
        self.last.as_ref()
    }

    /// Waits until there is something new to say. An answer with the same content is not.
    ///
    /// Cancel-safe: a request that is dropped is made again, and pauses are kept.
    pub async fn next(&mut self) -> Event<T> {
        loop {
            if let Some(not_before) = self.not_before {
                sleep_until(not_before).await;
            }
            self.not_before = None;
            self.asked_at = Instant::now();
            let answered = self.client.get::<T>(&self.next_request()).await;
            if let Some(event) = self.take(answered, Instant::now(), fastrand::f64()) {
                return event;
            }
        }
    }

    /// Asks once, without waiting for a change; `None` if there is nothing new to say. For those who read in turns of
    /// their own, and bound how often.
    pub async fn read(&mut self) -> Option<Event<T>> {
        self.position = Position::Unknown;
        let answered = self.client.get::<T>(&self.next_request()).await;
        self.take(answered, Instant::now(), fastrand::f64())
    }

    #[cfg(test)]
    pub(super) fn set_position(&mut self, position: Position) {
        self.position = position;
    }

    fn next_request(&self) -> Request {
        let request = self.request.clone();
        let wait = self.position.wait(self.settings.wait);
        let request = match &self.position {
            Position::Unknown => request,
            Position::Unconfirmed(index) | Position::Index(index) => {
                request.waiting(wait).with("index", index.to_string())
            }
            Position::Hash(hash) => request.waiting(wait).with("hash", hash),
        };
        if self.settings.stale && !self.from_leader {
            request.with("stale", "")
        } else {
            request
        }
    }

    /// Everything but the waiting.
    fn take(
        &mut self,
        answered: Result<Answer<T>, ConsulError>,
        now: Instant,
        random: f64,
    ) -> Option<Event<T>> {
        let answer = match answered {
            Ok(answer) if self.settings.from_agent => Answer {
                known_leader: None,
                last_contact: None,
                ..answer
            },
            Ok(answer) => answer,
            Err(error) => {
                self.failed(chain(&error).to_string(), now, random);
                return Some(Event::Failed(error));
            }
        };
        let before = self.last.as_ref().map(|last| Before {
            was_empty: last.body.is_empty(),
            was_filtered: last.filtered_by_acls,
        });
        let waited = self.position != Position::Unknown;
        match judge(before, &answer, waited, self.settings.stale_max) {
            // A server that was restarted answers with what it has read again so far, and knows its leader already.
            Verdict::Take if self.is_behind(&answer) => {
                self.position = Position::Unknown;
                self.from_leader = true;
                return None;
            }
            Verdict::Take => {}
            Verdict::AskAgain => {
                self.position = Position::Unknown;
                return None;
            }
            Verdict::Keep(doubt) => {
                self.failed(doubt.to_string(), now, random);
                self.from_leader = true;
                return Some(Event::Doubtful(doubt));
            }
        }
        self.from_leader = false;
        self.index = answer.index.or(self.index);
        let hash = answer.content_hash.as_deref();
        let next = self.position.after_answer(answer.index, hash);
        let wait = self.position.wait(self.settings.wait);
        let is_early = now.saturating_duration_since(self.asked_at) < wait;
        self.position = if waited && is_early && next.is_same_state(&self.position) {
            // Consul has thrown away the state that it waited on, and answered with it: it restored a snapshot. What is
            // there now may have a lower index, so the next request does not wait.
            Position::Unknown
        } else {
            next
        };
        let pause = if answer.index.is_none() && hash.is_none() {
            self.pace.after_answer(now, random);
            self.settings.poll.mul_f64(0.75 + random / 2.0)
        } else {
            self.pace.after_answer(now, random)
        };
        self.not_before = Some(now + pause);
        {
            let mut status = self.status.lock();
            status.good_at = Some(now);
            status.problem = None;
        }
        let is_same = self.last.as_ref().is_some_and(|last| {
            *last.body == answer.body
                && last.filtered_by_acls == answer.filtered_by_acls
                && last.default_acl_policy == answer.default_acl_policy
        });
        if is_same {
            return None;
        }
        let answer = answer.map(Arc::new);
        self.last = Some(answer.clone());
        Some(Event::Changed(answer))
    }

    /// Whether `answer` is of a time before the last one that was believed, and it may be so only for the server that
    /// answered.
    fn is_behind(&self, answer: &Answer<T>) -> bool {
        let is_older = self
            .index
            .zip(answer.index)
            .is_some_and(|(known, now)| now < known);
        is_older && self.settings.stale && !self.from_leader
    }

    fn failed(&mut self, problem: String, now: Instant, random: f64) {
        self.position = Position::after_failure();
        self.not_before = Some(now + self.pace.after_failure(random));
        self.status.lock().problem = Some(problem);
    }
}
