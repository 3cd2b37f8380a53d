//! The tensors that make up a packed matrix, and checks of their shapes.

use crate::error::{Error, Place, Result};
use crate::format::safetensors::{SafeTensors, TensorInfo};
use crate::quant::block::BlockType;

/// The tensors that make up one matrix.
pub(super) struct Parts<'a> {
    pub(super) files: &'a SafeTensors,
    /// The matrix's name without `.weight`.
    pub(super) stem: &'a str,
}

impl<'a> Parts<'a> {
    /// The name of the tensor with this suffix.
    pub(super) fn name(&self, end: &str) -> String {
        format!("{}{end}", self.stem)
    }

    /// The index of the tensor with this suffix.
    pub(super) fn at(&self, end: &str) -> Result<usize> {
        let name = self.name(end);
        self.files.position(&name).ok_or_else(|| Error::Missing {
            path: self.files.folder().to_path_buf(),
            place: Place::Tensor(name),
            expected: format!("a part of {}, whose other parts exist", self.stem),
        })
    }

    pub(super) fn malformed(
        &self,
        end: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Error {
        let name = self.name(end);
        let path = self.files.tensor(&name).map_or(self.files.folder(), |tensor| self.files.path(tensor));
        Error::malformed(path, Place::Tensor(name), found, expected)
    }

    /// A tensor of one of these types and of this shape, and its index.
    fn part(&self, end: &str, dtypes: &[&str], shape: &[usize]) -> Result<(usize, &'a TensorInfo)> {
        let at = self.at(end)?;
        // `at` is an index into this list.
        let Some(tensor) = self.files.tensors().get(at) else { return Err(self.malformed(end, "nothing", "a tensor")) };
        if !dtypes.contains(&tensor.dtype()) {
            return Err(self.malformed(end, format_args!("the type {}", tensor.dtype()), dtypes.join(" or ")));
        }
        if tensor.shape() != shape {
            let expected = format_args!("{shape:?}, as config.json says");
            return Err(self.malformed(end, format_args!("shape {:?}", tensor.shape()), expected));
        }
        Ok((at, tensor))
    }

    /// The index of a tensor of 32-bit words.
    pub(super) fn words(&self, end: &str, shape: &[usize]) -> Result<usize> {
        Ok(self.part(end, &["I32", "U32"], shape)?.0)
    }

    /// The index and the type of a tensor of scales.
    pub(super) fn scales(&self, end: &str, shape: &[usize]) -> Result<(usize, BlockType)> {
        let (at, tensor) = self.part(end, &["F16", "BF16", "F32"], shape)?;
        Ok((at, tensor.block_type().unwrap_or(BlockType::F32)))
    }

    /// Checks the numbers of `weight_shape`.
    pub(super) fn shape(&self, expected: [usize; 2]) -> Result<()> {
        let (_, tensor) = self.part(".weight_shape", &["I64", "I32"], &[2])?;
        let bytes = self.files.data(tensor);
        let numbers: Vec<i64> = match tensor.dtype() {
            "I64" => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        };
        if numbers.iter().map(|number| usize::try_from(*number)).ne(expected.map(Ok)) {
            let expected = format_args!("{expected:?}, as config.json says");
            return Err(self.malformed(".weight_shape", format_args!("{numbers:?}"), expected));
        }
        Ok(())
    }

    /// The group of each column `(columns)`.
    pub(super) fn order(&self, end: &str, columns: usize, groups: usize) -> Result<Vec<u32>> {
        let (_, tensor) = self.part(end, &["I32"], &[columns])?;
        let words = self.files.data(tensor).as_chunks::<4>().0.iter();
        words
            .map(|bytes| match i32::from_le_bytes(*bytes) {
                group if (0..groups as i64).contains(&i64::from(group)) => Ok(group as u32),
                group => {
                    Err(self.malformed(end, group, format_args!("a group from 0 to {}", groups.saturating_sub(1))))
                }
            })
            .collect()
    }
}
