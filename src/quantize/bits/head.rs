//! The sensitivity of the embedding and the output matrix: how much the predictions of the model change when one of them alone is
//! quantized.

use super::measure::{bytes, divergence, logits};
use crate::error::Result;
use crate::format::{Checkpoint, Tensor, as_in_source};
use crate::model::layerwise::Layerwise;
use crate::quant::block::BlockType;
use crate::quant::pack::Contiguous;
use crate::quantize::calibration::{Calibration, PassThrough, read_rows};
use crate::quantize::context::OpenRun;
use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::{LayerProblem, error};
use crate::quantize::overrides::Stored;
use crate::quantize::recipes::rtn;

/// The matrices before the first block of the model and after the last. Where the second is missing, the first is both.
const NAMES: [&str; 2] = ["token_embd.weight", "output.weight"];
/// Their formats, fewest bits first.
pub(super) const FORMATS: [Format; 3] = [Format::Iq4Nl, Format::Q5_0, Format::Q8_0];
/// Rows that are in memory at a time.
const ROWS: usize = 4096;

/// Those matrices of the checkpoint that would be stored in Q8_0, with their number of weights.
pub(super) fn open<'a>(run: &OpenRun<'a>) -> Vec<(&'a str, usize)> {
    let (checkpoint, formats) = (run.checkpoint, run.formats);
    let has_logits = run.layers.config().has_logits;
    let names = checkpoint.names().into_iter().filter(|name| has_logits && NAMES.contains(name));
    let is_open = |(name, dims): &(&str, Vec<usize>)| {
        !formats.is_overridden(name) && formats.stored(name, dims) == Stored::Encoded(BlockType::Q8_0)
    };
    let matrices = names.filter_map(|name| Some((name, checkpoint.tensor(name)?.dims))).filter(is_open);
    matrices.map(|(name, dims)| (name, dims.iter().product())).collect()
}

/// The bytes that the matrices of [`open`] take in Q8_0.
pub(super) fn size(run: &OpenRun<'_>) -> u64 {
    open(run).iter().map(|(_, weights)| bytes(BlockType::Q8_0, *weights)).sum()
}

/// The loss of a matrix in the first of [`FORMATS`], then the relative error of its weights in each of them. `reference` are the
/// logits of the windows of the run.
///
/// # Errors
/// [`Error::Interrupted`](crate::error::Error::Interrupted); those of the forward pass.
pub(super) fn measure(run: &OpenRun<'_>, name: &str, reference: &[f32]) -> Result<Vec<f64>> {
    let Some(tensor) = run.checkpoint.tensor(name) else { return Ok(vec![0.0; 1 + FORMATS.len()]) };
    let (columns, rows) = (tensor.dims[0], tensor.dims.iter().skip(1).product::<usize>());
    let compute = run.compute();
    let (mut errors, mut chunks, mut blocks) = ([0.0; FORMATS.len()], 0.0, Vec::new());
    for first in (0..rows).step_by(ROWS) {
        run.check()?;
        let weights = read_rows(&tensor, first, ROWS.min(rows - first))?;
        let problem = LayerProblem::new(&weights, weights.len() / columns, columns, &[], &[])?;
        for (at, format) in FORMATS.into_iter().enumerate() {
            let grouped = GroupedFormat { format, group: format.block() };
            let solution = rtn::solve(&problem, &grouped, true, &compute);
            errors[at] += error(&problem, &solution.decode(&grouped, columns));
            if at == 0 {
                blocks.extend(solution.encode(&grouped, columns));
            }
        }
        chunks += 1.0;
    }
    let errors = errors.map(|sum| sum / chunks);
    run.check()?;
    let dims = tensor.dims.clone();
    drop(tensor);
    run.checkpoint.release(name);
    let patched = PatchedHead { source: run.checkpoint, name, dims, block_type: FORMATS[0].block_type(), blocks };
    let windows = run.context.windows;
    let layers = &Layerwise::load(&patched, &run.context.load_options())?;
    let folder = std::env::temp_dir();
    let mut calibration = Calibration::start(layers, windows, &folder)?;
    for index in 0..layers.config().layers.len() {
        calibration.layer(index, &mut PassThrough(&patched))?;
        run.release_layer(index);
    }
    let loss = divergence(reference, &logits(&mut calibration, windows.len())?, layers.vocabulary());
    Ok([&[loss], &errors[..]].concat())
}

/// A checkpoint with other blocks for one matrix.
struct PatchedHead<'a> {
    source: &'a dyn Checkpoint,
    name: &'a str,
    dims: Vec<usize>,
    block_type: BlockType,
    blocks: Vec<u8>,
}

impl Checkpoint for PatchedHead<'_> {
    as_in_source!();

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        if name != self.name {
            return self.source.tensor(name);
        }
        let rows = self.dims.iter().skip(1).product();
        let rows = Box::new(Contiguous::new(self.block_type, &self.blocks, rows));
        Some(Tensor { dims: self.dims.clone(), rows })
    }

    fn is_quantized(&self, name: &str) -> bool {
        name == self.name || self.source.is_quantized(name)
    }
}
