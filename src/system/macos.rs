//! Memory and cores, as macOS reports them.
#![allow(unsafe_code, reason = "calls the system")]

use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::LazyLock;

/// Memory that the process can still use without swap, in bytes: free pages, those of files, and those that their owners let the
/// system drop.
pub(crate) fn available() -> Option<usize> {
    // SAFETY: every field is a number.
    let mut found: libc::vm_statistics64 = unsafe { std::mem::zeroed() };
    let mut count = libc::HOST_VM_INFO64_COUNT;
    let start = (&raw mut found).cast();
    // SAFETY: the structure is writable and has `count` integers. Older systems fill fewer of them.
    let result = unsafe { libc::host_statistics64(*HOST, libc::HOST_VM_INFO64, start, &raw mut count) };
    // SAFETY: the page size is set before a program starts and never changes.
    let page = unsafe { libc::vm_page_size };
    let pages = [found.free_count, found.external_page_count, found.purgeable_count].map(u64::from).iter().sum::<u64>();
    (result == libc::KERN_SUCCESS).then(|| usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(page))
}

/// The port of the machine. Each call for it would add a reference.
static HOST: LazyLock<libc::mach_port_t> = LazyLock::new(|| {
    #[expect(deprecated, reason = "for one function, another crate is not worth it")]
    // SAFETY: the call takes nothing and cannot fail.
    unsafe {
        libc::mach_host_self()
    }
});

/// Bytes of memory that the process holds, mapped files included.
#[cfg(feature = "python")]
pub(crate) fn resident() -> Option<usize> {
    // SAFETY: every field is a number.
    let mut found: libc::proc_taskinfo = unsafe { std::mem::zeroed() };
    let size = libc::c_int::try_from(size_of::<libc::proc_taskinfo>()).ok()?;
    let start = (&raw mut found).cast();
    // SAFETY: the structure is writable and has that size.
    let written = unsafe { libc::proc_pidinfo(libc::getpid(), libc::PROC_PIDTASKINFO, 0, start, size) };
    (written == size).then(|| usize::try_from(found.pti_resident_size).unwrap_or(usize::MAX))
}

/// The physical cores of the fastest kind. Cores for background work are several times slower, and would make the others wait. `None`
/// if the system does not say.
pub(crate) fn usable_cores() -> Option<usize> {
    // The first name exists on Apple's chips since macOS 12.
    [c"hw.perflevel0.physicalcpu", c"hw.physicalcpu"].into_iter().find_map(number).filter(|count| *count > 0)
}

/// A number that the system knows by name.
fn number(name: &CStr) -> Option<usize> {
    let mut value: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>();
    // SAFETY: the name ends with a zero, the number is writable and `size` bytes long, and nothing is set.
    let result = unsafe { libc::sysctlbyname(name.as_ptr(), (&raw mut value).cast(), &raw mut size, null_mut(), 0) };
    if result == 0 && size == size_of::<libc::c_int>() { usize::try_from(value).ok() } else { None }
}

/// A text that the system knows by name.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn text(name: &CStr) -> Option<String> {
    let mut bytes = vec![0u8; 256];
    let mut size = bytes.len();
    // SAFETY: the name ends with a zero, `size` bytes are writable, and nothing is set.
    let result = unsafe { libc::sysctlbyname(name.as_ptr(), bytes.as_mut_ptr().cast(), &raw mut size, null_mut(), 0) };
    if result != 0 {
        return None;
    }
    bytes.truncate(size);
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_answers_every_question() {
        let cores = usable_cores().unwrap();
        assert!((1..=1024).contains(&cores), "{cores} cores");
        assert_eq!(number(c"hw.no_such_name"), None);
        assert!(available().unwrap() > 0);
    }
}
