//! Following the directory: inotify says that something moved, a scan says what there is.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep_until, timeout_at},
};

use super::{FileSource, Loaded, scan};
use crate::{
    lifecycle::{Shutdown, aside},
    telemetry::log::chain,
};

/// A change is settled when nothing moved for this long.
const SETTLED: Duration = Duration::from_millis(200);

/// Under constant change, what there is counts after this long.
const LATEST: Duration = Duration::from_secs(2);

/// Some file systems send no events; and a watch may have been lost.
const RESCAN: Duration = Duration::from_secs(30);

impl FileSource {
    /// Publishes what the directory says after each settled change, if it says something else, until all has drained.
    ///
    /// `last` is what was published before.
    pub async fn watch(mut self, mut last: Loaded, shutdown: Shutdown, publish: impl Fn(&Loaded)) {
        let mut watcher = Watcher::start();
        loop {
            if let Some(watcher) = &watcher {
                watcher.cover(self.directory());
            }
            // Read after the watches stand, so that no change falls between.
            aside(|| {
                let loaded = self.load();
                if loaded != last {
                    publish(&loaded);
                    last = loaded;
                }
            });
            let changed = async {
                match &mut watcher {
                    Some(watcher) => watcher.settled_change().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Shutdown first, so that constant change does not hold it up.
                biased;
                () = shutdown.stopped() => return,
                () = changed => {}
                () = tokio::time::sleep(RESCAN) => {}
            }
        }
    }
}

struct Watcher {
    inotify: AsyncFd<OwnedFd>,
}

impl Watcher {
    /// `None` if the kernel gives no inotify instance; then the slow rescan has to do.
    fn start() -> Option<Self> {
        let started = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .and_then(watch_descriptor);
        match started {
            Ok(inotify) => Some(Self { inotify }),
            Err(error) => {
                let every = RESCAN.as_secs();
                tracing::warn!(error = %chain(&error), "no inotify: changes of the catalog are seen every {every} s");
                None
            }
        }
    }

    /// Watches the directory, everything below, and what is above, in case it is replaced as a whole.
    /// Watching again what is watched does nothing.
    fn cover(&self, root: &Path) {
        let entries =
            WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        let everything = entries
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MODIFY
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ATTRIB;
        let below = scan::directories(root);
        let watched = below
            .iter()
            .map(|directory| (directory.as_path(), everything));
        for (directory, flags) in watched.chain(root.parent().map(|parent| (parent, entries))) {
            match inotify::add_watch(&self.inotify, directory, flags) {
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    tracing::warn!(directory = %directory.display(), %errno, "directory not watched");
                }
            }
        }
    }

    async fn settled_change(&mut self) {
        self.event().await;
        let latest = Instant::now() + LATEST;
        loop {
            let quiet_at = (Instant::now() + SETTLED).min(latest);
            if timeout_at(quiet_at, self.event()).await.is_err() {
                return;
            }
            if Instant::now() >= latest {
                sleep_until(latest).await;
                return;
            }
        }
    }

    /// Waits for an event and takes all there are. What they say does not matter.
    async fn event(&mut self) {
        let mut buffer = [0_u8; 4096];
        loop {
            let Ok(mut ready) = self.inotify.readable().await else {
                return std::future::pending().await;
            };
            let mut seen = false;
            loop {
                match rustix::io::read(ready.get_inner(), &mut buffer) {
                    Ok(0) | Err(Errno::AGAIN) => break,
                    Ok(_) => seen = true,
                    Err(Errno::INTR) => {}
                    Err(_) => return std::future::pending().await,
                }
            }
            ready.clear_ready();
            if seen {
                return;
            }
        }
    }
}

/// The newer `AsyncFd::register` is unsafe for types whose descriptor may change; this one's cannot.
#[expect(deprecated, reason = "sound for an OwnedFd, and needs no unsafe block")]
fn watch_descriptor(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}
