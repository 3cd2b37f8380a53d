//! AVX2 with FMA and F16C: a panel of 16 output rows is two registers, its sides, over the same bytes.
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
#![allow(unsafe_code, reason = "intrinsics that load and store, and the entry into functions with target features")]

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use half::f16;

use super::activations::{Activations, RowMut, TALLEST, Tile};
use super::portable::{self, Activation, portable_methods};
use super::{Kernel, PAGE};
use crate::quant::packed::{Code, Line, PANEL, Packed, Panel};
use crate::threads::Columns;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug)]
pub(super) struct Avx2(());

static WITNESS: Avx2 = Avx2(());

impl Avx2 {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(&WITNESS)
    }
}

impl Kernel for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        // SAFETY: `self` exists, so `detect` has found every feature that `product` enables.
        unsafe { product(w, panels, x, out) }
    }

    fn product_float(&self, w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
        // SAFETY: as in `product`.
        unsafe { product_float(w, panels, x, stride, out) }
    }

    fn scores(&self, queries: &[f32], head_dim: usize, keys: &[f16], scale: f32, scores: &mut [f32], stride: usize) {
        // SAFETY: as in `product`.
        unsafe { all_scores(queries, head_dim, keys, scale, scores, stride) }
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        counts: &[usize],
        values: &[f16],
        width: usize,
        out: &mut [f32],
    ) {
        // SAFETY: as in `product`.
        unsafe { weighted_sum(weights, stride, counts, values, width, out) }
    }

    fn to_f16(&self, x: &[f32], out: &mut [f16]) {
        // SAFETY: as in `product`.
        unsafe { to_f16(x, out) }
    }

    fn peak_int8(&self, rounds: usize) -> (u64, i32) {
        // SAFETY: as in `product`.
        unsafe { peak_int8(rounds) }
    }

    portable_methods!("avx2,fma,f16c");
}

/// Lanes of a register: half a panel.
const LANES: usize = 8;
/// Registers that make a panel.
const SIDES: usize = PANEL / LANES;
/// Something of each row of a panel.
type Both<T> = [[T; LANES]; SIDES];

const INT4: u8 = 0;
const TABLE4: u8 = 1;
const INT8: u8 = 2;

/// Bytes of activations that stay in the second-level cache while the panels go by.
const CACHE_BYTES: usize = 256 << 10;

#[target_feature(enable = "avx2,fma,f16c")]
fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
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

#[target_feature(enable = "avx2,fma,f16c")]
fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
    match w.layout().code {
        Code::F16 => float_tiles(w, panels, x, stride, out, |w: &Both<f16>| [load_f16(&w[0]), load_f16(&w[1])]),
        Code::BF16 => float_tiles(w, panels, x, stride, out, |w: &Both<u16>| [load_bf16(&w[0]), load_bf16(&w[1])]),
        _ => float_tiles(w, panels, x, stride, out, |w: &Both<f32>| [load_f32(&w[0]), load_f32(&w[1])]),
    }
}

/// All rows times all panels of floats. `load` makes F32 of the 16 weights of a column.
#[target_feature(enable = "avx2,fma,f16c")]
fn float_tiles<W: bytemuck::Pod>(
    w: &Packed,
    panels: Range<usize>,
    x: &[f32],
    stride: usize,
    out: &mut Columns<'_>,
    load: impl Fn(&W) -> [__m256; SIDES] + Copy,
) {
    let gain = w.gain();
    let weights = |index: usize| -> &[W] { &bytemuck::cast_slice(w.panel(index).codes)[..w.columns()] };
    let (mut p, count) = (0, panels.len());
    while p < count {
        let first = panels.start + p;
        // A single row has too few sums in flight to hide the latency of FMA, so it takes four panels at once.
        if out.rows() == 1 && count - p >= 4 {
            let panels = [weights(first), weights(first + 1), weights(first + 2), weights(first + 3)];
            float_tile::<W, 1, 4>(panels, gain, x, stride, 0, out, p, load);
            p += 4;
            continue;
        }
        let panel = [weights(first)];
        let mut row = 0;
        while row < out.rows() {
            row += match out.rows() - row {
                6.. => float_tile::<W, 6, 1>(panel, gain, x, stride, row, out, p, load),
                3.. => float_tile::<W, 3, 1>(panel, gain, x, stride, row, out, p, load),
                2 => float_tile::<W, 2, 1>(panel, gain, x, stride, row, out, p, load),
                _ => float_tile::<W, 1, 1>(panel, gain, x, stride, row, out, p, load),
            };
        }
        p += 1;
    }
}

/// `R` rows of F32 activations times `P` panels of floats. Returns `R`.
#[allow(clippy::too_many_arguments, reason = "what a row and a panel are made of")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn float_tile<W: bytemuck::Pod, const R: usize, const P: usize>(
    weights: [&[W]; P],
    gain: f32,
    x: &[f32],
    stride: usize,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
    load: impl Fn(&W) -> [__m256; SIDES] + Copy,
) -> usize {
    let columns = weights[0].len();
    let weights = weights.map(|w| &w[..columns]);
    let x: [&[f32]; R] = portable::rows(&x[row * stride..], stride, columns);
    let mut acc = [[[_mm256_setzero_ps(); SIDES]; P]; R];
    for k in 0..columns {
        for p in 0..P {
            let w = load(&weights[p][k]);
            for r in 0..R {
                let x = _mm256_set1_ps(x[r][k]);
                for side in 0..SIDES {
                    acc[r][p][side] = _mm256_fmadd_ps(w[side], x, acc[r][p][side]);
                }
            }
        }
    }
    let gain = _mm256_set1_ps(gain);
    for r in 0..R {
        for (i, acc) in acc[r].into_iter().enumerate() {
            let out = &mut out.row_mut(row + r)[(p + i) * PANEL..];
            (0..SIDES).for_each(|side| store_side(_mm256_mul_ps(acc[side], gain), side, out));
        }
    }
    R
}

#[target_feature(enable = "avx2,fma,f16c")]
fn all_scores(queries: &[f32], head_dim: usize, keys: &[f16], scale: f32, scores: &mut [f32], stride: usize) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        // Eight to twelve sums: enough to hide the latency of FMA, few enough to stay in registers.
        i += match n - i {
            6.. => scores_tile::<6, 1>(queries, head_dim, keys, scale, scores, stride),
            3.. => scores_tile::<3, 2>(queries, head_dim, keys, scale, scores, stride),
            2 => scores_tile::<2, 2>(queries, head_dim, keys, scale, scores, stride),
            _ => scores_tile::<1, 4>(queries, head_dim, keys, scale, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, `P` panels of 16 positions at a time. Returns `Q`.
#[target_feature(enable = "avx2,fma,f16c")]
fn scores_tile<const Q: usize, const P: usize>(
    queries: &[f32],
    head_dim: usize,
    keys: &[f16],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[Both<f16>] = bytemuck::cast_slice(keys);
    for first in (0..PAGE / PANEL).step_by(P) {
        let keys: [&[Both<f16>]; P] = portable::rows(&keys[first * head_dim..], head_dim, head_dim);
        let mut acc = [[[_mm256_setzero_ps(); SIDES]; P]; Q];
        for d in 0..head_dim {
            for p in 0..P {
                for side in 0..SIDES {
                    let k = load_f16(&keys[p][d][side]);
                    for q in 0..Q {
                        acc[q][p][side] = _mm256_fmadd_ps(k, _mm256_set1_ps(queries[q][d]), acc[q][p][side]);
                    }
                }
            }
        }
        let scale = _mm256_set1_ps(scale);
        for q in 0..Q {
            let scores = &mut scores[q * stride..][..PAGE];
            for p in 0..P {
                for side in 0..SIDES {
                    store_side(_mm256_mul_ps(acc[q][p][side], scale), side, &mut scores[(first + p) * PANEL..]);
                }
            }
        }
    }
    Q
}

#[target_feature(enable = "avx2,fma,f16c")]
fn weighted_sum(weights: &[f32], stride: usize, counts: &[usize], values: &[f16], width: usize, out: &mut [f32]) {
    let n = counts.len();
    let mut i = 0;
    while i < n {
        let (weights, counts, out) = (&weights[i * stride..], &counts[i..], &mut out[i * width..]);
        i += match n - i {
            4.. => sum_queries::<4, 1>(weights, stride, counts, values, width, out),
            3 => sum_queries::<3, 2>(weights, stride, counts, values, width, out),
            2 => sum_queries::<2, 2>(weights, stride, counts, values, width, out),
            _ => sum_queries::<1, 4>(weights, stride, counts, values, width, out),
        };
    }
}

/// `Q` queries: together as far as all of them reach, then each to its own end. Returns `Q`.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_queries<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    counts: &[usize],
    values: &[f16],
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = counts[..Q].iter().copied().min().unwrap_or(0);
    sum_columns::<Q, V>(weights, stride, 0..common, values, width, out);
    for q in 0..Q {
        if counts[q] > common {
            let (weights, out) = (&weights[q * stride..], &mut out[q * width..]);
            sum_columns::<1, 4>(weights, stride, common..counts[q], values, width, out);
        }
    }
    Q
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum_columns<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    while column < width {
        column += if width - column >= V * PANEL {
            sum_tile::<Q, V>(weights, stride, positions.clone(), values, width, column, out)
        } else {
            sum_tile::<Q, 1>(weights, stride, positions.clone(), values, width, column, out)
        };
    }
}

/// `Q` queries and `V` times 16 columns over a range of positions. Returns the columns done.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(&weights[positions.start..], stride, positions.len());
    let mut acc = [[[_mm256_setzero_ps(); SIDES]; V]; Q];
    for q in 0..Q {
        let out: &[Both<f32>] = bytemuck::cast_slice(&out[q * width + column..][..V * PANEL]);
        for v in 0..V {
            acc[q][v] = [load_f32(&out[v][0]), load_f32(&out[v][1])];
        }
    }
    let rows = values[positions.start * width..].chunks_exact(width).take(positions.len());
    for (i, row) in rows.enumerate() {
        let row: &[Both<f16>] = bytemuck::cast_slice(&row[column..][..V * PANEL]);
        for v in 0..V {
            for side in 0..SIDES {
                let value = load_f16(&row[v][side]);
                for q in 0..Q {
                    acc[q][v][side] = _mm256_fmadd_ps(value, _mm256_set1_ps(weights[q][i]), acc[q][v][side]);
                }
            }
        }
    }
    for q in 0..Q {
        let out: &mut [Both<f32>] = bytemuck::cast_slice_mut(&mut out[q * width + column..][..V * PANEL]);
        for v in 0..V {
            store(acc[q][v][0], &mut out[v][0]);
            store(acc[q][v][1], &mut out[v][1]);
        }
    }
    V * PANEL
}

#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in x.iter().zip(out) {
        store_f16(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(x)), out);
    }
    portable::to_f16(x_tail, out_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn peak_int8(rounds: usize) -> (u64, i32) {
    // 12 independent sums hide the latency, and each product depends on its sum, or the compiler would compute it once.
    let mut sums: [__m256i; 12] = std::array::from_fn(|i| _mm256_set1_epi8(black_box(i as i8)));
    let factor = _mm256_set1_epi8(black_box(-5));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, factor));
        }
    }
    let total = sums.into_iter().fold(factor, |total, sum| _mm256_add_epi32(total, sum));
    let mut lanes = [0.0; LANES];
    store(_mm256_castsi256_ps(total), &mut lanes);
    (rounds as u64 * 12 * 32 * 2, lanes.iter().fold(0, |sum, lane| sum.wrapping_add(lane.to_bits() as i32)))
}

/// Side `side` of a line.
#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line, side: usize) -> __m256i {
    // SAFETY: a chunk is 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(line.0.as_chunks::<32>().0[side].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_table(table: &[i8; 16]) -> __m256i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_f16(x: &[f16; LANES]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// The upper halves of F32.
#[inline]
#[target_feature(enable = "avx2")]
fn load_bf16(x: &[u16; LANES]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    let bits = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(x: &[f32; LANES]) -> __m256 {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Stores a side of a panel. The last panel of a matrix may have fewer than 16 rows: `out` has only those.
#[inline]
#[target_feature(enable = "avx2")]
fn store_side(x: __m256, side: usize, out: &mut [f32]) {
    let first = (side * LANES).min(out.len());
    let out = &mut out[first..];
    match out.first_chunk_mut() {
        Some(out) => store(x, out),
        None => {
            let mut lanes = [0.0; LANES];
            store(x, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(x: __m256, out: &mut [f32; LANES]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_f16(x: __m128i, out: &mut [f16; LANES]) {
    // SAFETY: the reference is to 16 writable bytes, and the store needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), x) }
}
