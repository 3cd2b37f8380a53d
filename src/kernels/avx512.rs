//! AVX-512 (F, BW, VL, VNNI): one panel of 16 output rows is one register.
//!
//! The product in pseudo-code, for a tile of `R` activation rows and one panel:
//!
//! ```text
//! for each block of 32 columns:
//!     w[0..8] = nibbles of 4 lines          (8 registers: 16 rows x 4 weights each, used for all R rows)
//!     for each of R rows:
//!         dot = zero point                   (-8 * sum of the activation's codes, broadcast)
//!         dot = vpdpbusd(dot, w[j], codes[j]) for j in 0..8   (u8 weights x i8 activations, broadcast)
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```
#![allow(unsafe_code, reason = "intrinsics that load and store, and the entry into functions with target features")]

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::activations::{Activations, RowMut, TALLEST};
use super::portable::{self, Activation, portable_methods};
use super::{Kernel, PAGE};
use crate::quant::packed::{Code, Line, PANEL, Packed, Panel};
use crate::threads::Columns;

/// Proof that the CPU has AVX-512 F, BW, VL and VNNI, and AVX2, FMA and F16C.
#[derive(Debug)]
pub(super) struct Avx512(());

static WITNESS: Avx512 = Avx512(());

impl Avx512 {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(&WITNESS)
    }
}

impl Kernel for Avx512 {
    fn name(&self) -> &'static str {
        "avx512"
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

    portable_methods!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");
}

const INT4: u8 = 0;
const TABLE4: u8 = 1;
const INT8: u8 = 2;

/// Blocks between a line's prefetch and its use when there is one row, so that memory and not the product sets the pace.
const AHEAD: usize = 12;
/// Rows whose chains of dot products are in flight together.
const TOGETHER: usize = 8;
/// Bytes of activations that stay in the second-level cache while the panels go by.
const CACHE_BYTES: usize = 1 << 20;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
                    16 => tile::<CODE, HALVES, MIN, 16>(&panel, w.gain(), x, row, out, p, table),
                    8 => tile::<CODE, HALVES, MIN, 8>(&panel, w.gain(), x, row, out, p, table),
                    4 => tile::<CODE, HALVES, MIN, 4>(&panel, w.gain(), x, row, out, p, table),
                    2 => tile::<CODE, HALVES, MIN, 2>(&panel, w.gain(), x, row, out, p, table),
                    _ => tile::<CODE, HALVES, MIN, 1>(&panel, w.gain(), x, row, out, p, table),
                };
            }
        }
    }
}

/// `R` rows times one panel. Returns `R`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tile<const CODE: u8, const HALVES: usize, const MIN: bool, const R: usize>(
    panel: &Panel<'_>,
    gain: f32,
    x: &Activations,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
    table: &[i8; 16],
) -> usize {
    const { assert!(HALVES == 1 || HALVES == 2) };
    let blocks = x.blocks();
    let x = x.tile::<R>(row);
    // All cut to the same length once, so that the loop below needs no bounds checks.
    let (codes, x_scales) = (&x.codes[..blocks], &x.scales[..blocks]);
    let (zeros, sums) = (&x.zeros[..blocks], &x.sums[..blocks]);
    let (half_zeros, half_sums) = (&x.half_zeros[..blocks], &x.half_sums[..blocks]);
    let scales: &[[[f16; PANEL]; HALVES]] = &panel.scales.as_chunks().0[..blocks];
    let mins: &[[[f16; PANEL]; HALVES]] = if MIN { &panel.mins.as_chunks().0[..blocks] } else { scales };
    let table = _mm512_xor_si512(_mm512_broadcast_i32x4(load_table(table)), _mm512_set1_epi8(-128));
    let mut acc = [_mm512_setzero_ps(); R];
    for b in 0..blocks {
        if R == 1 {
            let lines = if CODE == INT8 { 8 } else { 4 };
            for i in 0..lines {
                if let Some(line) = panel.codes.get((b + AHEAD) * lines + i) {
                    prefetch(line);
                }
            }
        }
        let w = unpack::<CODE>(panel.codes, b, table);
        for half in 0..HALVES {
            let scale = load_f16(&scales[b][half]);
            let min = if MIN { load_f16(&mins[b][half]) } else { scale };
            // Rows go in groups so that enough independent chains of dot products are in flight to hide their latency.
            for first in (0..R).step_by(TOGETHER) {
                let rows = first..R.min(first + TOGETHER);
                let mut dots = [_mm512_setzero_si512(); TOGETHER];
                if CODE != INT4 || !MIN {
                    for (dot, r) in dots.iter_mut().zip(rows.clone()) {
                        let zero = _mm512_set1_epi32(if HALVES == 1 { zeros[b][r] } else { half_zeros[b][half][r] });
                        // 8-bit codes and table values are stored 128 too high, 16 times the zero point of 4-bit codes.
                        *dot = if CODE == INT4 { zero } else { _mm512_slli_epi32::<4>(zero) };
                    }
                }
                let per_half = 8 / HALVES;
                for j in half * per_half..(half + 1) * per_half {
                    for (dot, r) in dots.iter_mut().zip(rows.clone()) {
                        *dot = _mm512_dpbusd_epi32(*dot, w[j], _mm512_set1_epi32(codes[b][r][j]));
                    }
                }
                for (dot, r) in dots.iter_mut().zip(rows) {
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[b][r]));
                    acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(*dot), scale, acc[r]);
                    if MIN {
                        let sum = if HALVES == 1 { sums[b][r] } else { half_sums[b][half][r] };
                        acc[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), acc[r]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        store(_mm512_mul_ps(acc[r], _mm512_set1_ps(gain)), &mut out.row_mut(row + r)[p * PANEL..]);
    }
    R
}

/// The weights of block `b` as unsigned bytes: register `j` holds columns `4 j .. 4 j + 4` of the 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn unpack<const CODE: u8>(codes: &[Line], b: usize, table: __m512i) -> [__m512i; 8] {
    let mut w = [_mm512_setzero_si512(); 8];
    if CODE == INT8 {
        let lines = &codes[b * 8..][..8];
        for j in 0..8 {
            w[j] = load(&lines[j]);
        }
    } else {
        let lines = &codes[b * 4..][..4];
        let nibble = _mm512_set1_epi8(15);
        for j in 0..4 {
            let line = load(&lines[j]);
            w[2 * j] = _mm512_and_si512(line, nibble);
            w[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibble);
        }
        if CODE == TABLE4 {
            for w in &mut w {
                *w = _mm512_shuffle_epi8(table, *w);
            }
        }
    }
    w
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
    for (p, index) in panels.enumerate() {
        let panel = w.panel(index);
        let mut row = 0;
        while row < out.rows() {
            row += match out.rows() - row {
                8.. => float_tile::<8>(w, &panel, x, stride, row, out, p),
                4.. => float_tile::<4>(w, &panel, x, stride, row, out, p),
                2.. => float_tile::<2>(w, &panel, x, stride, row, out, p),
                _ => float_tile::<1>(w, &panel, x, stride, row, out, p),
            };
        }
    }
}

/// `R` rows of F32 activations times one panel of floats. Returns `R`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn float_tile<const R: usize>(
    w: &Packed,
    panel: &Panel<'_>,
    x: &[f32],
    stride: usize,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
) -> usize {
    let columns = w.columns();
    let x: [&[f32]; R] = portable::rows(&x[row * stride..], stride, columns);
    let mut acc = [_mm512_setzero_ps(); R];
    match w.layout().code {
        Code::F16 => {
            let weights: &[[f16; PANEL]] = &bytemuck::cast_slice(panel.codes)[..columns];
            for k in 0..columns {
                let w = load_f16(&weights[k]);
                for r in 0..R {
                    acc[r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r][k]), acc[r]);
                }
            }
        }
        Code::BF16 => {
            let weights: &[[u16; PANEL]] = &bytemuck::cast_slice(panel.codes)[..columns];
            for k in 0..columns {
                let w = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_u16(&weights[k]))));
                for r in 0..R {
                    acc[r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r][k]), acc[r]);
                }
            }
        }
        _ => {
            for k in 0..columns {
                let w = _mm512_castsi512_ps(load(&panel.codes[k]));
                for r in 0..R {
                    acc[r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r][k]), acc[r]);
                }
            }
        }
    }
    for r in 0..R {
        store(_mm512_mul_ps(acc[r], _mm512_set1_ps(w.gain())), &mut out.row_mut(row + r)[p * PANEL..]);
    }
    R
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_scores(queries: &[f32], head_dim: usize, keys: &[f16], scale: f32, scores: &mut [f32], stride: usize) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        i += match n - i {
            6.. => scores_tile::<6>(queries, head_dim, keys, scale, scores, stride),
            3.. => scores_tile::<3>(queries, head_dim, keys, scale, scores, stride),
            2 => scores_tile::<2>(queries, head_dim, keys, scale, scores, stride),
            _ => scores_tile::<1>(queries, head_dim, keys, scale, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, four registers of 16 positions. Returns `Q`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn scores_tile<const Q: usize>(
    queries: &[f32],
    head_dim: usize,
    keys: &[f16],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    const PANELS: usize = PAGE / PANEL;
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[[f16; PANEL]] = bytemuck::cast_slice(keys);
    let keys: [&[[f16; PANEL]]; PANELS] = portable::rows(keys, head_dim, head_dim);
    let mut acc = [[_mm512_setzero_ps(); PANELS]; Q];
    for d in 0..head_dim {
        let k: [__m512; PANELS] =
            [load_f16(&keys[0][d]), load_f16(&keys[1][d]), load_f16(&keys[2][d]), load_f16(&keys[3][d])];
        for q in 0..Q {
            let x = _mm512_set1_ps(queries[q][d]);
            for p in 0..PANELS {
                acc[q][p] = _mm512_fmadd_ps(k[p], x, acc[q][p]);
            }
        }
    }
    for q in 0..Q {
        let scores = &mut scores[q * stride..][..PAGE];
        for p in 0..PANELS {
            store(_mm512_mul_ps(acc[q][p], _mm512_set1_ps(scale)), &mut scores[p * PANEL..]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn weighted_sum(weights: &[f32], stride: usize, counts: &[usize], values: &[f16], width: usize, out: &mut [f32]) {
    let n = counts.len();
    let mut i = 0;
    while i < n {
        let (weights, counts, out) = (&weights[i * stride..], &counts[i..], &mut out[i * width..]);
        i += match n - i {
            4.. => sum_queries::<4>(weights, stride, counts, values, width, out),
            2.. => sum_queries::<2>(weights, stride, counts, values, width, out),
            _ => sum_queries::<1>(weights, stride, counts, values, width, out),
        };
    }
}

/// `Q` queries: together as far as all of them reach, then each to its own end. Returns `Q`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_queries<const Q: usize>(
    weights: &[f32],
    stride: usize,
    counts: &[usize],
    values: &[f16],
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = counts[..Q].iter().copied().min().unwrap_or(0);
    sum_columns::<Q>(weights, stride, 0..common, values, width, out);
    for q in 0..Q {
        if counts[q] > common {
            sum_columns::<1>(&weights[q * stride..], stride, common..counts[q], values, width, &mut out[q * width..]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_columns<const Q: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    while column < width {
        column += match width - column {
            64.. => sum_tile::<Q, 4>(weights, stride, positions.clone(), values, width, column, out),
            32.. => sum_tile::<Q, 2>(weights, stride, positions.clone(), values, width, column, out),
            _ => sum_tile::<Q, 1>(weights, stride, positions.clone(), values, width, column, out),
        };
    }
}

/// `Q` queries, `16 * V` columns. Returns `16 * V`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(weights, stride, positions.end);
    let mut acc = [[_mm512_setzero_ps(); V]; Q];
    for q in 0..Q {
        for v in 0..V {
            acc[q][v] = load_f32(&out[q * width + column + v * PANEL..]);
        }
    }
    for position in positions {
        let row = &values[position * width + column..][..V * PANEL];
        let row: &[[f16; PANEL]] = row.as_chunks().0;
        let mut value = [_mm512_setzero_ps(); V];
        for v in 0..V {
            value[v] = load_f16(&row[v]);
        }
        for q in 0..Q {
            let weight = _mm512_set1_ps(weights[q][position]);
            for v in 0..V {
                acc[q][v] = _mm512_fmadd_ps(value[v], weight, acc[q][v]);
            }
        }
    }
    for q in 0..Q {
        for v in 0..V {
            store(acc[q][v], &mut out[q * width + column + v * PANEL..][..PANEL]);
        }
    }
    V * PANEL
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn to_f16(x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<PANEL>();
    let (out, out_tail) = out.as_chunks_mut::<PANEL>();
    for (x, out) in x.iter().zip(out) {
        store_f16(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(x)), out);
    }
    portable::to_f16(x_tail, out_tail);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn peak_int8(rounds: usize) -> (u64, i32) {
    // 16 independent sums hide the instruction's latency.
    let mut sums = [_mm512_setzero_si512(); 16];
    let (a, b) = (_mm512_set1_epi8(3), _mm512_set1_epi8(-5));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    let total = sums.into_iter().fold(_mm512_setzero_si512(), |total, sum| _mm512_add_epi32(total, sum));
    (rounds as u64 * 16 * 64 * 2, _mm512_reduce_add_epi32(total))
}

/// Asks for a line that will be loaded soon.
#[inline]
fn prefetch(line: &Line) {
    // SAFETY: a prefetch of a valid address; it reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a `Line` is 64 readable bytes, aligned to 64.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_table(table: &[i8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { _mm_loadu_si128(table.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_u16(x: &[u16; PANEL]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f16(x: &[f16; PANEL]) -> __m512 {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(x: &[f32]) -> __m512 {
    let x = &x[..PANEL];
    // SAFETY: the slice is 64 readable bytes, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Stores the lanes that `out` has room for: the last panel of a matrix may have fewer than 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(x: __m512, out: &mut [f32]) {
    let lanes = if out.len() < PANEL { (1u16 << out.len()) - 1 } else { u16::MAX };
    // SAFETY: the mask leaves only lanes inside `out`, and a masked store touches no others.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), lanes, x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_f16(x: __m256i, out: &mut [f16; PANEL]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}
