//! Keys and values of the tokens seen so far, in pages of 64 positions.

use std::sync::Arc;

use half::f16;

use super::config::Config;
use crate::error::{Error, Result};
use crate::kernels::{Kernel, KvSlice, PAGE};
use crate::quant::packed::{CacheLine, PANEL};
use crate::system::aligned_buf::AlignedBuf;
use crate::system::memory;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// Single precision, for models that compute in it.
    F32,
    /// Half precision.
    F16,
    /// INT8, a scale a position and head: half the memory of F16.
    Int8,
}

impl CacheType {
    const ALL: [CacheType; 3] = [CacheType::F32, CacheType::F16, CacheType::Int8];

    /// The type called `f32`, `f16` or `int8`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<CacheType> {
        let found = CacheType::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| Error::argument("cache_type", format_args!("{name:?}"), "f16, int8 or f32"))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Int8 => "int8",
        }
    }

    /// Bytes of a number.
    fn bytes(self) -> usize {
        match self {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
            CacheType::Int8 => 1,
        }
    }

    /// Lines of the scales of a page: none, or an F32 a position.
    fn scale_lines(self) -> usize {
        match self {
            CacheType::F32 | CacheType::F16 => 0,
            CacheType::Int8 => PAGE * size_of::<f32>() / size_of::<CacheLine>(),
        }
    }
}

/// The shape of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    layers: usize,
    kv_heads: usize,
    pub(super) head_dim: usize,
    /// `head_dim` rounded up to whole registers.
    pub(super) width: usize,
    pub(super) cache_type: CacheType,
}

impl Shape {
    pub(super) fn of(config: &Config, cache_type: CacheType) -> Shape {
        let (layers, kv_heads, head_dim) = (config.layers.len(), config.kv_heads, config.head_dim);
        Shape { layers, kv_heads, head_dim, width: head_dim.next_multiple_of(PANEL), cache_type }
    }

    /// Lines of one head's keys, values and each of their scales. A page has as many positions as a line has bytes.
    fn head(&self) -> [usize; 4] {
        const { assert!(PAGE == size_of::<CacheLine>()) };
        let (bytes, scales) = (self.cache_type.bytes(), self.cache_type.scale_lines());
        [self.head_dim * bytes, self.width * bytes, scales, scales]
    }

    /// Bytes of the pages for `tokens` tokens, if they can be counted.
    pub(super) fn bytes(&self, tokens: usize) -> Option<usize> {
        self.page()?.checked_mul(size_of::<CacheLine>())?.checked_mul(tokens.div_ceil(PAGE))
    }

    /// Lines of a page, if they can be counted.
    fn page(&self) -> Option<usize> {
        self.head().iter().sum::<usize>().checked_mul(self.kv_heads)?.checked_mul(self.layers)
    }

    /// Bytes of a page.
    pub(super) fn page_bytes(&self) -> usize {
        self.page().map_or(usize::MAX, |lines| lines.saturating_mul(size_of::<CacheLine>()))
    }
}

/// What a page holds of one head of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head<'a> {
    /// `(PAGE / 16, head_dim, 16)`, so that a register holds one dimension of 16 positions.
    pub(super) keys: KvSlice<'a>,
    /// `(PAGE, width)`
    pub(super) values: KvSlice<'a>,
    /// Of keys and of values, each `(PAGE)`, where they are codes.
    pub(super) scales: Option<[&'a [f32; PAGE]; 2]>,
}

/// 64 positions of every layer and head.
#[derive(Debug)]
pub(super) struct Page {
    /// `(layers, kv_heads, keys, values, scales of keys, scales of values)`
    lines: AlignedBuf,
}

impl Page {
    pub(super) fn new(shape: &Shape) -> Result<Page> {
        let len = shape.page().unwrap_or(usize::MAX);
        // Zeroed memory comes untouched from the system, so a page costs only what is written of it, and it goes back there.
        Ok(Page { lines: AlignedBuf::try_zeroed(len, "a page of the key/value cache")? })
    }

    pub(super) fn copy(&self, shape: &Shape) -> Result<Page> {
        let mut page = Page::new(shape)?;
        page.lines.copy_from_slice(&self.lines);
        Ok(page)
    }

    /// All of it, for a file.
    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    /// All of it, from a file.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Zeroes what is stored at `slot` and behind it.
    pub(super) fn clear_from(&mut self, shape: &Shape, slot: usize) {
        let bytes = shape.cache_type.bytes();
        let [keys, values, scales, _] = shape.head();
        for head in self.lines.chunks_exact_mut(keys + values + 2 * scales) {
            let (keys, rest) = head.split_at_mut(keys);
            let (values, scales) = rest.split_at_mut(values);
            // One dimension of 16 positions after the other.
            let columns = bytemuck::cast_slice_mut::<CacheLine, u8>(keys).chunks_exact_mut(PANEL * bytes);
            for (i, column) in columns.enumerate() {
                let kept = slot.saturating_sub(i / shape.head_dim * PANEL).min(PANEL);
                column[kept * bytes..].fill(0);
            }
            bytemuck::cast_slice_mut::<CacheLine, u8>(values)[slot * shape.width * bytes..].fill(0);
            for scales in bytemuck::cast_slice_mut::<CacheLine, f32>(scales).chunks_exact_mut(PAGE) {
                scales[slot..].fill(0.0);
            }
        }
    }

    /// What it holds of one head.
    pub(super) fn head(&self, shape: &Shape, layer: usize, head: usize) -> Head<'_> {
        let [keys, values, scales, _] = shape.head();
        let both = keys + values + 2 * scales;
        let lines = &self.lines[(layer * shape.kv_heads + head) * both..][..both];
        let (keys, lines) = lines.split_at(keys);
        let (values, lines) = lines.split_at(values);
        let numbers = |lines| match shape.cache_type {
            CacheType::F32 => KvSlice::F32(bytemuck::cast_slice(lines)),
            CacheType::F16 => KvSlice::F16(bytemuck::cast_slice(lines)),
            CacheType::Int8 => KvSlice::Int8(bytemuck::cast_slice(lines)),
        };
        let scales: &[[f32; PAGE]] = bytemuck::cast_slice::<CacheLine, f32>(lines).as_chunks().0;
        let scales = scales.first_chunk().map(|[keys, values]: &[_; 2]| [keys, values]);
        Head { keys: numbers(keys), values: numbers(values), scales }
    }

    /// Stores key and value `(head_dim)` of one head at `slot` of the page.
    #[allow(clippy::too_many_arguments, reason = "where, and the two rows")]
    pub(super) fn store(
        &mut self,
        kernel: &Kernel,
        shape: &Shape,
        layer: usize,
        head: usize,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let [keys, values, scales, _] = shape.head();
        let both = keys + values + 2 * scales;
        let lines = &mut self.lines[(layer * shape.kv_heads + head) * both..][..both];
        let (keys, lines) = lines.split_at_mut(keys);
        let (values, lines) = lines.split_at_mut(values);
        // The value's row serves as a buffer for the key, which is then spread over the columns of its panel.
        match shape.cache_type {
            CacheType::F32 => {
                let keys: &mut [f32] = bytemuck::cast_slice_mut(keys);
                spread(key, panel(keys, shape, slot), slot);
                row(bytemuck::cast_slice_mut(values), shape, slot).copy_from_slice(value);
            }
            CacheType::F16 => {
                let row: &mut [f16] = row(bytemuck::cast_slice_mut(values), shape, slot);
                kernel.to_f16(key, row);
                spread(row, panel(bytemuck::cast_slice_mut(keys), shape, slot), slot);
                kernel.to_f16(value, row);
            }
            CacheType::Int8 => {
                let row: &mut [i8] = row(bytemuck::cast_slice_mut(values), shape, slot);
                let scales: &mut [f32] = bytemuck::cast_slice_mut(lines);
                scales[slot] = kernel.to_int8(key, row);
                spread(row, panel(bytemuck::cast_slice_mut(keys), shape, slot), slot);
                scales[PAGE + slot] = kernel.to_int8(value, row);
            }
        }
    }
}

/// The panel of keys `(head_dim, 16)` with `slot`.
fn panel<'a, T>(keys: &'a mut [T], shape: &Shape, slot: usize) -> &'a mut [T] {
    &mut keys[slot / PANEL * shape.head_dim * PANEL..][..shape.head_dim * PANEL]
}

/// The value `(head_dim)` at `slot`.
fn row<'a, T>(values: &'a mut [T], shape: &Shape, slot: usize) -> &'a mut [T] {
    &mut values[slot * shape.width..][..shape.head_dim]
}

fn spread<T: Copy>(key: &[T], panel: &mut [T], slot: usize) {
    for (column, key) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(key) {
        column[slot % PANEL] = *key;
    }
}

/// Keys and values of 64 positions that sessions of one model may share. What holds it keeps it in memory.
#[derive(Debug, Clone)]
pub struct SharedPage {
    page: Arc<Page>,
    model: u64,
}

impl SharedPage {
    /// Whether anything else holds this page, too: a session, or another `SharedPage`.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.page) > 1
    }
}

/// One sequence of tokens over a model: its keys and values.
///
/// Memory grows by a page of 64 positions as tokens come.
#[derive(Debug)]
pub struct Session {
    pub(super) shape: Shape,
    /// Pages may be shared with other sessions; one is written to only while it is not.
    pub(super) pages: Vec<Arc<Page>>,
    len: usize,
    context: usize,
    /// Number of the model that it belongs to.
    pub(super) model: u64,
}

impl Session {
    pub(super) fn new(shape: Shape, context: usize, model: u64) -> Session {
        Session { shape, pages: Vec::new(), len: 0, context, model }
    }

    /// Another session with the same tokens, which goes on by itself.
    ///
    /// Both share the memory of what they have in common; a page of 64 positions is copied when one of them adds to it.
    pub fn fork(&self) -> Session {
        Session { pages: self.pages.clone(), ..*self }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of all pages, those included that are shared with a [`fork`](Session::fork).
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.shape.page_bytes()
    }

    /// Forgets all but the first `len` tokens. Does nothing when there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Its page `index`, to be given to other sessions. `None` unless all 64 of its positions are filled.
    pub fn page(&self, index: usize) -> Option<SharedPage> {
        let page = self.pages.get(index).filter(|_| (index + 1) * PAGE <= self.len)?;
        Some(SharedPage { page: page.clone(), model: self.model })
    }

    /// Goes on with the first `tokens` positions of a page that another session has filled, as if it had seen these tokens.
    /// That it would have seen the same ones, from the very first, is the caller's to know.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a page of another model, or when this session's last page is not full or `tokens` not
    /// from 1 to 64; [`Error::ContextFull`] when they do not fit.
    pub fn adopt(&mut self, page: &SharedPage, tokens: usize) -> Result<()> {
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

    /// Holds `page` in the place of its own page `index`, which was computed from the same tokens and so has the same bits.
    pub(crate) fn exchange(&mut self, index: usize, page: &SharedPage) {
        if let Some(own) = self.pages.get_mut(index) {
            *own = page.page.clone();
        }
    }

    /// Whether it is one of `model`'s.
    pub fn is_of(&self, model: &super::Model) -> bool {
        self.model == model.id
    }

    /// Bytes that its next `tokens` tokens take: new pages, and a copy of its last one where that is shared.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        let copied = self.pages.get(self.len / PAGE).is_some_and(|page| Arc::strong_count(page) > 1);
        let new = self.len.saturating_add(tokens).div_ceil(PAGE).saturating_sub(self.pages.len());
        (new + usize::from(copied)).saturating_mul(self.shape.page_bytes())
    }

    /// Makes room for `tokens` more tokens, in pages of its own.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::OutOfMemory`] when there is no memory for them.
    pub(super) fn reserve(&mut self, tokens: usize) -> Result<()> {
        let full = Error::ContextFull { used: self.len, requested: tokens, context: self.context };
        let Some(end) = self.len.checked_add(tokens).filter(|end| *end <= self.context) else { return Err(full) };
        // All at once: what is granted and not yet written would look free to the next one that asks.
        memory::check("the key/value cache", self.bytes_for(tokens))?;
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

    /// Counts `tokens` tokens as seen, whose keys and values were stored.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
