//! NUMA nodes on Linux, from sysfs.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::Path;

use crate::threads::count::linux::{allowed_cpus, cpu_list};

/// The CPUs of each node that the process may use, with the root of the file system, which tests build. Empty if a file cannot be
/// read or parsed.
pub(super) fn cpus_of_nodes(root: &Path) -> Vec<BTreeSet<usize>> {
    let read = |path: &Path| read_to_string(path).ok();
    let known = || -> Option<Vec<_>> {
        let allowed = allowed_cpus(&read(&root.join("proc/self/status"))?)?;
        let folder = root.join("sys/devices/system/node");
        let online = cpu_list(&read(&folder.join("online"))?)?;
        let cpus_of = |node: &usize| cpu_list(&read(&folder.join(format!("node{node}/cpulist")))?);
        online.iter().map(|node| cpus_of(node).map(|cpus| &cpus & &allowed)).collect()
    };
    known().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, write};

    use super::*;

    /// A file system with these nodes, and these CPUs allowed.
    fn system(allowed: &str, online: &str, nodes: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = root.path().join(path);
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, text).unwrap();
        };
        file("proc/self/status", &format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n"));
        file("sys/devices/system/node/online", online);
        for (i, cpus) in nodes.iter().enumerate() {
            file(&format!("sys/devices/system/node/node{i}/cpulist"), cpus);
        }
        root
    }

    fn found(root: &tempfile::TempDir) -> Vec<Vec<usize>> {
        cpus_of_nodes(root.path()).into_iter().map(|cpus| cpus.into_iter().collect()).collect()
    }

    #[test]
    fn nodes_have_the_cpus_that_the_process_may_use() {
        assert_eq!(found(&system("0-7", "0-1\n", &["0-3\n", "4-7\n"])), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(found(&system("2,4-5", "0-1\n", &["0-3\n", "4-7\n"])), [vec![2], vec![4, 5]]);
        // A node of memory alone has no CPUs.
        assert_eq!(found(&system("0-1", "0-1\n", &["0-1\n", "\n"])), [vec![0, 1], vec![]]);
    }

    #[test]
    fn a_system_that_does_not_say_has_none() {
        assert!(found(&system("0-7", "0-2\n", &["0-3\n", "4-7\n"])).is_empty());
        assert!(found(&system("0-7", "x", &["0-7\n"])).is_empty());
        assert!(found(&system("", "0", &["0-7\n"])).is_empty());
        assert!(found(&tempfile::tempdir().unwrap()).is_empty());
    }
}
