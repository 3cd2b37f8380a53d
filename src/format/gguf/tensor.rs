//! Descriptions of tensors.

use std::ops::Range;

use crate::quant::block::BlockType;

/// The name, the shape and the place of a tensor. They were checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub(super) name: String,
    pub(super) block_type: BlockType,
    pub(super) dims: Vec<u64>,
    /// The product of the dimensions.
    pub(super) elements: usize,
    /// The range of the data in file number `shard`.
    pub(super) bytes: Range<usize>,
    pub(super) shard: usize,
}

impl TensorInfo {
    /// The name, for example `blk.0.attn_q.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the values are stored.
    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    /// The 1 to 4 dimensions, none of them 0, the fastest-varying first. A matrix of `rows` outputs from `columns` inputs has
    /// `[columns, rows]`.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }

    /// The length of a row, the first dimension. A multiple of the type's block.
    pub fn columns(&self) -> usize {
        // Opening the file has checked that the product of all dimensions fits.
        self.dims.first().map_or(1, |columns| *columns as usize)
    }

    /// The number of rows: the product of all dimensions but the first.
    pub fn rows(&self) -> usize {
        self.elements / self.columns()
    }

    /// The number of values.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The length of the data in bytes.
    pub fn nbytes(&self) -> usize {
        self.bytes.len()
    }

    /// The offset of the data in their file, in bytes.
    pub fn offset(&self) -> u64 {
        self.bytes.start as u64
    }

    /// The index of the file that holds the data, 0 in models of one file.
    pub fn shard(&self) -> usize {
        self.shard
    }
}
