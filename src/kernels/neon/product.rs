//! The integer product in pseudo-code, for `S` activation rows and `T` quarters of a panel:
//!
//! ```text
//! for each half of a block of 32 columns:
//!     w[0..4] = codes of 2 or 4 lines, signed        (4 registers a quarter: 4 rows x 4 weights each, used for all S rows)
//!     for each of S rows:
//!         x = 16 codes of the activations             (1 register, a lane for each w)
//!         dot += sdot(w[j], x.lane[j]) for j in 0..4  (from the zero point on: -8 * sum of the activation's codes)
//!     at the end of a block, or of this half if it has a scale of its own:
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::aarch64::*;
use std::ops::Range;

use half::f16;

use super::{Four, QUARTERS, dot, load, load_f16, load_i8, store_quarter};
use crate::kernels::activations::{Activations, MAX_TILE_ROWS, Tile};
use crate::quant::packed::{BLOCK, CacheLine, Code, PANEL, Packed, Panel};
use crate::threads::Columns;

const INT4: u8 = 0;
const TABLE4: u8 = 1;
const INT8: u8 = 2;

/// Bytes of activations that stay in the second-level cache while the panels go by.
const CACHE_BYTES: usize = 256 << 10;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    let layout = w.layout();
    match (layout.code, layout.group, layout.min) {
        (Code::Int4, 16, false) => tiles::<INT4, 16, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 16, true) => tiles::<INT4, 16, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 32, false) => tiles::<INT4, 32, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 32, true) => tiles::<INT4, 32, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 64, false) => tiles::<INT4, 64, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 64, true) => tiles::<INT4, 64, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, false) => tiles::<INT4, 128, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, true) => tiles::<INT4, 128, true>(w, panels, x, out, &[0; 16]),
        (Code::Table4(table), 16, false) => tiles::<TABLE4, 16, false>(w, panels, x, out, &table),
        (Code::Table4(table), 16, true) => tiles::<TABLE4, 16, true>(w, panels, x, out, &table),
        (Code::Table4(table), _, false) => tiles::<TABLE4, 32, false>(w, panels, x, out, &table),
        (Code::Table4(table), _, true) => tiles::<TABLE4, 32, true>(w, panels, x, out, &table),
        (Code::Int8, 16, false) => tiles::<INT8, 16, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, 16, true) => tiles::<INT8, 16, true>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, false) => tiles::<INT8, 32, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, true) => tiles::<INT8, 32, true>(w, panels, x, out, &[0; 16]),
        (Code::F32 | Code::F16 | Code::BF16, ..) => unreachable!("float layouts go to product_float"),
    }
}

/// All rows times all panels: rows in slices that stay in the cache, in each slice every panel, in each panel tiles.
#[target_feature(enable = "neon,dotprod")]
fn tiles<const CODE: u8, const GROUP: usize, const MIN: bool>(
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
    table: &[i8; 16],
) {
    let slice = (CACHE_BYTES / (x.row_lines() * size_of::<CacheLine>()).max(1)).max(MAX_TILE_ROWS) / MAX_TILE_ROWS
        * MAX_TILE_ROWS;
    for first in (0..x.rows()).step_by(slice) {
        let last = x.rows().min(first + slice);
        for (p, index) in panels.clone().enumerate() {
            let panel = w.panel(index);
            let mut row = first;
            while row < last {
                row += match Activations::height(x.rows() - row) {
                    8 => tile::<CODE, GROUP, MIN, 8, 4, 2>(&panel, w.gain(), x, row, out, p, table),
                    4 => tile::<CODE, GROUP, MIN, 4, 4, 2>(&panel, w.gain(), x, row, out, p, table),
                    2 => tile::<CODE, GROUP, MIN, 2, 2, 4>(&panel, w.gain(), x, row, out, p, table),
                    _ => tile::<CODE, GROUP, MIN, 1, 1, 4>(&panel, w.gain(), x, row, out, p, table),
                };
            }
        }
    }
}

/// `R` rows times one panel, `S` rows and `T` quarters at a time, as many as there are registers for. Returns `R`.
#[target_feature(enable = "neon,dotprod")]
fn tile<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize, const S: usize, const T: usize>(
    panel: &Panel<'_>,
    gain: f32,
    x: &Activations,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
    table: &[i8; 16],
) -> usize {
    let (blocks, rows) = (x.blocks(), x.rows());
    let (x, table) = (x.tile::<R>(row), load_i8(table));
    for quarter in (0..QUARTERS).step_by(T) {
        for first in (0..R).step_by(S) {
            let sums = strip::<CODE, GROUP, MIN, R, S, T>(panel, blocks, &x, first, quarter, table);
            for (sums, row) in sums.into_iter().zip(row + first..rows) {
                let out = &mut out.row_mut(row)[p * PANEL..];
                (0..T).for_each(|t| store_quarter(vmulq_n_f32(sums[t], gain), quarter + t, out));
            }
        }
    }
    R
}

/// `S` rows of a tile, from `first` on, times `T` quarters of a panel, from `quarter` on.
#[target_feature(enable = "neon,dotprod")]
fn strip<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize, const S: usize, const T: usize>(
    panel: &Panel<'_>,
    blocks: usize,
    x: &Tile<'_, R>,
    first: usize,
    quarter: usize,
    table: int8x16_t,
) -> [[float32x4_t; T]; S] {
    assert!(first <= R - S && quarter <= QUARTERS - T);
    // A block has one or two groups, or a group one or several blocks.
    let (halves, run) = (BLOCK.div_ceil(GROUP), GROUP.div_ceil(BLOCK));
    // All cut to the same length once, so that the loop below needs no bounds checks.
    let codes: &[[[[i8; BLOCK / 2]; 2]; R]] = &bytemuck::cast_slice(x.codes)[..blocks];
    let (x_scales, zeros, sums) = (&x.scales[..blocks], &x.zeros[..blocks], &x.sums[..blocks]);
    let (half_zeros, half_sums) = (&x.half_zeros[..blocks], &x.half_sums[..blocks]);
    let scales: &[Four<f16>] = &bytemuck::cast_slice(panel.scales)[..(blocks * halves).div_ceil(run)];
    let mins: &[Four<f16>] = if MIN { &bytemuck::cast_slice(panel.mins)[..scales.len()] } else { scales };
    let mut acc = [[vdupq_n_f32(0.0); T]; S];
    // What the blocks of a group have added up to.
    let mut parts = [[vdupq_n_f32(0.0); T]; S];
    for b in 0..blocks {
        for part in 0..halves {
            let group = b * halves / run + part;
            for t in 0..T {
                let mut dots = [vdupq_n_s32(0); S];
                if CODE == INT4 && !MIN {
                    for r in 0..S {
                        let zero = if halves == 1 { zeros[b][first + r] } else { half_zeros[b][part][first + r] };
                        dots[r] = vdupq_n_s32(zero);
                    }
                }
                for half in part..part + 2 / halves {
                    let w = unpack::<CODE>(panel.codes, b, half, quarter + t, table);
                    for r in 0..S {
                        let x = load_i8(&codes[b][first + r][half]);
                        let sum = dot::<1>(dot::<0>(dots[r], w[0], x), w[1], x);
                        dots[r] = dot::<3>(dot::<2>(sum, w[2], x), w[3], x);
                    }
                }
                let (scale, min) = (load_f16(&scales[group][quarter + t]), load_f16(&mins[group][quarter + t]));
                for r in 0..S {
                    let (dot, x_scale) = (vcvtq_f32_s32(dots[r]), x_scales[b][first + r]);
                    if run == 1 {
                        acc[r][t] = vfmaq_f32(acc[r][t], dot, vmulq_n_f32(scale, x_scale));
                        if MIN {
                            let sum = if halves == 1 { sums[b][first + r] } else { half_sums[b][part][first + r] };
                            acc[r][t] = vfmaq_n_f32(acc[r][t], min, sum);
                        }
                        continue;
                    }
                    parts[r][t] = vfmaq_n_f32(parts[r][t], dot, x_scale);
                    if (b + 1).is_multiple_of(run) || b + 1 == blocks {
                        acc[r][t] = vfmaq_f32(acc[r][t], parts[r][t], scale);
                        parts[r][t] = vdupq_n_f32(0.0);
                        if MIN {
                            for sums in &sums[b / run * run..=b] {
                                acc[r][t] = vfmaq_n_f32(acc[r][t], min, sums[first + r]);
                            }
                        }
                    }
                }
            }
        }
    }
    acc
}

/// The weights of half `half` of block `b`, signed: register `j` holds columns `4 j .. 4 j + 4` of 4 rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn unpack<const CODE: u8>(
    codes: &[CacheLine],
    b: usize,
    half: usize,
    quarter: usize,
    table: int8x16_t,
) -> [int8x16_t; 4] {
    if CODE == INT8 {
        let lines = &codes[b * 8..][..8];
        // Stored 128 too high.
        let signed = |j: usize| vreinterpretq_s8_u8(veorq_u8(load(&lines[4 * half + j], quarter), vdupq_n_u8(128)));
        [signed(0), signed(1), signed(2), signed(3)]
    } else {
        let lines = &codes[b * 4..][..4];
        let (first, second) = (load(&lines[2 * half], quarter), load(&lines[2 * half + 1], quarter));
        let low = |line| vandq_u8(line, vdupq_n_u8(15));
        let w = [low(first), vshrq_n_u8::<4>(first), low(second), vshrq_n_u8::<4>(second)];
        let value = |w| if CODE == TABLE4 { vqtbl1q_s8(table, w) } else { vreinterpretq_s8_u8(w) };
        [value(w[0]), value(w[1]), value(w[2]), value(w[3])]
    }
}
