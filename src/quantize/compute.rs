//! Dense linear algebra on the kernels of the forward pass, distributed over a thread pool.
//!
//! Every output is summed in one fixed order, so that files are bit-identical for any number of threads and any CPU.

use std::fmt;

use super::layer::{self, LayerProblem};
use crate::kernels::Kernel;
use crate::quant::packed::{CacheLine, Code, Layout, PANEL, Packed};
use crate::threads::{Columns, ThreadPool};

/// Rows of a product per task.
const TASK_ROWS: usize = 32;

/// A thread pool, a kernel and a way to stop.
#[derive(Clone, Copy)]
pub(super) struct Compute<'a> {
    /// The thread pool.
    pub pool: &'a ThreadPool,
    /// The kernel of the instruction set.
    pub kernel: &'static Kernel,
    stop: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl fmt::Debug for Compute<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compute").field("pool", self.pool).field("kernel", &self.kernel).finish_non_exhaustive()
    }
}

impl<'a> Compute<'a> {
    /// Computes without a way to stop.
    pub(super) fn new(pool: &'a ThreadPool, kernel: &'static Kernel) -> Compute<'a> {
        Compute { pool, kernel, stop: None }
    }

    /// Stops computing once `stop` returns true. Results are meaningless then: the caller must ask `stop` before it uses one,
    /// and `stop` must never return false again.
    pub(super) fn until(self, stop: &'a (dyn Fn() -> bool + Sync)) -> Compute<'a> {
        Compute { stop: Some(stop), ..self }
    }

    /// Whether to stop.
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop())
    }

    /// Runs `item(i, chunk)` for each chunk of `length` elements of `buffer`, in parallel.
    ///
    /// # Panics
    /// If `length` is 0.
    pub(super) fn for_each_chunk<T: Send>(
        &self,
        buffer: &mut [T],
        length: usize,
        item: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.pool.run(|scope| {
            scope.for_each_chunk(buffer, length, |i, chunk| {
                if !self.is_stopped() {
                    item(i, chunk);
                }
            });
        });
    }

    /// Writes `x (rows, k) * w (n, k)^T` to `out (rows, n)`.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub(super) fn product(&self, x: &[f32], w: &[f32], k: usize, out: &mut [f32]) {
        let n = w.len() / k;
        assert_eq!(out.len() * k, x.len() * n, "lengths of a product");
        let packed = self.pack(n, k, |panel, column, line| {
            for (lane, row) in w[panel * PANEL * k..].chunks(k).take(PANEL).enumerate() {
                line[lane] = row[column];
            }
        });
        self.for_each_product(x, &packed, out, n, |product, out| out.copy_from_slice(product));
    }

    /// `x (rows, columns of w) * w^T`, on the calling thread, which may be a worker of the pool.
    pub(super) fn multiply(&self, x: &[f32], w: &Packed) -> Vec<f32> {
        let (k, n, width) = (w.columns(), w.rows(), w.panels() * PANEL);
        let rows = x.len() / k;
        let mut wide = vec![0.0; rows * width];
        self.kernel.product_float(w, 0..w.panels(), x, k, &mut Columns::whole(&mut wide, rows, width));
        if n == width { wide } else { wide.chunks(width).flat_map(|row| &row[..n]).copied().collect() }
    }

    /// Calls `item` with each row of `x (rows, columns of w) * w^T` and the same row of `out (rows, stride)`.
    pub(super) fn for_each_product(
        &self,
        x: &[f32],
        w: &Packed,
        out: &mut [f32],
        stride: usize,
        item: impl Fn(&[f32], &mut [f32]) + Sync,
    ) {
        let (k, width) = (w.columns(), w.panels() * PANEL);
        self.for_each_chunk(out, TASK_ROWS * stride, |task, out| {
            let rows = out.len() / stride;
            let mut wide = vec![0.0; rows * width];
            let x = &x[task * TASK_ROWS * k..][..rows * k];
            self.kernel.product_float(w, 0..w.panels(), x, k, &mut Columns::whole(&mut wide, rows, width));
            for (out, wide) in out.chunks_mut(stride).zip(wide.chunks(width)) {
                item(&wide[..w.rows()], out);
            }
        });
    }

    /// [`layer::error`], faster and in single precision.
    pub(super) fn error(&self, problem: &LayerProblem<'_>, decoded: &[f32]) -> f64 {
        if problem.hessian.is_empty() {
            return layer::error(problem, decoded);
        }
        let n = problem.columns;
        let hessian = self.pack_transposed(n, n, |row| &problem.hessian[row * n..][..n]);
        let energy = |x: Vec<f32>| {
            let mut rows = x.clone();
            // The first number of each row is replaced by the energy of its output.
            self.for_each_product(&x, &hessian, &mut rows, n, |product, row| {
                let dot: f64 = row.iter().zip(product).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                row[0] = dot as f32;
            });
            rows.iter().step_by(n).map(|dot| f64::from(*dot)).sum::<f64>()
        };
        let lost = energy(problem.weights.iter().zip(decoded).map(|(w, q)| w - q).collect());
        let all = energy(problem.weights.to_vec());
        if all > 0.0 { lost / all } else { 0.0 }
    }

    /// Adds `x^T x` of `x (rows, n)` to the lower triangle of `sum (n, n)`, whole panels at a time. [`mirror`] completes the sum.
    ///
    /// # Panics
    /// If the lengths do not agree.
    pub(super) fn add_moments(&self, x: &[f32], n: usize, sum: &mut [f32]) {
        let rows = x.len() / n;
        assert_eq!(sum.len(), n * n, "length of the sum");
        if rows == 0 {
            return;
        }
        let packed = self.pack_transposed(n, rows, |row| &x[row * n..][..n]);
        let mut transposed = vec![0.0; n * rows];
        self.for_each_chunk(&mut transposed, PANEL * rows, |task, out| {
            for row in 0..rows {
                for (i, x) in x[row * n + task * PANEL..(row + 1) * n].iter().take(PANEL).enumerate() {
                    out[i * rows + row] = *x;
                }
            }
        });
        self.add_lower_product(&transposed, &packed, sum, n, 1.0);
    }

    /// Adds `factor * x * w^T` to the lower triangle of the bottom right corner of `sum (n, n)`, which has the rows of `w`.
    fn add_lower_product(&self, x: &[f32], w: &Packed, sum: &mut [f32], n: usize, factor: f32) {
        let (k, first) = (w.columns(), n - w.rows());
        self.for_each_chunk(&mut sum[first * n..], TASK_ROWS * n, |task, sum| {
            let rows = sum.len() / n;
            let panels = (task * TASK_ROWS + rows).div_ceil(PANEL);
            let width = panels * PANEL;
            let mut wide = vec![0.0; rows * width];
            let x = &x[task * TASK_ROWS * k..][..rows * k];
            self.kernel.product_float(w, 0..panels, x, k, &mut Columns::whole(&mut wide, rows, width));
            for (sum, wide) in sum.chunks_mut(n).zip(wide.chunks(width)) {
                sum[first..].iter_mut().zip(wide).for_each(|(sum, x)| *sum += factor * x);
            }
        });
    }

    /// Packs the transpose of a matrix `(columns, rows)` with the rows `row(k)`.
    pub(super) fn pack_transposed<'x>(
        &self,
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> &'x [f32] + Sync,
    ) -> Packed {
        self.pack(rows, columns, |panel, column, line| {
            let from = &row(column)[panel * PANEL..];
            line.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        })
    }

    /// Packs a matrix `(rows, columns)`. `fill(panel, column, line)` fills one column of the 16 rows of a panel.
    fn pack(&self, rows: usize, columns: usize, fill: impl Fn(usize, usize, &mut [f32; PANEL]) + Sync) -> Packed {
        let mut packed = Packed::zeroed(rows, columns, Layout::float(Code::F32), 1.0);
        let mut panels = packed.panels_mut();
        self.for_each_chunk(&mut panels, 1, |index, panel| {
            for panel in panel {
                let lines = bytemuck::cast_slice_mut::<CacheLine, [f32; PANEL]>(panel.codes);
                lines.iter_mut().take(columns).enumerate().for_each(|(column, line)| fill(index, column, line));
            }
        });
        drop(panels);
        packed
    }
}

/// Packs the matrix `(rows, columns)` of the numbers `at(row, column)`.
pub(super) fn packed_of(rows: usize, columns: usize, at: impl Fn(usize, usize) -> f32) -> Packed {
    let mut packed = Packed::zeroed(rows, columns, Layout::float(Code::F32), 1.0);
    for (index, panel) in packed.panels_mut().into_iter().enumerate() {
        let lines = bytemuck::cast_slice_mut::<CacheLine, [f32; PANEL]>(panel.codes);
        for (column, line) in lines.iter_mut().take(columns).enumerate() {
            let lanes = line.iter_mut().take(rows - index * PANEL).enumerate();
            lanes.for_each(|(lane, x)| *x = at(index * PANEL + lane, column));
        }
    }
    packed
}

/// The upper triangular `U (n, n)` with `U^T U = (H + damping)^-1`, where H is `hessian (n, n)` with rows and columns in the given
/// order. `damping` is in units of the mean of the diagonal.
pub(super) fn inverse_factor(hessian: &[f32], order: &[usize], damping: f32, compute: &Compute<'_>) -> Vec<f32> {
    let n = order.len();
    let diagonal = |i: usize| hessian[i * n + i];
    let mean = (0..n).map(diagonal).sum::<f32>() / n as f32;
    let damp = if mean > 0.0 { damping * mean } else { 1.0 };
    // With a diagonal of ones single precision is enough. Rows and columns are reversed: the inverse of the lower triangular `L`
    // with `L L^T` equal to the reversed matrix is `U`, reversed again.
    let scale: Vec<f32> = order.iter().rev().map(|i| 1.0 / (diagonal(*i) + damp).sqrt()).collect();
    let mut lower = vec![0.0; n * n];
    compute.for_each_chunk(&mut lower, n, |i, row| {
        let source = &hessian[order[n - 1 - i] * n..][..n];
        for j in 0..i {
            row[j] = source[order[n - 1 - j]] * scale[i] * scale[j];
        }
        row[i] = 1.0;
    });
    cholesky(&mut lower, n, compute);
    invert_lower(&mut lower, n, compute);
    // (S L)^-1 = L^-1 S^-1, where S is the inverse of `scale`.
    let mut upper = vec![0.0; n * n];
    compute.for_each_chunk(&mut upper, n, |i, row| {
        let source = &lower[(n - 1 - i) * n..][..n];
        for j in i..n {
            row[j] = source[n - 1 - j] * scale[n - 1 - j];
        }
    });
    upper
}

/// Columns of a triangular matrix per strip.
const STRIP: usize = 64;

/// Replaces the lower triangle of the positive definite `A (n, n)` by the lower triangular `L` with `L L^T = A`.
fn cholesky(a: &mut [f32], n: usize, compute: &Compute<'_>) {
    for start in (0..n).step_by(STRIP) {
        let end = n.min(start + STRIP);
        let width = end - start;
        for i in start..end {
            for j in start..=i {
                let dot: f64 = (start..j).map(|k| f64::from(a[i * n + k]) * f64::from(a[j * n + k])).sum();
                let rest = f64::from(a[i * n + j]) - dot;
                // Rounding may cancel a direction in which inputs hardly vary.
                a[i * n + j] = if i == j { rest.max(1e-6).sqrt() } else { rest / f64::from(a[j * n + j]) } as f32;
            }
        }
        let (above, below) = a.split_at_mut(end * n);
        let corner = |j: usize| &above[(start + j) * n + start..][..width];
        compute.for_each_chunk(below, n, |_, row| {
            let row = &mut row[start..end];
            for j in 0..width {
                let dot: f64 = row[..j].iter().zip(corner(j)).map(|(x, l)| f64::from(*x) * f64::from(*l)).sum();
                row[j] = ((f64::from(row[j]) - dot) / f64::from(corner(j)[j])) as f32;
            }
        });
        if end < n {
            let strip: Vec<f32> = below.chunks(n).flat_map(|row| &row[start..end]).copied().collect();
            let packed = compute.pack(n - end, width, |panel, column, line| {
                for (lane, row) in strip[panel * PANEL * width..].chunks(width).take(PANEL).enumerate() {
                    line[lane] = row[column];
                }
            });
            compute.add_lower_product(&strip, &packed, a, n, -1.0);
        }
    }
}

/// Inverts the lower triangular `l (n, n)` in place.
fn invert_lower(l: &mut [f32], n: usize, compute: &Compute<'_>) {
    for start in (0..n).step_by(STRIP) {
        let end = n.min(start + STRIP);
        let width = end - start;
        let (above, rest) = l.split_at_mut(start * n);
        let strip = &mut rest[..width * n];
        // These rows of the inverse are -D^-1 (L M) left of the diagonal block D, and D^-1 in its place.
        let mut left = vec![0.0; width * start];
        if start > 0 {
            let x: Vec<f32> = strip.chunks(n).flat_map(|row| &row[..start]).copied().collect();
            let done = compute.pack_transposed(start, start, |row| &above[row * n..][..start]);
            compute.for_each_product(&x, &done, &mut left, start, |product, out| out.copy_from_slice(product));
        }
        let corner: Vec<f64> = strip.chunks(n).flat_map(|row| &row[start..end]).map(|x| f64::from(*x)).collect();
        for column in 0..end {
            let mut solved = [0.0f64; STRIP];
            for i in 0..width {
                let wanted = match column.checked_sub(start) {
                    None => -f64::from(left[i * start + column]),
                    Some(at) => f64::from(u8::from(at == i)),
                };
                let dot: f64 = (0..i).map(|k| corner[i * width + k] * solved[k]).sum();
                solved[i] = (wanted - dot) / corner[i * width + i];
                strip[i * n + column] = solved[i] as f32;
            }
        }
    }
}

/// Copies the lower triangle of `matrix (n, n)` to the upper one and multiplies the matrix by `factor`.
pub(super) fn mirror(matrix: &mut [f32], n: usize, factor: f32) {
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
    fn products_are_right_and_bit_identical_on_any_number_of_threads() {
        let (rows, n, k) = (70, 37, 41);
        let (x, w) = (numbers(rows * k), numbers(n * k));
        let of = |threads| {
            let pool = ThreadPool::new(threads).unwrap();
            let compute = Compute::new(&pool, crate::kernels::choose(None).unwrap());
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

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        // More than two strips, inputs of very different size, one of them always 0.
        let n = 150;
        let mut x = numbers(400 * n);
        for row in x.chunks_mut(n) {
            row.iter_mut().enumerate().for_each(|(i, x)| *x *= 10.0f32.powi(i as i32 % 5 - 2));
            row[7] = 0.0;
        }
        let pool = ThreadPool::new(2).unwrap();
        let compute = Compute::new(&pool, crate::kernels::choose(None).unwrap());
        let mut hessian = vec![0.0; n * n];
        compute.add_moments(&x, n, &mut hessian);
        mirror(&mut hessian, n, 1.0 / 400.0);
        let order: Vec<usize> = (0..n).map(|i| i * 7 % n).collect();
        let upper = inverse_factor(&hessian, &order, 0.01, &compute);
        let mean = (0..n).map(|i| hessian[i * n + i]).sum::<f32>() / n as f32;
        // U^T U (H + damping) = 1
        let at = |i: usize, j: usize| {
            f64::from(hessian[order[i] * n + order[j]]) + f64::from(u8::from(i == j)) * 0.01 * f64::from(mean)
        };
        for i in 0..n {
            let inverse: Vec<f64> = (0..n)
                .map(|j| (0..=i.min(j)).map(|k| f64::from(upper[k * n + i]) * f64::from(upper[k * n + j])).sum())
                .collect();
            assert!(upper[i * n..i * n + i].iter().all(|below| *below == 0.0));
            for j in 0..n {
                let product: f64 = (0..n).map(|k| inverse[k] * at(k, j)).sum();
                let expected = f64::from(u8::from(i == j));
                assert!((product - expected).abs() < 2e-3, "({i}, {j}): {product}");
            }
        }
    }
}
