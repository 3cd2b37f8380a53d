//! Maps on huge pages, and disjoint parts of them.
#![allow(unsafe_code, reason = "buffers that are freed one by one share a map")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use memmap2::{MmapMut, MmapRaw};

use super::cache_line::CacheLine;

/// Bytes of a huge page, on x86-64 and on Arm with pages of 4 KiB.
pub(super) const HUGE_PAGE: usize = 2 << 20;
/// Cache lines of a huge page.
pub(super) const HUGE_LINES: usize = HUGE_PAGE / size_of::<CacheLine>();

/// Whether huge pages took much longer to become available than ordinary ones.
pub(super) static ARE_SLOW: AtomicBool = AtomicBool::new(false);

/// Whether maps ask for huge pages. `NYBBLE_HUGE_PAGES=off` says no, for comparisons.
pub(super) fn are_wanted() -> bool {
    static WANTED: LazyLock<bool> = LazyLock::new(|| {
        cfg!(target_os = "linux") && std::env::var_os("NYBBLE_HUGE_PAGES").is_none_or(|value| value != "off")
    });
    *WANTED
}

/// What the system should do with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// Use huge pages.
    Huge,
    /// Use ordinary pages.
    Ordinary,
    /// Fetch the memory.
    Fetch,
}

#[cfg(target_os = "linux")]
impl Advice {
    fn of_linux(self) -> memmap2::Advice {
        match self {
            Advice::Huge => memmap2::Advice::HugePage,
            Advice::Ordinary => memmap2::Advice::NoHugePage,
            Advice::Fetch => memmap2::Advice::PopulateWrite,
        }
    }
}

/// A map that buffers share. It is returned to the system with the last of them.
#[derive(Debug)]
pub(super) struct Region {
    map: MmapRaw,
    /// Bytes of the map before its first huge page.
    offset: usize,
}

/// A part of a region that nothing else accesses.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) region: Arc<Region>,
    /// The first cache line.
    pub(super) start: usize,
    /// Cache lines.
    pub(super) len: usize,
}

impl Region {
    /// A map of at least `bytes` from its first huge page on.
    pub(super) fn new(bytes: usize) -> Option<Region> {
        let map: MmapRaw = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE)?).ok()?.into();
        let offset = map.as_ptr().addr().next_multiple_of(HUGE_PAGE) - map.as_ptr().addr();
        Some(Region { map, offset })
    }

    /// Cache lines of whole huge pages.
    pub(super) fn len(&self) -> usize {
        (self.map.len() - self.offset) / HUGE_PAGE * HUGE_LINES
    }

    /// Gives `advice` for huge pages `first..first + count`. Systems that do not know it do nothing.
    ///
    /// # Panics
    /// If they are not in the map.
    pub(super) fn advise(&self, advice: Advice, first: usize, count: usize) {
        assert!((first + count) * HUGE_LINES <= self.len());
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(advice.of_linux(), self.offset + first * HUGE_PAGE, count * HUGE_PAGE);
        #[cfg(not(target_os = "linux"))]
        let _ = advice;
    }

    /// Moves the contents of a huge page, which lie on ordinary ones, to a huge one.
    pub(super) fn collapse(&self, page: usize) -> bool {
        #[cfg(target_os = "linux")]
        {
            // Since Linux 6.1. memmap2 does not know it.
            const MADV_COLLAPSE: libc::c_int = 25;
            let start = self.at(page * HUGE_LINES).cast();
            // SAFETY: the range lies in the map, whose contents stay as they are while other threads read and write them.
            unsafe { libc::madvise(start, HUGE_PAGE, MADV_COLLAPSE) == 0 }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = page;
            false
        }
    }

    fn at(&self, line: usize) -> *mut CacheLine {
        debug_assert!(self.offset + line * size_of::<CacheLine>() <= self.map.len());
        self.map.as_mut_ptr().wrapping_add(self.offset).cast::<CacheLine>().wrapping_add(line)
    }
}

impl Piece {
    /// A map of its own with `lines` zeroed cache lines, at least one huge page. `None` when there is no memory.
    ///
    /// Asks for huge pages, for a buffer that is soon to be used only where they do not take long.
    pub(super) fn alone(lines: usize, is_soon: bool) -> Option<Piece> {
        let region = Region::new(lines.checked_mul(size_of::<CacheLine>())?)?;
        // Only whole pages, so that no memory is taken beyond the end.
        if are_wanted() && !(is_soon && ARE_SLOW.load(Ordering::Relaxed)) {
            region.advise(Advice::Huge, 0, lines / HUGE_LINES);
        }
        Some(Piece { region: Arc::new(region), start: 0, len: lines })
    }

    pub(super) fn lines(&self) -> &[CacheLine] {
        // SAFETY: the lines are within the map, which lives as long as the piece. Only `lines_mut` of this piece writes to them.
        unsafe { std::slice::from_raw_parts(self.region.at(self.start), self.len) }
    }

    pub(super) fn lines_mut(&mut self) -> &mut [CacheLine] {
        // SAFETY: as in `lines`. An arena gives each line to one piece, and the map is readable and writable.
        unsafe { std::slice::from_raw_parts_mut(self.region.at(self.start), self.len) }
    }
}
