//! Scratch network namespaces and the veth pairs between them.
//!
//! They are entered with `setns` of the network namespace alone: `ip netns exec` remounts `/sys`,
//! and cgroup2 and bpffs are then out of sight.

use std::{
    fs::{self, File},
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, unshare_unsafe,
};

use crate::{program::Program, scratch::Scratch, wait::SOON};

/// A network namespace, kept by a mount in the run's directory. Cheap to clone; goes with the run.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    path: PathBuf,
    handle: File,
}

impl Namespace {
    /// Makes a namespace with nothing but a working loopback. It has no route to anywhere.
    ///
    /// # Errors
    /// Without permission, or if `ip` is missing.
    pub fn create(scratch: &Scratch, name: &str) -> Result<Self> {
        Self::create_in(scratch.directory(), name)
    }

    /// As [`Self::create`], by the directory of the run.
    pub(crate) fn create_in(run: &Path, name: &str) -> Result<Self> {
        let directory = run.join("netns");
        fs::create_dir_all(&directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let path = directory.join(name);
        File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        let mount_point = path.clone();
        in_new_thread(move || {
            unshare_network().context("making a network namespace")?;
            let own = format!("/proc/self/task/{}/ns/net", gettid().as_raw_nonzero());
            rustix::mount::mount_bind(&own, &mount_point)
                .with_context(|| format!("mounting it at {}", mount_point.display()))
        })?;
        let handle = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let namespace = Self(Arc::new(Inner {
            name: name.to_owned(),
            path,
            handle,
        }));
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name within the run.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// For `setns`.
    pub fn handle(&self) -> BorrowedFd<'_> {
        self.0.handle.as_fd()
    }

    /// Runs `work` in a fresh thread inside: sockets that it makes belong to the namespace.
    ///
    /// # Errors
    /// If it cannot be entered, and those of `work`.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let namespace = self.clone();
        in_new_thread(move || {
            namespace.enter()?;
            work()
        })
    }

    /// Moves the calling thread in, for good.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.handle(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("entering the network namespace {}", self.name()))
    }

    /// Runs `ip` inside with the words of `arguments`.
    ///
    /// # Errors
    /// If it fails.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        Program::new("ip")
            .args(arguments.split_whitespace())
            .in_namespace(self)
            .run(SOON)
            .map(|_output| ())
    }

    /// Joins this namespace with `other`: a veth pair named `device` here and `other_device` there.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn join(&self, device: &str, other: &Self, other_device: &str) -> Result<()> {
        self.ip(&format!(
            "link add {device} type veth peer name {other_device} netns {}",
            other.path().display()
        ))?;
        self.ip(&format!("link set {device} up"))?;
        other.ip(&format!("link set {other_device} up"))
    }

    /// Sets `net.ipv4.KEY` in the namespace.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_ipv4(&self, key: &str, value: &str) -> Result<()> {
        let (file, value) = (format!("/proc/sys/net/ipv4/{key}"), value.to_owned());
        // The file means the namespace of the thread that writes.
        self.run(move || fs::write(&file, value).with_context(|| format!("writing {file}")))
    }

    /// Gives `device` an address and a route to that address's network and to nothing else.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn add_address(&self, device: &str, address: IpAddr) -> Result<()> {
        // Without duplicate address detection, which would keep IPv6 unusable for a second.
        self.ip(&match address {
            IpAddr::V4(address) => format!("address add {address}/24 dev {device}"),
            IpAddr::V6(address) => format!("address add {address}/64 dev {device} nodad"),
        })
    }
}

#[expect(
    unsafe_code,
    reason = "unshare is unsafe in rustix, which cannot know the flags"
)]
fn unshare_network() -> rustix::io::Result<()> {
    // SAFETY: of all flags only FILES can harm (another thread's descriptors would be gone); this is NEWNET.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
}

fn in_new_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    thread::spawn(work)
        .join()
        .map_err(|_panic| anyhow!("a thread in a network namespace panicked"))?
}
