//! The second moments of the inputs of a linear layer.

use crate::quantize::compute::{Compute, mirror};

/// Tokens that moments need at least. A layer that fewer tokens reached is rounded to nearest.
pub(in crate::quantize) const MIN_TOKENS: usize = 64;
/// Rows whose products are summed together.
const BATCH_ROWS: usize = 2048;

/// Sums over tokens while inputs are added; means after [`finish`](Moments::finish).
#[derive(Debug)]
pub(in crate::quantize) struct Moments {
    columns: usize,
    /// `(columns, columns)`: `x x^T`.
    pub(in crate::quantize) hessian: Vec<f32>,
    /// `(columns)`: `|x|`.
    pub(in crate::quantize) magnitude: Vec<f32>,
    /// Tokens added.
    pub(in crate::quantize) tokens: usize,
    /// `(rows, columns)`: inputs that are not in `hessian` yet.
    pending: Vec<f32>,
}

impl Moments {
    pub(super) fn new(columns: usize) -> Moments {
        Moments {
            columns,
            hessian: vec![0.0; columns * columns],
            magnitude: vec![0.0; columns],
            tokens: 0,
            pending: Vec::new(),
        }
    }

    /// Adds inputs `(tokens, columns)`.
    pub(super) fn add(&mut self, x: &[f32], compute: &Compute<'_>) {
        self.tokens += x.len() / self.columns;
        for row in x.chunks(self.columns) {
            self.magnitude.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.abs());
        }
        self.pending.extend_from_slice(x);
        if self.pending.len() >= BATCH_ROWS * self.columns {
            self.flush(compute);
        }
    }

    fn flush(&mut self, compute: &Compute<'_>) {
        compute.add_moments(&self.pending, self.columns, &mut self.hessian);
        self.pending.clear();
    }

    /// Turns the sums into means.
    pub(super) fn finish(&mut self, compute: &Compute<'_>) {
        self.flush(compute);
        self.pending = Vec::new();
        let factor = 1.0 / self.tokens.max(1) as f32;
        mirror(&mut self.hessian, self.columns, factor);
        self.magnitude.iter_mut().for_each(|sum| *sum *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_means_over_all_tokens() {
        let pool = crate::threads::ThreadPool::new(1).unwrap();
        let compute = Compute::new(&pool, crate::kernels::choose(None).unwrap());
        let mut moments = Moments::new(2);
        // More than one batch.
        for _ in 0..3000 {
            moments.add(&[1.0, -2.0, 3.0, 0.0], &compute);
        }
        moments.finish(&compute);
        assert_eq!((moments.tokens, &moments.hessian[..]), (6000, &[5.0, -1.0, -1.0, 2.0][..]));
        assert_eq!(moments.magnitude, [2.0, 1.0]);
    }
}
