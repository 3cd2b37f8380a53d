//! The product of float layouts with F32 activations.

use std::arch::aarch64::*;
use std::ops::Range;

use half::f16;

use super::{Four, QUARTERS, load_bf16, load_f16, load_f32, store_quarter};
use crate::kernels::portable;
use crate::quant::packed::{Code, PANEL, Packed};
use crate::threads::Columns;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
    match w.layout().code {
        Code::F16 => float_tiles(w, panels, x, stride, out, |w: &Four<f16>, i| load_f16(&w[i])),
        Code::BF16 => float_tiles(w, panels, x, stride, out, |w: &Four<u16>, i| load_bf16(&w[i])),
        _ => float_tiles(w, panels, x, stride, out, |w: &Four<f32>, i| load_f32(&w[i])),
    }
}

/// All rows times all panels of floats. `load` makes F32 of a quarter of the 16 weights of a column.
#[target_feature(enable = "neon,dotprod")]
fn float_tiles<W: bytemuck::Pod>(
    w: &Packed,
    panels: Range<usize>,
    x: &[f32],
    stride: usize,
    out: &mut Columns<'_>,
    load: impl Fn(&W, usize) -> float32x4_t + Copy,
) {
    for (p, index) in panels.enumerate() {
        let weights: &[W] = &bytemuck::cast_slice(w.panel(index).codes)[..w.columns()];
        let mut row = 0;
        while row < out.rows() {
            row += match out.rows() - row {
                6.. => float_tile::<W, 6>(weights, w.gain(), x, stride, row, out, p, load),
                3.. => float_tile::<W, 3>(weights, w.gain(), x, stride, row, out, p, load),
                2 => float_tile::<W, 2>(weights, w.gain(), x, stride, row, out, p, load),
                _ => float_tile::<W, 1>(weights, w.gain(), x, stride, row, out, p, load),
            };
        }
    }
}

/// `R` rows of F32 activations times one panel of floats. Returns `R`.
#[allow(clippy::too_many_arguments, reason = "what a row and a panel are made of")]
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn float_tile<W: bytemuck::Pod, const R: usize>(
    weights: &[W],
    gain: f32,
    x: &[f32],
    stride: usize,
    row: usize,
    out: &mut Columns<'_>,
    p: usize,
    load: impl Fn(&W, usize) -> float32x4_t + Copy,
) -> usize {
    let columns = weights.len();
    let x: [&[f32]; R] = portable::rows(&x[row * stride..], stride, columns);
    let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for k in 0..columns {
        for i in 0..QUARTERS {
            let w = load(&weights[k], i);
            for r in 0..R {
                acc[r][i] = vfmaq_n_f32(acc[r][i], w, x[r][k]);
            }
        }
    }
    for r in 0..R {
        let out = &mut out.row_mut(row + r)[p * PANEL..];
        (0..QUARTERS).for_each(|i| store_quarter(vmulq_n_f32(acc[r][i], gain), i, out));
    }
    R
}
