//! On which CPUs a thread of Linux runs.
#![allow(unsafe_code, reason = "system calls")]

use std::collections::BTreeSet;

/// Keeps the calling thread on these CPUs, if the system allows it.
pub(crate) fn keep_on(cpus: &BTreeSet<usize>) {
    let mut mask = vec![0u64; cpus.last().map_or(0, |last| last / 64 + 1)];
    for cpu in cpus {
        mask[cpu / 64] |= 1 << (cpu % 64);
    }
    // SAFETY: the mask is readable for the length that is passed, and the call changes this thread only.
    unsafe { libc::sched_setaffinity(0, size_of_val(&*mask), mask.as_ptr().cast()) };
}

/// The CPU that the calling thread is on now.
pub(crate) fn current_cpu() -> Option<usize> {
    // SAFETY: the call has no arguments.
    unsafe { libc::sched_getcpu() }.try_into().ok()
}
