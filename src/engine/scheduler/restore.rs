//! Pages that are read from disk before a waiting sequence is admitted.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::super::disk_cache::DiskCache;
use super::super::prefix::{Key, Prefixes, Tokens, root};
use super::entry::Entry;
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::SharedPage;

/// How long a step waits for a page before it asks whether it is interrupted.
const WAIT: Duration = Duration::from_millis(20);
/// How long a sequence waits for a page before it is computed.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

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

    /// Adds the pages of the first waiting sequence that have arrived to the prefix cache, which may take `space` bytes. Returns
    /// whether all have. With `alone`, which says whether the step is interrupted, it waits for them.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    pub(super) fn advance(
        &mut self,
        first: Option<&Entry>,
        prefixes: &mut Prefixes,
        space: usize,
        alone: Option<&(dyn Fn() -> bool + Sync)>,
    ) -> Result<bool> {
        let (Some(entry), Some(disk)) = (first, prefixes.disk()) else { return Ok(true) };
        disk.set_busy(true);
        let page_bytes = disk.page_bytes().max(1);
        let mut restore = match self.current.take() {
            Some((id, restore)) if id == entry.id => restore,
            _ => {
                let free = space.saturating_sub(prefixes.bytes_in_use());
                Restore::begin(entry, prefixes, free / page_bytes)
            }
        };
        while let Some(pages) = &mut restore {
            match pages.next(alone.map_or(Duration::ZERO, |_| WAIT)) {
                Arrival::Page(page) => {
                    let excess = prefixes.bytes().saturating_add(page.bytes()).saturating_sub(space);
                    if prefixes.evict(excess) >= excess && pages.add(page, prefixes) {
                        self.tokens += PAGE;
                        self.hits += usize::from(pages.restored == 1);
                        continue;
                    }
                }
                Arrival::Later if pages.asked.elapsed() > LONGEST_WAIT => {
                    prefixes.disk().into_iter().for_each(DiskCache::give_up);
                }
                Arrival::Later => match alone {
                    Some(interrupted) if !interrupted() => continue,
                    _ => {
                        self.current = Some((entry.id, restore));
                        return alone.map_or(Ok(false), |_| Err(Error::Interrupted));
                    }
                },
                Arrival::End => {}
            }
            restore = None;
        }
        // Not again while the sequence waits for memory.
        self.current = Some((entry.id, None));
        Ok(true)
    }
}

/// The pages of a sequence that are read.
#[derive(Debug)]
struct Restore {
    /// In a mutex, because a receiver alone cannot be shared between threads.
    pages: Mutex<Receiver<SharedPage>>,
    /// The tokens of the pages that have not arrived.
    left: VecDeque<Tokens>,
    /// The block before them.
    parent: u64,
    /// The parent of the sequence's first block.
    root: u64,
    /// Pages that have arrived.
    restored: usize,
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
    /// Begins to read the pages that the prompt of `entry` can reuse, at most `most`. `None` if there are none.
    fn begin(entry: &Entry, prefixes: &mut Prefixes, most: usize) -> Option<Restore> {
        let session = &entry.sequence.session;
        let tokens = entry.sequence.tokens.get(entry.blocks * PAGE..)?;
        if session.len() != entry.blocks * PAGE {
            return None;
        }
        let (parent, mut ids) = prefixes.on_disk(session, [entry.block, entry.blocks as u64], tokens)?;
        ids.truncate(most);
        let left = ids.iter().map(|id| id.tokens).collect();
        let pages = Mutex::new(prefixes.disk()?.read(ids));
        Some(Restore { pages, left, parent, root: root(session), restored: 0, asked: Instant::now() })
    }

    /// The next page, after waiting for it at most this long.
    fn next(&mut self, wait: Duration) -> Arrival {
        let Ok(pages) = self.pages.get_mut() else { return Arrival::End };
        match pages.recv_timeout(wait) {
            Ok(page) => {
                self.asked = Instant::now();
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
