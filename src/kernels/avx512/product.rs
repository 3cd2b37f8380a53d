//! The integer product in pseudo-code, for a tile of `R` activation rows and one panel:
//!
//! ```text
//! for each block of 32 columns:
//!     w[0..8] = nibbles of 4 lines          (8 registers: 16 rows x 4 weights each, used for all R rows)
//!     for each of R rows:
//!         dot = zero point                   (-8 * sum of the activation's codes, broadcast)
//!         dot = vpdpbusd(dot, w[j], codes[j]) for j in 0..8   (u8 weights x i8 activations, broadcast)
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{load, load_f16, load_table, prefetch, store};
use crate::kernels::activations::{Activations, TALLEST};
use crate::quant::packed::{Code, Line, PANEL, Packed, Panel};
use crate::threads::Columns;

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
