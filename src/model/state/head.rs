//! What a session keeps for a head for multi-token prediction: keys and values of the head's layer, and the latest states of
//! the model.

use std::ops::Range;
use std::sync::Arc;

use super::cache::{CacheShape, Page};
use crate::error::Result;
use crate::kernels::PAGE;
use crate::system::memory;

/// States that stay after their pairs are stored: the largest number that a step may take back.
const KEPT_STATES: usize = 16;

/// The latest states of the model, of consecutive positions, with their tokens.
#[derive(Debug, Clone, Default)]
struct Latest {
    /// The first position.
    first: usize,
    tokens: Vec<u32>,
    /// `(positions, hidden)`
    states: Vec<f32>,
}

impl Latest {
    /// The position after the last one.
    fn end(&self) -> usize {
        self.first + self.tokens.len()
    }

    fn positions(&self) -> Range<usize> {
        self.first..self.end()
    }

    /// Keeps only positions of `range`.
    fn keep(&mut self, range: Range<usize>, hidden: usize) {
        let own = self.positions();
        let (start, end) = (range.start.clamp(own.start, own.end), range.end.clamp(own.start, own.end));
        let (from, to) = (start - own.start, end.max(start) - own.start);
        self.tokens.truncate(to);
        self.states.truncate(to * hidden);
        self.tokens.drain(..from);
        self.states.drain(..from * hidden);
        self.first = start;
    }
}

/// The keys and values of a head, and the latest states of the model.
///
/// Position `i` of the cache has the pair of the state at `i - 1` and token `i`, so a page depends on the same tokens as the
/// model's own page. Position 0 has no pair.
#[derive(Debug, Clone)]
pub(in crate::model) struct HeadState {
    shape: CacheShape,
    pages: Vec<Page>,
    /// The first position whose pair is stored. The head does not see earlier ones, where the session has computed them without
    /// its head.
    first: usize,
    /// The position after the last whose pair is stored.
    stored: usize,
    latest: Latest,
    /// The last state before the latest step, and its position: a step that fails is taken back.
    before: Option<(usize, Vec<f32>)>,
    /// `(pages)`: the state at the last position of each page, where it is known.
    ends: Vec<Option<Arc<[f32]>>>,
    /// The token of the last position that is stored, where the session has not computed that position yet.
    newest: Option<u32>,
    /// `(hidden)`: the head's output for the latest draft token.
    output: Vec<f32>,
    hidden: usize,
}

/// The part of a page that belongs to the head.
#[derive(Debug, Clone)]
pub(in crate::model) struct HeadPage {
    page: Page,
    /// The state at its last position.
    end: Arc<[f32]>,
}

impl HeadPage {
    /// Bytes of the page and the state.
    pub(in crate::model) fn bytes(&self) -> usize {
        self.page.len() + size_of_val::<[f32]>(&self.end)
    }

    /// Bytes that other pages have, too.
    pub(in crate::model) fn shared_bytes(&self) -> usize {
        self.page.shared_len()
    }

    /// Frees what nothing else holds, and returns how many bytes that was.
    pub(in crate::model) fn free_unshared(&mut self) -> usize {
        self.page.free_unshared()
    }

    /// Whether all parts are there.
    pub(in crate::model) fn is_whole(&self) -> bool {
        self.page.is_whole()
    }
}

impl HeadState {
    /// The state of a session of `len` tokens whose head has seen none of them.
    pub(in crate::model) fn new(shape: CacheShape, hidden: usize, len: usize) -> HeadState {
        let mut state = HeadState {
            shape,
            pages: Vec::new(),
            first: 0,
            stored: 0,
            latest: Latest::default(),
            before: None,
            ends: Vec::new(),
            newest: None,
            output: Vec::new(),
            hidden,
        };
        state.restart(len + 1);
        state
    }

    /// Bytes of the pages from `index` on, and of states.
    pub(in crate::model) fn bytes_from(&self, index: usize) -> usize {
        let states = self.latest.states.len() + self.ends.iter().skip(index).flatten().count() * self.hidden;
        let pages: usize = self.pages.iter().skip(index).map(Page::len).sum();
        pages.saturating_add(size_of::<f32>() * states)
    }

    /// Bytes that storing the pairs of all positions before `end` takes.
    pub(in crate::model) fn bytes_for(&self, end: usize) -> usize {
        let copied = self.pages.get(self.stored / PAGE).map_or(0, Page::shared_len);
        let new = end.div_ceil(PAGE).saturating_sub(self.pages.len());
        new.saturating_mul(self.shape.page_bytes()).saturating_add(copied)
    }

    /// Bytes of the pages that `tokens` tokens keep.
    pub(in crate::model) fn kept_bytes(&self, tokens: usize) -> usize {
        self.shape.kept_bytes(tokens)
    }

    /// Allocates pages for the pairs of all positions before `end`, and copies the last one where it is shared.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(in crate::model) fn reserve(&mut self, end: usize) -> Result<()> {
        memory::check("the KV cache", self.bytes_for(end))?;
        if let Some(page) = self.pages.get_mut(self.stored / PAGE) {
            page.unshare(&self.shape)?;
        }
        while self.pages.len() * PAGE < end {
            self.pages.push(Page::new(&self.shape)?);
        }
        Ok(())
    }

    /// Swaps shape, pages and first position with those of the session, so that mixers compute in the head's cache.
    pub(super) fn swap_pages(&mut self, shape: &mut CacheShape, pages: &mut Vec<Page>, first: &mut usize) {
        std::mem::swap(&mut self.shape, shape);
        std::mem::swap(&mut self.pages, pages);
        std::mem::swap(&mut self.first, first);
    }

    /// Frees the parts of pages that no later draft sees.
    pub(in crate::model) fn free_unseen(&mut self) {
        for (part, shape) in self.shape.parts().iter().enumerate() {
            let first = shape.first_kept(self.stored).min(self.pages.len());
            self.pages[..first].iter_mut().for_each(|page| page.free(part));
        }
    }

    /// Begins with the pair of `position`: the head does not see the positions before it.
    fn restart(&mut self, position: usize) {
        self.pages = (0..position / PAGE).map(|_| Page::empty(&self.shape)).collect();
        (self.first, self.stored, self.newest) = (position, position, None);
    }

    /// Takes back all but the first `len` tokens of the session.
    pub(in crate::model) fn truncate(&mut self, len: usize) {
        self.ends.truncate(len / PAGE);
        self.latest.keep(0..len, self.hidden);
        if self.latest.tokens.is_empty()
            && let Some((position, state)) = self.before.take_if(|before| before.0 + 1 == len)
        {
            self.latest = Latest { first: position, tokens: vec![0], states: state };
        }
        self.truncate_pairs(len);
        if len == 0 {
            self.restart(1);
        }
    }

    /// Takes back the pairs from position `len` on.
    fn truncate_pairs(&mut self, len: usize) {
        if self.stored > len {
            (self.stored, self.newest) = (len, None);
            self.pages.truncate(len.div_ceil(PAGE));
            if len < self.first || !self.sees_from(len) {
                self.restart(len + 1);
            }
        }
    }

    /// Whether all parts of pages are there that a draft at position `len` sees.
    fn sees_from(&self, len: usize) -> bool {
        self.shape.parts().iter().enumerate().all(|(part, shape)| {
            let seen = shape.first_seen(len).max(self.first / PAGE)..len.div_ceil(PAGE);
            seen.into_iter().all(|index| self.pages.get(index).is_some_and(|page| page.has(part)))
        })
    }

    /// Prepares for a step whose first token is `token` at `position`.
    pub(in crate::model) fn begin_step(&mut self, position: usize, token: u32) {
        if self.latest.end() > position {
            // A step that failed has left them.
            self.truncate(position);
        }
        self.truncate_pairs(if self.newest == Some(token) { position + 1 } else { position });
        let (hidden, own) = (self.hidden, self.latest.positions());
        self.before = position.checked_sub(1).filter(|last| own.contains(last)).map(|last| {
            let at = (last - own.start) * hidden;
            (last, self.latest.states[at..at + hidden].to_vec())
        });
    }

    /// Takes the state that the model has computed for `token` at `position`.
    pub(in crate::model) fn push(&mut self, position: usize, token: u32, state: &[f32]) {
        if self.latest.end() != position {
            self.latest = Latest { first: position, ..Latest::default() };
        }
        self.latest.tokens.push(token);
        self.latest.states.extend_from_slice(state);
        if (position + 1).is_multiple_of(PAGE) {
            let page = position / PAGE;
            self.ends.resize(self.ends.len().max(page + 1), None);
            self.ends[page] = Some(state.into());
        }
    }

    /// Whether pairs must be stored now: there are many, or they complete a page.
    pub(in crate::model) fn must_store(&self) -> bool {
        let end = self.latest.end();
        end / PAGE > self.stored / PAGE || end > self.stored + KEPT_STATES
    }

    /// The positions whose pairs are known and not stored. Where earlier ones are missing, the head begins there.
    fn open_pairs(&mut self, end: usize) -> Range<usize> {
        if self.stored <= self.latest.first {
            self.restart(self.latest.first + 1);
        }
        self.stored..end.max(self.stored)
    }

    /// The positions that are known and not stored, up to the latest state.
    pub(in crate::model) fn open(&mut self) -> Range<usize> {
        self.open_pairs(self.latest.end())
    }

    /// The state at `position` and the token after it, which is `next` for the last one.
    pub(in crate::model) fn pair(&self, position: usize, next: Option<u32>) -> (u32, &[f32]) {
        let at = position - 1 - self.latest.first;
        let token = self.latest.tokens.get(at + 1).copied().or(next).unwrap_or(0);
        (token, &self.latest.states[at * self.hidden..][..self.hidden])
    }

    /// Counts `count` more pairs as stored.
    pub(in crate::model) fn advance(&mut self, count: usize) {
        self.stored += count;
    }

    /// Drops states whose pairs are stored, but the last few.
    pub(in crate::model) fn drop_stored(&mut self) {
        let end = self.latest.end();
        if self.latest.tokens.len() <= 2 * KEPT_STATES {
            return;
        }
        let first = self.stored.saturating_sub(1).min(end.saturating_sub(KEPT_STATES));
        self.latest.keep(first..end, self.hidden);
    }

    /// Whether the state before `position` is known, so that the head can draft from the token at `position`.
    pub(in crate::model) fn is_ready(&self, position: usize) -> bool {
        position > 0 && self.latest.end() == position && !self.latest.tokens.is_empty()
    }

    /// Begins drafts from `token` at `position`. Returns the positions whose pairs the head reads.
    pub(in crate::model) fn begin_drafts(&mut self, position: usize) -> Range<usize> {
        self.truncate_pairs(position);
        self.open_pairs(position + 1)
    }

    /// Ends drafts from `token` at `position`: their own pairs are taken back.
    pub(in crate::model) fn end_drafts(&mut self, position: usize, token: u32) {
        self.truncate_pairs(position + 1);
        self.newest = (self.stored == position + 1).then_some(token);
    }

    /// The head's output for the latest draft token.
    pub(in crate::model) fn output(&self) -> &[f32] {
        &self.output
    }

    /// Takes the head's output for a draft token.
    pub(in crate::model) fn set_output(&mut self, output: &[f32]) {
        self.output.clear();
        self.output.extend_from_slice(output);
    }

    /// Page `index`, if it is complete.
    pub(in crate::model) fn page(&self, index: usize) -> Option<HeadPage> {
        let (start, end) = (index * PAGE, (index + 1) * PAGE);
        let is_complete = self.first <= start.max(1) && self.stored >= end;
        let page = self.pages.get(index).filter(|_| is_complete)?;
        Some(HeadPage { page: page.clone(), end: self.ends.get(index)?.clone()? })
    }

    /// Appends the first `tokens` positions of a page that follows `len` tokens, or nothing where the page has no part of the
    /// head. The page's next token is `next`, if it is the session's, too.
    pub(in crate::model) fn attach(&mut self, page: Option<&HeadPage>, len: usize, tokens: usize, next: Option<u32>) {
        self.truncate_pairs(len);
        self.pages.truncate(len / PAGE);
        self.latest = Latest { first: len, ..Latest::default() };
        self.before = None;
        let fits = self.stored == len.max(1) && self.pages.len() == len / PAGE;
        let Some(page) = page.filter(|page| fits && page.is_whole()) else {
            return self.restart(len + tokens + 1);
        };
        self.pages.push(page.page.clone());
        self.newest = next.filter(|_| tokens < PAGE);
        self.stored = len + tokens + usize::from(self.newest.is_some());
        if tokens == PAGE {
            self.ends.resize(len / PAGE, None);
            self.ends.push(Some(page.end.clone()));
            self.latest = Latest { first: len + tokens - 1, tokens: vec![0], states: page.end.to_vec() };
        } else {
            self.latest.first = len + tokens;
        }
    }

    /// Replaces page `index` by one that was computed from the same tokens.
    pub(in crate::model) fn replace_page(&mut self, index: usize, page: &HeadPage) {
        if let Some(own) = self.pages.get_mut(index) {
            own.replace_by(&page.page);
        }
    }
}
