//! What the whole machine spends: processor time and memory of the kernel, which belong to no process.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

/// Processor time of the whole machine since its start, from `/proc/stat` (proc(5)), in steps of 10 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// In programs.
    pub user: Duration,
    /// In the kernel: system calls, interrupts, and what is done after interrupts (softirq).
    pub kernel: Duration,
}

impl Busy {
    /// Up to now.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        Self::read(&text).context("/proc/stat does not begin with the sum of all processors")
    }

    fn read(stat: &str) -> Option<Self> {
        let numbers: Vec<u64> = stat
            .lines()
            .next()?
            .strip_prefix("cpu ")?
            .split_whitespace()
            .map_while(|number| number.parse().ok())
            .collect();
        // Guest time, behind these, is in user time already; steal is nobody's here.
        let [user, nice, system, _idle, _iowait, irq, softirq, ..] = *numbers else {
            return None;
        };
        // USER_HZ is 100 on every architecture that Sidestep runs on.
        let time = |ticks: u64| Duration::from_millis(ticks * 10);
        Some(Self {
            user: time(user + nice),
            kernel: time(system + irq + softirq),
        })
    }

    /// What was spent since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            kernel: self.kernel.saturating_sub(before.kernel),
        }
    }

    /// Both together.
    pub fn all(self) -> Duration {
        self.user + self.kernel
    }
}

/// Memory of the kernel that eBPF maps and rules are made of, in bytes: slab, vmalloc and per-processor memory of the
/// whole machine, from `/proc/meminfo`. Differences below a megabyte say nothing.
///
/// # Errors
/// Without `/proc`.
pub fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    Ok(kibibytes(&text, &["Slab:", "VmallocUsed:", "Percpu:"]) * 1024)
}

/// The resident memory of the processes of a cgroup (not of those below), in bytes. What they share counts for each.
///
/// # Errors
/// If the cgroup is gone.
pub fn resident(cgroup: &Path) -> Result<u64> {
    let mut sum = 0;
    for process in processes(cgroup)? {
        // It may have ended since.
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        sum += kibibytes(&status, &["VmRSS:"]) * 1024;
    }
    Ok(sum)
}

/// The processes of a cgroup.
///
/// # Errors
/// If the cgroup is gone.
pub fn processes(cgroup: &Path) -> Result<Vec<u32>> {
    let file = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// The memory of all eBPF maps that a process holds, in bytes, as the kernel tells it (`memlock` of their fdinfo; since
/// Linux 6.4 that is what they use, before an upper bound).
///
/// # Errors
/// If the process has ended.
pub fn maps(process: u32) -> Result<u64> {
    let directory = format!("/proc/{process}/fdinfo");
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {directory}"))?;
    let mut maps = std::collections::BTreeMap::new();
    for entry in entries.flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let number = |key: &str| field(&text, key)?.parse::<u64>().ok();
        // A map may be held twice.
        if let (Some(id), Some(memory)) = (number("map_id:"), number("memlock:")) {
            maps.insert(id, memory);
        }
    }
    Ok(maps.values().sum())
}

fn kibibytes(text: &str, keys: &[&str]) -> u64 {
    let number = |key: &&str| field(text, key)?.parse::<u64>().ok();
    keys.iter().filter_map(number).sum()
}

/// The word behind `key` at the start of a line.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()
}

/// What the figures were measured on: pairs of name and value.
pub fn description() -> Vec<(&'static str, String)> {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let memory = kibibytes(&read("/proc/meminfo"), &["MemTotal:"]) / (1 << 20);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    vec![
        (
            "kernel",
            read("/proc/sys/kernel/osrelease").trim().to_owned(),
        ),
        (
            "processor",
            model.unwrap_or(std::env::consts::ARCH).to_owned(),
        ),
        ("cores", cores.to_string()),
        ("memory_gib", memory.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_kernel_are_told_apart() {
        let busy = Busy::read("cpu  100 20 300 4000 50 6 7 8 9 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(busy.user, Duration::from_millis(1_200));
        assert_eq!(busy.kernel, Duration::from_millis(3_130));
        assert_eq!(Busy::read("intr 1 2 3"), None);
    }

    #[test]
    fn this_machine_is_understood() {
        let busy = Busy::now().unwrap();
        assert!(busy.all() > Duration::ZERO);
        assert!(kernel_memory().unwrap() > 1 << 20);
        assert!(description().iter().all(|(_, value)| !value.is_empty()));
    }
}
