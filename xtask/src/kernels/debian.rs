//! Debian's kernels: fetched with apt from the mirror that this machine uses, of any release, without
//! installing anything. Kept below `target/`: the next run takes what is there.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{apt::Apt, progress::Step};

/// Depends on the newest kernel of a release. The flavour for virtual machines: a third of the size.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Which packages a kernel is in; which of them depends on the release.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// Kernel modules that the tests need and no kernel of Debian has built in.
const MODULES: [&str; 1] = ["drivers/net/veth.ko"];

/// A kernel to be booted.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// Its full version.
    pub(crate) release: String,
    /// What the boot loader loads.
    pub(crate) image: PathBuf,
    /// To be loaded by the first program, in this order.
    pub(crate) modules: Vec<PathBuf>,
}

/// The kernel of the Debian release `suite`, kept in `directory`; the newest one if `update` asks for it or none
/// is kept.
///
/// # Errors
/// If there is no apt, the mirror does not have it, or it is not put together as it is known to be.
pub(crate) fn kernel(suite: &str, directory: &Path, update: bool) -> Result<Kernel> {
    let kept = directory.join("kernel");
    if update || !kept.exists() {
        let step = Step::begin(format!("fetching the kernel of Debian {suite}"));
        fetch(suite, directory, &kept, &step)?;
        step.done();
    }
    let release = kept.join("release");
    let release =
        fs::read_to_string(&release).with_context(|| format!("reading {}", release.display()))?;
    Ok(Kernel {
        release,
        image: kept.join("image"),
        modules: MODULES.map(|path| kept.join(file_name(path))).to_vec(),
    })
}

fn fetch(suite: &str, directory: &Path, kept: &Path, step: &Step) -> Result<()> {
    let work = directory.join("fetching");
    empty(&work)?;
    let apt = Apt::new(suite, &work, step)?;
    apt.run(step, "apt-get", &["update"]).with_context(|| {
        format!("this machine's mirror does not have Debian {suite}, or cannot be reached")
    })?;
    let packages = closure(&apt, step)?;
    for package in &packages {
        apt.run(step, "apt-get", &["download", package])?;
    }
    let root = work.join("root");
    for package in entries(&work)? {
        if package
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            step.run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
        }
    }
    let fresh = work.join("kernel");
    take(&root, &fresh, step).with_context(|| {
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        format!("looking into {}", packages.join(", "))
    })?;
    if kept.exists() {
        fs::remove_dir_all(kept).with_context(|| format!("removing {}", kept.display()))?;
    }
    fs::rename(&fresh, kept).with_context(|| format!("writing {}", kept.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
}

/// Takes the image and the modules out of the unpacked packages.
fn take(root: &Path, fresh: &Path, step: &Step) -> Result<()> {
    fs::create_dir_all(fresh).with_context(|| format!("creating {}", fresh.display()))?;
    let releases: Vec<PathBuf> = ["lib/modules", "usr/lib/modules"]
        .iter()
        .filter_map(|modules| entries(&root.join(modules)).ok())
        .flatten()
        .collect();
    let image = entries(&root.join("boot"))
        .unwrap_or_default()
        .into_iter()
        .find(|file| file_name(file).starts_with("vmlinuz-"))
        .or_else(|| {
            let in_release = |release: &PathBuf| release.join("vmlinuz");
            releases.iter().map(in_release).find(|file| file.exists())
        })
        .context("they have no kernel image")?;
    copy(&image, &fresh.join("image"))?;
    let release = releases.first().context("they have no modules")?;
    fs::write(fresh.join("release"), file_name(release)).context("writing the kernel's version")?;
    for module in MODULES {
        let plain = |release: &PathBuf| release.join("kernel").join(module);
        let found = releases.iter().map(plain).find_map(|plain| {
            let packed = ["", ".xz"].map(|suffix| plain.with_extension(format!("ko{suffix}")));
            packed.into_iter().find(|file| file.exists())
        });
        let found = found.with_context(|| format!("they have no module {module}"))?;
        let target = fresh.join(file_name(&found));
        copy(&found, &target)?;
        if target
            .extension()
            .is_some_and(|extension| extension == "xz")
        {
            step.run(Command::new("xz").arg("--decompress").arg(&target))?;
        }
    }
    Ok(())
}

/// The packages that the newest kernel is in.
fn closure(apt: &Apt, step: &Step) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut open = vec![NEWEST.to_owned()];
    while let Some(package) = open.pop() {
        let said = apt
            .run(step, "apt-cache", &["depends", &package])
            .with_context(|| format!("the mirror has no {package}"))?;
        let parts = said
            .iter()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .filter(|name| PARTS.iter().any(|part| name.starts_with(part)));
        open.extend(
            parts
                .filter(|name| !found.contains(*name))
                .map(str::to_owned),
        );
        found.insert(package);
    }
    // The first has nothing but the dependency.
    found.remove(NEWEST);
    if found.is_empty() {
        bail!("{NEWEST} depends on no kernel");
    }
    Ok(found)
}

fn empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = fs::copy(from, to).with_context(|| format!("copying {}", from.display()));
    copied.map(drop)
}

fn file_name(path: impl AsRef<Path>) -> String {
    let name = path.as_ref().file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
