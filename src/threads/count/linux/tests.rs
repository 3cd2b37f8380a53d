//! Tests with machines made of files in a temporary directory.

use std::fs;

use tempfile::TempDir;

use super::*;

/// A machine whose `/proc/self/status` allows `allowed`, with cores of two hardware threads: `n` and `n + cores`.
fn machine(allowed: &str, cores: usize) -> TempDir {
    let root = TempDir::new().unwrap();
    write(&root, "proc/self/status", &format!("Name:\tnybble\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n"));
    for cpu in 0..2 * cores {
        let core = cpu % cores;
        let path = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        write(&root, &path, &format!("{core},{}\n", core + cores));
    }
    root
}

fn write(root: &TempDir, path: &str, text: &str) {
    let path = root.path().join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Puts the process into `group` of cgroup version 2, mounted in the usual place.
fn cgroup2(root: &TempDir, group: &str) {
    write(root, "proc/self/cgroup", &format!("0::{group}\n"));
    let mounts = "22 1 0:20 / /proc rw,nosuid - proc proc rw\n\
                  30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    write(root, "proc/self/mountinfo", mounts);
}

#[test]
fn cpu_lists_in_the_format_of_the_kernel_are_parsed() {
    let list = |text| cpu_list(text).map(|cpus| cpus.into_iter().collect::<Vec<_>>());
    assert_eq!(list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
    assert_eq!(list("5"), Some(vec![5]));
    assert_eq!(list("\n"), Some(vec![]));
    for invalid in ["3-1", "a", "1-", "-1", "0-4294967295", "0-99999999999999999999", "1 2"] {
        assert_eq!(list(invalid), None, "{invalid}");
    }
}

#[test]
fn a_machine_without_limits_uses_each_core_once() {
    assert_eq!(usable_cores(machine("0-15", 8).path()), Some(8));
}

#[test]
fn affinity_counts_each_allowed_core_once() {
    assert_eq!(usable_cores(machine("0-2", 8).path()), Some(3));
    assert_eq!(usable_cores(machine("1,9", 8).path()), Some(1));
    assert_eq!(usable_cores(machine("1,2,9", 8).path()), Some(2));
}

#[test]
fn cpus_of_unknown_topology_count_as_cores() {
    let root = machine("0-3", 0);
    assert_eq!(usable_cores(root.path()), Some(4));
    for cpu in ["cpu2", "cpu3"] {
        write(&root, &format!("sys/devices/system/cpu/{cpu}/topology/core_cpus_list"), "2-3\n");
    }
    assert_eq!(usable_cores(root.path()), Some(3));
}

#[test]
fn an_unreadable_affinity_gives_none() {
    let root = TempDir::new().unwrap();
    assert_eq!(usable_cores(root.path()), None);
    write(&root, "proc/self/status", "Name:\tnybble\n");
    assert_eq!(usable_cores(root.path()), None);
    write(&root, "proc/self/status", "Cpus_allowed_list:\t\n");
    assert_eq!(usable_cores(root.path()), None);
}

#[test]
fn a_quota_is_rounded_down_but_not_to_zero() {
    for (cpu_max, cores) in [("350000 100000", 3), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8)] {
        let root = machine("0-15", 8);
        cgroup2(&root, "/user/job");
        write(&root, "sys/fs/cgroup/user/job/cpu.max", &format!("{cpu_max}\n"));
        assert_eq!(usable_cores(root.path()), Some(cores), "{cpu_max}");
    }
}

#[test]
fn the_smallest_quota_of_all_ancestors_counts() {
    let root = machine("0-15", 8);
    cgroup2(&root, "/user/job/step");
    write(&root, "sys/fs/cgroup/cpu.max", "700000 100000\n");
    write(&root, "sys/fs/cgroup/user/cpu.max", "200000 100000\n");
    write(&root, "sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
    write(&root, "sys/fs/cgroup/user/job/step/cpu.max", "400000 100000\n");
    write(&root, "sys/fs/cgroup/other/cpu.max", "100000 100000\n");
    write(&root, "sys/fs/cpu.max", "100000 100000\n");
    assert_eq!(usable_cores(root.path()), Some(2));
}

#[test]
fn a_container_sees_its_quota_at_the_mount_itself() {
    let root = machine("0-15", 8);
    cgroup2(&root, "/");
    write(&root, "sys/fs/cgroup/cpu.max", "250000 100000\n");
    assert_eq!(usable_cores(root.path()), Some(2));
    // With a path on the host, which is not mounted here, or one outside the namespace.
    let foreign = "30 23 0:26 /machine/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    for group in ["/machine/abc", "/system/x", "/../x"] {
        write(&root, "proc/self/cgroup", &format!("0::{group}\n"));
        write(&root, "proc/self/mountinfo", foreign);
        assert_eq!(usable_cores(root.path()), Some(2), "{group}");
    }
}

#[test]
fn a_quota_of_cgroup_version_1_is_found() {
    let root = machine("0-15", 8);
    write(&root, "proc/self/cgroup", "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n");
    let mounts = "31 30 0:27 /docker/abc /sys/fs/cgroup/cpu\\040set rw - cgroup cgroup rw,cpuset\n\
                  32 30 0:28 /docker /sys/fs/cgroup/cpu\\054cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                  33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    write(&root, "proc/self/mountinfo", mounts);
    assert_eq!(usable_cores(root.path()), Some(8));
    for (group, quota, period, cores) in
        [("abc", -1, 100_000, 8), ("abc", 450_000, 100_000, 4), (".", 150_000, 50_000, 3)]
    {
        let folder = format!("sys/fs/cgroup/cpu,cpuacct/{group}");
        write(&root, &format!("{folder}/cpu.cfs_quota_us"), &format!("{quota}\n"));
        write(&root, &format!("{folder}/cpu.cfs_period_us"), &format!("{period}\n"));
        assert_eq!(usable_cores(root.path()), Some(cores), "{group} {quota}");
    }
}

#[test]
fn damaged_files_set_no_limit() {
    let root = machine("0-15", 8);
    for (cgroup, mounts, cpu_max) in [
        ("", "", ""),
        ("0::/\n", "30 23\n - \nx - cgroup2\n", ""),
        ("nonsense\n0::/\n", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "100000\n"),
        ("0::/\n", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "100000 0\n"),
        ("0::/\n", "30 23 0:26 / /sys\\9zz\\ rw - cgroup2 cgroup2 rw\n", "100000 100000\n"),
        ("0::/\n", "30 23 0:26 / relative rw - cgroup2 cgroup2 rw\n", "100000 100000\n"),
    ] {
        write(&root, "proc/self/cgroup", cgroup);
        write(&root, "proc/self/mountinfo", mounts);
        write(&root, "sys/fs/cgroup/cpu.max", cpu_max);
        assert_eq!(usable_cores(root.path()), Some(8), "{cgroup:?} {mounts:?} {cpu_max:?}");
    }
}
