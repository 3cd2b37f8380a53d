//! The open files of a PEFT folder, and their matrices.

use super::peft_config::PeftConfig;
use crate::error::{Error, Place, Result};
use crate::format::safetensors::{SafeTensors, TensorInfo};
use crate::system::memory;

/// A matrix of the file.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) tensor: &'a TensorInfo,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// The matrices of a module.
#[derive(Default, Clone, Copy)]
pub(super) struct Module<'a> {
    pub(super) a: Option<Matrix<'a>>,
    pub(super) b: Option<Matrix<'a>>,
    /// Whether it is an embedding, whose matrices are transposed.
    pub(super) is_table: bool,
}

/// The open files of an adapter.
pub(super) struct Folder {
    pub(super) config: PeftConfig,
    pub(super) files: SafeTensors,
}

impl Folder {
    pub(super) fn malformed(&self, tensor: &TensorInfo, found: impl std::fmt::Display, expected: &str) -> Error {
        Error::malformed(self.files.path(tensor), Place::Tensor(tensor.name().to_owned()), found, expected)
    }

    pub(super) fn unsupported(&self, tensor: &TensorInfo, what: &str) -> Error {
        Error::Unsupported {
            path: self.files.path(tensor).to_path_buf(),
            place: Place::Tensor(tensor.name().to_owned()),
            what: what.to_owned(),
            supported: "supported: matrices of LoRA for linear layers, the embedding and the output".to_owned(),
        }
    }

    /// The matrix of a tensor.
    ///
    /// # Errors
    /// [`Error::Malformed`] for another number of dimensions.
    pub(super) fn matrix<'a>(&self, tensor: &'a TensorInfo) -> Result<Matrix<'a>> {
        let &[rows, columns] = tensor.shape() else {
            return Err(self.malformed(tensor, format_args!("shape {:?}", tensor.shape()), "a matrix"));
        };
        if rows == 0 || columns == 0 {
            return Err(self.malformed(tensor, format_args!("shape {:?}", tensor.shape()), "rows and columns"));
        }
        Ok(Matrix { tensor, rows, columns })
    }

    /// The numbers of a matrix.
    pub(super) fn values(&self, matrix: Matrix<'_>) -> Result<Vec<f32>> {
        let Some(block_type) = matrix.tensor.block_type() else {
            return Err(self.malformed(matrix.tensor, matrix.tensor.dtype(), "F32, F16 or BF16"));
        };
        let count = matrix.rows.saturating_mul(matrix.columns);
        memory::check("the matrices of an adapter", count.saturating_mul(size_of::<f32>()))?;
        let mut values = vec![0.0; count];
        block_type.decode(self.files.data(matrix.tensor), &mut values)?;
        Ok(values)
    }
}
