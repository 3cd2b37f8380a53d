//! Linux's three answers: the affinity mask, the cgroups' CPU quotas and the topology of cores.
//!
//! All functions take the root of the file system, so that tests can build one. Whatever cannot be read or understood
//! does not limit.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::{Component, Path, PathBuf};

/// Larger CPU numbers than any kernel is built for are taken for nonsense.
const MAX_CPU: usize = 1 << 16;

/// The number of physical cores that the process may run on, but no more than its quota; at least 1. `None` when the
/// affinity mask cannot be read.
pub(super) fn usable_cores(root: &Path) -> Option<usize> {
    let status = read_to_string(root.join("proc/self/status")).ok()?;
    let cpus = allowed_cpus(&status)?;
    let cores = physical_cores(root, &cpus);
    Some(cores.min(quota(root).unwrap_or(usize::MAX)).max(1))
}

/// The CPUs that `/proc/self/status` allows.
fn allowed_cpus(status: &str) -> Option<BTreeSet<usize>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cpu_list(list).filter(|cpus| !cpus.is_empty())
}

/// The kernel's format for sets of CPUs, for example `0-3,8,10-11`.
fn cpu_list(text: &str) -> Option<BTreeSet<usize>> {
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

/// How many cores the CPUs (hardware threads) are on. One whose siblings cannot be read is a core of its own.
fn physical_cores(root: &Path, cpus: &BTreeSet<usize>) -> usize {
    let core = |cpu: &usize| {
        let topology = root.join(format!("sys/devices/system/cpu/cpu{cpu}/topology"));
        // The first is the name since Linux 5.3.
        let siblings = ["core_cpus_list", "thread_siblings_list"]
            .into_iter()
            .find_map(|name| cpu_list(&read_to_string(topology.join(name)).ok()?));
        siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(*cpu)
    };
    cpus.iter().map(core).collect::<BTreeSet<_>>().len()
}

/// The smallest CPU quota of the process's cgroups and of those that they lie in, in whole CPUs, at least 1.
fn quota(root: &Path) -> Option<usize> {
    let cgroups = read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = read_to_string(root.join("proc/self/mountinfo")).ok()?;
    [Version::V1, Version::V2].into_iter().filter_map(|version| version.quota(root, &cgroups, &mounts)).min()
}

#[derive(Clone, Copy, PartialEq)]
enum Version {
    V1,
    V2,
}

impl Version {
    fn quota(self, root: &Path, cgroups: &str, mounts: &str) -> Option<usize> {
        let group = self.group(cgroups)?;
        let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).filter(|mount| self.is_in(mount)).collect();
        // Usually the group lies under what is mounted. A container without a cgroup namespace may see a foreign path:
        // then all that can be found are the limits at the mount itself.
        let mut directories: Vec<PathBuf> = mounts.iter().filter_map(|mount| mount.locate(&group)).collect();
        if directories.is_empty() {
            directories = mounts.iter().map(|mount| mount.point.clone()).collect();
        }
        let points = || mounts.iter().map(|mount| mount.point.as_path());
        let with_parents = directories.iter().flat_map(|directory| {
            directory.ancestors().take_while(|ancestor| points().any(|point| ancestor.starts_with(point)))
        });
        with_parents
            .filter_map(|directory| {
                let read = |name| read_to_string(root.join(directory.strip_prefix("/").ok()?).join(name)).ok();
                match self {
                    Version::V1 => whole_cpus(&read("cpu.cfs_quota_us")?, &read("cpu.cfs_period_us")?),
                    Version::V2 => read("cpu.max")?.split_once(' ').and_then(|(max, period)| whole_cpus(max, period)),
                }
            })
            .min()
    }

    /// The process's group, from `/proc/self/cgroup`: lines of `id:controllers:path`, without controllers in version 2.
    fn group(self, cgroups: &str) -> Option<PathBuf> {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let found = match self {
                Version::V1 => controllers.split(',').any(|controller| controller == "cpu"),
                Version::V2 => controllers.is_empty(),
            };
            found.then(|| PathBuf::from(path))
        })
    }

    fn is_in(self, mount: &Mount) -> bool {
        match self {
            Version::V1 => mount.kind == "cgroup" && mount.options.split(',').any(|option| option == "cpu"),
            Version::V2 => mount.kind == "cgroup2",
        }
    }
}

/// A quota in CPUs, rounded down, at least 1. `None` for the words that mean no limit.
fn whole_cpus(quota: &str, period: &str) -> Option<usize> {
    let quota: usize = quota.trim().parse().ok()?; // "max" or "-1" when there is none
    let period: usize = period.trim().parse().ok()?;
    Some(quota.checked_div(period)?.max(1))
}

/// A line of `/proc/self/mountinfo`.
struct Mount<'a> {
    /// Which directory of the file system is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
    /// The type of the file system.
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    /// `36 35 98:0 /root /point rw,noatime master:1 - type device rw,options`, any number of fields before the dash.
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        let (root, point) = (unescape(left.next()?), unescape(left.next()?));
        let (kind, options) = (right.next()?, right.nth(1)?);
        Some(Mount { root: root.into(), point: point.into(), kind, options })
    }

    /// The directory in which the mount shows `group`.
    fn locate(&self, group: &Path) -> Option<PathBuf> {
        let inside = group.strip_prefix(&self.root).ok()?;
        // `..` means a group outside of this process's namespace.
        let visible = inside.components().all(|part| matches!(part, Component::Normal(_)));
        visible.then(|| self.point.join(inside))
    }
}

/// Undoes the octal escapes (`\040` for a space) of `/proc`.
fn unescape(text: &str) -> String {
    let mut pieces = text.split('\\');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let code = piece.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(piece.get(3..).unwrap_or_default());
            }
            None => {
                plain.push('\\');
                plain.push_str(piece);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests;
