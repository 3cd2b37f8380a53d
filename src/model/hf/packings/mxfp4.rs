//! Experts in MXFP4, as gpt-oss is published: `NAME_blocks (experts, rows, columns / 32, 16)` with two codes in a byte, and
//! `NAME_scales (experts, rows, columns / 32)` with the exponents (OCP Microscaling Formats 1.0). Read as GGUF's blocks of the
//! same numbers.

use crate::error::{Error, Place, Result};
use crate::format::safetensors::{SafeTensors, TensorInfo};
use crate::model::hf::entry::Transform;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// Weights of a block.
const BLOCK: usize = 32;

/// Where the rows of a tensor are.
#[derive(Debug, Clone, Copy)]
pub(in crate::model::hf) struct Blocks {
    /// Indices into [`SafeTensors::tensors`].
    codes: usize,
    scales: usize,
    /// Rows of an expert in the tensor that are read, and in the tensors of the checkpoint.
    rows: usize,
    of: usize,
    /// Rows that are read: `first`, `first + step`, ...
    first: usize,
    step: usize,
    columns: usize,
}

impl Blocks {
    /// The tensors called `name`, if the checkpoint has them, for a tensor of `dims`, the fastest-varying first.
    ///
    /// # Errors
    /// [`Error::Missing`] and [`Error::Malformed`] with the checkpoint's name of the tensor.
    pub(in crate::model::hf) fn find(
        files: &SafeTensors,
        name: &str,
        dims: &[usize],
        transform: Transform,
    ) -> Result<Option<(Blocks, [usize; 2])>> {
        let (Some(codes), Transform::ColumnsOfPart { part, parts, alternate }, &[columns, rows, experts]) =
            (files.position(&format!("{name}_blocks")), transform, dims)
        else {
            return Ok(None);
        };
        let scales_name = format!("{name}_scales");
        let Some(scales) = files.position(&scales_name) else {
            return Err(Error::Missing {
                path: files.folder().to_path_buf(),
                place: Place::Tensor(scales_name),
                expected: "the scales of the blocks".to_owned(),
            });
        };
        let (of, blocks) = (parts * rows, columns / BLOCK);
        if !columns.is_multiple_of(BLOCK) {
            let place = Place::Tensor(format!("{name}_blocks"));
            let found = format!("rows of {columns} weights");
            return Err(Error::malformed(files.folder(), place, found, "a multiple of 32"));
        }
        check(files, codes, &[experts, of, blocks, BLOCK / 2])?;
        check(files, scales, &[experts, of, blocks])?;
        let (first, step) = if alternate { (part, parts) } else { (part * rows, 1) };
        Ok(Some((Blocks { codes, scales, rows, of, first, step, columns }, [codes, scales])))
    }

    /// The rows, as GGUF has them.
    pub(in crate::model::hf) fn rows<'a>(&self, files: &'a SafeTensors) -> Option<MxRows<'a>> {
        let data = |at: usize| files.tensors().get(at).map(|tensor| files.data(tensor));
        Some(MxRows { blocks: *self, codes: data(self.codes)?, scales: data(self.scales)? })
    }
}

fn check(files: &SafeTensors, at: usize, shape: &[usize]) -> Result<()> {
    let Some(tensor) = files.tensors().get(at) else { return Ok(()) };
    let is_right = |tensor: &TensorInfo| tensor.dtype() == "U8" && tensor.shape() == shape;
    if is_right(tensor) {
        return Ok(());
    }
    let found = format!("{} of shape {:?}", tensor.dtype(), tensor.shape());
    let place = Place::Tensor(tensor.name().to_owned());
    Err(Error::malformed(files.path(tensor), place, found, format_args!("U8 of shape {shape:?}")))
}

/// Rows of blocks.
pub(in crate::model::hf) struct MxRows<'a> {
    blocks: Blocks,
    codes: &'a [u8],
    scales: &'a [u8],
}

impl Rows for MxRows<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::MXFP4
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let Blocks { rows, of, first, step, columns, .. } = self.blocks;
        let (source, blocks) = (index / rows * of + first + index % rows * step, columns / BLOCK);
        let scales = &self.scales[source * blocks..][..blocks];
        let codes = &self.codes[source * blocks * (BLOCK / 2)..][..blocks * (BLOCK / 2)];
        scratch.clear();
        for (scale, codes) in scales.iter().zip(codes.chunks_exact(BLOCK / 2)) {
            scratch.push(*scale);
            // Neighbors share a byte in the checkpoint; weights 16 apart do in GGUF.
            let code = |weight: usize| codes[weight / 2] >> (weight % 2 * 4) & 15;
            scratch.extend((0..BLOCK / 2).map(|weight| code(weight) | code(weight + BLOCK / 2) << 4));
        }
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_become_those_of_gguf_with_the_rows_of_a_part() {
        // Two experts of two rows of gate and two of up that alternate, a block each.
        let codes: Vec<u8> = (0..8 * 16).map(|i| (i % 16) as u8 | ((i / 16) as u8) << 4).collect();
        let scales: Vec<u8> = (120..128).collect();
        let blocks = Blocks { codes: 0, scales: 1, rows: 2, of: 4, first: 1, step: 2, columns: 32 };
        let rows = MxRows { blocks, codes: &codes, scales: &scales };
        let mut scratch = Vec::new();
        for (row, source) in [1u8, 3, 5, 7].into_iter().enumerate() {
            let bytes = rows.row(row, &mut scratch).to_vec();
            let mut values = [0.0; 32];
            BlockType::MXFP4.decode(&bytes, &mut values).unwrap();
            let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
            let scale = 2f32.powi(i32::from(120 + source) - 127);
            for (pair, values) in values.chunks(2).enumerate() {
                let expected = [table[pair] * scale, table[usize::from(source)] * scale];
                assert_eq!(values, expected, "row {row}, pair {pair}");
            }
        }
    }
}
