//! The threads that carry connections, each with a runtime of its own.
//!
//! A connection stays on one of them from accept to end, with its sockets, its timers and its tasks, so that nothing
//! of it is woken on another thread or waits for a lock. What is no connection (catalog, Consul, names, operators) has
//! the runtime that the agent started with, and holds up no bytes.

use std::{
    cell::Cell,
    future::Future as _,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Context,
    thread::{self, JoinHandle},
};

use tokio::runtime::{Builder, Handle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// By how many connections a worker must be ahead of another before that one gets the next: to hand it over wakes a
/// thread, and one that comes as another ends is best off where that one was.
const AHEAD: usize = 2;

/// How many tasks a worker polls before it looks which sockets are ready, and what other threads have for it. tokio's own
/// are 61 and 31: tasks that wake each other and do not give way would hold up small questions for as many polls.
/// Measured: docs/decisions/0026.
const POLLS_BETWEEN_LOOKS: u32 = 8;

thread_local! {
    static HERE: Cell<Option<WorkerId>> = const { Cell::new(None) };
}

/// One of the agent's workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerId(usize);

impl WorkerId {
    /// The worker that the caller runs on, if it is one.
    pub fn here() -> Option<Self> {
        HERE.get()
    }
}

/// Where connections are carried. Without any (in tests), on the caller's runtime.
#[derive(Debug, Clone, Default)]
pub struct Workers {
    all: Arc<[Worker]>,
    turn: Arc<AtomicUsize>,
    beside: Option<Handle>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    /// Connections that are carried there.
    carried: TaskTracker,
}

/// The threads of [`Workers`], which end when this is dropped.
#[derive(Debug)]
pub struct WorkerThreads {
    stopped: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

/// For a task that could go on and has had its turn: has it polled again once its worker has looked which sockets are
/// ready. Woken at once, it would be polled many times before.
pub fn give_way(cx: &mut Context<'_>) {
    let again = pin!(tokio::task::yield_now());
    // Pending: it has taken the waker.
    let _given = again.poll(cx);
}

impl Workers {
    /// Starts `count` of them, beside the runtime of what is no connection.
    ///
    /// # Errors
    /// If a thread or its epoll instance cannot be had.
    pub fn start(count: usize, beside: Handle) -> io::Result<(Self, WorkerThreads)> {
        let mut started = WorkerThreads {
            stopped: CancellationToken::new(),
            threads: Vec::new(),
        };
        let mut all = Vec::new();
        for index in 0..count {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .event_interval(POLLS_BETWEEN_LOOKS)
                .global_queue_interval(POLLS_BETWEEN_LOOKS)
                .thread_name(format!("worker-{index}-aside"))
                .build()?;
            all.push(Worker {
                runtime: runtime.handle().clone(),
                carried: TaskTracker::new(),
            });
            let stopped = started.stopped.clone();
            let thread = thread::Builder::new().name(format!("worker-{index}"));
            started.threads.push(thread.spawn(move || {
                HERE.set(Some(WorkerId(index)));
                runtime.block_on(stopped.cancelled());
                // What is left is what shutdown did not wait for.
                runtime.shutdown_background();
            })?);
        }
        let workers = Self {
            all: all.into(),
            turn: Arc::default(),
            beside: Some(beside),
        };
        Ok((workers, started))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Where to run what is no connection, also if one began it.
    pub fn beside(&self) -> Handle {
        self.beside.clone().unwrap_or_else(Handle::current)
    }

    /// One after the other: for listeners, and for what carries many connections.
    pub fn in_turn(&self) -> Handle {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let worker = self.all.get(turn % self.all.len().max(1));
        worker.map_or_else(Handle::current, |worker| worker.runtime.clone())
    }

    /// Where the next connection is carried, and counted: here, unless another worker has fewer.
    pub fn least_busy(&self) -> (Handle, TaskTracker) {
        let carried = self.all.iter().map(|worker| worker.carried.len());
        let chosen = least_busy(carried, WorkerId::here());
        let Some(worker) = chosen.and_then(|WorkerId(index)| self.all.get(index)) else {
            return (Handle::current(), TaskTracker::new());
        };
        (worker.runtime.clone(), worker.carried.clone())
    }
}

/// The worker that carries the least; `here`, if none carries [`AHEAD`] less.
fn least_busy(carried: impl Iterator<Item = usize>, here: Option<WorkerId>) -> Option<WorkerId> {
    let cost = |(index, carried): (usize, usize)| {
        let is_here = here == Some(WorkerId(index));
        (carried + if is_here { 0 } else { AHEAD }, !is_here, index)
    };
    let (_carried, _is_elsewhere, index) = carried.enumerate().map(cost).min()?;
    Some(WorkerId(index))
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.stopped.cancel();
        for thread in self.threads.drain(..) {
            // Its panic was logged as it happened.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        future::poll_fn,
        sync::mpsc,
        task::{Poll, Wake},
        time::Duration,
    };

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixStream,
        runtime::Runtime,
    };

    use super::*;

    #[test]
    fn a_connection_is_carried_where_it_came_in_unless_others_have_far_less() {
        let table: [(&[usize], Option<usize>, usize); 7] = [
            (&[0, 0], Some(1), 1),
            (&[0, 2], Some(1), 1),
            (&[0, 3], Some(1), 0),
            (&[9, 4], Some(1), 1),
            (&[9, 4], Some(0), 1),
            (&[9, 4, 3], None, 2),
            (&[3], Some(0), 0),
        ];
        for (carried, here, expected) in table {
            let chosen = least_busy(carried.iter().copied(), here.map(WorkerId));
            assert_eq!(chosen, Some(WorkerId(expected)), "{carried:?} {here:?}");
        }
        assert_eq!(least_busy(std::iter::empty(), None), None);
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether `poll` asks to be polled again, but not before the runtime has looked which sockets are ready.
    pub(crate) async fn gives_way(poll: impl FnOnce(&mut Context<'_>)) -> bool {
        let wakes = Arc::<Wakes>::default();
        poll(&mut Context::from_waker(&Arc::clone(&wakes).into()));
        let before = wakes.0.load(Ordering::Relaxed);
        tokio::task::yield_now().await;
        before == 0 && wakes.0.load(Ordering::Relaxed) == 1
    }

    /// The runtime beside the workers.
    fn beside() -> Runtime {
        Builder::new_current_thread().build().unwrap()
    }

    #[test]
    fn there_are_as_many_as_asked_for_and_they_end() {
        let beside = beside();
        let (workers, threads) = Workers::start(3, beside.handle().clone()).unwrap();
        let (found, seen) = mpsc::channel();
        for _ in 0..6 {
            let found = found.clone();
            let note = async move { found.send(WorkerId::here()) };
            drop(workers.in_turn().spawn(note));
        }
        let mut seen: Vec<_> = (0..6)
            .map(|_| seen.recv_timeout(Duration::from_secs(20)).unwrap())
            .map(|worker| worker.unwrap().0)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 0, 1, 1, 2, 2]);
        drop(threads);
        let (kept, dropped) = mpsc::channel::<()>();
        drop(workers.in_turn().spawn(async move {
            std::future::pending::<()>().await;
            drop(kept);
        }));
        let ended = dropped.recv_timeout(Duration::from_secs(20));
        assert_eq!(ended, Err(mpsc::RecvTimeoutError::Disconnected));
    }

    const BUSY: usize = 4;

    /// A worker with [`BUSY`] tasks that always could go on and end their turns so, and how many they have had.
    fn busy_worker(end_turn: fn(&mut Context<'_>)) -> (Handle, Arc<AtomicUsize>, impl Drop) {
        let beside = beside();
        let (workers, threads) = Workers::start(1, beside.handle().clone()).unwrap();
        let worker = workers.in_turn();
        let turns = Arc::new(AtomicUsize::new(0));
        for _ in 0..BUSY {
            let turns = Arc::clone(&turns);
            drop(worker.spawn(poll_fn(move |cx| {
                turns.fetch_add(1, Ordering::Relaxed);
                end_turn(cx);
                Poll::<()>::Pending
            })));
        }
        (worker, turns, threads)
    }

    /// How many turns they have, at most, while another task waits for a socket that is ready.
    fn turns_before_a_ready_socket(end_turn: fn(&mut Context<'_>)) -> usize {
        const TRIES: usize = 50;
        let (worker, turns, _threads) = busy_worker(end_turn);
        let (told, longest) = mpsc::channel();
        drop(worker.spawn(async move {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let mut longest = 0;
            for _ in 0..TRIES {
                there.write_all(&[1]).await.unwrap();
                let before = turns.load(Ordering::Relaxed);
                // With room for more, so that the next read waits.
                assert_eq!(here.read(&mut [0; 2]).await.unwrap(), 1);
                longest = longest.max(turns.load(Ordering::Relaxed) - before);
            }
            told.send(longest).unwrap();
        }));
        longest.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn who_gives_way_has_one_turn_before_others_whose_sockets_are_ready() {
        let turns = turns_before_a_ready_socket(give_way);
        assert!(turns <= BUSY, "{turns} turns of {BUSY} tasks");
    }

    #[test]
    fn who_does_not_give_way_holds_up_others_for_some_turns_only() {
        let turns = turns_before_a_ready_socket(|cx| cx.waker().wake_by_ref());
        assert!(turns <= 16, "{turns} turns of {BUSY} tasks");
    }

    #[test]
    fn a_connection_handed_over_waits_for_some_turns_only() {
        let (worker, turns, _threads) = busy_worker(|cx| cx.waker().wake_by_ref());
        let (told, waited) = mpsc::channel();
        let inner = worker.clone();
        drop(worker.spawn(async move {
            // Handed over while this worker stands still, so that turns are counted from a known one on.
            let before = turns.load(Ordering::Relaxed);
            let handed_over = async move { told.send(turns.load(Ordering::Relaxed) - before) };
            let other = thread::spawn(move || drop(inner.spawn(handed_over)));
            other.join().unwrap();
        }));
        let waited = waited.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(waited <= 16, "{waited} turns of {BUSY} tasks");
    }

    #[test]
    fn connections_are_spread_for_as_long_as_they_are_carried() {
        let beside = beside();
        let (workers, _threads) = Workers::start(2, beside.handle().clone()).unwrap();
        let carried = || workers.all.iter().map(|worker| worker.carried.len());
        let place = || {
            workers
                .least_busy()
                .1
                .track_future(std::future::pending::<()>())
        };
        let mut places: Vec<_> = (0..8).map(|_| place()).collect();
        assert!(carried().all(|here| here >= 3), "{workers:?}");
        places.clear();
        assert_eq!(carried().sum::<usize>(), 0);
    }

    #[tokio::test]
    async fn without_workers_connections_are_carried_on_the_runtime_of_the_caller() {
        let workers = Workers::default();
        let (next, (least, _)) = (workers.in_turn(), workers.least_busy());
        let beside = workers.beside();
        assert_eq!(next.spawn(async { WorkerId::here() }).await.unwrap(), None);
        assert_eq!(least.spawn(async { WorkerId::here() }).await.unwrap(), None);
        assert_eq!(
            beside.spawn(async { WorkerId::here() }).await.unwrap(),
            None
        );
    }
}
