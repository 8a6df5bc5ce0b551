//! Debian as it is installed, in an initramfs, with the packages that are tried.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    apt::{KEYRING, mirror},
    kernels::archive::Archive,
    progress::Step,
};

/// What the system has beside what every Debian has.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,procps,curl,busybox";

/// What it can do without: half of it.
const LEFT_OUT: [&str; 3] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
];

/// Does what is to be tried, as a service.
const GUEST: &str = include_str!("guest.sh");

/// The first program. The kernel unpacks into a file system that cannot be exchanged for another one, as systemd
/// does for services that see only a part of it: this makes one that can.
const INIT: &str = "#!/bin/sh
set -e
mount -t tmpfs -o mode=755,size=80% none /mnt
cp -a /bin /etc /home /lib* /opt /root /sbin /srv /usr /var /proof /mnt/
mkdir /mnt/dev /mnt/proc /mnt/sys /mnt/run /mnt/tmp /mnt/mnt
mount -t devtmpfs none /dev
exec switch_root /mnt /sbin/init
";

const UNIT: &str = "[Service]
Type=exec
ExecStart=/bin/sh /proof/guest.sh
StandardOutput=file:/dev/ttyS1
StandardError=journal+console
";

const SERVED: &str = "[Service]
ExecStart=/bin/busybox httpd -f -p 127.0.0.1:8080 -h /proof/www
";

/// Takes its time, to be under way while the agent is replaced.
const SLOW: &str = "#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
for second in $(seq 25); do
    echo $second
    sleep 1
done
";

/// The initramfs of a machine with Debian `suite`, which is kept in `directory`.
///
/// # Errors
/// If Debian cannot be fetched or packed.
pub(super) fn pack(
    suite: &str,
    directory: &Path,
    update: bool,
    packages: &[PathBuf],
) -> Result<Vec<u8>> {
    let root = directory.join("root");
    // Written last: a half-made one is made again.
    let made_of = directory.join("packages");
    let is_made = fs::read_to_string(&made_of).is_ok_and(|text| text == PACKAGES);
    if update || !is_made || !root.exists() {
        let step = Step::begin(format!("installing Debian {suite} below target/"));
        install(suite, &root, &step)?;
        fs::write(&made_of, PACKAGES).with_context(|| format!("writing {}", made_of.display()))?;
        step.done();
    }
    let mut archive = Archive::default();
    archive.console()?;
    archive.tree(&root)?;
    archive.program("/init", INIT.as_bytes())?;
    archive.file("/proof/guest.sh", GUEST.as_bytes())?;
    archive.file("/proof/www/index.html", b"served\n")?;
    archive.program("/proof/www/cgi-bin/slow", SLOW.as_bytes())?;
    for (unit, text) in [("proof.service", UNIT), ("web.service", SERVED)] {
        archive.file(&format!("/etc/systemd/system/{unit}"), text.as_bytes())?;
        let wanted = format!("/etc/systemd/system/multi-user.target.wants/{unit}");
        archive.link(&wanted, &format!("../{unit}"))?;
    }
    for (index, package) in packages.iter().enumerate() {
        archive.copy(package, &format!("/proof/{}.deb", index + 1))?;
    }
    archive.finish()
}

fn install(suite: &str, root: &Path, step: &Step) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root).with_context(|| format!("removing {}", root.display()))?;
    }
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--include", PACKAGES]);
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    if Path::new(KEYRING).exists() {
        command.args(["--keyring", KEYRING]);
    }
    command.arg(suite).arg(root).arg(mirror(step)?);
    step.run(&mut command).map(drop)
}
