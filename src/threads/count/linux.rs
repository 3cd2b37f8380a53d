//! The number of usable cores on Linux, from the affinity mask, the CPU quotas of cgroups and the topology of cores.
//!
//! All functions take the root of the file system, so that tests can build one. A file that cannot be read or parsed sets
//! no limit.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use crate::system::cgroup::Version;

/// The first CPU number that is considered invalid. No Linux kernel is built for as many CPUs.
const MAX_CPU: usize = 1 << 16;

/// The number of physical cores that the process may run on, at most its quota and at least 1. `None` if the affinity mask
/// cannot be read.
pub(super) fn usable_cores(root: &Path) -> Option<usize> {
    let status = read_to_string(root.join("proc/self/status")).ok()?;
    let cpus = allowed_cpus(&status)?;
    let cores = physical_cores(root, &cpus);
    Some(cores.min(quota(root).unwrap_or(usize::MAX)).max(1))
}

/// The CPUs that `/proc/self/status` allows.
pub(in crate::threads) fn allowed_cpus(status: &str) -> Option<BTreeSet<usize>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cpu_list(list).filter(|cpus| !cpus.is_empty())
}

/// The kernel's format for sets of CPUs, for example `0-3,8,10-11`.
pub(in crate::threads) fn cpu_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for item in text.trim().split(',').filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// The number of cores of the CPUs (hardware threads). A CPU whose siblings cannot be read counts as its own core.
fn physical_cores(root: &Path, cpus: &BTreeSet<usize>) -> usize {
    let core = |cpu: &usize| {
        let topology = root.join(format!("sys/devices/system/cpu/cpu{cpu}/topology"));
        // The first name exists since Linux 5.3.
        let siblings = ["core_cpus_list", "thread_siblings_list"]
            .into_iter()
            .find_map(|name| cpu_list(&read_to_string(topology.join(name)).ok()?));
        siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(*cpu)
    };
    cpus.iter().map(core).collect::<BTreeSet<_>>().len()
}

/// The smallest CPU quota of the process's cgroups and their ancestors, in whole CPUs, at least 1.
fn quota(root: &Path) -> Option<usize> {
    let quota_of = |folder: &PathBuf, version| {
        let read = |name| read_to_string(folder.join(name)).ok();
        match version {
            Version::V1 => whole_cpus(&read("cpu.cfs_quota_us")?, &read("cpu.cfs_period_us")?),
            Version::V2 => read("cpu.max")?.split_once(' ').and_then(|(max, period)| whole_cpus(max, period)),
        }
    };
    let of =
        |version: Version| version.folders(root, "cpu").iter().filter_map(|folder| quota_of(folder, version)).min();
    Version::ALL.into_iter().filter_map(of).min()
}

/// A quota in CPUs, rounded down, at least 1. `None` if the quota says that there is no limit.
fn whole_cpus(quota: &str, period: &str) -> Option<usize> {
    let quota: usize = quota.trim().parse().ok()?; // "max" or "-1" when there is none
    let period: usize = period.trim().parse().ok()?;
    Some(quota.checked_div(period)?.max(1))
}

#[cfg(test)]
mod tests;
