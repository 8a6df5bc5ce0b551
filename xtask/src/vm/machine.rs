//! The virtual machine, and what it reports.

use std::{fs, path::Path, time::Duration};

use anyhow::{Result, bail};
use bpf_tests::cgroup::Cgroup;

use crate::kernels::{
    debian::Kernel,
    machine::{Ended, Machine},
};

/// Whatever happens, a machine is switched off after this.
const DEADLINE: Duration = Duration::from_secs(900);

/// Of what the machine says on its console, so many last lines are shown if it ends badly.
const TAIL: usize = 40;

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
    let machine = Machine {
        kernel,
        command_line: KERNEL,
        memory_mib: 3000,
        deadline: DEADLINE,
    };
    let Ended {
        status: ended,
        console,
        report,
    } = machine.run(archive, directory, cgroup)?;
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
