//! The one task that owns what is known: it takes what the asking tasks bring, decides what is asked next, and
//! publishes.

mod asking;

pub(super) use self::asking::sees;

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    ConsulSource, ConsulStatus, Message, Named, Shared, SourceSettings, Wanted, chain::Query,
    services::Endpoints, state::State,
};
use crate::{
    catalog::model::{ServiceName, Snapshot},
    consul::{
        Client, Event, Watch,
        judge::{Content as _, Doubt},
        position::{Pace, PaceLimits},
        watch::WatchStatus,
    },
    lifecycle::Shutdown,
    telemetry::log::chain,
};

/// Between two publications. The first change after a rest is published at once.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);
/// Of the time, at most a third is spent on publishing.
const PUBLISH_SHARE: u32 = 2;
/// Between two choices of what is asked for.
const CHOOSE_EVERY: Duration = Duration::from_millis(50);
/// A service that became callable, or ceased to be, changes the choice. That is in no hurry.
const RANK_EVERY: Duration = Duration::from_secs(1);
/// Services read at a time, of those without a blocking query.
const READERS: usize = 8;
/// The same, with those that a connection waits for.
const READERS_MAX: usize = 24;
/// Between two looks at how the queries fare.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Problems told to operators.
const PROBLEMS_MAX: usize = 20;

/// What is asked about the instances of one query.
enum Asking {
    /// Nothing just now.
    Idle(Box<Watch<Endpoints>>),
    /// Once.
    Reading,
    /// Again and again.
    Watching {
        stop: CancellationToken,
        status: Arc<Mutex<WatchStatus>>,
    },
}

/// What a task leaves when it ends.
enum Ended {
    Endpoints(Box<Watch<Endpoints>>),
    Other,
}

pub(super) struct Runner {
    client: Client,
    settings: SourceSettings,
    local: watch::Receiver<Option<BTreeSet<ServiceName>>>,
    wanted: mpsc::Receiver<Wanted>,
    named: mpsc::Receiver<Named>,
    shared: Arc<Shared>,
    state: State,
    /// In the order of their rank.
    queries: Vec<Query>,
    all: HashSet<Query>,
    /// Those of them that are to have a blocking query.
    to_watch: HashSet<Query>,
    asking: HashMap<Query, Asking>,
    tasks: JoinSet<Ended>,
    queries_of_tasks: HashMap<Id, Query>,
    into: mpsc::Sender<Message>,
    messages: mpsc::Receiver<Message>,
    fixed: Vec<Arc<Mutex<WatchStatus>>>,
    chains: Option<AbortHandle>,
    /// Read as soon as possible: not read yet, or changed by all signs.
    due: VecDeque<Query>,
    /// Whose turn it is to be read again.
    turn: usize,
    /// The same among those that are refused as last read, every second time.
    turn_of_refused: usize,
    is_turn_of_refused: bool,
    turn_at: Instant,
    /// After a failed read.
    read_not_before: Instant,
    read_pace: Pace,
    read_problem: Option<String>,
    /// Services whose instances all vanished, as it seems, while that is made sure of.
    gone: HashMap<Query, AbortHandle>,
    waiting: Vec<(Query, oneshot::Sender<()>)>,
    /// Names that are being resolved, until what is known of their services is published.
    resolving: Vec<Named>,
    choose_at: Option<Instant>,
    chosen_at: Instant,
    publish_at: Option<Instant>,
    publish_not_before: Instant,
    published: Option<Snapshot>,
    was_behind: bool,
}

impl Runner {
    pub(super) fn new(source: ConsulSource) -> Self {
        let ConsulSource {
            client,
            settings,
            local,
            wanted,
            named,
            shared,
        } = source;
        let now = Instant::now();
        let (into, messages) = mpsc::channel(64);
        let state = State::new(
            settings.node.clone(),
            settings.domain.clone(),
            settings.everything,
        );
        Self {
            client,
            settings,
            local,
            wanted,
            named,
            shared,
            state,
            queries: Vec::new(),
            all: HashSet::new(),
            to_watch: HashSet::new(),
            asking: HashMap::new(),
            tasks: JoinSet::new(),
            queries_of_tasks: HashMap::new(),
            into,
            messages,
            fixed: Vec::new(),
            chains: None,
            due: VecDeque::new(),
            turn: 0,
            turn_of_refused: 0,
            is_turn_of_refused: false,
            turn_at: now,
            read_not_before: now,
            read_pace: Pace::new(PaceLimits::default(), now),
            read_problem: None,
            gone: HashMap::new(),
            waiting: Vec::new(),
            resolving: Vec::new(),
            choose_at: None,
            chosen_at: now - CHOOSE_EVERY,
            publish_at: None,
            publish_not_before: now,
            published: None,
            was_behind: false,
        }
    }

    pub(super) async fn run(mut self, shutdown: Shutdown, publish: impl Fn(Snapshot)) {
        self.ask_for_the_rest();
        self.local.mark_changed();
        let mut report = tokio::time::interval(REPORT_EVERY);
        loop {
            let read_at = self.start_reads();
            tokio::select! {
                // Shutdown first, then what is due, so that constant change does not hold it up.
                biased;
                () = shutdown.stopped() => return,
                () = at(self.choose_at) => self.choose(),
                () = at(self.publish_at) => self.publish(&publish),
                Some(ended) = self.tasks.join_next_with_id() => {
                    self.ended(ended);
                    self.publish_for_the_waiting(&publish);
                }
                Some(message) = self.messages.recv() => self.take(message),
                Some(wanted) = self.wanted.recv() => self.want(wanted),
                Some(named) = self.named.recv() => self.resolve(named),
                Ok(()) = self.local.changed() => {
                    self.state.local.clone_from(&self.local.borrow_and_update());
                    self.choose_soon();
                }
                () = at(read_at) => {}
                _ = report.tick() => self.report(),
            }
        }
    }

    /// Takes what a task brought.
    fn take(&mut self, message: Message) {
        match message {
            Message::Names(names) => {
                let names = names.0.keys().filter_map(|name| name.parse().ok());
                let names = names.collect();
                self.read_what_new_names_concern(&names);
                self.state.names = Some(names);
                self.choose_soon();
            }
            Message::Policy(policy) => {
                self.state.policy = Some(policy);
                self.choose_soon();
            }
            Message::Resolvers(resolvers) => {
                self.state.resolvers = Some(resolvers.names());
                self.state.rebuild();
                // Any of them may lead to any other: all chains are asked for again.
                if let Some(chains) = self.chains.take() {
                    chains.abort();
                }
                self.choose_soon();
                self.ask_for_chains(self.state.with_resolver());
            }
            Message::Defaults(defaults) => {
                self.state.defaults = Some(defaults);
                self.state.rebuild();
            }
            Message::Global(global) => {
                self.state.global = Some(global);
                self.state.rebuild();
            }
            Message::Chain(name, plan) => {
                if self.state.plan(name, plan) {
                    self.choose_soon();
                }
            }
            Message::Endpoints(query, event) => {
                self.take_endpoints(query, event);
                return;
            }
            Message::Gone(query, nobody) => {
                if self.gone.remove(&query).is_some() && self.all.contains(&query) {
                    self.know(query, nobody);
                }
                return;
            }
        }
        self.publish_soon();
    }

    fn take_endpoints(&mut self, query: Query, event: Event<Endpoints>) {
        match event {
            Event::Changed(answer) if self.all.contains(&query) => {
                self.read_pace.after_answer(Instant::now(), 0.0);
                self.read_problem = None;
                // What was to be made sure of is no longer so.
                if let Some(asking) = self.gone.remove(&query) {
                    asking.abort();
                }
                match self.state.endpoints.get(&query) {
                    Some(before) if answer.body.is_empty() && !before.is_empty() => {
                        let before = Arc::clone(before);
                        self.make_sure(query, before, answer.body);
                    }
                    Some(_) | None => self.know(query, answer.body),
                }
            }
            Event::Changed(_) => {}
            Event::Doubtful(doubt) => self.read_failed(&query, doubt.to_string()),
            Event::Failed(error) => self.read_failed(&query, chain(&error).to_string()),
        }
    }

    fn know(&mut self, query: Query, known: Arc<Endpoints>) {
        let is_empty = known.is_empty();
        if query.is_plain() {
            let has_nobody = known.list.is_empty();
            let mut outside = self.shared.outside.lock();
            if has_nobody {
                outside.insert(query.service.clone());
            } else {
                outside.remove(&query.service);
            }
        }
        let before = self.state.know(query, known);
        if before.is_none_or(|before| before.is_empty() != is_empty) {
            self.choose_by(Instant::now() + RANK_EVERY);
        }
        self.publish_soon();
    }

    /// A blocking query paces itself; what is read in turns is not read on while reads fail.
    fn read_failed(&mut self, query: &Query, problem: String) {
        if matches!(self.asking.get(query), Some(Asking::Watching { .. })) {
            return;
        }
        let pause = self.read_pace.after_failure(fastrand::f64());
        self.read_not_before = Instant::now() + pause;
        self.read_problem = Some(problem);
        if !self.state.endpoints.contains_key(query) {
            self.due.push_back(query.clone());
        }
    }

    /// A service becomes callable when its proxy is registered, under a name that mostly begins with its own.
    fn read_what_new_names_concern(&mut self, names: &BTreeSet<ServiceName>) {
        let Some(before) = &self.state.names else {
            return;
        };
        for new in names.difference(before) {
            let begins_it = |query: &&Query| {
                let known = query.service.as_str();
                new.as_str().starts_with(known) && new.as_str() != known
            };
            let concerned = self.queries.iter().filter(begins_it).cloned();
            self.due.extend(concerned);
        }
    }

    fn choose_soon(&mut self) {
        self.state.is_outdated = true;
        self.choose_by(Instant::now());
    }

    fn choose_by(&mut self, time: Instant) {
        let time = time.max(self.chosen_at + CHOOSE_EVERY);
        self.choose_at = Some(self.choose_at.map_or(time, |before| before.min(time)));
    }

    fn choose(&mut self) {
        self.choose_at = None;
        self.chosen_at = Instant::now();
        self.state.choose();
        let without_plan = self.state.with_resolver();
        let without_plan: Vec<_> = without_plan
            .into_iter()
            .filter(|name| !self.state.plans.contains_key(name))
            .collect();
        let is_asking = self.chains.as_ref().is_some_and(|c| !c.is_finished());
        if !without_plan.is_empty() && !is_asking {
            self.ask_for_chains(without_plan);
        }
        self.assign();
        self.publish_soon();
    }

    /// Gives the blocking queries to those that come first.
    fn assign(&mut self) {
        let now = Instant::now();
        for (service, used) in self.shared.watched.load().iter() {
            if used.swap(false, Ordering::Relaxed) {
                self.state.wanted.insert(service.clone(), now);
            }
        }
        self.queries = self.state.queries();
        self.state.retain(&self.queries);
        let is_chosen = |service: &ServiceName| self.state.is_chosen(service);
        self.shared.outside.lock().retain(is_chosen);
        self.all = self.queries.iter().cloned().collect();
        self.gone.retain(|query, asking| {
            let is_known = self.all.contains(query);
            if !is_known {
                asking.abort();
            }
            is_known
        });
        self.to_watch = self
            .queries
            .iter()
            .take(self.settings.max_watches)
            .cloned()
            .collect();
        self.asking.retain(|query, asking| match asking {
            Asking::Idle(_) => self.all.contains(query),
            Asking::Reading => true,
            Asking::Watching { stop, .. } => {
                if !self.to_watch.contains(query) {
                    stop.cancel();
                }
                // Until it has ended.
                true
            }
        });
        for query in self.queries.clone() {
            match self.asking.get(&query) {
                Some(Asking::Idle(_)) if self.to_watch.contains(&query) => {
                    if let Some(Asking::Idle(watch)) = self.asking.remove(&query) {
                        self.watch(query, watch);
                    }
                }
                Some(_) => {}
                None => {
                    let watch = self.new_watch(&query);
                    self.settle(query, watch);
                }
            }
        }
        self.share_watched();
    }

    /// Tells connections which services need no fresh read: those all of whose queries are watched.
    fn share_watched(&self) {
        let of_queries = self.to_watch.iter().map(|query| &query.service);
        let services: BTreeSet<&ServiceName> = of_queries.chain(self.state.plans.keys()).collect();
        let watched = services.into_iter().filter(|service| {
            self.queries_of(service)
                .all(|query| self.to_watch.contains(&query))
        });
        let watched: HashMap<ServiceName, AtomicBool> = watched
            .map(|service| (service.clone(), AtomicBool::new(false)))
            .collect();
        self.shared.watched.store(Arc::new(watched));
    }

    fn queries_of(&self, service: &ServiceName) -> impl Iterator<Item = Query> {
        let planned = self.state.plans.get(service).map(|plan| {
            let targets = plan.targets.iter();
            targets.map(|target| target.query.clone()).collect()
        });
        planned
            .unwrap_or_else(|| vec![Query::of(service)])
            .into_iter()
    }

    /// Puts a watch that nobody uses where it belongs.
    fn settle(&mut self, query: Query, watch: Box<Watch<Endpoints>>) {
        if self.to_watch.contains(&query) {
            self.watch(query, watch);
            return;
        }
        if !self.state.endpoints.contains_key(&query) {
            self.due.push_back(query.clone());
        }
        self.asking.insert(query, Asking::Idle(watch));
    }

    /// A connection is being made.
    fn want(&mut self, wanted: Wanted) {
        let Wanted { service, fresh } = wanted;
        self.state.wanted.insert(service.clone(), Instant::now());
        let queries: Vec<Query> = self.queries_of(&service).collect();
        let mut waits_for = None;
        for query in queries {
            if matches!(self.asking.get(&query), Some(Asking::Idle(_)))
                && self.queries_of_tasks.len() < self.to_watch.len() + READERS_MAX
            {
                self.read(query.clone());
            }
            if matches!(self.asking.get(&query), Some(Asking::Reading)) {
                waits_for = Some(query);
            }
        }
        // Without anything to wait for, `fresh` is dropped, which ends the wait.
        if let Some(query) = waits_for {
            self.waiting.push((query, fresh));
            self.choose_by(Instant::now());
        }
    }

    /// A name is being resolved.
    fn resolve(&mut self, mut named: Named) {
        let Some(service) = self.state.spelled(named.service) else {
            return;
        };
        if self.state.name(&service, Instant::now()) {
            self.choose_soon();
        }
        named.service = service;
        self.resolving.push(named);
        self.publish_soon();
    }

    /// Answers those who resolve names of what is published now.
    fn tell_what_is_known(&mut self) {
        for named in std::mem::take(&mut self.resolving) {
            match self.state.endpoints.get(&Query::of(&named.service)) {
                Some(known) => {
                    let _nobody_waits_any_more = named.known.send(!known.list.is_empty());
                }
                None if named.known.is_closed() => {}
                None => self.resolving.push(named),
            }
        }
    }

    /// Starts the reads that may be started; says when the next may be, if time is all that it lacks.
    fn start_reads(&mut self) -> Option<Instant> {
        let now = Instant::now();
        loop {
            let reading = self.reading();
            if reading >= READERS {
                return None;
            }
            if self.read_not_before > now {
                return Some(self.read_not_before);
            }
            if let Some(query) = self.due.pop_front() {
                if matches!(self.asking.get(&query), Some(Asking::Idle(_))) {
                    self.read(query);
                }
                continue;
            }
            if self.to_watch.len() == self.queries.len() {
                return None;
            }
            if self.turn_at > now {
                return Some(self.turn_at);
            }
            let per_second = self.settings.reads_per_second.max(1);
            self.turn_at = now + Duration::from_secs(1) / per_second;
            if let Some(query) = self.next_in_turn() {
                self.read(query);
            }
        }
    }

    fn reading(&self) -> usize {
        let asking = self.queries_of_tasks.values().map(|q| self.asking.get(q));
        asking
            .filter(|asking| matches!(asking, Some(Asking::Reading)))
            .count()
    }

    /// Every second time one that the kernel refuses by what was last read, if there is any: nobody's call makes it
    /// read at once.
    fn next_in_turn(&mut self) -> Option<Query> {
        self.is_turn_of_refused = !self.is_turn_of_refused;
        if self.is_turn_of_refused {
            let refused = self.next_idle(self.turn_of_refused, |known| {
                known.is_some_and(Endpoints::is_refused)
            });
            if let Some((turn, query)) = refused {
                self.turn_of_refused = turn;
                return Some(query);
            }
        }
        let (turn, query) = self.next_idle(self.turn, |_known| true)?;
        self.turn = turn;
        Some(query)
    }

    /// The first after `turn` that may be read and was, last time, as `is_meant` says; with its place.
    fn next_idle(
        &self,
        turn: usize,
        is_meant: impl Fn(Option<&Endpoints>) -> bool,
    ) -> Option<(usize, Query)> {
        let places = (1..=self.queries.len()).map(|step| (turn + step) % self.queries.len());
        let mut queries = places.filter_map(|place| Some((place, self.queries.get(place)?)));
        let found = queries.find(|(_, query)| {
            matches!(self.asking.get(query), Some(Asking::Idle(_)))
                && is_meant(self.state.endpoints.get(query).map(AsRef::as_ref))
        });
        found.map(|(place, query)| (place, query.clone()))
    }

    /// A task has ended: its watch is free again.
    fn ended(&mut self, ended: Result<(Id, Ended), JoinError>) {
        // What it brought is taken before it counts as ended.
        while let Ok(message) = self.messages.try_recv() {
            self.take(message);
        }
        let (query, watch) = match ended {
            Ok((id, Ended::Endpoints(watch))) => (self.queries_of_tasks.remove(&id), Some(watch)),
            Ok((id, Ended::Other)) => (self.queries_of_tasks.remove(&id), None),
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(%error, "a query of Consul's catalog panicked");
                }
                (self.queries_of_tasks.remove(&error.id()), None)
            }
        };
        let Some(query) = query else { return };
        if !self.all.contains(&query) {
            self.asking.remove(&query);
            return;
        }
        let watch = watch.unwrap_or_else(|| self.new_watch(&query));
        self.settle(query, watch);
    }

    /// Publishes at once if a connection waits for what was read, and lets it go on.
    fn publish_for_the_waiting(&mut self, publish: &impl Fn(Snapshot)) {
        let is_read = |asking: &HashMap<Query, Asking>, query: &Query| {
            !matches!(asking.get(query), Some(Asking::Reading))
        };
        if !self
            .waiting
            .iter()
            .any(|(query, _)| is_read(&self.asking, query))
        {
            return;
        }
        if self.publish_at.is_some() {
            self.publish(publish);
        }
        for (query, fresh) in std::mem::take(&mut self.waiting) {
            if is_read(&self.asking, &query) {
                let _nobody_waits_any_more = fresh.send(());
            } else {
                self.waiting.push((query, fresh));
            }
        }
    }

    fn publish_soon(&mut self) {
        // Without intentions, what is published would be decided by a default that may not be Consul's.
        if self.state.policy.is_some() {
            let soon = Instant::now().max(self.publish_not_before);
            self.publish_at.get_or_insert(soon);
        }
    }

    fn publish(&mut self, publish: &impl Fn(Snapshot)) {
        self.publish_at = None;
        let began = Instant::now();
        let snapshot = self.state.snapshot(&self.queries);
        if self.published.as_ref() != Some(&snapshot) {
            publish(snapshot.clone());
            self.published = Some(snapshot);
        }
        self.tell_what_is_known();
        let ended = Instant::now();
        self.publish_not_before = ended + PUBLISH_EVERY.max((ended - began) * PUBLISH_SHARE);
    }

    /// How all queries fare.
    fn report(&mut self) {
        let mut watches: Vec<WatchStatus> = self
            .fixed
            .iter()
            .map(|status| status.lock().clone())
            .collect();
        let of_services = self.asking.values().filter_map(|asking| match asking {
            Asking::Watching { status, .. } => Some(status.lock().clone()),
            Asking::Idle(_) | Asking::Reading => None,
        });
        watches.extend(of_services.filter(|status| status.problem.is_some()));
        for query in self.gone.keys() {
            watches.push(WatchStatus {
                path: format!("/v1/health/connect/{}", query.service),
                good_at: None,
                problem: Some(Doubt::LostRights.to_string()),
            });
        }
        let problem = watches.iter().find_map(|status| status.problem.clone());
        let is_behind = problem.is_some() || self.read_problem.is_some();
        if is_behind != self.was_behind {
            let problem = problem.or_else(|| self.read_problem.clone());
            if let Some(problem) = problem {
                tracing::warn!(problem, "Consul not followed: what was known of it stays");
            } else {
                tracing::info!("Consul followed again");
            }
        }
        self.was_behind = is_behind;
        let unread = self
            .queries
            .iter()
            .filter(|query| !self.state.endpoints.contains_key(query));
        let status = ConsulStatus {
            watches,
            watched: self.to_watch.len(),
            in_turns: self.queries.len() - self.to_watch.len(),
            unread: unread.count(),
            problems: self
                .state
                .problems()
                .into_iter()
                .take(PROBLEMS_MAX)
                .collect(),
            problem: self.read_problem.clone(),
        };
        *self.shared.status.lock() = status;
    }
}

/// Never, if there is no time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
