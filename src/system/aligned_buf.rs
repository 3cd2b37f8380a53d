//! Memory for packed weights and for keys and values: cache lines, zero at first.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// A cache line. Buffers of these are 64-byte aligned, so every load of one is a full line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct CacheLine(pub [u8; 64]);

/// Lines that fill less than this many bytes come from the allocator, which has no call to the system for each.
const SMALLEST_MAP: usize = 1 << 16;

/// A buffer of zeroed lines.
///
/// Large ones are mapped from the system rather than allocated: Rust's allocator writes the zeros of memory with such an
/// alignment itself, so that one thread would meet all page faults, a third of the time that loading takes. A map is
/// zero by itself, and a page faults where a worker first writes to it.
#[derive(Debug)]
pub(crate) enum AlignedBuf {
    Allocated(Vec<CacheLine>),
    /// Whole lines, as many as were asked for.
    Mapped(MmapMut),
}

impl AlignedBuf {
    /// As [`AlignedBuf::zeroed`]. `None` when there is no memory, where that ends the process.
    pub(crate) fn try_zeroed(len: usize) -> Option<AlignedBuf> {
        let bytes = len.checked_mul(size_of::<CacheLine>())?;
        if bytes >= SMALLEST_MAP {
            return MmapMut::map_anon(bytes).ok().map(AlignedBuf::Mapped);
        }
        let mut lines: Vec<CacheLine> = Vec::new();
        lines.try_reserve_exact(len).ok()?;
        drop(lines);
        Some(AlignedBuf::Allocated(bytemuck::zeroed_vec(len)))
    }

    pub(crate) fn zeroed(len: usize) -> AlignedBuf {
        let bytes = len.saturating_mul(size_of::<CacheLine>());
        if bytes >= SMALLEST_MAP
            && let Ok(map) = MmapMut::map_anon(bytes)
        {
            return AlignedBuf::Mapped(map);
        }
        AlignedBuf::Allocated(bytemuck::zeroed_vec(len))
    }
}

impl Deref for AlignedBuf {
    type Target = [CacheLine];

    fn deref(&self) -> &[CacheLine] {
        match self {
            AlignedBuf::Allocated(lines) => lines,
            AlignedBuf::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [CacheLine] {
        match self {
            AlignedBuf::Allocated(lines) => lines,
            AlignedBuf::Mapped(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> AlignedBuf {
        let mut lines = AlignedBuf::zeroed(self.len());
        lines.copy_from_slice(self);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_and_of_the_length_asked_for_however_they_are_had() {
        let large = SMALLEST_MAP / size_of::<CacheLine>();
        for len in [0, 1, large - 1, large, large + 1] {
            let mut lines = AlignedBuf::zeroed(len);
            assert_eq!(matches!(lines, AlignedBuf::Mapped(_)), len >= large);
            assert_eq!(lines.len(), len);
            assert!(lines.iter().all(|line| line.0 == [0; 64]));
            assert_eq!(*AlignedBuf::try_zeroed(len).unwrap(), *lines);
            let Some(last) = lines.last_mut() else { continue };
            last.0[63] = 7;
            assert_eq!(lines.clone().last(), lines.last());
        }
        for len in [usize::MAX, 1 << 57, 1 << 50] {
            assert!(AlignedBuf::try_zeroed(len).is_none(), "{len}");
        }
    }
}
