//! The tasks that ask, one per blocking query.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Asking, Ended, Runner};
use crate::{
    catalog::{
        consul::{
            Message,
            chain::{ChainAnswer, ChainRequest, Plan, Query},
            entries::Resolvers,
            policy,
            services::Endpoints,
        },
        model::{NodeName, ServiceName},
    },
    consul::{
        Client, ConsulError, Event, Request, Watch, WatchSettings,
        answers::{List, ServiceNames},
        judge::{Content, Doubt},
        position::{Pace, PaceLimits},
        watch::WatchStatus,
    },
    telemetry::log::chain,
};

/// Of the names under which a service's instances were seen, how many are asked about once all have vanished.
const NAMES_ASKED_ABOUT: usize = 3;

/// Consul answers with the names of all services at any change of any instance: in a datacenter that never rests, that
/// is read twice a second.
const NAMES_PACE: PaceLimits = PaceLimits {
    burst: 5,
    interval: Duration::from_millis(500),
    pause_min: Duration::from_millis(100),
    pause_max: Duration::from_secs(30),
};

impl Runner {
    /// Everything but instances and chains.
    pub(super) fn ask_for_the_rest(&mut self) {
        let rarely = WatchSettings {
            pace: NAMES_PACE,
            ..self.settings.watch
        };
        let names = ["v1", "catalog", "services"];
        self.ask_for::<ServiceNames>(&names, rarely, Message::Names, None);
        let defaults = ["v1", "config", "service-defaults"];
        self.ask_for(
            &defaults,
            self.settings.watch,
            Message::Defaults,
            Some(Arc::default),
        );
        let global = ["v1", "config", "proxy-defaults"];
        self.ask_for(
            &global,
            self.settings.watch,
            Message::Global,
            Some(Arc::default),
        );
        let resolvers = ["v1", "config", "service-resolver"];
        let watch = Watch::new(
            self.client.clone(),
            Request::to(&resolvers),
            self.settings.watch,
        );
        self.fixed.push(watch.status());
        let made_sure = Arc::new(Mutex::new(WatchStatus {
            path: "/v1/config/service-resolver/:name".to_owned(),
            good_at: None,
            problem: None,
        }));
        self.fixed.push(Arc::clone(&made_sure));
        let client = self.client.clone();
        let following = follow_resolvers(client, watch, made_sure, self.into.clone());
        self.tasks.spawn(async move {
            following.await;
            Ended::Other
        });
        let request = Request::to(&["v1", "connect", "intentions"]);
        let watch = Watch::new(self.client.clone(), request, self.settings.watch);
        self.fixed.push(watch.status());
        let settled = Arc::new(Mutex::new(WatchStatus {
            path: "/v1/connect/intentions/match".to_owned(),
            good_at: None,
            problem: None,
        }));
        self.fixed.push(Arc::clone(&settled));
        let following = policy::follow(self.client.clone(), watch, settled, self.into.clone());
        let following = Box::pin(following);
        self.tasks.spawn(async move {
            following.await;
            Ended::Other
        });
    }

    /// `otherwise` is what holds while the token may not see it, and nothing was seen before.
    fn ask_for<T: DeserializeOwned + PartialEq + Content + Send + Sync + 'static>(
        &mut self,
        path: &[&str],
        settings: WatchSettings,
        message: fn(Arc<T>) -> Message,
        otherwise: Option<fn() -> Arc<T>>,
    ) {
        let watch = Watch::new(self.client.clone(), Request::to(path), settings);
        self.fixed.push(watch.status());
        let following = follow(watch, self.into.clone(), message, otherwise);
        self.tasks.spawn(async move {
            following.await;
            Ended::Other
        });
    }

    /// Asks for the compiled chains of these services, one after the other.
    pub(super) fn ask_for_chains(&mut self, services: Vec<ServiceName>) {
        if services.is_empty() {
            return;
        }
        let asking = chains(self.client.clone(), services.into(), self.into.clone());
        let task = self.tasks.spawn(async move {
            asking.await;
            Ended::Other
        });
        self.chains = Some(task);
    }

    /// Makes sure that nobody is there any more where `before` was, and not only out of the token's sight.
    pub(super) fn make_sure(
        &mut self,
        query: Query,
        before: Arc<Endpoints>,
        nobody: Arc<Endpoints>,
    ) {
        let (client, into) = (self.client.clone(), self.into.clone());
        let asked = query.clone();
        let task = self.tasks.spawn(async move {
            let mut pace = Pace::new(PaceLimits::default(), Instant::now());
            while !sees(&client, &asked, &before).await.unwrap_or(false) {
                sleep(pace.after_failure(fastrand::f64())).await;
            }
            // Nobody takes it while the source ends.
            let _ended = into.send(Message::Gone(asked, nobody)).await;
            Ended::Other
        });
        self.gone.insert(query, task);
    }

    pub(super) fn new_watch(&self, query: &Query) -> Box<Watch<Endpoints>> {
        let mut request = Request::to(&["v1", "health", "connect", query.service.as_str()]);
        if let Some(datacenter) = &query.datacenter {
            request = request.with("dc", &**datacenter);
        }
        if !query.filter.is_empty() {
            request = request.with("filter", &*query.filter);
        }
        let watch = Watch::new(self.client.clone(), request, self.settings.watch);
        Box::new(watch)
    }

    /// Asks again and again.
    pub(super) fn watch(&mut self, query: Query, watch: Box<Watch<Endpoints>>) {
        let stop = CancellationToken::new();
        let asking = Asking::Watching {
            stop: stop.clone(),
            status: watch.status(),
        };
        let following = follow_endpoints(query.clone(), watch, stop, self.into.clone());
        let task = self.tasks.spawn(following);
        self.queries_of_tasks.insert(task.id(), query.clone());
        self.asking.insert(query, asking);
    }

    /// Asks once.
    pub(super) fn read(&mut self, query: Query) {
        let Some(Asking::Idle(mut watch)) = self.asking.remove(&query) else {
            return;
        };
        let (asked, into) = (query.clone(), self.into.clone());
        let task = self.tasks.spawn(async move {
            if let Some(event) = watch.read().await {
                // Nobody takes it while the source ends.
                let _ended = into.send(Message::Endpoints(asked, event)).await;
            }
            Ended::Endpoints(watch)
        });
        self.queries_of_tasks.insert(task.id(), query.clone());
        self.asking.insert(query, Asking::Reading);
    }
}

async fn follow<T: DeserializeOwned + PartialEq + Content>(
    mut watch: Watch<T>,
    into: mpsc::Sender<Message>,
    message: fn(Arc<T>) -> Message,
    otherwise: Option<fn() -> Arc<T>>,
) {
    loop {
        let cannot_be_seen = match watch.next().await {
            Event::Changed(answer) => {
                if into.send(message(answer.body)).await.is_err() {
                    return;
                }
                continue;
            }
            Event::Doubtful(doubt) => doubt == Doubt::LostRights,
            Event::Failed(error) => error.is_refused(),
        };
        if let Some(otherwise) = otherwise
            && cannot_be_seen
            && watch.last().is_none()
            && into.send(message(otherwise())).await.is_err()
        {
            return;
        }
    }
}

/// Makes sure, before the resolver of a service is dropped, that it is gone and not only out of the token's sight.
async fn follow_resolvers(
    client: Client,
    mut watch: Watch<Resolvers>,
    status: Arc<Mutex<WatchStatus>>,
    into: mpsc::Sender<Message>,
) {
    let mut before = Arc::<Resolvers>::default();
    let mut now: Option<Arc<Resolvers>> = None;
    let mut pace = Pace::new(PaceLimits::default(), Instant::now());
    let mut again_at = Instant::now();
    loop {
        tokio::select! {
            event = watch.next() => match event {
                Event::Changed(answer) => now = Some(answer.body),
                // As with the other entries.
                Event::Doubtful(Doubt::LostRights) if watch.last().is_none() => now = Some(Arc::default()),
                Event::Failed(error) if error.is_refused() && watch.last().is_none() => now = Some(Arc::default()),
                Event::Doubtful(_) | Event::Failed(_) => continue,
            },
            () = sleep_until(again_at), if now.is_some() => {}
        }
        let Some(new) = now.take() else { continue };
        let checked = are_gone(&client, before.vanished(&new)).await;
        {
            let mut status = status.lock();
            if checked.is_ok() {
                status.good_at = Some(Instant::now());
            }
            status.problem = checked.as_ref().err().cloned();
        }
        if checked.is_err() {
            again_at = Instant::now() + pace.after_failure(fastrand::f64());
            now = Some(new);
            continue;
        }
        pace.after_answer(Instant::now(), 0.0);
        before = Arc::clone(&new);
        if into.send(Message::Resolvers(new)).await.is_err() {
            return;
        }
    }
}

async fn are_gone(
    client: &Client,
    services: impl Iterator<Item = &ServiceName>,
) -> Result<(), String> {
    for service in services.take(NAMES_ASKED_ABOUT) {
        let request = Request::to(&["v1", "config", "service-resolver", service.as_str()]);
        match client.get::<IgnoredAny>(&request).await {
            Err(error) if error.is_not_found() => {}
            Err(error) if error.is_refused() => return Err(Doubt::LostRights.to_string()),
            Err(error) => return Err(chain(&error).to_string()),
            Ok(_) => {
                return Err(format!(
                    "service-resolver {service} is there and not listed"
                ));
            }
        }
    }
    Ok(())
}

async fn follow_endpoints(
    query: Query,
    mut watch: Box<Watch<Endpoints>>,
    stop: CancellationToken,
    into: mpsc::Sender<Message>,
) -> Ended {
    loop {
        let event = tokio::select! {
            biased;
            () = stop.cancelled() => return Ended::Endpoints(watch),
            event = watch.next() => event,
        };
        let message = Message::Endpoints(query.clone(), event);
        if into.send(message).await.is_err() {
            return Ended::Endpoints(watch);
        }
    }
}

/// Whether the token may see what was registered as `before`: an answer is filtered by the rights on nodes and on the
/// names of proxies as well, without a sign in versions before 1.11.
///
/// A name that may not be seen is answered as if nothing had been looked up, even if it is nobody's; and some node
/// there is always.
pub(in crate::catalog::consul) async fn sees(
    client: &Client,
    query: &Query,
    before: &Endpoints,
) -> Result<bool, ConsulError> {
    let to = |segments: &[&str]| match &query.datacenter {
        Some(datacenter) => Request::to(segments).with("dc", &**datacenter),
        None => Request::to(segments),
    };
    let names: BTreeSet<&str> = before.list.iter().map(|e| &*e.registered_as).collect();
    for name in names.into_iter().take(NAMES_ASKED_ABOUT) {
        let request = to(&["v1", "health", "connect", name]);
        let answer = client.get::<IgnoredAny>(&request).await?;
        if answer.known_leader != Some(true) || answer.filtered_by_acls {
            return Ok(false);
        }
    }
    let nodes = before.list.iter().map(|endpoint| &endpoint.instance.node);
    let nodes: BTreeSet<&NodeName> = nodes.collect();
    let wanted: Vec<String> = nodes
        .into_iter()
        .take(NAMES_ASKED_ABOUT)
        .map(|node| format!("Node == {}", serde_json::Value::from(node.as_str())))
        .collect();
    let request = to(&["v1", "catalog", "nodes"]);
    let some = request.clone().with("filter", wanted.join(" or "));
    // They may have left; then others are there to be seen.
    for request in [some, request] {
        if !client
            .get::<List<Anything>>(&request)
            .await?
            .body
            .is_empty()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An element that is not looked at.
#[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
struct Anything {}

/// What fails is asked for again after the others.
async fn chains(client: Client, mut services: VecDeque<ServiceName>, into: mpsc::Sender<Message>) {
    let mut pace = Pace::new(PaceLimits::default(), Instant::now());
    while let Some(service) = services.pop_front() {
        let request = Request::to(&["v1", "discovery-chain", service.as_str()]);
        let answered = client
            .post::<ChainAnswer>(&request, &ChainRequest::TCP)
            .await;
        let plan = match answered {
            Ok(answer) => Plan::of_chain(&service, &answer.body).unwrap_or_else(|problem| {
                let mut plan = Plan::plain(&service);
                plan.problems.push(problem);
                plan
            }),
            Err(error) => {
                tracing::debug!(%service, error = %chain(&error), "no discovery chain");
                services.push_back(service);
                sleep(pace.after_failure(fastrand::f64())).await;
                continue;
            }
        };
        if into.send(Message::Chain(service, plan)).await.is_err() {
            return;
        }
    }
}
