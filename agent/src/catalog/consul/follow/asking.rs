//! The tasks that ask, one per blocking query.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{Asking, Ended, Runner};
use crate::{
    catalog::{
        consul::{
            Message,
            chain::{ChainAnswer, ChainRequest, Plan, Query},
            policy,
            services::Endpoints,
        },
        model::ServiceName,
    },
    consul::{
        Client, Event, Request, Watch,
        answers::ServiceNames,
        judge::{Content, Doubt},
        position::{Pace, PaceLimits},
        watch::WatchStatus,
    },
};

impl Runner {
    /// Everything but instances and chains.
    pub(super) fn ask_for_the_rest(&mut self) {
        self.ask_for::<ServiceNames>(&["v1", "catalog", "services"], Message::Names, None);
        let defaults = ["v1", "config", "service-defaults"];
        self.ask_for(&defaults, Message::Defaults, Some(Arc::default));
        let global = ["v1", "config", "proxy-defaults"];
        self.ask_for(&global, Message::Global, Some(Arc::default));
        let resolvers = ["v1", "config", "service-resolver"];
        self.ask_for(&resolvers, Message::Resolvers, Some(Arc::default));
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
        message: fn(Arc<T>) -> Message,
        otherwise: Option<fn() -> Arc<T>>,
    ) {
        let watch = Watch::new(self.client.clone(), Request::to(path), self.settings.watch);
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
                tracing::debug!(%service, error = %crate::telemetry::log::chain(&error), "no discovery chain");
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
