//! Memory for packed weights, the KV cache and workspaces.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

pub use super::cache_line::CacheLine;
use super::huge_pages::{HUGE_PAGE, Piece};
use super::memory;
use crate::error::{Error, Result};

/// Buffers of this many bytes and more are mapped from the system. Smaller ones come from the allocator, which needs no
/// system call for each.
const SMALLEST_MAP: usize = memory::SMALLEST_CHECKED;
/// Maps of this many bytes and more ask for huge pages, but for their last part.
const SMALLEST_HUGE_MAP: usize = 2 * HUGE_PAGE;

/// A buffer of `T` that starts at a cache line, zero at first.
///
/// Large buffers are mapped from the system and return to it when they are dropped. Rust's allocator would write the zeros
/// of memory with such an alignment itself, so one thread would handle all page faults, a third of the loading time. A map
/// starts as zeros, and each page fault occurs in the worker that first writes to the page.
#[derive(Debug)]
pub(crate) struct AlignedBuf<T = CacheLine> {
    memory: Memory,
    /// In items.
    len: usize,
    item: PhantomData<T>,
}

#[derive(Debug)]
enum Memory {
    Allocated(Vec<CacheLine>),
    /// Whole cache lines.
    Mapped(MmapMut),
    /// A part of a map with huge pages.
    Huge(Piece),
}

impl Memory {
    /// Zeroed memory of `lines` cache lines. `None` when there is none.
    fn zeroed(lines: usize) -> Option<Memory> {
        let bytes = lines.checked_mul(size_of::<CacheLine>())?;
        if bytes >= SMALLEST_HUGE_MAP {
            return Piece::alone(lines, true).map(Memory::Huge);
        }
        if bytes >= SMALLEST_MAP {
            return MmapMut::map_anon(bytes).ok().map(Memory::Mapped);
        }
        bytemuck::try_zeroed_vec(lines).ok().map(Memory::Allocated)
    }

    fn lines(&self) -> &[CacheLine] {
        match self {
            Memory::Allocated(lines) => lines,
            Memory::Mapped(map) => bytemuck::cast_slice(map),
            Memory::Huge(piece) => piece.lines(),
        }
    }

    fn lines_mut(&mut self) -> &mut [CacheLine] {
        match self {
            Memory::Allocated(lines) => lines,
            Memory::Mapped(map) => bytemuck::cast_slice_mut(map),
            Memory::Huge(piece) => piece.lines_mut(),
        }
    }
}

impl AlignedBuf {
    /// The cache lines of `piece`.
    pub(super) fn from_piece(piece: Piece) -> AlignedBuf {
        AlignedBuf { len: piece.lines().len(), memory: Memory::Huge(piece), item: PhantomData }
    }

    /// The part of a map that holds the buffer, if it may be shared.
    pub(super) fn piece_mut(&mut self) -> Option<&mut Piece> {
        if let Memory::Huge(piece) = &mut self.memory { Some(piece) } else { None }
    }
}

impl<T: Pod> AlignedBuf<T> {
    /// Items in a cache line.
    const PER_LINE: usize = {
        assert!(size_of::<CacheLine>().is_multiple_of(size_of::<T>()), "items fill cache lines");
        size_of::<CacheLine>() / size_of::<T>()
    };

    /// `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system or the process's cgroup does not have enough memory. It contains `purpose`.
    pub(crate) fn try_zeroed(len: usize, purpose: &'static str) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        memory::check(purpose, bytes)?;
        let refused = Error::OutOfMemory { what: purpose, bytes, left: None };
        let memory = Memory::zeroed(len.div_ceil(Self::PER_LINE)).ok_or(refused)?;
        Ok(AlignedBuf { memory, len, item: PhantomData })
    }

    /// `len` zeros, for callers that cannot handle an error.
    ///
    /// # Panics
    /// When there is no memory.
    pub(crate) fn zeroed(len: usize) -> Self {
        let memory = Memory::zeroed(len.div_ceil(Self::PER_LINE));
        let memory = memory.unwrap_or_else(|| panic!("out of memory: {len} items of {} bytes", size_of::<T>()));
        AlignedBuf { memory, len, item: PhantomData }
    }

    /// `len` zeros on huge pages where the system grants them, however long that takes. `None` when there is no memory.
    pub(crate) fn on_huge_pages(len: usize) -> Option<Self> {
        let memory = Memory::Huge(Piece::alone(len.div_ceil(Self::PER_LINE), false)?);
        Some(AlignedBuf { memory, len, item: PhantomData })
    }

    /// Items that fit without new memory.
    pub(crate) fn capacity(&self) -> usize {
        self.memory.lines().len() * Self::PER_LINE
    }

    /// Shortens the buffer to `len` items, or leaves it alone if it is shorter. Keeps its memory.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Changes the length to `len`, which fits without new memory. The contents are unspecified afterwards.
    ///
    /// # Panics
    /// If `len` is more than the [capacity](Self::capacity).
    pub(super) fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} items of {}", self.capacity());
        self.len = len;
    }

    /// Changes the length to `len`. The contents are unspecified afterwards; memory is never given back.
    ///
    /// # Errors
    /// As for [`AlignedBuf::try_zeroed`]. The buffer is then unchanged.
    pub(crate) fn try_resize(&mut self, len: usize, purpose: &'static str) -> Result<()> {
        if len > self.capacity() {
            *self = AlignedBuf::try_zeroed(len, purpose)?;
        }
        self.len = len;
        Ok(())
    }
}

impl<T> Default for AlignedBuf<T> {
    /// An empty buffer.
    fn default() -> Self {
        AlignedBuf { memory: Memory::Allocated(Vec::new()), len: 0, item: PhantomData }
    }
}

impl<T: Pod> Deref for AlignedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(self.memory.lines())[..self.len]
    }
}

impl<T: Pod> DerefMut for AlignedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(self.memory.lines_mut())[..self.len]
    }
}

impl<T: Pod> Clone for AlignedBuf<T> {
    /// # Panics
    /// When there is no memory.
    fn clone(&self) -> Self {
        let mut copy = AlignedBuf::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_as_long_as_asked() {
        let [large, huge] = [SMALLEST_MAP, SMALLEST_HUGE_MAP].map(|bytes| bytes / size_of::<CacheLine>());
        for len in [0, 1, large - 1, large, large + 1, huge - 1, huge, huge + 1] {
            let mut lines = AlignedBuf::<CacheLine>::zeroed(len);
            assert_eq!(matches!(lines.memory, Memory::Allocated(_)), len < large);
            assert_eq!(matches!(lines.memory, Memory::Huge(_)), len >= huge);
            assert_eq!(lines.len(), len);
            assert!(lines.iter().all(|line| line.0 == [0; 64]));
            assert_eq!(*AlignedBuf::<CacheLine>::try_zeroed(len, "a test").unwrap(), *lines);
            let Some(last) = lines.last_mut() else { continue };
            last.0[63] = 7;
            assert_eq!(lines.clone().last(), lines.last());
        }
    }

    #[test]
    fn a_buffer_of_numbers_starts_at_a_cache_line() {
        for len in [1, 15, 16, 17, SMALLEST_MAP / 4 + 3] {
            let mut numbers = AlignedBuf::<f32>::try_zeroed(len, "a test").unwrap();
            assert_eq!((numbers.len(), numbers.capacity()), (len, len.next_multiple_of(16)));
            assert!(numbers.as_ptr().addr().is_multiple_of(64));
            numbers.fill(2.0);
            assert!(numbers.iter().all(|x| *x == 2.0));
        }
    }

    #[test]
    fn resizing_keeps_memory_that_is_large_enough() {
        let mut numbers = AlignedBuf::<f32>::default();
        numbers.try_resize(1 << 20, "a test").unwrap();
        let start = numbers.as_ptr();
        for len in [3, 0, 1 << 20] {
            numbers.try_resize(len, "a test").unwrap();
            assert_eq!((numbers.len(), numbers.as_ptr()), (len, start));
        }
    }

    #[test]
    fn impossible_sizes_are_errors_with_purpose_and_size() {
        for len in [usize::MAX, 1 << 57, 1 << 50] {
            let error = AlignedBuf::<CacheLine>::try_zeroed(len, "a test").unwrap_err();
            let Error::OutOfMemory { what: "a test", bytes, .. } = error else { panic!("{error}") };
            assert_eq!(bytes, len.saturating_mul(64));
        }
        let mut buffer = AlignedBuf::<u8>::zeroed(5);
        assert!(buffer.try_resize(usize::MAX, "a test").is_err());
        assert_eq!(buffer.len(), 5);
    }
}
