//! Keys and values of the tokens seen so far, in pages of 64 positions.

use half::f16;

use super::config::Config;
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::quant::packed::PANEL;

/// The shape of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    layers: usize,
    kv_heads: usize,
    pub(super) head_dim: usize,
    /// `head_dim` rounded up to whole registers.
    pub(super) width: usize,
    /// 1, or 2 for models that compute in F32: each number is then the sum of two F16 numbers, 22 bits in all.
    pub(super) planes: usize,
}

impl Shape {
    pub(super) fn of(config: &Config, planes: usize) -> Shape {
        let (layers, kv_heads, head_dim) = (config.layers.len(), config.kv_heads, config.head_dim);
        Shape { layers, kv_heads, head_dim, width: head_dim.next_multiple_of(PANEL), planes }
    }

    /// Numbers of one head's keys in one plane, and of keys and values together.
    fn head(&self) -> (usize, usize) {
        (PAGE * self.head_dim, PAGE * (self.head_dim + self.width))
    }

    /// Bytes of the pages for `tokens` tokens, if they can be counted.
    pub(super) fn bytes(&self, tokens: usize) -> Option<usize> {
        self.page()?.checked_mul(size_of::<f16>())?.checked_mul(tokens.div_ceil(PAGE))
    }

    /// Numbers in a page, if they can be counted.
    fn page(&self) -> Option<usize> {
        self.head().1.checked_mul(self.planes)?.checked_mul(self.kv_heads)?.checked_mul(self.layers)
    }
}

/// Which numbers of a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) plane: usize,
}

/// 64 positions of every layer and head.
#[derive(Debug)]
pub(super) struct Page {
    /// `(layers, kv_heads, planes, keys and values)`: keys `(PAGE / 16, head_dim, 16)`, so that a register holds one dimension of
    /// 16 positions; values `(PAGE, width)`.
    data: Vec<f16>,
}

impl Page {
    fn new(shape: &Shape) -> Result<Page> {
        let len = shape.page().unwrap_or(usize::MAX);
        // Zeroed memory comes untouched from the system, so a page costs only what is written of it. An allocation that
        // fails must not abort the process, so it is tried first.
        let mut data: Vec<f16> = Vec::new();
        data.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
            what: "a page of the key/value cache",
            bytes: len.saturating_mul(size_of::<f16>()),
        })?;
        drop(data);
        Ok(Page { data: bytemuck::zeroed_vec(len) })
    }

    /// Keys `(PAGE / 16, head_dim, 16)` and values `(PAGE, width)` of one head.
    pub(super) fn head(&self, shape: &Shape, layer: usize, head: usize, plane: usize) -> (&[f16], &[f16]) {
        let (keys, both) = shape.head();
        self.data[((layer * shape.kv_heads + head) * shape.planes + plane) * both..][..both].split_at(keys)
    }

    /// Stores key and value `(head_dim)` of one head, given by `place`, at `slot` of the page.
    pub(super) fn store(&mut self, shape: &Shape, place: Place, slot: usize, key: &[f16], value: &[f16]) {
        let (keys, both) = shape.head();
        let Place { layer, head, plane } = place;
        let start = ((layer * shape.kv_heads + head) * shape.planes + plane) * both;
        let (keys, values) = self.data[start..][..both].split_at_mut(keys);
        let panel = &mut keys[slot / PANEL * shape.head_dim * PANEL..][..shape.head_dim * PANEL];
        for (column, key) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(key) {
            column[slot % PANEL] = *key;
        }
        values[slot * shape.width..][..value.len()].copy_from_slice(value);
    }
}

/// One sequence of tokens over a model: its keys and values.
///
/// Memory grows by a page of 64 positions as tokens come.
#[derive(Debug)]
pub struct Session {
    pub(super) shape: Shape,
    pub(super) pages: Vec<Page>,
    len: usize,
    context: usize,
    /// Number of the model that it belongs to.
    pub(super) model: u64,
}

impl Session {
    pub(super) fn new(shape: Shape, context: usize, model: u64) -> Session {
        Session { shape, pages: Vec::new(), len: 0, context, model }
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

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.shape.bytes(self.pages.len() * PAGE).unwrap_or(0)
    }

    /// Forgets all but the first `len` tokens. Does nothing when there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Makes room for `tokens` more tokens.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::OutOfMemory`] when there is no memory for them.
    pub(super) fn reserve(&mut self, tokens: usize) -> Result<()> {
        let full = Error::ContextFull { used: self.len, requested: tokens, context: self.context };
        let Some(end) = self.len.checked_add(tokens).filter(|end| *end <= self.context) else { return Err(full) };
        while self.pages.len() * PAGE < end {
            self.pages.push(Page::new(&self.shape)?);
        }
        Ok(())
    }

    /// Counts `tokens` tokens as seen, whose keys and values were stored.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
