//! The integer product.
//!
//! `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs of products in 16 bits, where it saturates. Codes 0
//! to 15 times activations leave room for the 8 pairs of a whole block: 2 * 15 * 127 * 8 = 30480. So 4-bit codes are
//! widened to 32 bits once a group. 8-bit codes and table values are signed and multiplied as |w| with sign(w) x: a pair
//! is at most 2 * 128 * 127 = 32512 and widened at once. In pseudo-code, for `S` activation rows and a side of a panel:
//!
//! ```text
//! for each half of a block of 32 columns:
//!     w[0..4] = unpacked codes of 2 or 4 lines    (4 registers: 8 rows x 4 weights each, used for all S rows)
//!     for each of S rows:
//!         pairs += vpmaddubsw(w[j], x[j]) for j in 0..4           (4-bit codes times activations, broadcast)
//!         dot += vpmaddwd(vpmaddubsw(|w[j]|, sign(w[j]) x[j]), 1) for j in 0..4           (signed weights)
//!     at the end of a group:
//!         dot = zero point + vpmaddwd(pairs, 1)                   (4-bit codes)
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{Both, SIDES, load, load_f16, load_table, store_side};
use crate::kernels::activations::{Activations, TALLEST, Tile};
use crate::quant::packed::{Code, Line, PANEL, Packed, Panel};
use crate::threads::Columns;

const INT4: u8 = 0;
const TABLE4: u8 = 1;
const INT8: u8 = 2;

/// Bytes of activations that stay in the second-level cache while the panels go by.
const CACHE_BYTES: usize = 256 << 10;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    let layout = w.layout();
    match (layout.code, layout.group, layout.min) {
        (Code::Int4, 32, false) => tiles::<INT4, 1, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 32, true) => tiles::<INT4, 1, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, false) => tiles::<INT4, 2, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, true) => tiles::<INT4, 2, true>(w, panels, x, out, &[0; 16]),
        (Code::Table4(table), 32, false) => tiles::<TABLE4, 1, false>(w, panels, x, out, &table),
        (Code::Table4(table), 32, true) => tiles::<TABLE4, 1, true>(w, panels, x, out, &table),
        (Code::Table4(table), _, false) => tiles::<TABLE4, 2, false>(w, panels, x, out, &table),
        (Code::Table4(table), _, true) => tiles::<TABLE4, 2, true>(w, panels, x, out, &table),
        (Code::Int8, 32, false) => tiles::<INT8, 1, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, 32, true) => tiles::<INT8, 1, true>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, false) => tiles::<INT8, 2, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, true) => tiles::<INT8, 2, true>(w, panels, x, out, &[0; 16]),
        (Code::F32 | Code::F16 | Code::BF16, ..) => unreachable!("float layouts go to product_float"),
    }
}

/// All rows times all panels: rows in slices that stay in the cache, in each slice every panel, in each panel tiles.
#[target_feature(enable = "avx2,fma,f16c")]
fn tiles<const CODE: u8, const HALVES: usize, const MIN: bool>(
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
    table: &[i8; 16],
) {
    let slice = (CACHE_BYTES / (x.row_lines() * size_of::<Line>()).max(1)).max(TALLEST) / TALLEST * TALLEST;
    for first in (0..x.rows()).step_by(slice) {
        let last = x.rows().min(first + slice);
        for (p, index) in panels.clone().enumerate() {
            let panel = w.panel(index);
            let mut row = first;
            while row < last {
                row += match Activations::height(x.rows() - row) {
                    16 => tile::<CODE, HALVES, MIN, 16, 4, 1>(&panel, w.gain(), x, row, out, p, table),
                    8 => tile::<CODE, HALVES, MIN, 8, 4, 1>(&panel, w.gain(), x, row, out, p, table),
                    4 => tile::<CODE, HALVES, MIN, 4, 4, 1>(&panel, w.gain(), x, row, out, p, table),
                    2 => tile::<CODE, HALVES, MIN, 2, 2, 2>(&panel, w.gain(), x, row, out, p, table),
                    _ => tile::<CODE, HALVES, MIN, 1, 1, 2>(&panel, w.gain(), x, row, out, p, table),
                };
            }
        }
    }
}

/// `R` rows times one panel, `S` rows and `T` sides at a time, as registers are few. Returns `R`.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const CODE: u8, const HALVES: usize, const MIN: bool, const R: usize, const S: usize, const T: usize>(
    panel: &Panel<'_>,
    gain: f32,
    x: &Activations,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
    table: &[i8; 16],
) -> usize {
    let (blocks, x) = (x.blocks(), x.tile::<R>(row));
    let (table, gain) = (load_table(table), _mm256_set1_ps(gain));
    for side in (0..SIDES).step_by(T) {
        for first in (0..R).step_by(S) {
            let sums = strip::<CODE, HALVES, MIN, R, S, T>(panel, blocks, &x, first, side, table);
            for (r, sums) in sums.into_iter().enumerate() {
                let out = &mut out.row_mut(row + first + r)[p * PANEL..];
                (0..T).for_each(|t| store_side(_mm256_mul_ps(sums[t], gain), side + t, out));
            }
        }
    }
    R
}

/// `S` rows of a tile, from `first` on, times `T` sides of a panel, from `side` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn strip<const CODE: u8, const HALVES: usize, const MIN: bool, const R: usize, const S: usize, const T: usize>(
    panel: &Panel<'_>,
    blocks: usize,
    x: &Tile<'_, R>,
    first: usize,
    side: usize,
    table: __m256i,
) -> [[__m256; T]; S] {
    const { assert!(HALVES == 1 || HALVES == 2) };
    assert!(first <= R - S && side <= SIDES - T);
    // All cut to the same length once, so that the loop below needs no bounds checks.
    let (codes, x_scales) = (&x.codes[..blocks], &x.scales[..blocks]);
    let (zeros, sums) = (&x.zeros[..blocks], &x.sums[..blocks]);
    let (half_zeros, half_sums) = (&x.half_zeros[..blocks], &x.half_sums[..blocks]);
    let scales: &[[Both<f16>; HALVES]] = &bytemuck::cast_slice(panel.scales)[..blocks];
    let mins: &[[Both<f16>; HALVES]] = if MIN { &bytemuck::cast_slice(panel.mins)[..blocks] } else { scales };
    let mut acc = [[_mm256_setzero_ps(); T]; S];
    for b in 0..blocks {
        for t in 0..T {
            let mut partial = [_mm256_setzero_si256(); S];
            for half in 0..2 {
                let w = unpack::<CODE>(panel.codes, b, half, side + t, table);
                for r in 0..S {
                    let codes = &codes[b][first + r];
                    for j in 0..4 {
                        partial[r] = add_dot::<CODE>(partial[r], w[j], _mm256_set1_epi32(codes[4 * half + j]));
                    }
                }
                if HALVES == 1 && half == 0 {
                    continue;
                }
                let group = if HALVES == 1 { 0 } else { half };
                let scale = load_f16(&scales[b][group][side + t]);
                let min = load_f16(&mins[b][group][side + t]);
                for r in 0..S {
                    let mut dot = partial[r];
                    if CODE == INT4 {
                        dot = _mm256_madd_epi16(dot, _mm256_set1_epi16(1));
                        if !MIN {
                            let zero = if HALVES == 1 { zeros[b][first + r] } else { half_zeros[b][half][first + r] };
                            dot = _mm256_add_epi32(dot, _mm256_set1_epi32(zero));
                        }
                    }
                    partial[r] = _mm256_setzero_si256();
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[b][first + r]));
                    acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, acc[r][t]);
                    if MIN {
                        let sum = if HALVES == 1 { sums[b][first + r] } else { half_sums[b][half][first + r] };
                        acc[r][t] = _mm256_fmadd_ps(min, _mm256_set1_ps(sum), acc[r][t]);
                    }
                }
            }
        }
    }
    acc
}

/// Adds the products of 4 columns: pairs in 16 bits for [`INT4`], else whole dot products in 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_dot<const CODE: u8>(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    if CODE == INT4 {
        _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x))
    } else {
        // |w| <= 128 and |x| <= 127: a pair is at most 32512 and does not saturate.
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// The weights of half `half` of block `b`: register `j` holds columns `4 j .. 4 j + 4` of 8 rows. Unsigned for [`INT4`],
/// else signed.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<const CODE: u8>(codes: &[Line], b: usize, half: usize, side: usize, table: __m256i) -> [__m256i; 4] {
    if CODE == INT8 {
        let lines = &codes[b * 8..][..8];
        let signed = |j: usize| _mm256_xor_si256(load(&lines[4 * half + j], side), _mm256_set1_epi8(-128));
        [signed(0), signed(1), signed(2), signed(3)]
    } else {
        let lines = &codes[b * 4..][..4];
        let (first, second) = (load(&lines[2 * half], side), load(&lines[2 * half + 1], side));
        let low = |line| _mm256_and_si256(line, _mm256_set1_epi8(15));
        let high = |line| low(_mm256_srli_epi16::<4>(line));
        let w = [low(first), high(first), low(second), high(second)];
        let value = |w| if CODE == TABLE4 { _mm256_shuffle_epi8(table, w) } else { w };
        [value(w[0]), value(w[1]), value(w[2]), value(w[3])]
    }
}
