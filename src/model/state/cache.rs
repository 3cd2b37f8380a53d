//! The KV cache: keys and values in pages of 64 positions.

use std::sync::Arc;

use half::f16;

use crate::error::{Error, Result};
use crate::kernels::{INT8_GROUP, Kernel, KvSlice, PAGE};
use crate::model::config::{Config, LayerConfig};
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
    /// INT8 with a scale per position and 32 numbers: about half the memory of F16. Keys and values are rotated first, so
    /// that single large numbers do not coarsen the others.
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

    /// The largest number that it holds; no limit for types that hold all of F32.
    pub(in crate::model) fn largest(self) -> Option<f32> {
        (self == CacheType::F16).then(|| f16::MAX.to_f32())
    }
}

/// The largest number of numbers that are rotated together.
const MAX_ROTATION: usize = 256;
/// Numbers of a key that are converted before they are spread over the columns of its panel.
const CONVERTED: usize = MAX_ROTATION;

/// The keys and values of one layer in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct LayerShape {
    /// Heads; 0 in a layer that reads those of another one.
    pub(in crate::model) kv_heads: usize,
    /// Width of a key.
    pub(in crate::model) head_dim: usize,
    /// Width of a value.
    pub(in crate::model) value_dim: usize,
    /// Width of a stored value: `value_dim` rounded up to whole registers.
    pub(in crate::model) width: usize,
    cache_type: CacheType,
    /// The first cache line of the layer in a page; saturating.
    at: usize,
}

impl LayerShape {
    /// Cache lines of one head's keys, its values, the scales of its keys and those of its values. A page has one
    /// position per byte of a line, so a byte per position is one line.
    fn head(&self) -> [usize; 4] {
        const { assert!(PAGE == size_of::<CacheLine>()) };
        let bytes = self.cache_type.bytes();
        let [keys, values] = [self.head_dim, self.value_dim].map(|width| self.groups(width) * size_of::<u16>());
        [self.head_dim * bytes, self.width * bytes, keys, values]
    }

    /// Groups of a key or value that have a scale: none except in INT8.
    fn groups(&self, width: usize) -> usize {
        if self.cache_type == CacheType::Int8 { width.div_ceil(INT8_GROUP) } else { 0 }
    }

    /// Numbers of a key that are rotated together before they become INT8: the largest power of two that divides
    /// its width. 1 for types that are not rotated.
    ///
    /// The rotation is a Walsh-Hadamard transform (Ashkboos et al. 2024, arXiv 2404.00456). Queries take it too, which leaves
    /// the scores as they are. It spreads a large number evenly over its block, as a few channels of keys have in many
    /// models.
    pub(in crate::model) fn key_rotation(&self) -> usize {
        self.rotation(self.head_dim)
    }

    /// As [`LayerShape::key_rotation`], of a value: the result of attention takes it back.
    pub(in crate::model) fn value_rotation(&self) -> usize {
        self.rotation(self.value_dim)
    }

    fn rotation(&self, width: usize) -> usize {
        match self.cache_type {
            CacheType::Int8 => (1 << width.trailing_zeros().min(usize::BITS - 1)).min(MAX_ROTATION),
            CacheType::F32 | CacheType::F16 => 1,
        }
    }

    /// The lines of one head.
    fn lines(&self, head: usize) -> std::ops::Range<usize> {
        let len = self.head().iter().sum::<usize>();
        self.at + head * len..self.at + (head + 1) * len
    }
}

/// The shape of a KV cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) struct CacheShape {
    layers: Arc<[LayerShape]>,
    pub(in crate::model) cache_type: CacheType,
    /// Cache lines of a page. `None` when the number overflows.
    page_lines: Option<usize>,
}

impl CacheShape {
    /// The shape of the cache of a model.
    pub(in crate::model) fn of(config: &Config, cache_type: CacheType) -> CacheShape {
        let mut page_lines = Some(0usize);
        let layer = |layer: &LayerConfig| {
            let kv_heads = if layer.shares.is_some() { 0 } else { layer.kv_heads };
            let (head_dim, value_dim) = (layer.head_dim, layer.value_dim);
            let width = value_dim.next_multiple_of(PANEL);
            let at = page_lines.unwrap_or(usize::MAX);
            let shape = LayerShape { kv_heads, head_dim, value_dim, width, cache_type, at };
            let lines = shape.head().iter().sum::<usize>().checked_mul(kv_heads);
            page_lines = page_lines.zip(lines).and_then(|(before, own)| before.checked_add(own));
            shape
        };
        let layers = config.layers.iter().map(layer).collect();
        CacheShape { layers, cache_type, page_lines }
    }

    /// The keys and values of layer `index`.
    pub(in crate::model) fn layer(&self, index: usize) -> &LayerShape {
        &self.layers[index]
    }

    /// The layers.
    pub(super) fn layers(&self) -> &[LayerShape] {
        &self.layers
    }

    /// Bytes of the pages for `tokens` tokens. `None` when the number overflows.
    pub(in crate::model) fn bytes(&self, tokens: usize) -> Option<usize> {
        self.page_lines?.checked_mul(size_of::<CacheLine>())?.checked_mul(tokens.div_ceil(PAGE))
    }

    /// Bytes of a page, saturating.
    pub(in crate::model) fn page_bytes(&self) -> usize {
        self.page_lines.map_or(usize::MAX, |lines| lines.saturating_mul(size_of::<CacheLine>()))
    }
}

/// The keys and values of one head of one layer in a page.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct PageHead<'a> {
    /// `(PAGE / 16, head_dim, 16)`, so that a register holds one dimension of 16 positions.
    pub(in crate::model) keys: KvSlice<'a>,
    /// `(PAGE, width)`
    pub(in crate::model) values: KvSlice<'a>,
    /// Scales of keys and of values, each `(groups, PAGE)` in BF16, for INT8.
    pub(in crate::model) scales: Option<[&'a [u16]; 2]>,
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
        let len = shape.page_lines.unwrap_or(usize::MAX);
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
        for layer in shape.layers() {
            let [keys, values, ..] = layer.head();
            for head in 0..layer.kv_heads {
                let (keys, rest) = self.lines[layer.lines(head)].split_at_mut(keys);
                let (values, scales) = rest.split_at_mut(values);
                // Each column holds one dimension of 16 positions.
                let columns = bytemuck::cast_slice_mut::<CacheLine, u8>(keys).chunks_exact_mut(PANEL * bytes);
                for (i, column) in columns.enumerate() {
                    let kept = slot.saturating_sub(i / layer.head_dim * PANEL).min(PANEL);
                    column[kept * bytes..].fill(0);
                }
                bytemuck::cast_slice_mut::<CacheLine, u8>(values)[slot * layer.width * bytes..].fill(0);
                for scales in bytemuck::cast_slice_mut::<CacheLine, u16>(scales).chunks_exact_mut(PAGE) {
                    scales[slot..].fill(0);
                }
            }
        }
    }

    /// The keys and values of one head.
    pub(in crate::model) fn head(&self, shape: &CacheShape, layer: usize, head: usize) -> PageHead<'_> {
        let layer = shape.layer(layer);
        let [keys, values, key_scales, _] = layer.head();
        let (keys, lines) = self.lines[layer.lines(head)].split_at(keys);
        let (values, lines) = lines.split_at(values);
        let slice = |lines| match shape.cache_type {
            CacheType::F32 => KvSlice::F32(bytemuck::cast_slice(lines)),
            CacheType::F16 => KvSlice::F16(bytemuck::cast_slice(lines)),
            CacheType::Int8 => KvSlice::Int8(bytemuck::cast_slice(lines)),
        };
        let (of_keys, of_values) = lines.split_at(key_scales);
        let scales = (key_scales > 0).then(|| [of_keys, of_values].map(bytemuck::cast_slice));
        PageHead { keys: slice(keys), values: slice(values), scales }
    }

    /// Stores key `(head_dim)` and value `(value_dim)` of one head at `slot` of the page. Returns whether the type holds them: a finite
    /// number that F16 does not hold is infinite in the page.
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
    ) -> bool {
        let cache_type = shape.cache_type;
        let shape = shape.layer(layer);
        let [keys, values, scales, _] = shape.head();
        let (keys, lines) = self.lines[shape.lines(head)].split_at_mut(keys);
        let (values, lines) = lines.split_at_mut(values);
        match cache_type {
            CacheType::F32 => {
                let keys: &mut [f32] = bytemuck::cast_slice_mut(keys);
                spread(key, panel(keys, shape, slot), slot);
                row(bytemuck::cast_slice_mut(values), shape, slot).copy_from_slice(value);
            }
            CacheType::F16 => {
                let mut converted = [f16::ZERO; CONVERTED];
                let panel = panel(bytemuck::cast_slice_mut(keys), shape, slot);
                for (key, panel) in key.chunks(CONVERTED).zip(panel.chunks_mut(CONVERTED * PANEL)) {
                    let converted = &mut converted[..key.len()];
                    kernel.to_f16(key, converted);
                    spread(converted, panel, slot);
                }
                kernel.to_f16(value, row(bytemuck::cast_slice_mut(values), shape, slot));
                return fits_f16(key) && fits_f16(value);
            }
            CacheType::Int8 => {
                let (key_scales, value_scales) = lines.split_at_mut(scales);
                let key_scales: &mut [u16] = bytemuck::cast_slice_mut(key_scales);
                let panel = panel(bytemuck::cast_slice_mut(keys), shape, slot);
                let mut codes = [0; CONVERTED];
                // Whole units of the conversion, a part of the key at a time.
                let parts = key.chunks(CONVERTED).zip(panel.chunks_mut(CONVERTED * PANEL));
                for ((key, panel), scales) in parts.zip(key_scales.chunks_mut(CONVERTED / INT8_GROUP * PAGE)) {
                    let codes = &mut codes[..key.len()];
                    to_int8(kernel, shape.key_rotation(), key, codes, scales, slot);
                    spread(codes, panel, slot);
                }
                let row: &mut [i8] = row(bytemuck::cast_slice_mut(values), shape, slot);
                to_int8(kernel, shape.value_rotation(), value, row, bytemuck::cast_slice_mut(value_scales), slot);
            }
        }
        true
    }
}

/// Whether F16 holds all finite numbers among `x`.
fn fits_f16(x: &[f32]) -> bool {
    // From the first number that is rounded to infinity, 65520, to the largest finite one. Without a branch per number, so
    // that the compiler vectorizes the loop.
    const { assert!(f32::from_bits(0x477f_f000) == 65520.0) };
    let beyond = |x: &f32| (x.abs().to_bits().wrapping_sub(0x477f_f000) <= 0x7f7f_ffff - 0x477f_f000) as u32;
    x.iter().map(beyond).fold(0, |any, beyond| any | beyond) == 0
}

/// Rotates a key or value, and stores it as codes and as scales `(groups, PAGE)` at `slot`.
fn to_int8(kernel: &Kernel, block: usize, x: &[f32], codes: &mut [i8], scales: &mut [u16], slot: usize) {
    // Whole blocks of the rotation and whole groups.
    let unit = block.max(INT8_GROUP);
    let mut rotated = [0.0; MAX_ROTATION];
    let groups = unit / INT8_GROUP;
    for (unit, (x, scales)) in codes.chunks_mut(unit).zip(x.chunks(unit).zip(scales.chunks_mut(groups * PAGE))) {
        let rotated = &mut rotated[..x.len()];
        rotated.copy_from_slice(x);
        kernel.hadamard(rotated, block);
        let groups = rotated.chunks(INT8_GROUP).zip(unit.chunks_mut(INT8_GROUP));
        for ((x, codes), scales) in groups.zip(scales.chunks_mut(PAGE)) {
            // BF16 scales are the upper half of an F32.
            scales[slot] = (kernel.to_int8(x, codes).to_bits() >> 16) as u16;
        }
    }
}

/// The panel of keys `(head_dim, 16)` that contains `slot`.
fn panel<'a, T>(keys: &'a mut [T], shape: &LayerShape, slot: usize) -> &'a mut [T] {
    &mut keys[slot / PANEL * shape.head_dim * PANEL..][..shape.head_dim * PANEL]
}

/// The value `(value_dim)` at `slot`.
fn row<'a, T>(values: &'a mut [T], shape: &LayerShape, slot: usize) -> &'a mut [T] {
    &mut values[slot * shape.width..][..shape.value_dim]
}

/// Writes `key (head_dim)` to the column of `slot` in `panel (head_dim, 16)`.
fn spread<T: Copy>(key: &[T], panel: &mut [T], slot: usize) {
    for (column, key) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(key) {
        column[slot % PANEL] = *key;
    }
}
