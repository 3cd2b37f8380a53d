//! The factors of a low-rank change of a matrix.

use std::path::Path;

use crate::error::{Error, Place, Result};

/// A change of a matrix: `up * down`.
#[derive(Debug, Clone)]
pub(super) struct Factors {
    pub(super) rank: usize,
    /// `(rank, columns)`
    pub(super) down: Vec<f32>,
    /// `(rows, rank)`, multiplied by the adapter's scale.
    pub(super) up: Vec<f32>,
}

/// The change of a tensor.
#[derive(Debug, Clone)]
pub(super) struct Delta {
    /// Columns, rows, and the number of matrices.
    pub(super) dims: [usize; 3],
    /// `(matrices)`
    pub(super) matrices: Vec<Option<Factors>>,
}

impl Factors {
    /// Factors whose second matrix, `up (rows, rank)`, is yet to be multiplied by `scale`.
    pub(super) fn scaled(rank: usize, down: Vec<f32>, mut up: Vec<f32>, scale: f32) -> Factors {
        up.iter_mut().for_each(|value| *value *= scale);
        Factors { rank, down, up }
    }

    /// Adds row `row` of the change to `out (columns)`.
    pub(super) fn add_row(&self, row: usize, out: &mut [f32]) {
        let columns = out.len();
        for (weight, direction) in self.up[row * self.rank..][..self.rank].iter().zip(self.down.chunks_exact(columns)) {
            out.iter_mut().zip(direction).for_each(|(out, x)| *out += weight * x);
        }
    }
}

impl Delta {
    /// A change of a tensor of these dimensions, without any factors yet.
    pub(super) fn empty(dims: [usize; 3]) -> Delta {
        Delta { dims, matrices: vec![None; dims[2]] }
    }

    /// Checks that the numbers of factors fit together and are finite.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the tensor `name` of the file at `path`.
    pub(super) fn check(&self, path: &Path, name: &str) -> Result<()> {
        let [columns, rows, _] = self.dims;
        let wrong = |found: &str, expected: &str| {
            Error::malformed(path, Place::Tensor(format!("{name}.weight")), found, expected)
        };
        for Factors { rank, down, up } in self.matrices.iter().flatten() {
            let fits = rank.checked_mul(columns) == Some(down.len()) && rank.checked_mul(rows) == Some(up.len());
            if !fits || *rank == 0 {
                return Err(wrong("matrices of other shapes", &format!("{rows} rows and {columns} columns")));
            }
            if !down.iter().chain(up).all(|value| value.is_finite()) {
                return Err(wrong("a change with NaN or an infinity", "finite numbers"));
            }
        }
        Ok(())
    }

    /// Adds the change to `hasher`.
    pub(super) fn hash(&self, hasher: &mut blake3::Hasher) {
        for number in self.dims {
            hasher.update(&(number as u64).to_le_bytes());
        }
        for factors in &self.matrices {
            let Some(Factors { rank, down, up }) = factors else {
                hasher.update(&0u64.to_le_bytes());
                continue;
            };
            hasher.update(&(*rank as u64).to_le_bytes());
            hasher.update(bytemuck::cast_slice(down)).update(bytemuck::cast_slice(up));
        }
    }
}

/// The columns of a matrix `(rows, columns)` as rows.
pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}
