//! Reads the memory that Linux leaves to this process: `/proc/meminfo` and the memory controllers of both cgroup versions.
//!
//! All functions take the root of the file system, so that tests can build one. A file that cannot be read or parsed sets no limit.

use std::fs::read_to_string;
use std::path::Path;

use crate::system::cgroup::Version;

/// Memory that the machine and the process's cgroups have left, in bytes, without swap. `None` where nothing is known.
pub(super) fn available(root: &Path) -> Option<usize> {
    let machine = meminfo(root, "MemAvailable:").map(to_usize);
    machine.into_iter().chain(left_in_cgroups(root, 0)).min()
}

/// Memory that the process's cgroups have left, in bytes, swap included. `None` where no cgroup limits.
pub(super) fn cgroup_left(root: &Path) -> Option<usize> {
    left_in_cgroups(root, meminfo(root, "SwapFree:").unwrap_or(0))
}

/// The least that the process's cgroup or one of its ancestors has left, with `swap` bytes of free swap on the machine.
fn left_in_cgroups(root: &Path, swap: u64) -> Option<usize> {
    let of = |version: Version| {
        let folders = version.folders(root, "memory");
        folders.iter().filter_map(|folder| left_in(folder, version, swap)).min()
    };
    Version::ALL.into_iter().filter_map(of).min()
}

/// What the cgroup in `folder` has left.
fn left_in(folder: &Path, version: Version, swap: u64) -> Option<usize> {
    let read = |name: &str| read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let (limit, used, reclaimable): (_, _, &[&str]) = match version {
        Version::V1 => {
            ("memory.limit_in_bytes", "memory.usage_in_bytes", &["total_inactive_file", "total_active_file"])
        }
        Version::V2 => ("memory.max", "memory.current", &["inactive_file", "active_file", "slab_reclaimable"]),
    };
    // Without a limit, version 2 has the word `max`, which is not a number, and version 1 a number above any memory.
    let (limit, used) = (number(limit)?, number(used)?);
    let reclaimable = sum(&read("memory.stat")?, reclaimable)?;
    let swap = match (number("memory.swap.max"), number("memory.swap.current")) {
        (Some(limit), Some(used)) => swap.min(limit.saturating_sub(used)),
        _ => swap,
    };
    Some(to_usize(limit.saturating_sub(used.saturating_sub(reclaimable)).saturating_add(swap)))
}

/// A field of `/proc/meminfo`, in bytes.
fn meminfo(root: &Path, name: &str) -> Option<u64> {
    sum(&read_to_string(root.join("proc/meminfo")).ok()?, &[name])?.checked_mul(1024)
}

/// The sum of the fields called `names`, each at the start of a line. `None` unless all are there.
fn sum(text: &str, names: &[&str]) -> Option<u64> {
    let number = |name: &&str| {
        let mut lines = text.lines().map(str::split_ascii_whitespace);
        lines.find_map(|mut fields| (fields.next() == Some(*name)).then_some(fields))?.next()?.parse::<u64>().ok()
    };
    names.iter().map(number).try_fold(0u64, |all, one| all.checked_add(one?))
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system with these files.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const V2: [(&str, &str); 2] = [
        ("proc/self/cgroup", "0::/pod/job\n"),
        ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
    ];
    const STAT: &str = "anon 700\nfile 260\nshmem 60\ninactive_file 150\nactive_file 50\nslab_reclaimable 7\n";
    const JOB: [(&str, &str); 3] = [
        ("sys/fs/cgroup/pod/job/memory.max", "1000\n"),
        ("sys/fs/cgroup/pod/job/memory.current", "960\n"),
        ("sys/fs/cgroup/pod/job/memory.stat", STAT),
    ];
    const SWAP: (&str, &str) = ("proc/meminfo", "MemAvailable: 2 kB\nSwapFree:     1 kB\n");

    fn left(files: &[&[(&str, &str)]]) -> Option<usize> {
        cgroup_left(machine(&[&[&V2[..]], files].concat().concat()).path())
    }

    #[test]
    fn file_pages_count_as_free_and_tmpfs_as_used() {
        assert_eq!(left(&[&JOB]), Some(1000 - (960 - 207)));
    }

    #[test]
    fn swap_counts_as_far_as_machine_and_cgroup_allow() {
        assert_eq!(left(&[&JOB, &[SWAP]]), Some(247 + 1024));
        let limit = ("sys/fs/cgroup/pod/job/memory.swap.max", "100\n");
        let used = ("sys/fs/cgroup/pod/job/memory.swap.current", "40\n");
        assert_eq!(left(&[&JOB, &[SWAP, limit, used]]), Some(247 + 60));
    }

    #[test]
    fn available_memory_excludes_swap_and_is_at_most_the_machines() {
        let on = |files: &[&[(&str, &str)]]| available(machine(&files.concat()).path());
        assert_eq!(on(&[]), None);
        assert_eq!(on(&[&[SWAP]]), Some(2048));
        assert_eq!(on(&[&V2, &JOB]), Some(247));
        assert_eq!(on(&[&V2, &JOB, &[SWAP]]), Some(247));
        assert_eq!(on(&[&V2, &JOB, &[("proc/meminfo", "MemAvailable: 0 kB\n")]]), Some(0));
    }

    #[test]
    fn every_cgroup_up_to_the_root_limits() {
        let pod = [
            ("sys/fs/cgroup/pod/memory.max", "5000\n"),
            ("sys/fs/cgroup/pod/memory.current", "4900\n"),
            ("sys/fs/cgroup/pod/memory.stat", STAT),
            ("sys/fs/cgroup/pod/job/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/job/memory.current", "960\n"),
            ("sys/fs/cgroup/pod/job/memory.stat", STAT),
        ];
        assert_eq!(left(&[&pod]), Some(307));
        let full = [
            ("sys/fs/cgroup/memory.max", "10\n"),
            ("sys/fs/cgroup/memory.current", "5000\n"),
            ("sys/fs/cgroup/memory.stat", STAT),
        ];
        assert_eq!(left(&[&pod, &full]), Some(0));
    }

    const V1_STAT: &str = "inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 100\n";

    #[test]
    fn version_1_counts_the_groups_inside() {
        let root = machine(&[
            ("proc/self/cgroup", "4:memory:/docker/abc\n0::/\n"),
            ("proc/self/mountinfo", "31 30 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "2000\n"),
            ("sys/fs/cgroup/memory/memory.stat", V1_STAT),
        ]);
        assert_eq!(cgroup_left(root.path()), Some(1500));
        let unlimited = "9223372036854771712\n";
        std::fs::write(root.path().join("sys/fs/cgroup/memory/memory.limit_in_bytes"), unlimited).unwrap();
        assert!(cgroup_left(root.path()).unwrap() > 1 << 62);
    }

    #[test]
    fn nested_groups_of_version_1_all_limit() {
        let root = machine(&[
            ("proc/self/cgroup", "4:cpu,memory:/batch/job\n"),
            ("proc/self/mountinfo", "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n"),
            ("sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", "9000\n"),
            ("sys/fs/cgroup/memory/batch/job/memory.usage_in_bytes", "2000\n"),
            ("sys/fs/cgroup/memory/batch/job/memory.stat", V1_STAT),
            ("sys/fs/cgroup/memory/batch/memory.limit_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/batch/memory.usage_in_bytes", "4000\n"),
            ("sys/fs/cgroup/memory/batch/memory.stat", V1_STAT),
        ]);
        assert_eq!(available(root.path()), Some(1500));
    }

    #[test]
    fn a_version_1_controller_limits_where_both_versions_are_mounted() {
        let root = machine(&[
            ("proc/self/cgroup", "4:memory:/job\n0::/job\n"),
            (
                "proc/self/mountinfo",
                "30 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                 31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "3000\n"),
            ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "2000\n"),
            ("sys/fs/cgroup/memory/job/memory.stat", V1_STAT),
        ]);
        assert_eq!(cgroup_left(root.path()), Some(1500));
    }

    #[test]
    fn unreadable_files_do_not_limit() {
        assert_eq!(cgroup_left(machine(&[]).path()), None);
        assert_eq!(left(&[]), None);
        assert_eq!(left(&[&JOB[..1]]), None);
        for stat in ["", "inactive_file\n", "inactive_file x\nactive_file 1\nslab_reclaimable 1\n"] {
            assert_eq!(left(&[&JOB[..2], &[("sys/fs/cgroup/pod/job/memory.stat", stat)]]), None, "{stat:?}");
        }
    }
}
