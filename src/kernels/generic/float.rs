//! The product of float layouts with F32 activations.

use std::ops::Range;

use half::{bf16, f16};

use super::vector::{Number, Vector, add_products, rows};
use crate::quant::packed::{Code, PANEL, Packed};
use crate::threads::Columns;

/// Columns between the prefetch of a single row's weights and their use, so that memory sets the pace.
const AHEAD: usize = 64;

/// Panels that a single row is multiplied with at a time: one panel has too few sums to hide the latency of FMA.
const PANELS_OF_ONE_ROW: usize = 4;

#[inline(always)]
pub(in crate::kernels) fn product_float<V: Vector>(
    v: V,
    w: &Packed,
    panels: Range<usize>,
    x: &[f32],
    stride: usize,
    out: &mut Columns<'_>,
) {
    let job = Job { v, w, start: panels.start, x, stride };
    match w.layout().code {
        Code::F16 => job.all::<f16>(panels.len(), out),
        Code::BF16 => job.all::<bf16>(panels.len(), out),
        _ => job.all::<f32>(panels.len(), out),
    }
}

/// Some panels times all rows.
struct Job<'a, V> {
    v: V,
    w: &'a Packed,
    /// The first panel.
    start: usize,
    /// `(rows, stride)`
    x: &'a [f32],
    stride: usize,
}

impl<V: Vector> Job<'_, V> {
    #[inline(always)]
    fn all<T: Number>(&self, count: usize, out: &mut Columns<'_>) {
        let many = V::CAPACITY >= 32;
        let (rows, mut p) = (out.rows(), 0);
        while p < count {
            if rows == 1 && count - p >= PANELS_OF_ONE_ROW {
                self.tile::<T, 1, PANELS_OF_ONE_ROW>(0, p, out);
                p += PANELS_OF_ONE_ROW;
                continue;
            }
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    8.. if many => self.tile::<T, 8, 1>(row, p, out),
                    6.. if !many => self.tile::<T, 6, 1>(row, p, out),
                    4.. => self.tile::<T, 4, 1>(row, p, out),
                    3 => self.tile::<T, 3, 1>(row, p, out),
                    2 => self.tile::<T, 2, 1>(row, p, out),
                    _ => self.tile::<T, 1, 1>(row, p, out),
                };
            }
            p += 1;
        }
    }

    /// The `R` rows from `row` on times the `P` panels from the `p`th on. Returns `R`.
    #[inline(always)]
    fn tile<T: Number, const R: usize, const P: usize>(&self, row: usize, p: usize, out: &mut Columns<'_>) -> usize {
        let (v, columns) = (self.v, self.w.columns());
        let weights: [&[[T; PANEL]]; P] = std::array::from_fn(|i| {
            let codes: &[[T; PANEL]] = bytemuck::cast_slice(self.w.panel(self.start + p + i).codes);
            &codes[..columns]
        });
        let x: [&[f32]; R] = rows(&self.x[row * self.stride..], self.stride, columns);
        let mut sums = [[v.zeros(); P]; R];
        for k in 0..columns {
            for i in 0..P {
                if P > 1
                    && let Some(later) = weights[i].get(k + AHEAD)
                {
                    v.prefetch(later);
                }
            }
            add_products(v, |i| &weights[i][k], |r| x[r][k], &mut sums);
        }
        let output_scale = v.splat(self.w.output_scale());
        for r in 0..R {
            for i in 0..P {
                for part in 0..V::PARTS {
                    sums[r][i][part] = v.mul(sums[r][i][part], output_scale);
                }
                v.store_panel(sums[r][i], &mut out.row_mut(row + r)[(p + i) * PANEL..]);
            }
        }
        R
    }
}
