//! The virtual machine, and what it reports.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use bpf_tests::{cgroup::Cgroup, program::Program};

use crate::kernels::{debian::Kernel, machine::processor};

/// Whatever happens, a machine is switched off after this.
const DEADLINE: Duration = Duration::from_secs(900);

/// Of what the machine says on its console, so many last lines are shown if it ends badly.
const TAIL: usize = 40;

const QEMU: &str = "qemu-system-x86_64";

/// Services that take long to start in emulation get more time than by default.
const KERNEL: &str = "console=ttyS0 loglevel=4 panic=-1 mitigations=off random.trust_cpu=on \
                      systemd.default_timeout_start_sec=300 systemd.show_status=0";

/// Boots the system until it switches itself off. Returns the lines of its report. QEMU runs in `cgroup`, whose
/// owner sees to it that nothing is left there.
///
/// # Errors
/// If the machine does not come to its end; with the end of what it said.
pub(super) fn boot(
    kernel: &Kernel,
    archive: &[u8],
    directory: &Path,
    cgroup: &Cgroup,
) -> Result<Vec<String>> {
    let file = |name: &str| directory.join(name);
    let (packed, console, report) = (file("initramfs"), file("console"), file("report"));
    fs::write(&packed, archive).with_context(|| format!("writing {}", packed.display()))?;
    for old in [&console, &report] {
        fs::write(old, "").with_context(|| format!("writing {}", old.display()))?;
    }
    let mut machine = Program::new(QEMU)
        .in_cgroup(cgroup)
        .args(["-accel", "tcg,tb-size=512"])
        .args(["-cpu", processor(&kernel.release)])
        .args(["-smp", "1", "-m", "3000"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-no-reboot")
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-serial")
        .arg(format!("file:{}", report.display()))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&packed)
        .args(["-append", KERNEL])
        .log(&console)
        .spawn()?;
    // Killed when dropped, however this ends.
    let ended = machine.wait(DEADLINE)?;
    drop(machine);
    // Made anew each time, and large.
    fs::remove_file(&packed).with_context(|| format!("removing {}", packed.display()))?;
    let lines = |path: &Path| -> Vec<String> {
        let bytes = fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        text.lines()
            .map(|line| line.trim_end().to_owned())
            .collect()
    };
    let mut said = lines(&report);
    if said.pop().is_none_or(|last| last != "done") {
        let why = match ended {
            None => format!("the machine was not done after {DEADLINE:?}"),
            Some(status) => format!("the machine ended too early ({status})"),
        };
        let console = lines(&console);
        let tail = console.get(console.len().saturating_sub(TAIL)..);
        bail!(
            "{why}; its report:\n{}\nits console:\n{}",
            said.join("\n"),
            tail.unwrap_or_default().join("\n")
        );
    }
    Ok(said)
}
