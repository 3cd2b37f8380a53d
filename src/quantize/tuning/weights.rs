//! The weights of the quantized model before tuning, with the factors that tuning has learned.

use super::adam::{AdamFactors, BlockFactors};
use super::backprop::{BlockWeights, MATRICES, NORMS};
use crate::error::{Error, Result};
use crate::format::Tensor;
use crate::quantize::calibration::read_rows;
use crate::quantize::context::OpenRun;
use crate::quantize::resume::ResumeLog;

/// The tensors of a block other than matrices and norms.
pub(super) const BIASES: [&str; 3] = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];

/// The name under which the log has a tuned tensor.
pub(in crate::quantize) fn tuned(name: &str) -> String {
    format!("tuned {name}")
}

/// A tensor that tuning needs.
///
/// # Errors
/// [`Error::InvalidArgument`] if the checkpoint does not have it.
pub(super) fn tensor<'a>(run: &OpenRun<'a>, name: &str) -> Result<Tensor<'a>> {
    let missing = || Error::argument("source", format_args!("no tensor {name}"), "a model of plain decoder blocks");
    run.checkpoint.tensor(name).ok_or_else(missing)
}

/// The values of a tensor as the file would have them without tuning.
///
/// # Errors
/// Those of the log, and of encoding and decoding.
pub(super) fn untuned(run: &OpenRun<'_>, log: &ResumeLog, name: &str) -> Result<Vec<f32>> {
    let tensor = tensor(run, name)?;
    let block_type = run.formats.stored(name, &tensor.dims).block_type();
    let blocks = match log.blocks(name, 0)? {
        Some(blocks) => blocks,
        None => {
            let (count, mut blocks) = (tensor.dims.iter().skip(1).product(), Vec::new());
            block_type.encode(&read_rows(&tensor, 0, count)?, &mut blocks)?;
            blocks
        }
    };
    let mut values = vec![0.0; tensor.dims.iter().product()];
    block_type.decode(&blocks, &mut values)?;
    Ok(values)
}

/// The weights of a block with its learned factors.
///
/// # Errors
/// Those of [`untuned`].
pub(super) fn block(run: &OpenRun<'_>, log: &ResumeLog, index: usize, factors: &BlockFactors) -> Result<BlockWeights> {
    let name = |stem: &str| format!("blk.{index}.{stem}.weight");
    let window = run.layers.config().layers[index].window.unwrap_or(usize::MAX);
    let mut block =
        BlockWeights { matrices: Default::default(), biases: Default::default(), norms: Default::default(), window };
    for (part, matrix) in block.matrices.iter_mut().enumerate() {
        *matrix = untuned(run, log, &name(MATRICES[part]))?;
        if let Some((group, factors)) = &factors.groups[part] {
            for (weights, delta) in matrix.chunks_mut(*group).zip(&factors.deltas) {
                weights.iter_mut().for_each(|weight| *weight *= 1.0 + delta);
            }
        }
    }
    for (bias, stem) in block.biases.iter_mut().zip(BIASES) {
        let name = format!("blk.{index}.{stem}");
        if run.checkpoint.tensor(&name).is_some() {
            *bias = untuned(run, log, &name)?;
        }
    }
    for (at, norm) in block.norms.iter_mut().enumerate() {
        *norm = scaled(&untuned(run, log, &name(NORMS[at]))?, &factors.norms[at]);
    }
    run.release_layer(index);
    Ok(block)
}

/// Weights multiplied by their factors.
pub(super) fn scaled(weights: &[f32], factors: &AdamFactors) -> Vec<f32> {
    weights.iter().zip(&factors.deltas).map(|(x, delta)| x * (1.0 + delta)).collect()
}
