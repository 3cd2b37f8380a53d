//! Dense products on the kernels of the forward pass, spread over a team's threads.
//!
//! Every output is summed in one fixed order, so a file has the same bytes whatever the number of threads or the CPU.

use crate::kernels::Kernel;
use crate::quant::packed::{Code, Layout, Line, PANEL, Packed};
use crate::threads::{Columns, Team};

/// Rows of a product that one thread takes together.
const TASK_ROWS: usize = 32;

/// Threads, and what they compute with.
#[derive(Debug, Clone, Copy)]
pub struct Compute<'a> {
    /// The threads.
    pub team: &'a Team,
    /// The instruction set.
    pub kernel: &'static dyn Kernel,
}

impl Compute<'_> {
    /// Runs `item(i, chunk)` for each chunk of `length` elements of `buffer`, side by side. Results must not depend on which
    /// thread runs an item.
    ///
    /// # Panics
    /// When `length` is 0.
    pub fn for_each_chunk<T: Send>(&self, buffer: &mut [T], length: usize, item: impl Fn(usize, &mut [T]) + Sync) {
        self.team.run(|scope| scope.for_each_chunk(buffer, length, item));
    }

    /// `x (rows, k) * w (n, k)^T`, into `out (rows, n)`.
    ///
    /// # Panics
    /// When the lengths do not belong together.
    pub fn product(&self, x: &[f32], w: &[f32], k: usize, out: &mut [f32]) {
        let n = w.len() / k;
        let packed = self.pack(n, k, |panel, column, lane| w[(panel * PANEL + lane) * k + column]);
        let width = packed.panels() * PANEL;
        assert_eq!(out.len() * k, x.len() * n, "lengths of a product");
        self.for_each_chunk(out, TASK_ROWS * n, |task, out| {
            let rows = out.len() / n;
            let mut wide = vec![0.0; rows * width];
            let x = &x[task * TASK_ROWS * k..][..rows * k];
            let mut columns = Columns::whole(&mut wide, rows, width);
            self.kernel.product_float(&packed, 0..packed.panels(), x, k, &mut columns);
            for (out, wide) in out.chunks_mut(n).zip(wide.chunks(width)) {
                out.copy_from_slice(&wide[..n]);
            }
        });
    }

    /// Adds `x^T x` of `x (rows, n)` to `sum (n, n)`: its lower triangle and what shares a panel with it.
    /// [`mirror`] completes the sum when all is added.
    ///
    /// # Panics
    /// When the lengths do not belong together.
    pub fn add_moments(&self, x: &[f32], n: usize, sum: &mut [f32]) {
        let rows = x.len() / n;
        assert_eq!(sum.len(), n * n, "length of the sum");
        if rows == 0 {
            return;
        }
        // Weights of the product are x^T: row i of it is column i of x, so a line of a panel is 16 neighbours of x.
        let packed = self.pack(n, rows, |panel, row, lane| x[row * n + panel * PANEL + lane]);
        let mut transposed = vec![0.0; n * rows];
        self.for_each_chunk(&mut transposed, PANEL * rows, |task, out| {
            for row in 0..rows {
                for (i, x) in x[row * n + task * PANEL..(row + 1) * n].iter().take(PANEL).enumerate() {
                    out[i * rows + row] = *x;
                }
            }
        });
        self.for_each_chunk(sum, TASK_ROWS * n, |task, sum| {
            let count = sum.len() / n;
            let panels = (task * TASK_ROWS + count).div_ceil(PANEL);
            let width = panels * PANEL;
            let mut wide = vec![0.0; count * width];
            let mut columns = Columns::whole(&mut wide, count, width);
            let x = &transposed[task * TASK_ROWS * rows..][..count * rows];
            self.kernel.product_float(&packed, 0..panels, x, rows, &mut columns);
            for (sum, wide) in sum.chunks_mut(n).zip(wide.chunks(width)) {
                sum.iter_mut().zip(wide).for_each(|(sum, x)| *sum += x);
            }
        });
    }

    /// A matrix of `rows x columns` floats, `value(panel, column, lane)` each.
    fn pack(&self, rows: usize, columns: usize, value: impl Fn(usize, usize, usize) -> f32 + Sync) -> Packed {
        let mut packed = Packed::zeroed(rows, columns, Layout::float(Code::F32), 1.0);
        let mut panels = packed.panels_mut();
        self.for_each_chunk(&mut panels, 1, |index, panel| {
            let lanes = PANEL.min(rows - index * PANEL);
            for panel in panel {
                let lines = bytemuck::cast_slice_mut::<Line, [f32; PANEL]>(panel.codes);
                for (column, line) in lines.iter_mut().take(columns).enumerate() {
                    for lane in 0..lanes {
                        line[lane] = value(index, column, lane);
                    }
                }
            }
        });
        drop(panels);
        packed
    }
}

/// Copies the lower triangle of `matrix (n, n)` to the upper one and multiplies all with `factor`.
pub fn mirror(matrix: &mut [f32], n: usize, factor: f32) {
    for i in 0..n {
        for j in 0..=i {
            let value = matrix[i * n + j] * factor;
            matrix[i * n + j] = value;
            matrix[j * n + i] = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 500.0).collect()
    }

    #[test]
    fn products_are_right_and_have_the_same_bits_on_any_number_of_threads() {
        let (rows, n, k) = (70, 37, 41);
        let (x, w) = (numbers(rows * k), numbers(n * k));
        let of = |threads| {
            let team = Team::new(threads).unwrap();
            let compute = Compute { team: &team, kernel: crate::kernels::best() };
            let mut out = vec![f32::NAN; rows * n];
            compute.product(&x, &w, k, &mut out);
            let mut moments = vec![0.0; k * k];
            compute.add_moments(&x, k, &mut moments);
            compute.add_moments(&x[..5 * k], k, &mut moments);
            mirror(&mut moments, k, 0.5);
            (out, moments)
        };
        let (out, moments) = of(1);
        for row in 0..rows {
            for column in 0..n {
                let exact: f64 = (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[column * k + i])).sum();
                assert!((f64::from(out[row * n + column]) - exact).abs() < 1e-4);
            }
        }
        for i in 0..k {
            for j in 0..k {
                let product = |row: usize| f64::from(x[row * k + i]) * f64::from(x[row * k + j]);
                let exact = (0..rows).chain(0..5).map(product).sum::<f64>() / 2.0;
                assert!((f64::from(moments[i * k + j]) - exact).abs() < 1e-4);
            }
        }
        assert_eq!((out, moments), of(3));
    }
}
