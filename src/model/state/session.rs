//! Sessions: the state of one sequence of tokens.

use std::sync::Arc;

use super::cache::{CacheShape, Page};
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::system::memory;

/// Keys and values of 64 positions that sessions of one model may share. They stay in memory while it exists.
#[derive(Debug, Clone)]
pub struct SharedPage {
    page: Arc<Page>,
    model: u64,
}

impl SharedPage {
    /// Whether a session or another `SharedPage` holds this page, too.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.page) > 1
    }
}

/// One sequence of tokens of a model: its keys and values.
///
/// Its memory grows by a page of 64 positions at a time.
#[derive(Debug)]
pub struct Session {
    pub(in crate::model) shape: CacheShape,
    /// Pages may be shared with other sessions. A page is written only while it is not shared.
    pub(in crate::model) pages: Vec<Arc<Page>>,
    len: usize,
    context: usize,
    /// The `id` of the model that it belongs to.
    pub(in crate::model) model: u64,
    /// The first position whose keys or values the cache type does not hold.
    overflow: Option<usize>,
}

impl Session {
    /// An empty session of the model with that `id`, for up to `context` tokens.
    pub(in crate::model) fn new(shape: CacheShape, context: usize, model: u64) -> Session {
        Session { shape, pages: Vec::new(), len: 0, context, model, overflow: None }
    }

    /// Another session with the same tokens, independent of this one.
    ///
    /// The two share pages of 64 positions; a shared page is copied when one of them adds to it.
    pub fn fork(&self) -> Session {
        Session { pages: self.pages.clone(), shape: self.shape.clone(), ..*self }
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

    /// Bytes of all pages, including those that are shared with a [`fork`](Session::fork).
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.shape.page_bytes()
    }

    /// Removes all but the first `len` tokens. Does nothing if there are no more than that.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
        self.overflow = self.overflow.filter(|position| *position < self.len);
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

    /// Records that the cache does not hold the keys or values at `position`, unless that is beyond all positions.
    pub(in crate::model) fn overflowed_at(&mut self, position: usize) {
        if position < usize::MAX {
            self.overflow = Some(self.overflow.map_or(position, |first| first.min(position)));
        }
    }

    /// Page `index`, to be shared with other sessions. `None` unless all 64 positions are filled with numbers that the cache
    /// type holds.
    #[doc(hidden)]
    pub fn page(&self, index: usize) -> Option<SharedPage> {
        let end = (index + 1) * PAGE;
        let page = self.pages.get(index).filter(|_| end <= self.overflow.unwrap_or(self.len))?;
        Some(SharedPage { page: page.clone(), model: self.model })
    }

    /// Appends the first `tokens` positions of a page that another session has filled, as if this session had seen these
    /// tokens. The caller makes sure that both sessions have the same tokens from the first one on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a page of another model, when this session's last page is not full, or when `tokens`
    /// is not 1 to 64; [`Error::ContextFull`] when they do not fit.
    #[doc(hidden)]
    pub fn attach_page(&mut self, page: &SharedPage, tokens: usize) -> Result<()> {
        if page.model != self.model {
            return Err(Error::argument("page", "a page of another model", "a page of this model"));
        }
        if !self.len.is_multiple_of(PAGE) || !(1..=PAGE).contains(&tokens) {
            let found = format!("{tokens} tokens after {}", self.len);
            return Err(Error::argument("page", found, "1 to 64 tokens after whole pages"));
        }
        if tokens > self.context - self.len {
            return Err(Error::ContextFull { used: self.len, requested: tokens, context: self.context });
        }
        self.pages.push(page.page.clone());
        self.len += tokens;
        Ok(())
    }

    /// Replaces page `index` by `page`, which was computed from the same tokens and so has the same bits.
    pub(crate) fn replace_page(&mut self, index: usize, page: &SharedPage) {
        if let Some(own) = self.pages.get_mut(index) {
            *own = page.page.clone();
        }
    }

    /// Bytes that the next `tokens` tokens take: new pages, and a copy of the last one where it is shared.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        let copied = self.pages.get(self.len / PAGE).is_some_and(|page| Arc::strong_count(page) > 1);
        let new = self.len.saturating_add(tokens).div_ceil(PAGE).saturating_sub(self.pages.len());
        (new + usize::from(copied)).saturating_mul(self.shape.page_bytes())
    }

    /// Allocates pages for `tokens` more tokens, and copies the last one where it is shared.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::OutOfMemory`].
    pub(in crate::model) fn reserve(&mut self, tokens: usize) -> Result<()> {
        let full = Error::ContextFull { used: self.len, requested: tokens, context: self.context };
        let Some(end) = self.len.checked_add(tokens).filter(|end| *end <= self.context) else { return Err(full) };
        // All at once: memory that is granted but not yet written would look free to the next check.
        memory::check("the KV cache", self.bytes_for(tokens))?;
        if let Some(page) = self.pages.get_mut(self.len / PAGE)
            && Arc::get_mut(page).is_none()
        {
            *page = Arc::new(page.copy(&self.shape)?);
        }
        while self.pages.len() * PAGE < end {
            self.pages.push(Arc::new(Page::new(&self.shape)?));
        }
        Ok(())
    }

    /// Counts `tokens` more tokens, whose keys and values are stored, as seen.
    pub(in crate::model) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
