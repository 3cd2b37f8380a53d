//! From a file's blocks to packed panels.
//!
//! Block types keep their numbers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and the floats are packed exactly. Types with
//! scales of scales (Q2_K to Q6_K, IQ4_XS) and MXFP4 get the product of their scales rounded to F16, after the whole
//! matrix was multiplied with a power of two (its [gain](super::packed::Packed::gain)) that keeps these products in the
//! range of F16.
//!
//! A weight that is NaN or infinite makes every text nonsense, so the numbers that can be are looked at while they are in the
//! processor's cache.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::block::BlockType;
use super::packed::{BLOCK, Code, Layout, PANEL, Packed, PanelMut};
use crate::threads::Scope;

/// Weights that are packed before their source is given back: enough for all threads, and 32 MiB where they are F32.
const SLAB: usize = 8 << 20;

/// The rows of a matrix, in a file's block type.
pub trait Rows: Sync {
    /// The type of every row's bytes.
    fn block_type(&self) -> BlockType;

    /// The bytes of row `index`. `scratch` is there for sources that have to compute them.
    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8];

    /// The same rows with their columns in another order, and that order: column `i` there is column `order[i]` here. Only
    /// for sources whose columns share scales with others that do not lie beside them, but do in that order.
    fn reordered(&self) -> Option<(Vec<u32>, Box<dyn Rows + '_>)> {
        None
    }
}

/// The values of IQ4_NL and IQ4_XS codes.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// The values of MXFP4 codes, doubled to be integers.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The layout that holds the numbers of a block type. `None` for types that are not supported.
pub fn layout(block_type: BlockType) -> Option<Layout> {
    let integer = |code, group, min| Layout { code, group, min };
    Some(match block_type {
        BlockType::F32 => Layout::float(Code::F32),
        BlockType::F16 => Layout::float(Code::F16),
        BlockType::BF16 => Layout::float(Code::BF16),
        BlockType::Q4_0 => integer(Code::Int4, 32, false),
        BlockType::Q4_1 | BlockType::Q4_K => integer(Code::Int4, 32, true),
        BlockType::Q2_K => integer(Code::Int4, 16, true),
        BlockType::Q3_K => integer(Code::Int4, 16, false),
        BlockType::Q5_0 | BlockType::Q8_0 => integer(Code::Int8, 32, false),
        BlockType::Q5_1 | BlockType::Q5_K => integer(Code::Int8, 32, true),
        BlockType::Q6_K => integer(Code::Int8, 16, false),
        BlockType::IQ4_NL | BlockType::IQ4_XS => integer(Code::Table4(IQ4_VALUES), 32, false),
        BlockType::MXFP4 => integer(Code::Table4(MXFP4_VALUES), 32, false),
        _ => return None,
    })
}

/// Packs `rows x columns` weights. Row `i` of the result is row `order(i)` of the source.
///
/// `release` is called each time that some million weights of the source were read and will not be read again for a while, so
/// that a tensor that is half of a model is not in memory twice.
///
/// # Errors
/// The first row, of the result, with a scale, a minimum or a float that is NaN or infinite.
///
/// # Panics
/// If the type has no [`layout`], or a row of the source has too few bytes for `columns`: callers check both first.
pub fn pack_in_slabs(
    scope: &Scope<'_>,
    source: &dyn Rows,
    rows: usize,
    columns: usize,
    order: &(dyn Fn(usize) -> usize + Sync),
    release: &dyn Fn(),
) -> Result<Packed, usize> {
    let block_type = source.block_type();
    let layout = layout(block_type).expect("callers check that the type has a layout");
    let slab = (SLAB / columns.max(1) / PANEL).max(1); // panels
    let gain = gain(scope, source, rows, columns, order, slab, release);
    let mut packed = Packed::zeroed(rows, columns, layout, gain);
    let unusable = AtomicUsize::new(usize::MAX);
    let mut panels = packed.panels_mut();
    for (i, panels) in panels.chunks_mut(slab).enumerate() {
        pack_panels(scope, source, rows, columns, order, i * slab, panels, layout, gain, &unusable);
        release();
    }
    drop(panels);
    let unusable = unusable.into_inner();
    if unusable < rows {
        return Err(unusable);
    }
    packed.merge_groups();
    Ok(packed)
}

/// Fills `panels`, the first of which is number `first`, and lowers `unusable` to the first row that is.
#[allow(clippy::too_many_arguments)]
fn pack_panels(
    scope: &Scope<'_>,
    source: &dyn Rows,
    rows: usize,
    columns: usize,
    order: &(dyn Fn(usize) -> usize + Sync),
    first: usize,
    panels: &mut [PanelMut<'_>],
    layout: Layout,
    gain: f32,
    unusable: &AtomicUsize,
) {
    let block_type = source.block_type();
    scope.for_each_chunk(panels, 1, |index, panel| {
        let (index, panel) = (first + index, &mut panel[0]);
        let mut scratch = Vec::new();
        for lane in 0..PANEL.min(rows - index * PANEL) {
            let bytes = source.row(order(index * PANEL + lane), &mut scratch);
            match block_type {
                BlockType::F32 => floats(bytes, columns, |column, b: [u8; 4]| {
                    panel.set_float(Code::F32, lane, column, f32::from_le_bytes(b));
                }),
                BlockType::F16 => floats(bytes, columns, |column, b: [u8; 2]| {
                    panel.set_float(Code::F16, lane, column, f16::from_le_bytes(b).to_f32());
                }),
                BlockType::BF16 => floats(bytes, columns, |column, b: [u8; 2]| {
                    panel.set_float(Code::BF16, lane, column, bf16::from_le_bytes(b).to_f32());
                }),
                BlockType::Q4_0 | BlockType::IQ4_NL => nibbled::<18>(bytes, panel, lane),
                BlockType::Q4_1 => nibbled::<20>(bytes, panel, lane),
                BlockType::Q5_0 => small::<22>(bytes, panel, lane, layout, |block, codes| {
                    fifth_bits(&block[6..], &block[2..], codes);
                    codes.iter_mut().for_each(|code| *code -= 16);
                    [bits(block, 0), f16::ZERO]
                }),
                BlockType::Q5_1 => small::<24>(bytes, panel, lane, layout, |block, codes| {
                    fifth_bits(&block[8..], &block[4..], codes);
                    [bits(block, 0), bits(block, 2)]
                }),
                BlockType::Q8_0 => small::<34>(bytes, panel, lane, layout, |block, codes| {
                    codes.iter_mut().zip(&block[2..]).for_each(|(code, byte)| *code = *byte as i8);
                    [bits(block, 0), f16::ZERO]
                }),
                BlockType::MXFP4 => small::<17>(bytes, panel, lane, layout, |block, codes| {
                    nibbles(&block[1..], codes);
                    [f16::from_f32(e8m0(block[0]) / gain), f16::ZERO]
                }),
                _ => large(block_type, bytes, panel, lane, layout, gain),
            }
        }
        if let Some(row) = panel.unusable_row(layout.code) {
            unusable.fetch_min(index * PANEL + row, Ordering::Relaxed);
        }
    });
}

/// The power of two that brings a matrix's largest scale or minimum below 2^15, for types whose scales are computed.
fn gain(
    scope: &Scope<'_>,
    source: &dyn Rows,
    rows: usize,
    columns: usize,
    order: &(dyn Fn(usize) -> usize + Sync),
    slab: usize,
    release: &dyn Fn(),
) -> f32 {
    /// Largest |d| and |dmin| of a row, each times its largest factor.
    fn bound<const N: usize>(bytes: &[u8], fields: &[(usize, f32)]) -> f32 {
        let blocks = bytes.as_chunks::<N>().0;
        let all = blocks.iter().flat_map(|block| fields.iter().map(|(at, factor)| half(block, *at).abs() * factor));
        all.filter(|x| x.is_finite()).fold(0.0, f32::max)
    }
    let block_type = source.block_type();
    let of_row = |bytes: &[u8]| match block_type {
        BlockType::Q2_K => bound::<84>(bytes, &[(80, 15.0), (82, 15.0)]),
        BlockType::Q3_K => bound::<110>(bytes, &[(108, 32.0)]),
        BlockType::Q4_K => bound::<144>(bytes, &[(0, 63.0), (2, 63.0)]),
        BlockType::Q5_K => bound::<176>(bytes, &[(0, 63.0), (2, 63.0)]),
        BlockType::Q6_K => bound::<210>(bytes, &[(208, 128.0)]),
        BlockType::IQ4_XS => bound::<136>(bytes, &[(0, 32.0)]),
        _ => bytes.as_chunks::<17>().0.iter().map(|block| e8m0(block[0])).fold(0.0, f32::max),
    };
    if !matches!(
        block_type,
        BlockType::Q2_K
            | BlockType::Q3_K
            | BlockType::Q4_K
            | BlockType::Q5_K
            | BlockType::Q6_K
            | BlockType::IQ4_XS
            | BlockType::MXFP4
    ) || columns == 0
    {
        return 1.0;
    }
    let mut bounds = vec![0.0f32; rows];
    for (s, bounds) in bounds.chunks_mut(slab * PANEL).enumerate() {
        scope.for_each_chunk(bounds, PANEL, |chunk, bounds| {
            let mut scratch = Vec::new();
            for (i, bound) in bounds.iter_mut().enumerate() {
                *bound = of_row(source.row(order((s * slab + chunk) * PANEL + i), &mut scratch));
            }
        });
        release();
    }
    let bound = bounds.into_iter().fold(0.0, f32::max);
    if bound > 0.0 { libm::exp2f((libm::log2f(bound) - 14.0).ceil().clamp(-100.0, 100.0)) } else { 1.0 }
}

fn floats<const N: usize>(bytes: &[u8], columns: usize, mut set: impl FnMut(usize, [u8; N])) {
    for (column, value) in bytes.as_chunks::<N>().0[..columns].iter().enumerate() {
        set(column, *value);
    }
}

/// Packs a row of blocks of 32 weights. `split` fills in the codes and returns scale and minimum.
#[inline(always)]
fn small<const N: usize>(
    bytes: &[u8],
    panel: &mut PanelMut<'_>,
    lane: usize,
    layout: Layout,
    split: impl Fn(&[u8; N], &mut [i8; BLOCK]) -> [f16; 2],
) {
    let mut codes = [0i8; BLOCK];
    for (b, block) in bytes.as_chunks::<N>().0[..panel.scales.len()].iter().enumerate() {
        let [scale, min] = split(block, &mut codes);
        panel.set_codes(layout.code, lane, b, &codes);
        panel.scales[b][lane] = scale;
        if layout.min {
            panel.mins[b][lane] = min;
        }
    }
}

/// Packs a row of blocks that hold an F16 scale at byte 0, perhaps an F16 minimum at byte 2, and 32 nibbles at the end, all
/// as they are.
#[inline(always)]
fn nibbled<const N: usize>(bytes: &[u8], panel: &mut PanelMut<'_>, lane: usize) {
    for (b, block) in bytes.as_chunks::<N>().0[..panel.scales.len()].iter().enumerate() {
        let Some((head, codes)) = block.split_last_chunk() else { continue };
        panel.set_nibbles(lane, b, codes);
        panel.scales[b][lane] = bits(head, 0);
        if let Some([_, min]) = head.as_chunks().0.first_chunk() {
            panel.mins[b][lane] = f16::from_le_bytes(*min);
        }
    }
}

/// The F16 at byte `at`.
#[inline(always)]
fn bits(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// The F16 at byte `at` as a number.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    bits(block, at).to_f32()
}

/// The scale of MXFP4 for doubled values: 2^(e - 128).
fn e8m0(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// 32 codes from 16 bytes: the low nibbles, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [i8; BLOCK]) {
    for (j, byte) in bytes[..16].iter().enumerate() {
        codes[j] = (byte & 15) as i8;
        codes[j + 16] = (byte >> 4) as i8;
    }
}

/// As [`nibbles`], with a fifth bit from 4 more bytes.
#[inline(always)]
fn fifth_bits(bytes: &[u8], high: &[u8], codes: &mut [i8; BLOCK]) {
    nibbles(bytes, codes);
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((high >> i & 1) << 4) as i8;
    }
}

/// Packs a row of blocks of 256 weights.
fn large(block_type: BlockType, bytes: &[u8], panel: &mut PanelMut<'_>, lane: usize, layout: Layout, gain: f32) {
    let per_block = 256 / layout.group;
    for (b, block) in bytes.chunks_exact(block_type.block_bytes()).take(panel.scales.len() / per_block).enumerate() {
        let mut codes = [0i8; 256];
        let mut scales = [0.0f32; 16];
        let mut mins = [0.0f32; 16];
        match block_type {
            BlockType::Q2_K => q2_k(block, &mut codes, &mut scales, &mut mins),
            BlockType::Q3_K => q3_k(block, &mut codes, &mut scales),
            BlockType::Q4_K | BlockType::Q5_K => {
                q45_k(block, block_type == BlockType::Q5_K, &mut codes, &mut scales, &mut mins);
            }
            BlockType::Q6_K => q6_k(block, &mut codes, &mut scales),
            BlockType::IQ4_XS => iq4_xs(block, &mut codes, &mut scales),
            _ => unreachable!("the layout table names no other type of 256"),
        }
        for (i, codes) in codes.as_chunks::<BLOCK>().0.iter().enumerate() {
            panel.set_codes(layout.code, lane, b * 8 + i, codes);
        }
        for i in 0..per_block {
            panel.scales[b * per_block + i][lane] = f16::from_f32(scales[i] / gain);
            if layout.min {
                panel.mins[b * per_block + i][lane] = f16::from_f32(mins[i] / gain);
            }
        }
    }
}

fn q2_k(block: &[u8], codes: &mut [i8; 256], scales: &mut [f32; 16], mins: &mut [f32; 16]) {
    let (d, dmin) = (half(block, 80), half(block, 82));
    for i in 0..16 {
        scales[i] = d * f32::from(block[i] & 15);
        mins[i] = -dmin * f32::from(block[i] >> 4);
    }
    for (i, code) in codes.iter_mut().enumerate() {
        let (part, shift, l) = (i / 128, i % 128 / 32 * 2, i % 32);
        *code = (block[16 + 32 * part + l] >> shift & 3) as i8;
    }
}

fn q3_k(block: &[u8], codes: &mut [i8; 256], scales: &mut [f32; 16]) {
    let (d, packed) = (half(block, 108), &block[96..108]);
    for (k, scale) in scales.iter_mut().enumerate() {
        let low = if k < 8 { packed[k] & 15 } else { packed[k - 8] >> 4 };
        let high = packed[8 + k % 4] >> (2 * (k / 4)) & 3;
        *scale = d * (f32::from(low | high << 4) - 32.0);
    }
    for (i, code) in codes.iter_mut().enumerate() {
        let (part, shift, l) = (i / 128, i % 128 / 32, i % 32);
        let low = block[32 + 32 * part + l] >> (2 * shift) & 3;
        let set = block[l] >> (4 * part + shift) & 1;
        // 8 is the zero point of 4-bit codes; the codes of this type are -4..=3.
        *code = 8 + low as i8 - if set == 0 { 4 } else { 0 };
    }
}

fn q45_k(block: &[u8], five: bool, codes: &mut [i8; 256], scales: &mut [f32; 16], mins: &mut [f32; 16]) {
    let (d, dmin, s) = (half(block, 0), half(block, 2), &block[4..16]);
    for j in 0..8 {
        let (scale, min) = if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
        };
        scales[j] = d * f32::from(scale);
        mins[j] = -dmin * f32::from(min);
    }
    let (high, low) = if five { block[16..].split_at(32) } else { (&[][..], &block[16..]) };
    for (i, code) in codes.iter_mut().enumerate() {
        let (sub, l) = (i / 32, i % 32);
        *code = (low[sub / 2 * 32 + l] >> (sub % 2 * 4) & 15) as i8;
        if five {
            *code |= ((high[l] >> sub & 1) << 4) as i8;
        }
    }
}

fn q6_k(block: &[u8], codes: &mut [i8; 256], scales: &mut [f32; 16]) {
    let d = half(block, 208);
    for (scale, byte) in scales.iter_mut().zip(&block[192..208]) {
        *scale = d * f32::from(*byte as i8);
    }
    for (i, code) in codes.iter_mut().enumerate() {
        let (part, quarter, l) = (i / 128, i % 128 / 32, i % 32);
        let low = block[64 * part + 32 * (quarter % 2) + l] >> (quarter / 2 * 4) & 15;
        let high = block[128 + 32 * part + l] >> (2 * quarter) & 3;
        *code = (low | high << 4) as i8 - 32;
    }
}

fn iq4_xs(block: &[u8], codes: &mut [i8; 256], scales: &mut [f32; 16]) {
    let (d, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
    for b in 0..8 {
        let low = block[4 + b / 2] >> (4 * (b % 2)) & 15;
        let scale = u16::from(low) | (high >> (2 * b) & 3) << 4;
        scales[b] = d * (f32::from(scale) - 32.0);
        for j in 0..16 {
            let byte = block[8 + 16 * b + j];
            codes[32 * b + j] = (byte & 15) as i8;
            codes[32 * b + 16 + j] = (byte >> 4) as i8;
        }
    }
}
