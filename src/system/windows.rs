//! Memory and cores, as Windows reports them.
#![allow(unsafe_code, reason = "calls the system")]

use std::ffi::c_void;
use std::ptr::null_mut;

use windows_sys::Win32::System::JobObjects::{
    JOB_OBJECT_CPU_RATE_CONTROL_ENABLE, JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP, JOB_OBJECT_LIMIT_JOB_MEMORY,
    JOB_OBJECT_LIMIT_PROCESS_MEMORY, JOBOBJECT_CPU_RATE_CONTROL_INFORMATION, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JOBOBJECTINFOCLASS, JobObjectCpuRateControlInformation, JobObjectExtendedLimitInformation,
    QueryInformationJobObject,
};
use windows_sys::Win32::System::Memory::VirtualUnlock;
use windows_sys::Win32::System::ProcessStatus::{K32GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::SystemInformation::{
    GetLogicalProcessorInformationEx, GlobalMemoryStatusEx, MEMORYSTATUSEX, RelationProcessorCore,
};
use windows_sys::Win32::System::Threading::{
    ALL_PROCESSOR_GROUPS, GetActiveProcessorCount, GetCurrentProcess, GetProcessAffinityMask, GetProcessGroupAffinity,
};

use super::topology::{self, Affinity};

/// More groups of processors than any machine has.
const MAX_GROUPS: usize = 64;

/// Memory that the machine and the process's job have left, in bytes.
pub(crate) fn available() -> Option<usize> {
    let mut status = MEMORYSTATUSEX { dwLength: size_of::<MEMORYSTATUSEX>() as u32, ..MEMORYSTATUSEX::default() };
    // SAFETY: the structure is writable and has its length in its first field.
    if unsafe { GlobalMemoryStatusEx(&raw mut status) } == 0 {
        return None;
    }
    let bytes = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    // The system promises no more memory than fits into the machine and its paging files.
    let machine = bytes(status.ullAvailPhys).min(bytes(status.ullAvailPageFile));
    Some(machine.min(left_in_job().unwrap_or(usize::MAX)))
}

/// Memory that the job leaves to this process, in bytes. `None` without a limit.
fn left_in_job() -> Option<usize> {
    let limits: JOBOBJECT_EXTENDED_LIMIT_INFORMATION = job_information(JobObjectExtendedLimitInformation)?;
    let flags = limits.BasicLimitInformation.LimitFlags;
    let limit = [
        (JOB_OBJECT_LIMIT_PROCESS_MEMORY, limits.ProcessMemoryLimit),
        // What other processes of the job use is not known.
        (JOB_OBJECT_LIMIT_JOB_MEMORY, limits.JobMemoryLimit),
    ];
    let limit = limit.into_iter().filter_map(|(flag, bytes)| (flags & flag != 0).then_some(bytes)).min()?;
    Some(limit.saturating_sub(memory_counters()?.PagefileUsage))
}

/// Bytes of memory that the process holds, mapped files included: now and at most so far.
#[cfg(feature = "python")]
pub(crate) fn resident() -> Option<[usize; 2]> {
    memory_counters().map(|counters| [counters.WorkingSetSize, counters.PeakWorkingSetSize])
}

fn memory_counters() -> Option<PROCESS_MEMORY_COUNTERS> {
    let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
    let mut counters = PROCESS_MEMORY_COUNTERS { cb: size, ..PROCESS_MEMORY_COUNTERS::default() };
    // SAFETY: the handle is that of this process and needs no closing; the structure is writable and `size` bytes long.
    let done = unsafe { K32GetProcessMemoryInfo(GetCurrentProcess(), &raw mut counters, size) };
    (done != 0).then_some(counters)
}

/// The physical cores that the process may run on, limited by the CPU rate of its job. `None` if the system does not say.
pub(crate) fn usable_cores() -> Option<usize> {
    let records = core_records()?;
    let mut groups = [0u16; MAX_GROUPS];
    let mut count = MAX_GROUPS as u16;
    // SAFETY: the array is writable and has `count` entries.
    let known = unsafe { GetProcessGroupAffinity(GetCurrentProcess(), &raw mut count, groups.as_mut_ptr()) } != 0;
    let cores = match groups.get(..usize::from(count)) {
        Some(several) if known && several.len() > 1 => topology::usable_cores(&records, Affinity::Groups(several)),
        _ => topology::usable_cores(&records, Affinity::Mask(affinity_mask()?)),
    };
    Some(cores?.min(job_cpus().unwrap_or(usize::MAX)))
}

/// The processors of its group that the process may run on.
fn affinity_mask() -> Option<usize> {
    let (mut own, mut all) = (0, 0);
    // SAFETY: both masks are writable.
    let done = unsafe { GetProcessAffinityMask(GetCurrentProcess(), &raw mut own, &raw mut all) };
    (done != 0 && own != 0).then_some(own)
}

/// The system's records of cores.
fn core_records() -> Option<Vec<u8>> {
    let mut len = 0;
    // SAFETY: without a buffer, the call only returns the length.
    unsafe { GetLogicalProcessorInformationEx(RelationProcessorCore, null_mut(), &raw mut len) };
    // Aligned as the records are.
    let mut records = vec![0u64; usize::try_from(len).ok()?.div_ceil(size_of::<u64>())];
    // SAFETY: the buffer is writable, aligned for the records and at least `len` bytes long.
    let done =
        unsafe { GetLogicalProcessorInformationEx(RelationProcessorCore, records.as_mut_ptr().cast(), &raw mut len) };
    let bytes = bytemuck::cast_slice(&records).get(..usize::try_from(len).ok()?)?;
    (done != 0).then(|| bytes.to_vec())
}

/// The whole CPUs that the process's job may use. `None` without a limit.
fn job_cpus() -> Option<usize> {
    let limit: JOBOBJECT_CPU_RATE_CONTROL_INFORMATION = job_information(JobObjectCpuRateControlInformation)?;
    let capped = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
    if limit.ControlFlags & capped != capped {
        return None;
    }
    // SAFETY: with a hard cap, the union holds the rate; and every field of it is a number, whose bits are always valid.
    let rate = unsafe { limit.Anonymous.CpuRate };
    // SAFETY: the call takes no pointer.
    let cpus = unsafe { GetActiveProcessorCount(ALL_PROCESSOR_GROUPS) };
    Some(topology::whole_cpus(rate, usize::try_from(cpus).ok()?))
}

/// What the system says about the job of this process. `None` if there is none.
fn job_information<T: Default + Copy>(class: JOBOBJECTINFOCLASS) -> Option<T> {
    let mut information = T::default();
    let start: *mut c_void = (&raw mut information).cast();
    // SAFETY: the structure is writable and of this size; callers name the class that belongs to it. Without a handle, the
    // call asks for the job of this process.
    let done = unsafe { QueryInformationJobObject(null_mut(), class, start, size_of::<T>() as u32, null_mut()) };
    (done != 0).then_some(information)
}

/// Lets the system reuse the memory of `pages` of a mapped file. They can still be read, from the disk.
pub(crate) fn drop_pages(pages: &[u8]) {
    // SAFETY: the call changes no contents. That of pages which are not locked fails, after it has removed them from the
    // process's memory.
    unsafe { VirtualUnlock(pages.as_ptr().cast(), pages.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_answers_every_question() {
        let cores = usable_cores().unwrap();
        assert!((1..=4096).contains(&cores), "{cores} cores");
        let counters = memory_counters().unwrap();
        assert!(counters.WorkingSetSize > 0 && counters.PeakWorkingSetSize >= counters.WorkingSetSize);
    }

    #[test]
    fn dropped_pages_keep_their_contents() {
        let pages = vec![7u8; 1 << 20];
        drop_pages(&pages);
        drop_pages(&[]);
        assert!(pages.iter().all(|byte| *byte == 7));
    }
}
