//! Memory for the weights of a model: few large maps on huge pages.
//!
//! A product reads every weight of a matrix once, so each page is looked up once per token. With pages of 4 KiB that costs up to
//! a third of the bandwidth, most in virtual machines, where a look-up walks the tables of guest and host. Linux grants pages of 2 MiB to
//! maps that ask for them, if it has free memory in such pieces. Matrices are smaller than that or end within a page, so
//! they lie side by side in maps that start at one.
//!
//! A huge page can take many times longer to become available than ordinary ones, for example in a virtual machine whose
//! host takes back free memory in pieces of that size. There, weights lie on ordinary pages at first, so that loading is as fast
//! as without, and a thread moves them afterwards.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

pub(crate) use self::activity::Computing;
use self::activity::Watch;
use super::aligned_buf::{AlignedBuf, CacheLine};
use super::huge_pages::{ARE_SLOW, Advice, HUGE_LINES, HUGE_PAGE, Piece, Region, are_wanted};
use super::memory;
use crate::error::{Error, Result};

mod activity;

/// Models with fewer bytes of weights lie in maps of their own, since a page that is partly used is in memory as a whole.
const SMALLEST_MODEL: usize = 16 << 20;
/// The smallest map in bytes.
const MAP: usize = 64 << 20;
/// The largest map in bytes, unless a matrix needs more.
const LARGEST_MAP: usize = 1 << 30;
/// Maps of a model. A matrix that does not fit into what is left of a map begins another one, and what is left is lost: up to a huge
/// page of memory, beyond that only addresses.
const MAPS: usize = 16;
/// A huge page that takes longer than this to become available is compared with ordinary pages.
const SLOW: Duration = Duration::from_millis(1);

/// The thread that moves memory gives up after this many pages that could not be moved.
const FAILURES: usize = 16;

/// Runs a function for each number below a count, on several threads.
pub(crate) type ForEach<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

/// Where the weights of a model are allocated.
#[derive(Debug)]
pub(crate) struct Arena(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The map from which buffers are taken.
    region: Option<Arc<Region>>,
    /// Bytes of a map, unless a matrix needs more.
    map: usize,
    /// Lines of the map that are taken.
    taken: usize,
    /// Lines of it that are in memory: whole huge pages.
    present: usize,
    pages: Pages,
    /// Whether the memory of a buffer is fetched at once.
    is_spread: bool,
    /// Huge pages of maps that lie on ordinary ones.
    ordinary: Vec<(Weak<Region>, Range<usize>)>,
    /// Buffers that were returned, where later ones get their memory.
    returned: Option<Vec<AlignedBuf>>,
}

/// Which pages the maps of an arena ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// Buffers have maps of their own.
    Separate,
    Huge,
    /// Huge pages, which were slow to get, but not slower than ordinary ones.
    HugeAsFast,
    /// Ordinary pages at first, since huge ones took too long.
    Ordinary,
}

impl Arena {
    /// An arena for a model with about `expected` bytes of weights.
    pub(crate) fn new(expected: usize) -> Arena {
        let pages = if expected >= SMALLEST_MODEL && are_wanted() { Pages::Huge } else { Pages::Separate };
        let map = (expected / MAPS).clamp(MAP, LARGEST_MAP);
        let (ordinary, returned) = (vec![], None);
        Arena(Mutex::new(State {
            region: None,
            map,
            taken: 0,
            present: 0,
            pages,
            is_spread: false,
            ordinary,
            returned,
        }))
    }

    /// The arena, which fetches the memory of each buffer at once if `is_spread`: the threads of a NUMA node then get the same part
    /// of every buffer.
    pub(crate) fn spread(self, is_spread: bool) -> Arena {
        self.state().is_spread = is_spread;
        self
    }

    /// An arena as [`Arena::new`], whose buffers get the memory of those that were [returned](Arena::put_back).
    pub(crate) fn recycling(expected: usize) -> Arena {
        let arena = Arena::new(expected);
        arena.state().returned = Some(Vec::new());
        arena
    }

    /// Keeps the memory of `buffer` for a later one, if the arena recycles.
    pub(crate) fn put_back(&self, buffer: AlignedBuf) {
        if let Some(returned) = &mut self.state().returned {
            returned.push(buffer);
        }
    }

    /// Drops buffers that were returned, the smallest first, until the others have at most this many bytes.
    pub(crate) fn trim(&self, bytes: usize) {
        let Some(returned) = &mut self.state().returned else { return };
        returned.sort_by_key(|buffer| std::cmp::Reverse(buffer.capacity()));
        let (mut lines, most) = (0, bytes / size_of::<CacheLine>());
        returned.retain(|buffer| {
            let is_kept = lines + buffer.capacity() <= most;
            lines += if is_kept { buffer.capacity() } else { 0 };
            is_kept
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `lines` zeroed cache lines. `for_each` fetches their memory from the system.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system or the process's cgroup does not have enough memory. It contains `purpose`.
    pub(crate) fn take(&self, lines: usize, purpose: &'static str, for_each: ForEach<'_>) -> Result<AlignedBuf> {
        let mut state = self.state();
        if let Some(buffer) = state.recycled(lines, for_each) {
            return Ok(buffer);
        }
        if state.pages == Pages::Separate {
            return AlignedBuf::try_zeroed(lines, purpose);
        }
        let bytes = lines.saturating_mul(size_of::<CacheLine>());
        memory::check(purpose, bytes)?;
        let piece = state.piece(lines, for_each).ok_or(Error::OutOfMemory { what: purpose, bytes, left: None })?;
        Ok(AlignedBuf::from_piece(piece))
    }

    /// Shortens `buffer` to `lines` cache lines. Gives the rest to the next buffer if `buffer` is the last that was taken.
    pub(crate) fn shorten(&self, buffer: &mut AlignedBuf, lines: usize) {
        let mut state = self.state();
        // A buffer that will be recycled keeps its memory: the next one may need all of it.
        if state.returned.is_none()
            && let Some(piece) = buffer.piece_mut()
            && let Some(region) = &state.region
            && Arc::ptr_eq(&piece.region, region)
            && piece.start + piece.len == state.taken
        {
            piece.lines_mut()[lines..].fill(CacheLine([0; 64]));
            piece.len = lines;
            state.taken = piece.start + lines;
        }
        buffer.truncate(lines);
    }
}

impl State {
    /// The smallest buffer of those that were returned that has `lines` cache lines, zeroed.
    fn recycled(&mut self, lines: usize, for_each: ForEach<'_>) -> Option<AlignedBuf> {
        /// Cache lines that a task zeroes.
        const TASK: usize = 1 << 12;
        let returned = self.returned.as_mut()?;
        let fitting = returned.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= lines);
        let (best, _) = fitting.min_by_key(|(_, buffer)| buffer.capacity())?;
        let mut buffer = returned.swap_remove(best);
        buffer.set_len(lines);
        let tasks: Vec<Mutex<&mut [CacheLine]>> = buffer.chunks_mut(TASK).map(Mutex::new).collect();
        for_each(tasks.len(), &|task| {
            tasks[task].lock().unwrap_or_else(PoisonError::into_inner).fill(CacheLine([0; 64]));
        });
        drop(tasks);
        Some(buffer)
    }

    fn piece(&mut self, lines: usize, for_each: ForEach<'_>) -> Option<Piece> {
        let region = match &self.region {
            Some(region) if lines <= region.len() - self.taken => Arc::clone(region),
            _ => {
                let region = Arc::new(Region::new(
                    lines.checked_mul(size_of::<CacheLine>())?.max(self.map).checked_next_multiple_of(HUGE_PAGE)?,
                )?);
                (self.taken, self.present) = (0, 0);
                Arc::clone(self.region.insert(region))
            }
        };
        let piece = Piece { start: self.taken, len: lines, region };
        self.taken += lines;
        self.fetch(for_each);
        Some(piece)
    }

    /// Fetches the memory of all lines that are taken: by the page, before many threads write to the same.
    fn fetch(&mut self, for_each: ForEach<'_>) {
        let Some(region) = self.region.clone() else { return };
        while self.present < self.taken {
            let first = self.present / HUGE_LINES;
            let missing = (self.taken - self.present).div_ceil(HUGE_LINES);
            // In parts, so that a system for which huge pages take long is noticed soon.
            let most = if self.pages == Pages::Huge { 8 } else { 32 };
            let count = if self.is_spread { missing } else { missing.min(most) };
            self.present += count * HUGE_LINES;
            let is_huge = self.pages != Pages::Ordinary;
            // A system that refuses has ordinary pages instead.
            region.advise(if is_huge { Advice::Huge } else { Advice::Ordinary }, first, count);
            let time = fetch(&region, first, count, for_each) / count as u32;
            let left = region.len() / HUGE_LINES - first - count;
            if self.pages == Pages::Huge && time > SLOW && left > 0 {
                // Where memory itself is slow to get, as in a virtual machine that is given it page by page, ordinary pages
                // are not faster.
                let (first, count) = (first + count, left.min(2));
                region.advise(Advice::Ordinary, first, count);
                self.present += count * HUGE_LINES;
                let ordinary = fetch(&region, first, count, for_each) / count as u32;
                let are_slow = time > 2 * ordinary;
                ARE_SLOW.store(are_slow, Ordering::Relaxed);
                self.pages = if are_slow { Pages::Ordinary } else { Pages::HugeAsFast };
                self.keep_ordinary(&region, first, count);
            } else if !is_huge {
                self.keep_ordinary(&region, first, count);
            }
        }
    }

    /// Notes that huge pages `first..first + count` lie on ordinary ones.
    fn keep_ordinary(&mut self, region: &Arc<Region>, first: usize, count: usize) {
        // The kernel may merge them, too.
        region.advise(Advice::Huge, first, count);
        self.ordinary.push((Arc::downgrade(region), first..first + count));
    }
}

impl Arena {
    /// Moves weights from ordinary pages to huge ones in the background. Later buffers have maps of their own.
    pub(crate) fn settle(&self) {
        let mut state = self.state();
        state.pages = Pages::Separate;
        let ordinary = std::mem::take(&mut state.ordinary);
        drop(state);
        if !ordinary.is_empty() {
            // Without a thread they stay where they are.
            let _ = std::thread::Builder::new().name("nybble-pages".to_owned()).spawn(|| collapse(ordinary));
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Moves pages to huge ones as long as anything uses their maps: in a sixteenth of a thread's time while the process computes, since what
/// reads a page that moves waits, and otherwise as fast as it can.
fn collapse(ordinary: Vec<(Weak<Region>, Range<usize>)>) {
    let (mut failures, mut watch) = (0, Watch::new());
    for (region, pages) in ordinary {
        for page in pages {
            let start = Instant::now();
            let Some(region) = region.upgrade() else { break };
            failures += usize::from(!region.collapse(page));
            if failures == FAILURES {
                return;
            }
            drop(region);
            if !watch.is_idle() {
                std::thread::sleep(15 * start.elapsed());
            }
        }
    }
}

/// Fetches the memory of huge pages `first..first + count` and returns how long that took.
fn fetch(region: &Region, first: usize, count: usize, for_each: ForEach<'_>) -> Duration {
    let start = Instant::now();
    for_each(count, &|page| {
        // Before Linux 5.14, and where there is no memory, the first write fetches the page.
        region.advise(Advice::Fetch, first + page, 1);
    });
    start.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_by_one(count: usize, item: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(item);
    }

    fn take(arena: &Arena, lines: usize) -> AlignedBuf {
        arena.take(lines, "a test", &one_by_one).unwrap()
    }

    /// Fills a zeroed buffer with a number.
    fn fill(buffer: &mut AlignedBuf, with: u8) {
        assert!(buffer.iter().all(|line| line.0 == [0; 64]));
        buffer.fill(CacheLine([with; 64]));
    }

    #[test]
    fn memory_that_is_spread_is_fetched_at_once() {
        const PAGES: usize = 20;
        let counts = |arena: Arena| {
            let counts = Mutex::new(Vec::new());
            let for_each: ForEach<'_> = &|count, item| {
                counts.lock().unwrap().push(count);
                (0..count).for_each(item);
            };
            arena.take(PAGES * HUGE_LINES, "a test", for_each).unwrap();
            counts.into_inner().unwrap()
        };
        if are_wanted() {
            assert_eq!(counts(Arena::new(1 << 30).spread(true))[0], PAGES);
            assert!(counts(Arena::new(1 << 30))[0] < PAGES);
        }
    }

    #[test]
    fn buffers_are_zero_separate_and_as_long_as_asked() {
        for expected in [0, SMALLEST_MODEL, usize::MAX] {
            let arena = Arena::new(expected);
            let lens = [1, 0, HUGE_LINES - 1, 3, 5 * HUGE_LINES + 7, MAP / 64, 100, 2 * MAP / 64 + 1, 5];
            let mut buffers: Vec<AlignedBuf> = lens.iter().map(|len| take(&arena, *len)).collect();
            for (i, (buffer, len)) in buffers.iter_mut().zip(lens).enumerate() {
                assert_eq!(buffer.len(), len);
                assert!(buffer.as_ptr().addr().is_multiple_of(size_of::<CacheLine>()));
                fill(buffer, i as u8 + 1);
            }
            drop(arena);
            buffers.remove(4);
            for (buffer, i) in buffers.iter().zip([0, 1, 2, 3, 5, 6, 7, 8]) {
                assert!(buffer.iter().all(|line| line.0 == [i + 1; 64]));
            }
        }
    }

    #[test]
    fn the_next_buffer_gets_what_the_last_one_returns() {
        let arena = Arena::new(SMALLEST_MODEL);
        let mut first = take(&arena, 100);
        let mut second = take(&arena, 100);
        fill(&mut first, 1);
        fill(&mut second, 2);
        arena.shorten(&mut first, 50);
        arena.shorten(&mut second, 40);
        assert_eq!((first.len(), second.len()), (50, 40));
        let mut third = take(&arena, 70);
        if cfg!(target_os = "linux") {
            assert_eq!(third.as_ptr(), second.as_ptr_range().end);
        }
        fill(&mut third, 3);
        assert!(first.iter().all(|line| line.0 == [1; 64]) && second.iter().all(|line| line.0 == [2; 64]));
        let clone = second.clone();
        drop((arena, first, second, third));
        assert!(clone.len() == 40 && clone.iter().all(|line| line.0 == [2; 64]));
    }

    #[test]
    fn a_recycling_arena_hands_out_what_was_put_back() {
        for expected in [0, SMALLEST_MODEL] {
            let arena = Arena::recycling(expected);
            let mut buffers = [100, 20_000, 300].map(|lines| take(&arena, lines));
            for buffer in &mut buffers {
                fill(buffer, 1);
                arena.shorten(buffer, 50);
                assert_eq!(buffer.len(), 50);
            }
            let starts = [0, 1, 2].map(|i| buffers[i].as_ptr());
            buffers.into_iter().for_each(|buffer| arena.put_back(buffer));
            // The smallest that is large enough, as long as it was before it was shortened.
            for (lines, at) in [(200, 2), (19_000, 1), (60, 0)] {
                let mut buffer = take(&arena, lines);
                assert_eq!((buffer.as_ptr(), buffer.len()), (starts[at], lines));
                fill(&mut buffer, 2);
                arena.put_back(buffer);
            }
            arena.trim(20_350 * 64);
            assert!(starts[1..].contains(&take(&arena, 10).as_ptr()));
            arena.trim(0);
            assert_eq!(take(&arena, 5).len(), 5);
        }
    }

    #[test]
    fn impossible_sizes_are_errors_and_leave_the_arena_usable() {
        let arena = Arena::new(SMALLEST_MODEL);
        for lines in [usize::MAX, 1 << 57, 1 << 50] {
            let error = arena.take(lines, "a test", &one_by_one).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { what: "a test", .. }), "{error}");
        }
        fill(&mut take(&arena, 10), 1);
    }

    #[test]
    fn every_kind_of_pages_gives_zeroed_memory() {
        for pages in [Pages::Huge, Pages::HugeAsFast, Pages::Ordinary] {
            let arena = Arena::new(SMALLEST_MODEL);
            arena.0.lock().unwrap().pages = pages;
            fill(&mut take(&arena, 3 * HUGE_LINES + 1), 1);
            fill(&mut take(&arena, 40 * HUGE_LINES), 2);
        }
    }

    #[test]
    fn contents_stay_while_pages_are_moved() {
        let arena = Arena::new(SMALLEST_MODEL);
        arena.0.lock().unwrap().pages = Pages::Ordinary;
        let mut kept = take(&arena, 3 * HUGE_LINES);
        let mut dropped = take(&arena, MAP / 64);
        fill(&mut kept, 1);
        fill(&mut dropped, 2);
        let ordinary = std::mem::take(&mut arena.0.lock().unwrap().ordinary);
        assert!(ordinary.len() >= 2);
        drop((arena, dropped));
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| collapse(ordinary));
            while !moving.is_finished() {
                assert!(kept.iter().all(|line| line.0 == [1; 64]));
            }
        });
        kept.fill(CacheLine([3; 64]));
        assert!(kept.iter().all(|line| line.0 == [3; 64]));
    }
}
