//! The KV cache: keys and values in pages of 64 positions.

use half::f16;

use crate::error::{Error, Result};
use crate::kernels::{Kernel, KvSlice, PAGE};
use crate::model::config::Config;
use crate::quant::packed::{CacheLine, PANEL};
use crate::system::aligned_buf::AlignedBuf;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheType {
    /// Single precision, for models that compute in it.
    F32,
    /// Half precision.
    F16,
    /// INT8 with a scale per position and head: half the memory of F16.
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

    /// Bytes per number.
    fn bytes(self) -> usize {
        match self {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
            CacheType::Int8 => 1,
        }
    }

    /// Cache lines of the scales of a page: none, or one F32 per position.
    fn scale_lines(self) -> usize {
        match self {
            CacheType::F32 | CacheType::F16 => 0,
            CacheType::Int8 => PAGE * size_of::<f32>() / size_of::<CacheLine>(),
        }
    }
}

/// The shape of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct CacheShape {
    layers: usize,
    kv_heads: usize,
    pub(in crate::model) head_dim: usize,
    /// Width of a stored value: `head_dim` rounded up to whole registers.
    pub(in crate::model) width: usize,
    pub(in crate::model) cache_type: CacheType,
}

impl CacheShape {
    /// The shape of the cache of a model.
    pub(in crate::model) fn of(config: &Config, cache_type: CacheType) -> CacheShape {
        let (layers, kv_heads, head_dim) = (config.layers.len(), config.kv_heads, config.head_dim);
        CacheShape { layers, kv_heads, head_dim, width: head_dim.next_multiple_of(PANEL), cache_type }
    }

    /// Cache lines of one head's keys, its values, the scales of its keys and those of its values. A page has one
    /// position per byte of a line, so a byte per position is one line.
    fn head(&self) -> [usize; 4] {
        const { assert!(PAGE == size_of::<CacheLine>()) };
        let (bytes, scales) = (self.cache_type.bytes(), self.cache_type.scale_lines());
        [self.head_dim * bytes, self.width * bytes, scales, scales]
    }

    /// Bytes of the pages for `tokens` tokens. `None` when the number overflows.
    pub(in crate::model) fn bytes(&self, tokens: usize) -> Option<usize> {
        self.page_lines()?.checked_mul(size_of::<CacheLine>())?.checked_mul(tokens.div_ceil(PAGE))
    }

    /// Cache lines of a page. `None` when the number overflows.
    fn page_lines(&self) -> Option<usize> {
        self.head().iter().sum::<usize>().checked_mul(self.kv_heads)?.checked_mul(self.layers)
    }

    /// Bytes of a page, saturating.
    pub(in crate::model) fn page_bytes(&self) -> usize {
        self.page_lines().map_or(usize::MAX, |lines| lines.saturating_mul(size_of::<CacheLine>()))
    }
}

/// The keys and values of one head of one layer in a page.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct PageHead<'a> {
    /// `(PAGE / 16, head_dim, 16)`, so that a register holds one dimension of 16 positions.
    pub(in crate::model) keys: KvSlice<'a>,
    /// `(PAGE, width)`
    pub(in crate::model) values: KvSlice<'a>,
    /// Scales of keys and of values, each `(PAGE)`, for INT8.
    pub(in crate::model) scales: Option<[&'a [f32; PAGE]; 2]>,
}

/// Keys and values of 64 positions, of every layer and head.
#[derive(Debug)]
pub(in crate::model) struct Page {
    /// `(layers, kv_heads, keys, values, scales of keys, scales of values)`
    lines: AlignedBuf,
}

impl Page {
    /// A page of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(in crate::model) fn new(shape: &CacheShape) -> Result<Page> {
        let len = shape.page_lines().unwrap_or(usize::MAX);
        // Zeroed memory comes from the system untouched, so a page costs only the part of it that is written.
        Ok(Page { lines: AlignedBuf::try_zeroed(len, "a page of the KV cache")? })
    }

    /// A copy of the page.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(in crate::model) fn copy(&self, shape: &CacheShape) -> Result<Page> {
        let mut page = Page::new(shape)?;
        page.lines.copy_from_slice(&self.lines);
        Ok(page)
    }

    /// The bytes of the page, to be written to a file.
    pub(in crate::model) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The bytes of the page, to be read from a file.
    pub(in crate::model) fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Zeroes the positions from `slot` on.
    pub(in crate::model) fn clear_from(&mut self, shape: &CacheShape, slot: usize) {
        let bytes = shape.cache_type.bytes();
        let [keys, values, scales, _] = shape.head();
        for head in self.lines.chunks_exact_mut(keys + values + 2 * scales) {
            let (keys, rest) = head.split_at_mut(keys);
            let (values, scales) = rest.split_at_mut(values);
            // Each column holds one dimension of 16 positions.
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

    /// The keys and values of one head.
    pub(in crate::model) fn head(&self, shape: &CacheShape, layer: usize, head: usize) -> PageHead<'_> {
        let [keys, values, scales, _] = shape.head();
        let len = keys + values + 2 * scales;
        let lines = &self.lines[(layer * shape.kv_heads + head) * len..][..len];
        let (keys, lines) = lines.split_at(keys);
        let (values, lines) = lines.split_at(values);
        let slice = |lines| match shape.cache_type {
            CacheType::F32 => KvSlice::F32(bytemuck::cast_slice(lines)),
            CacheType::F16 => KvSlice::F16(bytemuck::cast_slice(lines)),
            CacheType::Int8 => KvSlice::Int8(bytemuck::cast_slice(lines)),
        };
        let scales: &[[f32; PAGE]] = bytemuck::cast_slice::<CacheLine, f32>(lines).as_chunks().0;
        let scales = scales.first_chunk().map(|[keys, values]: &[_; 2]| [keys, values]);
        PageHead { keys: slice(keys), values: slice(values), scales }
    }

    /// Stores key and value `(head_dim)` of one head at `slot` of the page.
    #[allow(clippy::too_many_arguments, reason = "the place, and the two rows")]
    pub(in crate::model) fn store(
        &mut self,
        kernel: &Kernel,
        shape: &CacheShape,
        layer: usize,
        head: usize,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let [keys, values, scales, _] = shape.head();
        let len = keys + values + 2 * scales;
        let lines = &mut self.lines[(layer * shape.kv_heads + head) * len..][..len];
        let (keys, lines) = lines.split_at_mut(keys);
        let (values, lines) = lines.split_at_mut(values);
        // The key is converted in the value's row, then spread over the columns of its panel.
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

/// The panel of keys `(head_dim, 16)` that contains `slot`.
fn panel<'a, T>(keys: &'a mut [T], shape: &CacheShape, slot: usize) -> &'a mut [T] {
    &mut keys[slot / PANEL * shape.head_dim * PANEL..][..shape.head_dim * PANEL]
}

/// The value `(head_dim)` at `slot`.
fn row<'a, T>(values: &'a mut [T], shape: &CacheShape, slot: usize) -> &'a mut [T] {
    &mut values[slot * shape.width..][..shape.head_dim]
}

/// Writes `key (head_dim)` to the column of `slot` in `panel (head_dim, 16)`.
fn spread<T: Copy>(key: &[T], panel: &mut [T], slot: usize) {
    for (column, key) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(key) {
        column[slot % PANEL] = *key;
    }
}
