//! The agent's tasks: every one is named, counted and ends at shutdown.
//!
//! [`Shutdown`] is handed down from [`crate::node`]. Nothing else in the agent spawns.

use std::{fmt::Display, future::Future, time::Duration};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::{JoinHandle, block_in_place},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::workers::Workers;

/// Three steps: `draining` says "take nothing new", `forced` says "end now" to what is left of it, and `stopped`
/// ends what went on beside the draining: following the catalog, and, unless another agent has taken over before,
/// serving operators (`released`).
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    draining: CancellationToken,
    forced: CancellationToken,
    released: CancellationToken,
    stopped: CancellationToken,
    tasks: TaskTracker,
    services: TaskTracker,
    workers: Workers,
}

impl Shutdown {
    /// Connections are carried by `workers`.
    pub fn with(workers: Workers) -> Self {
        Self {
            workers,
            ..Self::default()
        }
    }

    /// The threads that carry connections.
    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Starts `task` under `span_name`; shutdown waits for it. A panic ends the task alone and is logged.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.spawn_on(&Handle::current(), name, task)
    }

    /// The same, on another runtime than the caller's.
    pub fn spawn_on<T: Send + 'static>(
        &self,
        runtime: &Handle,
        name: &'static str,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let span = tracing::debug_span!("task", name);
        runtime.spawn(self.tasks.track_future(task.instrument(span)))
    }

    /// The same, on one of the [workers](Self::workers). What has to be waited for there is made by the task.
    pub fn spawn_connection(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let (runtime, carried) = self.workers.least_busy();
        self.spawn_on(&runtime, name, carried.track_future(task));
    }

    /// Starts a task that goes on while others drain, at most until [`Self::stopped`]; draining does not wait for it.
    /// It runs beside the workers, also if a connection was the first to need it.
    pub fn spawn_service(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let span = tracing::debug_span!("service", name);
        let task = self.services.track_future(task.instrument(span));
        drop(self.workers.beside().spawn(task));
    }

    /// Ends what serves operators before all else, for an agent that another one has replaced: they ask that one.
    pub fn release_operators(&self) {
        self.released.cancel();
    }

    /// Resolves when operators are not served any more.
    pub async fn operators_released(&self) {
        self.released.cancelled().await;
    }

    /// Resolves when everything has drained.
    pub async fn stopped(&self) {
        self.stopped.cancelled().await;
    }

    /// Resolves when the agent stops taking new work.
    pub async fn draining(&self) {
        self.draining.cancelled().await;
    }

    /// Whether the agent has stopped taking new work.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Resolves when what is left must end at once.
    pub async fn forced(&self) {
        self.forced.cancelled().await;
    }

    /// Stops new work, waits up to `deadline` for the tasks, then forces them and waits for them to end.
    ///
    /// Returns how many tasks the deadline cut.
    pub async fn run(&self, reason: impl Display, deadline: Duration) -> usize {
        tracing::info!(%reason, deadline_ms = deadline.as_millis(), "draining started");
        self.draining.cancel();
        self.tasks.close();
        let mut left = 0;
        if tokio::time::timeout(deadline, self.tasks.wait())
            .await
            .is_err()
        {
            left = self.tasks.len();
            self.forced.cancel();
            self.tasks.wait().await;
        }
        self.released.cancel();
        self.stopped.cancel();
        self.services.close();
        self.services.wait().await;
        left
    }
}

/// Does what takes long without stopping others: else a worker that is busy may be the one that everybody's sockets
/// and timers are waited for on, and the whole runtime stands still.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    let runtime = Handle::try_current().map(|handle| handle.runtime_flavor());
    match runtime {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(work),
        // A worker, whose one thread is all it has, or a test.
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::WorkerId;

    #[tokio::test(start_paused = true)]
    async fn tasks_that_end_in_time_are_not_cut() {
        let shutdown = Shutdown::default();
        let inner = shutdown.clone();
        shutdown.spawn("short", async move { inner.draining().await });
        assert_eq!(shutdown.run("test", Duration::from_secs(5)).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_past_the_deadline_are_forced() {
        let shutdown = Shutdown::default();
        let inner = shutdown.clone();
        shutdown.spawn("long", async move { inner.forced().await });
        assert_eq!(shutdown.run("test", Duration::from_secs(5)).await, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_done_aside_keeps_no_task_waiting() {
        let shutdown = Shutdown::default();
        let (begun, other) = std::sync::mpsc::channel();
        let long = shutdown.spawn("long", async move { aside(|| other.recv()) });
        shutdown.spawn("other", async move { begun.send(()) });
        let both = tokio::time::timeout(Duration::from_secs(20), long);
        assert_eq!(both.await.unwrap().unwrap(), Ok(()));
    }

    #[test]
    fn what_a_connection_needs_served_runs_beside_the_workers() {
        let beside = tokio::runtime::Runtime::new().unwrap();
        let (workers, _threads) = Workers::start(1, beside.handle().clone()).unwrap();
        let worker = workers.in_turn();
        let shutdown = Shutdown::with(workers);
        let (found, place) = std::sync::mpsc::channel();
        drop(worker.spawn(async move {
            let note = async move { found.send(WorkerId::here()).unwrap_or_default() };
            shutdown.spawn_service("service", note);
        }));
        let place = place.recv_timeout(Duration::from_secs(20));
        assert_eq!(place, Ok(None));
    }

    #[tokio::test]
    async fn a_runtime_of_one_thread_does_it_all_the_same() {
        assert_eq!(aside(|| 1), 1);
    }
}
