//! What a file says of a tensor.

use std::ops::Range;

use crate::quant::block::BlockType;

/// A tensor of a file: its name, its shape, and where its data lie. Everything was checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub(super) name: String,
    pub(super) block_type: BlockType,
    pub(super) dims: Vec<u64>,
    /// The product of the dimensions.
    pub(super) elements: usize,
    /// The bytes of the data, in the file of number `shard`.
    pub(super) bytes: Range<usize>,
    pub(super) shard: usize,
}

impl TensorInfo {
    /// The name, as in `blk.0.attn_q.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the values are stored.
    pub fn block_type(&self) -> BlockType {
        self.block_type
    }

    /// The sizes of the 1 to 4 dimensions, none of them 0. The first is the one along which values lie side by side, so a
    /// matrix of `rows` outputs from `columns` inputs has `[columns, rows]`.
    pub fn dims(&self) -> &[u64] {
        &self.dims
    }

    /// The length of a row: the first dimension. It is a multiple of the type's block.
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

    /// Where the data start, in bytes from the start of the file that holds them.
    pub fn offset(&self) -> u64 {
        self.bytes.start as u64
    }

    /// The number of the file that holds the data, from 0: above 0 only in models of several files.
    pub fn shard(&self) -> usize {
        self.shard
    }
}
