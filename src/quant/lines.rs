//! Memory for packed weights and for keys and values: cache lines, zero at first.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use super::packed::Line;

/// Lines that fill less than this many bytes come from the allocator, which has no call to the system for each.
const SMALLEST_MAP: usize = 1 << 16;

/// A buffer of zeroed lines.
///
/// Large ones are mapped from the system rather than allocated: Rust's allocator writes the zeros of memory with such an
/// alignment itself, so that one thread would meet all page faults, a third of the time that loading takes. A map is
/// zero by itself, and a page faults where a worker first writes to it.
#[derive(Debug)]
pub(crate) enum Lines {
    Allocated(Vec<Line>),
    /// Whole lines, as many as were asked for.
    Mapped(MmapMut),
}

impl Lines {
    /// As [`Lines::zeroed`]. `None` when there is no memory, where that ends the process.
    pub(crate) fn try_zeroed(len: usize) -> Option<Lines> {
        let bytes = len.checked_mul(size_of::<Line>())?;
        if bytes >= SMALLEST_MAP {
            return MmapMut::map_anon(bytes).ok().map(Lines::Mapped);
        }
        let mut lines: Vec<Line> = Vec::new();
        lines.try_reserve_exact(len).ok()?;
        drop(lines);
        Some(Lines::Allocated(bytemuck::zeroed_vec(len)))
    }

    pub(crate) fn zeroed(len: usize) -> Lines {
        let bytes = len.saturating_mul(size_of::<Line>());
        if bytes >= SMALLEST_MAP
            && let Ok(map) = MmapMut::map_anon(bytes)
        {
            return Lines::Mapped(map);
        }
        Lines::Allocated(bytemuck::zeroed_vec(len))
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match self {
            Lines::Allocated(lines) => lines,
            Lines::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        match self {
            Lines::Allocated(lines) => lines,
            Lines::Mapped(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

impl Clone for Lines {
    fn clone(&self) -> Lines {
        let mut lines = Lines::zeroed(self.len());
        lines.copy_from_slice(self);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_and_of_the_length_asked_for_however_they_are_had() {
        let large = SMALLEST_MAP / size_of::<Line>();
        for len in [0, 1, large - 1, large, large + 1] {
            let mut lines = Lines::zeroed(len);
            assert_eq!(matches!(lines, Lines::Mapped(_)), len >= large);
            assert_eq!(lines.len(), len);
            assert!(lines.iter().all(|line| line.0 == [0; 64]));
            assert_eq!(*Lines::try_zeroed(len).unwrap(), *lines);
            let Some(last) = lines.last_mut() else { continue };
            last.0[63] = 7;
            assert_eq!(lines.clone().last(), lines.last());
        }
        for len in [usize::MAX, 1 << 57, 1 << 50] {
            assert!(Lines::try_zeroed(len).is_none(), "{len}");
        }
    }
}
