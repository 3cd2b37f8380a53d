//! A checkpoint with replaced rows: the layer that is being quantized.

use std::collections::HashMap;

use crate::error::Result;
use crate::format::{Checkpoint, Tensor, as_in_source};
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// A checkpoint that decodes blocks to F32 and returns new values for the rows that were replaced.
pub(in crate::quantize) struct PatchedCheckpoint<'a> {
    source: &'a dyn Checkpoint,
    /// By tensor: the first row and the values `(rows, columns)` of each replacement.
    replaced: HashMap<String, Vec<(usize, Vec<f32>)>>,
}

impl<'a> PatchedCheckpoint<'a> {
    pub(in crate::quantize) fn new(source: &'a dyn Checkpoint) -> PatchedCheckpoint<'a> {
        PatchedCheckpoint { source, replaced: HashMap::new() }
    }

    /// Replaces rows of a tensor, starting at row `first`.
    pub(in crate::quantize) fn replace(&mut self, name: &str, first: usize, values: Vec<f32>) {
        self.replaced.entry(name.to_owned()).or_default().push((first, values));
    }

    /// Undoes all replacements.
    pub(in crate::quantize) fn clear(&mut self) {
        self.replaced.clear();
    }
}

impl Checkpoint for PatchedCheckpoint<'_> {
    as_in_source!();

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let Tensor { dims, rows } = self.source.tensor(name)?;
        let replaced = self.replaced.get(name).map_or(&[][..], Vec::as_slice);
        let found = rows.block_type();
        let is_float = matches!(found, BlockType::F32 | BlockType::F16 | BlockType::BF16);
        if replaced.is_empty() && (is_float || !found.is_supported()) {
            return Some(Tensor { dims, rows });
        }
        let columns = *dims.first()?;
        Some(Tensor { dims, rows: Box::new(DecodedRows { source: rows, columns, replaced }) })
    }
}

/// Rows decoded to F32.
struct DecodedRows<'a> {
    source: Box<dyn Rows + 'a>,
    columns: usize,
    replaced: &'a [(usize, Vec<f32>)],
}

impl Rows for DecodedRows<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let columns = self.columns;
        for (first, values) in self.replaced {
            if let Some(row) = index.checked_sub(*first).and_then(|at| values.chunks(columns).nth(at)) {
                return bytemuck::cast_slice(row);
            }
        }
        let mut values = vec![0.0f32; columns];
        // `tensor` returns this type for block types that can be decoded only.
        if decode(self.source.as_ref(), index, scratch, &mut values).is_err() {
            values.fill(f32::NAN);
        }
        scratch.clear();
        scratch.extend_from_slice(bytemuck::cast_slice(&values));
        scratch
    }
}

fn decode(rows: &dyn Rows, index: usize, scratch: &mut Vec<u8>, values: &mut [f32]) -> Result<()> {
    rows.block_type().decode(rows.row(index, scratch), values)
}

/// Decodes `count` rows of a tensor, starting at row `first`: `(count, columns)`.
///
/// # Errors
/// Those of [`BlockType::decode`].
pub(in crate::quantize) fn read_rows(tensor: &Tensor<'_>, first: usize, count: usize) -> Result<Vec<f32>> {
    let columns = tensor.dims.first().copied().unwrap_or(0);
    let mut values = vec![0.0; count * columns];
    let mut scratch = Vec::new();
    for (row, values) in values.chunks_mut(columns.max(1)).enumerate() {
        decode(tensor.rows.as_ref(), first + row, &mut scratch, values)?;
    }
    Ok(values)
}
