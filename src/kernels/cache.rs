//! The caches of the CPU: how large they are, and how memory is prefetched into them.
#![allow(unsafe_code, reason = "instructions that describe, fill and empty caches")]

use std::sync::LazyLock;

use crate::quant::packed::CacheLine;

/// Bytes of the second-level cache of a core, where the CPU does not say.
const USUAL: usize = 512 << 10;

/// Bytes of the second-level cache of a core.
pub(crate) fn second_level_bytes() -> usize {
    static BYTES: LazyLock<usize> = LazyLock::new(|| described(2).filter(|bytes| *bytes > 0).unwrap_or(USUAL));
    *BYTES
}

/// Bytes of the largest cache: the third-level cache, or the second-level cache of a CPU without one. `None` if the CPU does not say.
pub(super) fn last_level_bytes() -> Option<usize> {
    static BYTES: LazyLock<Option<usize>> = LazyLock::new(|| described(3).or_else(|| described(2)));
    *BYTES
}

/// What the CPU says about its cache of a level.
fn described(level: u32) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe, reason = "reading a leaf was unsafe in earlier versions of Rust")]
    // SAFETY: every CPU with 64-bit instructions has CPUID, and the leaves are read only if they exist.
    unsafe {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Intel describes its caches in leaf 4 and AMD in another one, in the same form.
        const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
        let has_amd = __cpuid(0x8000_0000).eax >= 0x8000_001d && __cpuid(0x8000_0001).ecx & TOPOLOGY_EXTENSIONS != 0;
        let leaf = match has_amd {
            true => 0x8000_001d,
            false if __cpuid(0).eax >= 4 => 4,
            false => return None,
        };
        let caches = (0..8).map(|index| __cpuid_count(leaf, index)).take_while(|cache| cache.eax & 31 != 0);
        caches.filter(|cache| cache.eax >> 5 & 7 == level).map(|cache| bytes(cache.ebx, cache.ecx)).next()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        None
    }
}

/// Bytes of a cache, from what CPUID tells about its geometry (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
/// leaf 4).
#[cfg(any(target_arch = "x86_64", test))]
fn bytes(geometry: u32, sets: u32) -> usize {
    let (ways, partitions, line) = (geometry >> 22, geometry >> 12 & 0x3ff, geometry & 0xfff);
    [ways, partitions, line, sets].into_iter().map(|less_one| less_one as usize + 1).product()
}

/// Prefetches the line at an address into the second-level cache. Nothing need be there.
#[inline]
pub(crate) fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    let _ = address;
}

/// Whether [`evict`] does something.
pub(super) const CAN_EVICT: bool = cfg!(target_arch = "x86_64");

/// Removes lines from all caches, so that reading them takes as long as if they had not been read for long.
pub(super) fn evict(lines: &[CacheLine]) {
    #[cfg(target_arch = "x86_64")]
    for line in lines {
        // SAFETY: the line is readable, and every CPU with 64-bit instructions has this one.
        unsafe { std::arch::x86_64::_mm_clflush(std::ptr::from_ref(line).cast()) };
    }
    let _ = lines;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_cache_follows_from_its_geometry() {
        // 2 MiB: 16 ways, 1 partition, lines of 64 bytes, 2,048 sets.
        assert_eq!(bytes(15 << 22 | 63, 2047), 2 << 20);
    }

    #[test]
    fn the_second_level_cache_is_neither_tiny_nor_huge() {
        assert!((64 << 10..64 << 20).contains(&second_level_bytes()), "{}", second_level_bytes());
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn the_second_level_cache_is_as_large_as_the_system_says() {
        // Not every virtual machine has it.
        if let Ok(said) = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size") {
            assert_eq!(format!("{}K", second_level_bytes() >> 10), said.trim());
        }
    }

    #[test]
    fn the_last_cache_is_the_largest_and_lines_that_leave_it_keep_their_contents() {
        assert!(last_level_bytes().is_none_or(|bytes| bytes >= second_level_bytes()));
        let lines = [CacheLine([7; 64]); 100];
        evict(&lines);
        assert_eq!(lines, [CacheLine([7; 64]); 100]);
    }

    #[test]
    fn any_address_can_be_prefetched() {
        let line = [0u8; 64];
        for address in [0, 1, line.as_ptr().addr(), usize::MAX] {
            prefetch(address);
        }
    }
}
