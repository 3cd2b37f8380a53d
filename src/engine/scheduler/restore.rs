//! Pages that are read from disk before a waiting sequence is admitted.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::super::disk_cache::DiskCache;
use super::super::prefix::{Key, Prefixes, Tokens, root};
use super::entry::{Entry, Interrupted};
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::{Model, PageId, SharedPage};

/// How long a step waits for pages when nothing else can be computed.
const WAIT: Duration = Duration::from_millis(20);
/// How much longer than computing them reading pages may take. A shorter delay says nothing about a disk.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Bytes of weights that a thread of a fast machine applies to a prompt token in a second.
const FASTEST: f64 = 1e11;

/// What bounds reading.
pub(super) struct Bounds {
    /// Bytes that the prefix cache may take.
    pub(super) space: usize,
    /// Seconds in which a prompt token is computed.
    pub(super) row_seconds: f64,
    /// Whether they are measured, so that a slower disk is worth a report and a rest.
    pub(super) is_measured: bool,
    /// How much longer than computing them reading pages may take.
    pub(super) grace: Duration,
}

impl Bounds {
    /// Bounds with the measured time of a prompt token, or that of a fast machine.
    pub(super) fn new(space: usize, measured: Option<f64>, model: &Model, grace: Duration) -> Bounds {
        let row_seconds = measured.unwrap_or_else(|| model.weight_bytes() as f64 / (FASTEST * model.threads() as f64));
        Bounds { space, row_seconds, is_measured: measured.is_some(), grace }
    }

    /// Whether computing is faster than reading, after `spent` in which `pages` were read.
    fn is_slow(&self, pages: usize, spent: Duration) -> bool {
        spent.as_secs_f64() > ((pages + 1) * PAGE) as f64 * self.row_seconds + self.grace.as_secs_f64()
    }
}

/// What waiting sequences get from disk, one after the other.
#[derive(Debug, Default)]
pub(super) struct Restores {
    /// The id of the latest sequence, and its pages until all have arrived.
    current: Option<(u64, Option<Restore>)>,
    /// Sequences that have got pages.
    pub(super) hits: usize,
    /// Tokens of these pages.
    pub(super) tokens: usize,
}

impl Restores {
    /// Forgets the pages of a sequence that is cancelled.
    pub(super) fn cancel(&mut self, id: u64) {
        self.current.take_if(|(of, _)| *of == id);
    }

    /// The position of the first of the waiting sequences that has got its pages, or has none on disk. `None` if all must wait. Without
    /// others to compute, `alone` says whether the step is interrupted: then it waits for a moment.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    pub(super) fn ready(
        &mut self,
        waiting: &mut VecDeque<Entry>,
        prefixes: &mut Prefixes,
        bounds: &Bounds,
        alone: Option<Interrupted<'_>>,
    ) -> Result<Option<usize>> {
        if self.advance(waiting.front(), prefixes, bounds, None)? {
            return Ok(Some(0));
        }
        let mut is_on_disk = |entry: &mut Entry| {
            let known = entry.is_on_disk.unwrap_or_else(|| pages_of(entry, prefixes).is_some());
            *entry.is_on_disk.insert(known)
        };
        if let Some(at) = waiting.iter_mut().skip(1).position(|entry| !is_on_disk(entry)) {
            return Ok(Some(at + 1));
        }
        Ok((alone.is_some() && self.advance(waiting.front(), prefixes, bounds, alone)?).then_some(0))
    }

    /// Adds the pages of the first waiting sequence that have arrived to the prefix cache. Returns whether all have, or no others are
    /// worth waiting for. With `alone`, it waits for them for a moment.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    fn advance(
        &mut self,
        first: Option<&Entry>,
        prefixes: &mut Prefixes,
        bounds: &Bounds,
        alone: Option<Interrupted<'_>>,
    ) -> Result<bool> {
        let (Some(entry), Some(disk)) = (first, prefixes.disk()) else { return Ok(true) };
        disk.set_busy(true);
        let (started, space) = (Instant::now(), bounds.space);
        let mut restore = match self.current.take() {
            Some((id, restore)) if id == entry.id => restore,
            _ => Restore::begin(entry, prefixes, space),
        };
        while let Some(pages) = &mut restore {
            match pages.next(alone.map_or(Duration::ZERO, |_| WAIT.saturating_sub(started.elapsed()))) {
                Arrival::Page(page) => {
                    let excess = prefixes.bytes().saturating_add(page.bytes()).saturating_sub(space);
                    if prefixes.evict(excess) >= excess && pages.add(page, prefixes) {
                        self.tokens += PAGE;
                        self.hits += usize::from(pages.restored == 1);
                        if pages.left.is_empty() || !bounds.is_slow(pages.restored, pages.spent) {
                            continue;
                        }
                        prefixes.disk().filter(|_| bounds.is_measured).into_iter().for_each(DiskCache::give_up);
                    }
                }
                Arrival::Later if bounds.is_slow(pages.restored, pages.spent + pages.asked.elapsed()) => {
                    prefixes.disk().into_iter().for_each(DiskCache::give_up);
                }
                Arrival::Later => {
                    self.current = Some((entry.id, restore));
                    let is_interrupted = alone.is_some_and(|interrupted| interrupted());
                    return if is_interrupted { Err(Error::Interrupted) } else { Ok(false) };
                }
                Arrival::End => {}
            }
            restore = None;
        }
        // Not again while the sequence waits for memory.
        self.current = Some((entry.id, None));
        Ok(true)
    }
}

/// The pages on disk that the prompt of a sequence can reuse, and the block before them. `None` if there are none.
fn pages_of(entry: &Entry, prefixes: &mut Prefixes) -> Option<(u64, Vec<PageId>)> {
    let session = &entry.sequence.session;
    let tokens = entry.sequence.tokens.get(entry.blocks * PAGE..)?;
    if session.len() != entry.blocks * PAGE {
        return None;
    }
    prefixes.on_disk(session, entry.block, entry.blocks, tokens)
}

/// The pages of a sequence that are read.
#[derive(Debug)]
struct Restore {
    /// In a mutex, because a receiver alone cannot be shared between threads.
    pages: Mutex<Receiver<(SharedPage, Duration)>>,
    /// The tokens of the pages that have not arrived.
    left: VecDeque<Tokens>,
    /// The block before them.
    parent: u64,
    /// The parent of the sequence's first block.
    root: u64,
    /// Pages that have arrived.
    restored: usize,
    /// How long reading them took. Not since the beginning: steps of other sequences take their time, too.
    spent: Duration,
    /// Since when the next page is awaited.
    asked: Instant,
}

/// The next page of a [`Restore`].
enum Arrival {
    Page(SharedPage),
    /// It has not arrived yet.
    Later,
    /// No more pages come.
    End,
}

impl Restore {
    /// Begins to read the pages that the prompt of `entry` can reuse, as far as they fit into `space` bytes with those in use. `None`
    /// if there are none.
    fn begin(entry: &Entry, prefixes: &mut Prefixes, space: usize) -> Option<Restore> {
        let (parent, mut ids) = pages_of(entry, prefixes)?;
        let (used, unused) = (prefixes.bytes_in_use(), space.saturating_sub(prefixes.bytes()));
        let disk = prefixes.disk()?;
        ids.truncate(space.saturating_sub(used) / disk.page_bytes().max(1));
        let left = ids.iter().map(|id| id.tokens).collect();
        let (pages, root) = (Mutex::new(disk.read(ids, unused)), root(&entry.sequence.session));
        let (spent, asked) = (Duration::ZERO, Instant::now());
        Some(Restore { pages, left, parent, root, restored: 0, spent, asked })
    }

    /// The next page, after waiting for it at most this long.
    fn next(&mut self, wait: Duration) -> Arrival {
        let Ok(pages) = self.pages.get_mut() else { return Arrival::End };
        match pages.recv_timeout(wait) {
            Ok((page, took)) => {
                self.asked = Instant::now();
                self.spent += took;
                Arrival::Page(page)
            }
            Err(RecvTimeoutError::Timeout) => Arrival::Later,
            Err(RecvTimeoutError::Disconnected) => Arrival::End,
        }
    }

    /// Adds a page that has arrived to the prefix cache. Returns false if there is no place for more: the block before it was evicted.
    fn add(&mut self, page: SharedPage, prefixes: &mut Prefixes) -> bool {
        let Some(tokens) = self.left.pop_front().filter(|_| self.parent == self.root || prefixes.has(self.parent))
        else {
            return false;
        };
        let (number, _) = prefixes.insert(Key { parent: self.parent, tokens }, page);
        prefixes.refresh(number);
        (self.parent, self.restored) = (number, self.restored + 1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_when_computing_is_faster() {
        let seconds = Duration::from_secs_f64;
        for (row_seconds, pages, last, first) in [
            (0.0, 0, 1.9, 2.1),
            (0.0, 500, 1.9, 2.1),
            (0.01, 0, 2.6, 2.7),
            (0.01, 9, 8.3, 8.5),
            (1.0, 99, 6401.0, 6403.0),
        ] {
            let bounds = Bounds { space: 0, row_seconds, is_measured: true, grace: GRACE };
            assert!(!bounds.is_slow(pages, seconds(last)), "{row_seconds} {pages} {last}");
            assert!(bounds.is_slow(pages, seconds(first)), "{row_seconds} {pages} {first}");
        }
    }
}
