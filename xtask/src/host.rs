//! The programs that this machine must have: found, installed with apt-get, or fetched for this project alone.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use bpf_tests::{programs, services};
use rustix::{
    fs::{FlockOperation, flock},
    process::geteuid,
};

use crate::{
    fetched,
    interrupt::{keep_when_interrupted, remove_when_interrupted},
    progress::Step,
};

/// Programs and the Debian packages that have them.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("iptables-nft-save", "iptables"),
    ("iptables-legacy-save", "iptables"),
    ("tcpdump", "tcpdump"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("psql", "postgresql-client"),
    ("initdb", "postgresql"),
    ("python3", "python3"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("lintian", "lintian"),
    ("gzip", "gzip"),
    ("mmdebstrap", "mmdebstrap"),
    ("dig", "bind9-dnsutils"),
    ("getent", "libc-bin"),
    ("dnsmasq", "dnsmasq-base"),
    ("dnsperf", "dnsperf"),
    ("strip", "binutils"),
    ("musl-gcc", "musl-tools"),
    ("java", "default-jre-headless"),
    ("javac", "default-jdk-headless"),
    ("xz", "xz-utils"),
    ("pip3", "python3-pip"),
    ("nft", "nftables"),
    ("haproxy", "haproxy"),
    ("wrk", "wrk"),
    ("openssl", "openssl"),
];

/// Asked by packages before they start a service.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Our answer to that question, and how we know it again.
const POLICY_TEXT: &str =
    "#!/bin/sh\n# sidestep xtask: packages for tests start no services\nexit 101\n";

/// One installation at a time on this machine.
const LOCK: &str = "/run/lock/sidestep-install.lock";

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    geteuid().is_root()
}

/// Whether a run must not leave anything out.
pub(crate) fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

/// The programs out of `wanted` that are not here.
pub(crate) fn missing(wanted: &[&'static str]) -> Vec<&'static str> {
    let absent = |name: &&&str| match **name {
        // Not in PATH on Debian.
        "initdb" => services::postgres_program("initdb").is_err(),
        name => programs::find(name).is_none(),
    };
    wanted.iter().filter(absent).copied().collect()
}

/// Sees to it that all of `wanted` are here.
///
/// # Errors
/// If one is missing and cannot be had: says which packages to install.
pub(crate) fn require(wanted: &[&'static str]) -> Result<()> {
    let (fetchable, wanted): (Vec<_>, Vec<_>) = wanted
        .iter()
        .partition(|name| fetched::can_be_fetched(name));
    install(&wanted)?;
    missing(&fetchable).into_iter().try_for_each(fetched::fetch)
}

fn install(wanted: &[&'static str]) -> Result<()> {
    if missing(wanted).is_empty() {
        return Ok(());
    }
    if !is_root() {
        bail!("not root, and missing: {}", advice(&missing(wanted)));
    }
    if programs::find("apt-get").is_none() {
        bail!(
            "no apt-get here; install with the means of this system: {}",
            advice(&missing(wanted))
        );
    }
    let step = Step::begin(format!(
        "installing {}",
        packages(&missing(wanted)).join(", ")
    ));
    let _lock = lock()?;
    // Another copy may have installed them in the meantime.
    let absent = missing(wanted);
    if !absent.is_empty() {
        let _quiet = ServicesStayOff::begin()?;
        let packages = packages(&absent);
        if apt_get(&step, "install", &packages).is_err() {
            apt_get(&step, "update", &[])?;
            apt_get(&step, "install", &packages)?;
        }
    }
    step.done();
    match missing(wanted).as_slice() {
        [] => Ok(()),
        absent => bail!("installed, but still missing: {}", advice(absent)),
    }
}

/// Which version of a package does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Any,
    /// The newest there is: lists of packages that are months old may offer one that is.
    Newest,
}

/// Installs Debian packages by name.
///
/// # Errors
/// If there is no apt-get, or it fails.
pub(crate) fn apt_install(packages: &[&str], wanted: Wanted) -> Result<()> {
    if programs::find("apt-get").is_none() {
        bail!(
            "no apt-get here; install with the means of this system: {}",
            packages.join(", ")
        );
    }
    let step = Step::begin(format!("installing {}", packages.join(", ")));
    let _lock = lock()?;
    let _quiet = ServicesStayOff::begin()?;
    // If they cannot be updated, what they name may do all the same.
    let updated = wanted == Wanted::Newest && apt_get(&step, "update", &[]).is_ok();
    if let Err(error) = apt_get(&step, "install", packages) {
        if updated {
            return Err(error);
        }
        apt_get(&step, "update", &[])?;
        apt_get(&step, "install", packages)?;
    }
    step.done();
    Ok(())
}

fn apt_get(step: &Step, action: &str, packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args([action, "--yes", "-o", "DPkg::Lock::Timeout=300"])
        .env("DEBIAN_FRONTEND", "noninteractive");
    if action == "install" {
        command.arg("--no-install-recommends").args(packages);
    }
    step.run(&mut command).map(|_said| ())
}

fn packages(programs: &[&str]) -> Vec<&'static str> {
    PACKAGES
        .iter()
        .filter(|(program, _package)| programs.contains(program))
        .map(|(_program, package)| *package)
        .collect()
}

fn advice(programs: &[&str]) -> String {
    format!(
        "{} (Debian: apt-get install --no-install-recommends {})",
        programs.join(", "),
        packages(programs).join(" ")
    )
}

fn lock() -> Result<File> {
    let directory = Path::new(LOCK).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let file = File::create(LOCK).with_context(|| format!("creating {LOCK}"))?;
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("locking {LOCK}"))?;
    Ok(file)
}

/// As long as this lives, packages that are installed do not start their services.
struct ServicesStayOff {
    ours: bool,
}

impl ServicesStayOff {
    fn begin() -> Result<Self> {
        let policy = Path::new(POLICY);
        // One of somebody else is a decision of theirs; one of ours was left by a power cut.
        let ours = fs::read_to_string(policy).map_or(true, |text| text == POLICY_TEXT);
        if ours {
            remove_when_interrupted(policy);
            fs::write(policy, POLICY_TEXT)
                .and_then(|()| fs::set_permissions(policy, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("writing {POLICY}"))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for ServicesStayOff {
    fn drop(&mut self) {
        if self.ours {
            // The next installation recognises it if this fails.
            let _removed = fs::remove_file(POLICY);
            keep_when_interrupted(Path::new(POLICY));
        }
    }
}
