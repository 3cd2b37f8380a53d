//! The product of float layouts with F32 activations.

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{Both, SIDES, load_bf16, load_f16, load_f32, prefetch, store_side};
use crate::kernels::portable;
use crate::quant::packed::{Code, PANEL, Packed};
use crate::threads::Columns;

/// Columns between the prefetch of a single row's weights and their use, so that memory sets the pace.
const AHEAD: usize = 64;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
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
            if P > 1
                && let Some(later) = weights[p].get(k + AHEAD)
            {
                prefetch(later);
            }
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
