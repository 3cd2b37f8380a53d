//! The KV cache: keys and values in pages of 64 positions.
//!
//! A page has a part for each group of layers whose queries see equally far back. Parts that no later query sees are freed.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

pub use super::cache_type::CacheType;
use super::counted::Counted;
use super::page_head::{Int8Page, PageHead};
use super::recurrent::{Snapshot, StateShape};
use crate::error::Result;
use crate::kernels::{INT8_GROUP, Kernel, KvSlice, PAGE};
use crate::model::config::{Config, LayerConfig, Reach};
use crate::model::pipeline::held::Held;
use crate::quant::packed::{CacheLine, PANEL};

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
    /// The part of a page that it is in.
    part: usize,
    /// The first cache line of the layer in that part; saturating.
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

    /// Whether keys and values are codes.
    pub(in crate::model) fn is_int8(&self) -> bool {
        self.cache_type == CacheType::Int8
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

    /// The lines of one head in the part.
    fn lines(&self, head: usize) -> Range<usize> {
        let len = self.head().iter().sum::<usize>();
        self.at + head * len..self.at + (head + 1) * len
    }

    /// The lines of all heads in the part.
    fn all_lines(&self) -> Range<usize> {
        self.at..self.lines(self.kv_heads).start
    }
}

/// The part of a page that holds the layers whose queries see equally far back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct PartShape {
    /// How far back queries see; everything where earlier positions are never freed.
    reach: Reach,
    /// Cache lines. `None` when the number overflows.
    lines: Option<usize>,
    /// Cache lines that a limit counts: those of all stages in the driver of a pipeline, which has none itself.
    counted: Option<usize>,
}

impl PartShape {
    /// Bytes, saturating.
    pub(super) fn bytes(&self) -> usize {
        self.counted.map_or(usize::MAX, |lines| lines.saturating_mul(size_of::<CacheLine>()))
    }

    /// The first page that a query at `position` or later sees.
    pub(super) fn first_seen(&self, position: usize) -> usize {
        self.reach.oldest(position) / PAGE
    }

    /// The first page that a sequence of `len` tokens keeps. A page more than it sees, so that the last tokens can be
    /// taken back.
    pub(super) fn first_kept(&self, len: usize) -> usize {
        self.first_seen(len.saturating_sub(PAGE))
    }
}

/// The shape of a KV cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) struct CacheShape {
    layers: Arc<[LayerShape]>,
    parts: Arc<[PartShape]>,
    pub(in crate::model) cache_type: CacheType,
    /// The states of layers that have one, instead of keys and values or in addition to them.
    state: Option<Arc<StateShape>>,
    /// Pages from one snapshot of the states to the next.
    interval: usize,
}

impl CacheShape {
    /// The shape of the cache of a model.
    pub(in crate::model) fn of(config: &Config, cache_type: CacheType) -> CacheShape {
        CacheShape::of_part(config, cache_type, &Held::whole(config.layers.len()))
    }

    /// The shape of the cache of a part of a model. Its sessions have the pages, parts of pages and snapshots of the whole model's
    /// and make the same decisions, but the other layers have no bytes.
    pub(in crate::model) fn of_part(config: &Config, cache_type: CacheType, held: &Held) -> CacheShape {
        let counts_all = held.is_nothing();
        let mut whole = (0usize, StateShape::of(config, &Held::whole(config.layers.len())));
        let mut parts: Vec<PartShape> = Vec::new();
        let layer = |(index, layer): (usize, &LayerConfig)| {
            let kv_heads = if layer.shares.is_some() { 0 } else { layer.kv_heads };
            let reach = reach(config, index);
            let part = parts.iter().position(|part| part.reach == reach).unwrap_or(parts.len());
            if part == parts.len() {
                parts.push(PartShape { reach, lines: Some(0), counted: Some(0) });
            }
            let (head_dim, value_dim) = (layer.head_dim, layer.value_dim);
            let width = value_dim.next_multiple_of(PANEL);
            let (own, is_held) = (&mut parts[part], held.layers.contains(&index));
            let at = own.lines.unwrap_or(usize::MAX);
            let shape = LayerShape { kv_heads, head_dim, value_dim, width, cache_type, part, at };
            let lines = shape.head().iter().sum::<usize>().checked_mul(kv_heads);
            whole.0 = whole.0.saturating_add(lines.unwrap_or(usize::MAX));
            let add = |before: Option<usize>| before.zip(lines).and_then(|(before, own)| before.checked_add(own));
            if is_held {
                own.lines = add(own.lines);
            }
            if is_held || counts_all {
                own.counted = add(own.counted);
            }
            LayerShape { kv_heads: if is_held { kv_heads } else { 0 }, ..shape }
        };
        let layers = config.layers.iter().enumerate().map(layer).collect();
        let (lines, states) = whole;
        let interval =
            snapshot_interval(states.map_or(0, |states| states.bytes()), lines.saturating_mul(size_of::<CacheLine>()));
        let state = StateShape::of(config, held).map(Arc::new);
        CacheShape { layers, parts: parts.into(), cache_type, state, interval }
    }

    /// The keys and values of layer `index`.
    pub(in crate::model) fn layer(&self, index: usize) -> &LayerShape {
        &self.layers[index]
    }

    /// The layers.
    pub(super) fn layers(&self) -> &[LayerShape] {
        &self.layers
    }

    /// The states of layers that have one.
    pub(super) fn state(&self) -> Option<&Arc<StateShape>> {
        self.state.as_ref()
    }

    /// Pages from one snapshot of the states to the next.
    pub(super) fn snapshot_interval(&self) -> usize {
        self.interval
    }

    /// Bytes of the states of a sequence.
    pub(in crate::model) fn state_bytes(&self) -> usize {
        self.state.as_ref().map_or(0, |state| state.bytes())
    }

    /// The parts of a page.
    pub(super) fn parts(&self) -> &[PartShape] {
        &self.parts
    }

    /// Bytes of the pages for `tokens` tokens when none is freed. `None` when the number overflows.
    pub(in crate::model) fn bytes(&self, tokens: usize) -> Option<usize> {
        self.checked_page_bytes()?.checked_mul(tokens.div_ceil(PAGE))
    }

    /// Bytes of the pages that a sequence of `tokens` tokens keeps, and of its states, saturating.
    pub(in crate::model) fn kept_bytes(&self, tokens: usize) -> usize {
        let pages = tokens.div_ceil(PAGE);
        let kept = |part: &PartShape| part.bytes().saturating_mul(pages - part.first_kept(tokens).min(pages));
        self.parts.iter().map(kept).fold(self.state_bytes(), usize::saturating_add)
    }

    /// Bytes of a page, saturating.
    pub(in crate::model) fn page_bytes(&self) -> usize {
        self.checked_page_bytes().unwrap_or(usize::MAX)
    }

    fn checked_page_bytes(&self) -> Option<usize> {
        let lines = self.parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.counted?));
        lines?.checked_mul(size_of::<CacheLine>())
    }
}

/// Pages from one snapshot of the states to the next. The larger states are compared with keys and values, the more, so
/// that snapshots take at most about four times as much memory as the pages.
fn snapshot_interval(state_bytes: usize, page_bytes: usize) -> usize {
    (state_bytes / page_bytes.max(1).saturating_mul(4)).next_power_of_two().clamp(MIN_INTERVAL, MAX_INTERVAL)
}

/// How far back the queries see that read the keys and values of layer `index`: its own, and those of layers that share
/// them. Without limit where they differ, and where attention is not causal, since all positions are computed together then.
fn reach(config: &Config, index: usize) -> Reach {
    let own = config.layers[index].reach();
    let differs = |layer: &LayerConfig| layer.shares == Some(index) && layer.reach() != own;
    if config.causal && !config.layers.iter().any(differs) { own } else { Reach::default() }
}

/// Keys and values of 64 positions, of every layer and head. A clone shares its parts.
#[derive(Debug, Clone)]
pub(in crate::model) struct Page {
    /// Each `(layers, kv_heads, keys, values, scales of keys, scales of values)`; `None` where it is freed.
    parts: Box<[Option<Arc<Counted>>]>,
    /// The recurrent states after the last position.
    pub(super) snapshot: Option<Snapshot>,
}

impl Page {
    /// A page of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(in crate::model) fn new(shape: &CacheShape) -> Result<Page> {
        Page::with_parts(shape, |_| true)
    }

    /// A page of these parts, in order.
    pub(super) fn of(parts: impl IntoIterator<Item = Arc<Counted>>, snapshot: Option<Snapshot>) -> Page {
        Page { parts: parts.into_iter().map(Some).collect(), snapshot }
    }

    /// The parts that it has.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Arc<Counted>> {
        self.parts.iter().flatten()
    }

    /// A page without any part.
    pub(super) fn empty(shape: &CacheShape) -> Page {
        Page { parts: shape.parts.iter().map(|_| None).collect(), snapshot: None }
    }

    /// A page of zeros that has the parts for which `wanted` is true.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn with_parts(shape: &CacheShape, wanted: impl Fn(usize) -> bool) -> Result<Page> {
        let part = |(index, part): (usize, &PartShape)| wanted(index).then(|| zeros(part)).transpose();
        let parts = shape.parts.iter().enumerate().map(part).collect::<Result<_>>()?;
        Ok(Page { parts, snapshot: None })
    }

    /// Makes the parts unshared: those that other pages share are copied.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); parts may have been copied then.
    pub(super) fn unshare(&mut self, shape: &CacheShape) -> Result<()> {
        for (part, shape) in self.parts.iter_mut().zip(&*shape.parts) {
            if let Some(part) = part
                && Arc::get_mut(part).is_none()
            {
                let mut copy = Counted::try_zeroed(part.len(), part.bytes(), WHAT)?;
                copy.copy_from_slice(part);
                *part = Arc::new(copy);
            }
            debug_assert!(part.as_ref().is_none_or(|part| Some(part.len()) == shape.lines));
        }
        Ok(())
    }

    /// Frees part `index`.
    pub(super) fn free(&mut self, index: usize) {
        self.parts[index] = None;
    }

    /// Whether it has part `index`.
    pub(super) fn has(&self, index: usize) -> bool {
        self.parts[index].is_some()
    }

    /// Number of its parts, those that are freed included.
    pub(super) fn count(&self) -> usize {
        self.parts.len()
    }

    /// Whether it has all parts.
    pub(super) fn is_whole(&self) -> bool {
        self.parts.iter().all(Option::is_some)
    }

    /// Frees the parts and the snapshot that nothing else holds, and returns their bytes.
    pub(super) fn free_unshared(&mut self) -> usize {
        let unshared = |part: &&mut Option<Arc<Counted>>| part.as_ref().is_some_and(|p| Arc::strong_count(p) == 1);
        let freed = self.parts.iter_mut().filter(unshared).filter_map(Option::take);
        let parts: usize = freed.map(|part| part.bytes()).sum();
        let snapshot = self.snapshot.take_if(|snapshot| Arc::strong_count(snapshot) == 1);
        parts + snapshot.map_or(0, |snapshot| snapshot.bytes())
    }

    /// Takes the parts of `other`, and its snapshot, that it has not itself.
    pub(super) fn complete_from(&mut self, other: &Page) {
        for (own, other) in self.parts.iter_mut().zip(&other.parts) {
            if own.is_none() {
                own.clone_from(other);
            }
        }
        if self.snapshot.is_none() {
            self.snapshot.clone_from(&other.snapshot);
        }
    }

    /// Replaces parts by those of `other`, as far as it has them.
    pub(super) fn replace_by(&mut self, other: &Page) {
        for (own, other) in self.parts.iter_mut().zip(&other.parts) {
            if own.is_some() && other.is_some() {
                own.clone_from(other);
            }
        }
    }

    /// Bytes of the parts that it has, and of its snapshot.
    pub(super) fn len(&self) -> usize {
        let snapshot = self.snapshot.as_ref().map_or(0, |snapshot| snapshot.bytes());
        self.parts.iter().flatten().map(|part| part.bytes()).sum::<usize>() + snapshot
    }

    /// The address and bytes of each of its parts and of its snapshot, which clones share.
    pub(super) fn buffers(&self) -> impl Iterator<Item = (usize, usize)> {
        let snapshot = self.snapshot.iter().map(|snapshot| (Arc::as_ptr(snapshot).addr(), snapshot.bytes()));
        self.parts.iter().flatten().map(|part| (Arc::as_ptr(part).addr(), part.bytes())).chain(snapshot)
    }

    /// Bytes of the parts that other pages have, too.
    pub(super) fn shared_len(&self) -> usize {
        let shared = self.parts.iter().flatten().filter(|part| Arc::strong_count(part) > 1);
        shared.map(|part| part.bytes()).sum()
    }

    /// As [`Page::shared_len`], with the snapshot, if something else holds it.
    pub(super) fn shared_len_with_snapshot(&self) -> usize {
        let shared = self.snapshot.as_ref().filter(|snapshot| Arc::strong_count(snapshot) > 1);
        self.shared_len() + shared.map_or(0, |snapshot| snapshot.bytes())
    }

    /// The bytes of part `index`, to be written to a file.
    pub(super) fn part_bytes(&self, index: usize) -> &[u8] {
        self.parts[index].as_deref().map_or(&[], |part| bytemuck::cast_slice(part))
    }

    /// The bytes of part `index`, to be read from a file. Empty where it is shared or freed.
    pub(super) fn part_bytes_mut(&mut self, index: usize) -> &mut [u8] {
        let part = self.parts[index].as_mut().and_then(Arc::get_mut);
        part.map_or(&mut [], |part| bytemuck::cast_slice_mut(part))
    }

    /// Fills the page with `bytes (layers, heads)`: all layers in order, as if it had a single part.
    pub(super) fn fill_in_layer_order(&mut self, shape: &CacheShape, bytes: &[u8]) {
        let mut rest = bytes;
        for layer in shape.layers() {
            let lines = layer.all_lines();
            let (own, others) = rest.split_at(lines.len() * size_of::<CacheLine>());
            rest = others;
            let part = self.part_bytes_mut(layer.part);
            part[lines.start * size_of::<CacheLine>()..][..own.len()].copy_from_slice(own);
        }
    }

    /// Zeroes the positions from `slot` on of the parts that are not shared.
    pub(in crate::model) fn clear_from(&mut self, shape: &CacheShape, slot: usize) {
        let bytes = shape.cache_type.bytes();
        for layer in shape.layers() {
            let [keys, values, ..] = layer.head();
            let Some(part) = self.parts[layer.part].as_mut().and_then(Arc::get_mut) else { continue };
            for head in 0..layer.kv_heads {
                let (keys, rest) = part[layer.lines(head)].split_at_mut(keys);
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

    /// The keys and values of one head of a layer, whose part is there.
    pub(in crate::model) fn head(&self, layer: &LayerShape, head: usize) -> PageHead<'_> {
        let part = self.parts[layer.part].as_ref().expect("parts that a query sees are kept");
        let [keys, values, key_scales, _] = layer.head();
        let (keys, lines) = part[layer.lines(head)].split_at(keys);
        let (values, lines) = lines.split_at(values);
        let (of_keys, of_values) = lines.split_at(key_scales);
        match layer.cache_type {
            CacheType::F32 => PageHead::Floats {
                keys: KvSlice::F32(bytemuck::cast_slice(keys)),
                values: KvSlice::F32(bytemuck::cast_slice(values)),
            },
            CacheType::F16 => PageHead::Floats {
                keys: KvSlice::F16(bytemuck::cast_slice(keys)),
                values: KvSlice::F16(bytemuck::cast_slice(values)),
            },
            CacheType::Int8 => PageHead::Int8(Int8Page {
                keys: bytemuck::cast_slice(keys),
                values: bytemuck::cast_slice(values),
                key_scales: bytemuck::cast_slice(of_keys),
                value_scales: bytemuck::cast_slice(of_values),
            }),
        }
    }

    /// A layer of the page, to be written. Its part is there and not shared.
    pub(in crate::model) fn layer_mut<'a>(&'a mut self, layer: &'a LayerShape) -> PageLayerMut<'a> {
        let part = self.parts[layer.part].as_mut().and_then(Arc::get_mut);
        PageLayerMut { lines: part.expect("`Session::reserve` has made the page unshared"), layer }
    }
}

/// The fewest and the most pages from one snapshot to the next.
const MIN_INTERVAL: usize = 4;
const MAX_INTERVAL: usize = 16;

/// What a page is called where memory for it is missing.
const WHAT: &str = "a page of the KV cache";

/// A part of zeros.
fn zeros(part: &PartShape) -> Result<Arc<Counted>> {
    // Zeroed memory comes from the system untouched, so a page costs only the part of it that is written.
    Ok(Arc::new(Counted::try_zeroed(part.lines.unwrap_or(usize::MAX), part.bytes(), WHAT)?))
}

/// The keys and values of one layer in a page, to be written.
#[derive(Debug)]
pub(in crate::model) struct PageLayerMut<'a> {
    /// The part of the page.
    lines: &'a mut [CacheLine],
    layer: &'a LayerShape,
}

impl PageLayerMut<'_> {
    /// Stores key `(head_dim)` and value `(value_dim)` of one head at `slot` of the page. Returns whether the type holds them:
    /// a finite number that F16 does not hold is infinite in the page.
    pub(in crate::model) fn store(
        &mut self,
        kernel: &Kernel,
        head: usize,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) -> bool {
        let shape = self.layer;
        let [keys, values, scales, _] = shape.head();
        let (keys, lines) = self.lines[shape.lines(head)].split_at_mut(keys);
        let (values, lines) = lines.split_at_mut(values);
        match shape.cache_type {
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
