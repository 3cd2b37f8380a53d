//! Sessions: the state of one sequence of tokens.

use std::collections::HashMap;
use std::sync::Arc;

use super::cache::{CacheShape, CacheType, Page};
use super::head::HeadState;
use super::journal::{Change, Mirror};
use super::recurrent::{Recurrent, Snapshot};
use super::shared_page::SharedPage;
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::adapter::low_rank::Adapter;
use crate::system::memory;

/// One sequence of tokens of a model: its keys and values, and the states of recurrent layers.
///
/// Its memory grows by a page of 64 positions at a time. Layers whose queries see only a window keep its pages, and one
/// more; earlier pages are freed.
#[derive(Debug)]
pub struct Session {
    pub(in crate::model) shape: CacheShape,
    /// Pages may be shared with other sessions. A page is written only while it is not shared.
    pub(in crate::model) pages: Vec<Page>,
    len: usize,
    context: usize,
    /// The `id` of the model that it belongs to.
    pub(in crate::model) model: u64,
    /// The first position whose keys or values the cache type does not hold.
    overflow: Option<usize>,
    /// Whether pages that no later query sees stay after the next step.
    keeps_unseen: bool,
    /// The states of recurrent layers.
    state: Option<Recurrent>,
    /// Whether the last page keeps the state after the next step, if it is full then.
    keeps_state: bool,
    /// The first position that has keys and values. Queries do not see earlier ones.
    pub(in crate::model) first: usize,
    /// The adapter that all of its tokens are computed with, if any.
    adapter: Option<Arc<Adapter>>,
    /// What the session keeps for the head for multi-token prediction, if it follows the session.
    pub(in crate::model) head: Option<Box<HeadState>>,
    /// The session in the stages of a pipeline. It has no memory here then.
    pub(in crate::model) mirror: Option<Mirror>,
}

/// Snapshots of recurrent states that a session keeps, the newest.
const SNAPSHOTS: usize = 4;

impl Session {
    /// An empty session of the model with that `id`, for up to `context` tokens.
    pub(in crate::model) fn new(shape: CacheShape, context: usize, model: u64) -> Session {
        let state = shape.state().cloned().map(Recurrent::new);
        let (keeps_unseen, keeps_state) = (false, false);
        let (pages, overflow) = (Vec::new(), None);
        Session {
            shape,
            pages,
            len: 0,
            context,
            model,
            overflow,
            keeps_unseen,
            state,
            keeps_state,
            first: 0,
            adapter: None,
            head: None,
            mirror: None,
        }
    }

    /// The session, which must be empty, as the mirror of one in the stages of a pipeline.
    pub(in crate::model) fn mirrored(self, mirror: Mirror) -> Session {
        Session { mirror: Some(mirror), ..self }
    }

    /// The session, which must be empty, with an adapter that all of its tokens are computed with.
    pub(in crate::model) fn with_adapter(self, adapter: Option<Arc<Adapter>>) -> Session {
        Session { adapter, ..self }
    }

    /// The adapter that its tokens are computed with, if any.
    pub(in crate::model) fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// The name of the adapter that its tokens are computed with, if any.
    pub fn adapter_name(&self) -> Option<&str> {
        self.adapter.as_ref().map(|adapter| adapter.name())
    }

    /// A number that distinguishes the adapter of the session from all others; 0 without one. Sessions with different numbers
    /// never share pages.
    pub(crate) fn adapter_id(&self) -> u64 {
        self.adapter.as_ref().map_or(0, |adapter| adapter.id())
    }

    /// The hash of the weights of its adapter, if any. Pages of adapters with the same one have the same bits.
    pub(crate) fn adapter_hash(&self) -> Option<[u8; 32]> {
        self.adapter.as_ref().map(|adapter| *adapter.hash().as_bytes())
    }

    /// Another session with the same tokens, independent of this one.
    ///
    /// The two share pages of 64 positions; a shared page is copied when one of them adds to it.
    pub fn fork(&self) -> Session {
        let (state, head) = (self.state.as_ref().map(Recurrent::fork), self.head.clone());
        let (pages, shape, adapter) = (self.pages.clone(), self.shape.clone(), self.adapter.clone());
        let mirror = self.mirror.as_ref().map(Mirror::fork);
        Session { pages, shape, state, adapter, head, mirror, ..*self }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The largest number of tokens that fit.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of all pages and recurrent states, including those that are shared with a [`fork`](Session::fork).
    pub fn bytes(&self) -> usize {
        self.bytes_from(0)
    }

    /// Bytes of the pages from page `index` on, and of the recurrent states.
    pub(crate) fn bytes_from(&self, index: usize) -> usize {
        let state = self.state.as_ref().map_or(0, Recurrent::bytes);
        let head = self.head.as_ref().map_or(0, |head| head.bytes_from(index));
        self.pages.iter().skip(index).map(Page::len).sum::<usize>() + state + head
    }

    /// Bytes of the pages of several sessions from page `index` on, each counted once, and of their recurrent states.
    pub(crate) fn bytes_together<'a>(sessions: impl Iterator<Item = &'a Session>, index: usize) -> usize {
        let (mut counted, mut states) = (HashMap::new(), 0);
        for session in sessions {
            counted.extend(session.pages.iter().skip(index).flat_map(Page::buffers));
            states += session.state.as_ref().map_or(0, Recurrent::bytes);
        }
        counted.into_values().fold(states, usize::saturating_add)
    }

    /// Removes all but the first `len` tokens, and returns how many are left. Does nothing if there are no more than that.
    ///
    /// Fewer than `len` are left, possibly none, where the pages that a layer with a window would see from there have been
    /// freed: after more than 64 tokens beyond `len`. Recurrent states go back to any token of the last step, if that had at
    /// most 16 tokens, and otherwise to the last snapshot before `len`; a session keeps four, each after some hundred tokens.
    /// A [`fork`](Session::fork) made at `len` keeps everything.
    pub fn truncate(&mut self, len: usize) -> usize {
        self.renew_if_lost();
        let before = self.len;
        if len < before {
            let is_left = |len: &usize| self.sees_from(*len, &[]) && self.has_state_at(*len);
            self.len = (0..=len).rev().find(is_left).unwrap_or(0);
            let len = self.len;
            self.head.iter_mut().for_each(|head| head.truncate(len));
        }
        if let Some(state) = &mut self.state
            && !state.truncate(self.len)
        {
            let page = self.len.checked_sub(1).and_then(|last| self.pages.get(last / PAGE));
            state.restore(page.and_then(|page| page.snapshot.clone()), self.len);
        }
        // Also pages that a step has reserved and not filled: a fork would share them.
        self.pages.truncate(self.len.div_ceil(PAGE));
        self.overflow = self.overflow.filter(|position| *position < self.len);
        self.record(|session| Change::Truncate { session, len: self.len });
        self.len
    }

    /// Whether the stages of a pipeline have lost the session: all of its tokens are to be computed again.
    pub(crate) fn is_lost(&self) -> bool {
        self.mirror.as_ref().is_some_and(Mirror::is_lost)
    }

    /// Makes the session an empty one if the stages of a pipeline have lost it.
    fn renew_if_lost(&mut self) {
        if let Some(mirror) = self.mirror.take_if(|mirror| mirror.is_lost()) {
            self.mirror = Some(mirror.renewed());
            (self.len, self.overflow) = (0, None);
            self.pages.clear();
            self.state.iter_mut().for_each(|state| state.restore(None, 0));
        }
    }

    /// Records a call of the session with this id, if it is one of a pipeline.
    fn record(&self, change: impl FnOnce(u64) -> Change) {
        if let Some(mirror) = &self.mirror {
            mirror.record(change(mirror.id()));
        }
    }

    /// Whether the recurrent states after `len` tokens are known.
    fn has_state_at(&self, len: usize) -> bool {
        let Some(state) = &self.state else { return true };
        let page = || self.pages.get((len / PAGE).wrapping_sub(1)).filter(|_| len.is_multiple_of(PAGE));
        len == 0 || state.reaches(len) || page().is_some_and(|page| page.snapshot.is_some())
    }

    /// Whether all parts of pages are there that a query at position `len` sees, in this session's pages and in `more` after
    /// them.
    fn sees_from(&self, len: usize, more: &[SharedPage]) -> bool {
        let page = |index: usize| {
            let own = self.pages.get(index);
            own.or_else(|| more.get(index - self.pages.len()).map(|shared| &shared.page))
        };
        let mut parts = self.shape.parts().iter().enumerate();
        parts.all(|(part, shape)| {
            (shape.first_seen(len)..len.div_ceil(PAGE)).all(|index| page(index).is_some_and(|page| page.has(part)))
        })
    }

    /// How many of `pages` can be attached so that computing continues after them: the last ones may lack what a window
    /// shows there. All of them hold 64 tokens, but the last one `tokens`.
    pub(crate) fn attachable(&self, pages: &[SharedPage], tokens: usize) -> usize {
        let end = |count: usize| self.len + count * PAGE - if count == pages.len() { PAGE - tokens } else { 0 };
        let has_state = |count: usize| {
            let page = &pages[count - 1].page;
            self.state.is_none() || (end(count).is_multiple_of(PAGE) && page.snapshot.is_some())
        };
        let is_whole = |count: &usize| has_state(*count) && self.sees_from(end(*count), pages);
        (1..=pages.len()).rev().find(is_whole).unwrap_or(0)
    }

    /// Keeps pages that no later query sees after the next step, so that they can be shared before
    /// [`Session::free_unseen`].
    pub(crate) fn keep_unseen(&mut self) {
        self.keeps_unseen = true;
    }

    /// Forgets the recurrent states after page `index`, which something else keeps.
    pub(crate) fn forget_snapshot(&mut self, index: usize) {
        if let Some(page) = self.pages.get_mut(index) {
            page.snapshot = None;
            self.record(|session| Change::ForgetSnapshot { session, index });
        }
    }

    /// Forgets all earlier recurrent states that it keeps, and returns how many there were. Only [`Session::truncate`] needs
    /// them.
    pub(crate) fn forget_snapshots(&mut self) -> usize {
        let kept: Vec<_> = (0..self.pages.len()).filter(|index| self.pages[*index].snapshot.is_some()).collect();
        kept.iter().for_each(|index| self.forget_snapshot(*index));
        kept.len()
    }

    /// What [`Session::keep_unseen`] and [`Session::keep_state`] have set for the next step.
    pub(in crate::model) fn keeps(&self) -> [bool; 2] {
        [self.keeps_unseen, self.keeps_state]
    }

    /// Keeps the recurrent states after the next step in the last page, if that is full then.
    pub(crate) fn keep_state(&mut self) {
        self.keeps_state = true;
    }

    /// The first number of tokens after the present one at which states are kept. `None` for models without them.
    pub(crate) fn next_snapshot(&self) -> Option<usize> {
        let interval = self.shape.snapshot_interval() * PAGE;
        self.state.as_ref().map(|_| (self.len / interval + 1) * interval)
    }

    /// The states of recurrent layers.
    pub(in crate::model) fn state(&self) -> Option<&Recurrent> {
        self.state.as_ref()
    }

    /// Whether rows of the last step are yet to be applied to the recurrent states.
    pub(in crate::model) fn has_recorded_rows(&self) -> bool {
        self.state.as_ref().is_some_and(Recurrent::has_recorded_rows)
    }

    /// As [`Session::state`], to be changed.
    pub(in crate::model) fn state_mut(&mut self) -> Option<&mut Recurrent> {
        self.state.as_mut()
    }

    /// Whether the recurrent states after the present tokens are to be kept in the last page. Asked once a step.
    pub(in crate::model) fn wants_snapshot(&mut self) -> bool {
        let keeps_state = std::mem::take(&mut self.keeps_state);
        let pages = self.len / PAGE;
        let is_due = keeps_state || pages.is_multiple_of(self.shape.snapshot_interval());
        self.state.is_some() && pages > 0 && self.len.is_multiple_of(PAGE) && is_due
    }

    /// Keeps the recurrent states after the present tokens, to which no rows are to be applied, in the last page.
    pub(in crate::model) fn take_snapshot(&mut self) {
        let snapshot: Option<Snapshot> = self.state.as_ref().and_then(Recurrent::snapshot);
        let Some(last) = (self.len / PAGE).checked_sub(1) else { return };
        self.pages[last].snapshot = snapshot;
        let with = self.pages[..=last].iter_mut().rev().filter(|page| page.snapshot.is_some());
        with.skip(SNAPSHOTS).for_each(|page| page.snapshot = None);
    }

    /// Ends a step: frees what no later query sees, unless the session keeps it for now.
    pub(in crate::model) fn end_step(&mut self) {
        if let Some(state) = &mut self.state {
            state.end_step(self.len);
        }
        if !std::mem::take(&mut self.keeps_unseen) {
            self.free_parts();
        }
    }

    /// Frees the parts of pages that no later query sees, but the last page of them.
    pub(crate) fn free_unseen(&mut self) {
        self.free_parts();
        self.record(|session| Change::FreeUnseen { session });
    }

    fn free_parts(&mut self) {
        for (part, shape) in self.shape.parts().iter().enumerate() {
            let first = shape.first_kept(self.len).min(self.pages.len());
            self.pages[..first].iter_mut().for_each(|page| page.free(part));
        }
        self.head.iter_mut().for_each(|head| head.free_unseen());
    }

    /// Makes the pages of the head those of the session, or takes that back, so that mixers compute in them.
    pub(in crate::model) fn swap_head(&mut self) {
        if let Some(head) = &mut self.head {
            head.swap_pages(&mut self.shape, &mut self.pages, &mut self.first);
        }
    }

    /// Whether the head for multi-token prediction can draft from the next token.
    pub(crate) fn can_draft(&self) -> bool {
        self.head.as_ref().is_some_and(|head| head.is_ready(self.len))
    }

    /// Whether a head for multi-token prediction follows the session.
    pub(crate) fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Ends drafts after `token`, the next one: what the head has computed for its own draft tokens is taken back.
    pub(crate) fn end_drafts(&mut self, token: u32) {
        let len = self.len;
        self.head.iter_mut().for_each(|head| head.end_drafts(len, token));
    }

    /// Lets a head follow the session from now on, if none does. `shape` makes the shape of the head's cache.
    pub(in crate::model) fn follow(&mut self, shape: impl FnOnce(CacheType) -> CacheShape, hidden: usize) {
        let (cache_type, len) = (self.shape.cache_type, self.len);
        self.head.get_or_insert_with(|| Box::new(HeadState::new(shape(cache_type), hidden, len)));
    }

    /// Frees what the session keeps for a head.
    pub(crate) fn drop_head(&mut self) {
        self.head = None;
    }

    /// Checks that the cache holds the keys and values of all tokens.
    ///
    /// # Errors
    /// [`Error::CacheOverflow`] if a token has keys or values beyond the range of the cache type. What was computed from the
    /// cache is then NaN. Truncating the session to the tokens before that one repairs it.
    pub fn check_cache(&self) -> Result<()> {
        let largest = self.shape.cache_type.largest();
        match self.overflow.zip(largest) {
            None => Ok(()),
            Some((position, largest)) => {
                Err(Error::CacheOverflow { position, cache_type: self.shape.cache_type.name(), largest })
            }
        }
    }

    /// The first position whose keys or values the cache does not hold.
    pub(in crate::model) fn overflow(&self) -> Option<usize> {
        self.overflow
    }

    /// Records that the cache does not hold the keys or values at `position`, unless that is beyond all positions.
    pub(crate) fn overflowed_at(&mut self, position: usize) {
        if position < usize::MAX {
            self.overflow = Some(self.overflow.map_or(position, |first| first.min(position)));
        }
    }

    /// Page `index`, to be shared with other sessions. `None` unless all 64 positions are filled with numbers that the cache
    /// type holds.
    #[doc(hidden)]
    pub fn page(&self, index: usize) -> Option<SharedPage> {
        let end = (index + 1) * PAGE;
        (end <= self.overflow.unwrap_or(self.len)).then(|| self.shared_page(index))?
    }

    /// Page `index`, to be shared with other sessions, whatever it holds.
    pub(in crate::model) fn shared_page(&self, index: usize) -> Option<SharedPage> {
        let (page, is_recurrent) = (self.pages.get(index)?.clone(), self.state.is_some());
        let head = self.head.as_ref().and_then(|head| head.page(index));
        let mirror = self.mirror.as_ref().map(|mirror| Arc::new(mirror.share(index)));
        Some(SharedPage { page, head, model: self.model, adapter: self.adapter_id(), is_recurrent, mirror })
    }

    /// Appends the first `tokens` positions of a page that another session has filled, as if this session had seen these
    /// tokens. The caller makes sure that both sessions have the same tokens from the first one on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a page of another model or one with a freed part, when this session's last page is not full, or when `tokens`
    /// is not 1 to 64; [`Error::ContextFull`] when they do not fit.
    #[doc(hidden)]
    pub fn attach_page(&mut self, page: &SharedPage, tokens: usize) -> Result<()> {
        if !page.page.is_whole() {
            return Err(Error::argument("page", "a page with a freed part", "a whole page"));
        }
        if self.state.is_some() && (page.page.snapshot.is_none() || tokens < PAGE) {
            return Err(Error::argument("page", "a page without the recurrent states after it", "a page with them"));
        }
        self.attach(page, tokens, None)
    }

    /// As [`Session::attach_page`], but parts of the page may be freed: [`Session::attachable`] says whether that matters.
    /// `next` is the token after those in the page, if it is the session's next token, too.
    ///
    /// # Errors
    /// As for [`Session::attach_page`].
    pub(crate) fn attach(&mut self, page: &SharedPage, tokens: usize, next: Option<u32>) -> Result<()> {
        if page.model != self.model {
            return Err(Error::argument("page", "a page of another model", "a page of this model"));
        }
        if page.adapter != self.adapter_id() {
            return Err(Error::argument("page", "a page of another adapter", "a page of the session's adapter"));
        }
        if !self.len.is_multiple_of(PAGE) || !(1..=PAGE).contains(&tokens) {
            let found = format!("{tokens} tokens after {}", self.len);
            return Err(Error::argument("page", found, "1 to 64 tokens after whole pages"));
        }
        if tokens > self.context - self.len {
            return Err(Error::ContextFull { used: self.len, requested: tokens, context: self.context });
        }
        let mirrors = self.mirror.as_ref().zip(page.mirror.as_ref());
        if self.mirror.is_some() && mirrors.is_none_or(|(session, page)| session.is_lost() || page.is_lost()) {
            return Err(Error::argument("page", "a page that the stages have lost", "a page that they hold"));
        }
        if let Some((session, page)) = mirrors {
            session.record(Change::Attach { session: session.id(), page: page.id(), tokens });
        }
        if let Some(head) = &mut self.head {
            head.attach(page.head.as_ref(), self.len, tokens, next);
        }
        self.pages.push(page.page.clone());
        self.len += tokens;
        if let Some(state) = &mut self.state
            && let Some(snapshot) = page.page.snapshot.clone().filter(|_| tokens == PAGE)
        {
            state.restore(Some(snapshot), self.len);
        }
        Ok(())
    }

    /// Replaces page `index` by `page`, which was computed from the same tokens and so has the same bits.
    pub(crate) fn replace_page(&mut self, index: usize, page: &SharedPage) {
        if let Some(own) = self.pages.get_mut(index) {
            own.replace_by(&page.page);
        }
        if let (Some(own), Some(page)) = (&mut self.head, &page.head) {
            own.replace_page(index, page);
        }
        if let Some(page) = &page.mirror {
            self.record(|session| Change::Replace { session, index, page: page.id() });
        }
    }

    /// Bytes that the next `tokens` tokens take: new pages, and a copy of the last one where it is shared.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        let copied = self.pages.get(self.len / PAGE).map_or(0, Page::shared_len);
        let new = self.len.saturating_add(tokens).div_ceil(PAGE).saturating_sub(self.pages.len());
        let state = self.state.as_ref().map_or(0, |state| state.bytes_for(tokens));
        let head = self.head.as_ref().map_or(0, |head| head.bytes_for(self.len.saturating_add(tokens)));
        let pages = new.saturating_mul(self.shape.page_bytes()).saturating_add(copied);
        pages.saturating_add(state).saturating_add(head)
    }

    /// Bytes that the next `tokens` tokens add to what the session keeps, computed in steps of any size.
    pub(crate) fn kept_bytes_for(&self, tokens: usize) -> usize {
        let copied = self.pages.get(self.len / PAGE).map_or(0, Page::shared_len);
        let all = self.len.saturating_add(tokens);
        let head = self.head.as_ref().map_or(0, |head| head.kept_bytes(all));
        let kept = self.shape.kept_bytes(all).saturating_add(head);
        kept.saturating_sub(self.bytes()).saturating_add(copied)
    }

    /// Allocates pages for `tokens` more tokens, and copies the last one where it is shared.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::OutOfMemory`].
    pub(in crate::model) fn reserve(&mut self, tokens: usize) -> Result<()> {
        let full = Error::ContextFull { used: self.len, requested: tokens, context: self.context };
        let Some(end) = self.len.checked_add(tokens).filter(|end| *end <= self.context) else { return Err(full) };
        if self.state.as_ref().is_some_and(|state| state.len() != self.len) {
            return Err(Error::argument("session", "pages without the recurrent states after them", "pages with them"));
        }
        // All at once: memory that is granted but not yet written would look free to the next check.
        if self.mirror.is_none() {
            memory::check("the KV cache", self.bytes_for(tokens))?;
        }
        if let Some(page) = self.pages.get_mut(self.len / PAGE) {
            page.unshare(&self.shape)?;
        }
        while self.pages.len() * PAGE < end {
            self.pages.push(Page::new(&self.shape)?);
        }
        self.state.as_mut().map_or(Ok(()), |state| state.reserve(tokens))
    }

    /// Starts again from the first position, with the keys and values that are stored.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(in crate::model) fn rewind(&mut self) -> Result<()> {
        self.len = 0;
        if let Some(state) = &mut self.state {
            state.restore(None, 0);
        }
        self.pages.iter_mut().try_for_each(|page| page.unshare(&self.shape))
    }

    /// Counts `tokens` more tokens, whose keys and values are stored, as seen.
    pub(in crate::model) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
