//! Memory that the process's control group still has.
//!
//! The kernel grants more than a group may hold, and ends a process of it when the memory is written. So what is large is
//! compared with the limit before it is asked for, and refused where it certainly does not fit: pages of files that the
//! kernel can drop do not count as used, and swap counts as free.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Less is not worth a look: all that is packed, and of the cache, comes from the system from this size on.
const LEAST: usize = 64 << 10;
/// From this size on the allocator takes memory from the system; for less it may have some that was given back.
#[cfg(all(target_os = "linux", feature = "python"))]
const LARGE: usize = super::allocator::SMALLEST_MAP;
/// Whatever allocator the program has. glibc's keeps less than this.
#[cfg(not(all(target_os = "linux", feature = "python")))]
const LARGE: usize = 32 << 20;
/// What stays for all that is too small to be looked at.
const KEPT: usize = 8 << 20;
/// So long what was read is believed, less what was granted since.
const BELIEVED: Duration = Duration::from_millis(50);

/// What was left, and when.
static LEFT: Mutex<Option<(Instant, usize)>> = Mutex::new(None);

/// Makes sure that the control group has room for `bytes` more, which are going to be mapped from the system.
///
/// # Errors
/// [`Error::OutOfMemory`] where it certainly has not.
pub(crate) fn check(what: &'static str, bytes: usize) -> Result<()> {
    if bytes < LEAST {
        return Ok(());
    }
    let mut known = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((read, left)) = known.as_mut()
        && read.elapsed() < BELIEVED
        && *left >= bytes.saturating_add(KEPT)
    {
        *left -= bytes;
        return Ok(());
    }
    let left = left();
    if left < bytes.saturating_add(KEPT) {
        *known = None;
        return Err(Error::OutOfMemory { what, bytes, left: Some(left) });
    }
    *known = Some((Instant::now(), left - bytes));
    Ok(())
}

/// As [`check`], for memory that an allocator gives.
pub(crate) fn check_allocation(what: &'static str, bytes: usize) -> Result<()> {
    if bytes < LARGE { Ok(()) } else { check(what, bytes) }
}

/// Bytes that the process's control group, and those that it lies in, leave.
fn left() -> usize {
    #[cfg(target_os = "linux")]
    if let Some(left) = linux::left(std::path::Path::new("/")) {
        return left;
    }
    usize::MAX
}

#[cfg(any(target_os = "linux", test))]
mod linux {
    use std::fs::read_to_string;
    use std::path::Path;

    use crate::system::cgroup::Version;

    /// The least that any group leaves. `None` where no group limits.
    pub(super) fn left(root: &Path) -> Option<usize> {
        let swap = read_to_string(root.join("proc/meminfo")).ok();
        let swap = swap.and_then(|text| sum(&text, &["SwapFree:"])).map_or(0, |kilobytes| kilobytes << 10);
        let of = |version: Version| {
            let folders = version.folders(root, "memory");
            folders.iter().filter_map(|folder| left_in(folder, version, swap)).min()
        };
        Version::ALL.into_iter().filter_map(of).min()
    }

    /// What the group described in `folder` leaves, with that much swap on the machine.
    fn left_in(folder: &Path, version: Version, swap: u64) -> Option<usize> {
        let read = |name: &str| read_to_string(folder.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let (most, used, droppable): (_, _, &[&str]) = match version {
            Version::V1 => {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", &["total_inactive_file", "total_active_file"])
            }
            Version::V2 => ("memory.max", "memory.current", &["inactive_file", "active_file", "slab_reclaimable"]),
        };
        // Both versions show no limit in their own way: a word, and a number larger than any memory.
        let (most, used) = (number(most)?, number(used)?);
        let droppable = sum(&read("memory.stat")?, droppable)?;
        let swap = match (number("memory.swap.max"), number("memory.swap.current")) {
            (Some(most), Some(used)) => swap.min(most.saturating_sub(used)),
            _ => swap,
        };
        let left = most.saturating_sub(used.saturating_sub(droppable)).saturating_add(swap);
        Some(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// The sum of the numbers behind these names, each at the start of a line. `None` unless all are there.
    fn sum(text: &str, names: &[&str]) -> Option<u64> {
        let number = |name: &&str| {
            let mut fields = text
                .lines()
                .map(str::split_ascii_whitespace)
                .find_map(|mut fields| (fields.next() == Some(*name)).then_some(fields))?;
            fields.next()?.parse::<u64>().ok()
        };
        names.iter().map(number).try_fold(0u64, |all, one| all.checked_add(one?))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// A machine whose files have these contents.
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

        fn of(more: &[(&str, &str)]) -> Option<usize> {
            left(machine(&[&V2[..], more].concat()).path())
        }

        #[test]
        fn pages_of_files_count_as_free_and_those_of_tmpfs_as_used() {
            let job = "sys/fs/cgroup/pod/job/memory";
            let files = [("max", "1000\n"), ("current", "960\n"), ("stat", STAT)];
            let files = files.map(|(name, text)| (format!("{job}.{name}"), text));
            let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), *text)).collect();
            assert_eq!(of(&files), Some(1000 - (960 - 207)));
            // Swap counts as far as the machine has it and the group may use it.
            let swap = [("proc/meminfo", "MemFree:     1 kB\nSwapFree:     1 kB\n")];
            assert_eq!(of(&[&files[..], &swap].concat()), Some(247 + 1024));
            let most = ("sys/fs/cgroup/pod/job/memory.swap.max", "100\n");
            let used = ("sys/fs/cgroup/pod/job/memory.swap.current", "40\n");
            assert_eq!(of(&[&files[..], &swap, &[most, used]].concat()), Some(247 + 60));
        }

        #[test]
        fn the_least_that_any_group_on_the_way_to_the_root_leaves_counts() {
            let pod = [
                ("sys/fs/cgroup/pod/memory.max", "5000\n"),
                ("sys/fs/cgroup/pod/memory.current", "4900\n"),
                ("sys/fs/cgroup/pod/memory.stat", STAT),
                ("sys/fs/cgroup/pod/job/memory.max", "max\n"),
                ("sys/fs/cgroup/pod/job/memory.current", "960\n"),
                ("sys/fs/cgroup/pod/job/memory.stat", STAT),
            ];
            assert_eq!(of(&pod), Some(307));
            let full = [("sys/fs/cgroup/memory.max", "10\n"), ("sys/fs/cgroup/memory.current", "5000\n")];
            assert_eq!(of(&[&pod[..], &full, &[("sys/fs/cgroup/memory.stat", STAT)]].concat()), Some(0));
        }

        #[test]
        fn version_1_counts_with_the_groups_inside() {
            let root = machine(&[
                ("proc/self/cgroup", "4:memory:/docker/abc\n0::/\n"),
                ("proc/self/mountinfo", "31 30 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "2000\n"),
                (
                    "sys/fs/cgroup/memory/memory.stat",
                    "inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 100\n",
                ),
            ]);
            assert_eq!(left(root.path()), Some(1500));
            let none = "9223372036854771712\n";
            std::fs::write(root.path().join("sys/fs/cgroup/memory/memory.limit_in_bytes"), none).unwrap();
            assert!(left(root.path()).unwrap() > 1 << 62);
        }

        #[test]
        fn what_cannot_be_read_does_not_limit() {
            assert_eq!(left(machine(&[]).path()), None);
            assert_eq!(of(&[]), None);
            let job = ("sys/fs/cgroup/pod/job/memory.max", "1000\n");
            assert_eq!(of(&[job]), None);
            let used = ("sys/fs/cgroup/pod/job/memory.current", "960\n");
            for stat in ["", "inactive_file\n", "inactive_file x\nactive_file 1\nslab_reclaimable 1\n"] {
                assert_eq!(of(&[job, used, ("sys/fs/cgroup/pod/job/memory.stat", stat)]), None, "{stat:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_machine_has_is_refused_only_where_there_is_a_limit() {
        assert!(check("a test", LEAST - 1).is_ok());
        match (left(), check("a test", usize::MAX - KEPT)) {
            (usize::MAX, result) => assert!(result.is_ok()),
            (_, result) => assert!(result.unwrap_err().to_string().contains("cgroup leaves")),
        }
    }
}
