//! The product of float layouts with F32 activations.

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{load, load_f16, load_u16, store};
use crate::kernels::portable;
use crate::quant::packed::{Code, PANEL, Packed, Panel};
use crate::threads::Columns;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
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
