//! How much a model's predictions suffer when one tensor alone is rounded: measured, on a short text.

use serde_json::json;

use super::allocate::{Choice, allocate};
use super::calibrate::{Calibration, Moments, Visitor};
use super::compute::Compute;
use super::flow::Progress;
use super::journal::Journal;
use super::overlay::{Overlay, read_rows};
use super::policy::{Policy, Stored, is_linear};
use super::problem::{Format, Grid, Problem, error};
use super::rtn;
use crate::error::{Error, Result};
use crate::format::{Checkpoint, Tensor};
use crate::model::layerwise::{Layerwise, Site};
use crate::quant::block::BlockType;

/// Formats that a tensor may get instead of the usual one.
const FINER: [Grid; 2] = [Grid::Q5_0, Grid::Q8_0];

/// Names and types for [`Policy::keep`], such that the linear layers have `bits` a weight on average at most, scales
/// included, and the model loses as little as possible.
///
/// What a tensor loses in the usual format is the mean divergence of predictions on `windows` when it alone is rounded; in
/// finer ones it is less by as much as its weights' error is. What `journal` knows of that is not measured again, and what is
/// measured goes into it.
///
/// # Errors
/// [`Error::InvalidArgument`] when the usual format takes more bits; [`Error::Interrupted`]; those of the forward pass.
#[allow(clippy::too_many_arguments, reason = "one call, from where all of it is at hand")]
pub(super) fn plan(
    checkpoint: &dyn Checkpoint,
    layers: &Layerwise,
    policy: &Policy,
    bits: f64,
    windows: &[Vec<u32>],
    journal: &mut Journal,
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<(String, BlockType)>> {
    let compute = Compute::new(layers.pool(), layers.kernel());
    if !spare(checkpoint, layers.config().layers.len(), policy, bits)? {
        return Ok(Vec::new());
    }
    let folder = std::env::temp_dir();
    let mut calibration = Calibration::start(layers, windows, &folder)?;
    let count = layers.config().layers.len();
    let mut before = Vec::with_capacity(count);
    for index in 0..count {
        before.push(calibration.fork()?);
        calibration.layer(index, &mut Through(checkpoint))?;
    }
    let reference = logits(&mut calibration, windows.len())?;

    let (mut names, mut tensors, mut weights) = (Vec::new(), Vec::new(), 0usize);
    for (index, before) in before.iter_mut().enumerate() {
        for tensor in linear(checkpoint, policy, index) {
            if interrupted() {
                return Err(Error::Interrupted);
            }
            progress("sensitivity", index, count);
            let formats: Vec<Format> =
                std::iter::once(tensor.format).chain(FINER.map(|grid| Format { grid, group: 32 })).collect();
            let measure = || {
                let mut overlay = Overlay::new(checkpoint);
                let problem = Problem::new(&tensor.weights, tensor.rows, tensor.columns, &[], &[])?;
                let rounded =
                    |format: &Format| rtn::solve(&problem, format, true, &compute).decode(format, tensor.columns);
                let errors: Vec<f64> = formats.iter().map(|format| error(&problem, &rounded(format))).collect();
                overlay.replace(&tensor.name, 0, rounded(&tensor.format));
                let mut fork = before.fork()?;
                for later in index..count {
                    fork.layer(later, &mut Through(&overlay))?;
                }
                let loss = divergence(&reference, &logits(&mut fork, windows.len())?, layers.vocabulary());
                Ok([&[loss], &errors[..]].concat())
            };
            let numbers = known(journal, &tensor.name, measure)?;
            let (loss, errors) = (numbers[0], &numbers[1..]);
            let of = |(format, error): (&Format, &f64)| Choice {
                bytes: bytes(format.grid.block_type(), tensor.weights.len()),
                loss: if errors[0] > 0.0 { loss * error / errors[0] } else { 0.0 },
            };
            tensors.push(formats.iter().zip(errors).map(of).collect::<Vec<Choice>>());
            weights += tensor.weights.len();
            names.push((tensor.name, formats));
        }
    }
    let budget = (bits * weights as f64 / 8.0) as u64;
    let Some(chosen) = allocate(&tensors, budget) else { return Err(too_few(policy, bits, weights)) };
    let finer = names.into_iter().zip(chosen).filter(|(_, choice)| *choice > 0);
    Ok(finer.map(|((name, formats), choice)| (name, formats[choice].grid.block_type())).collect())
}

/// The numbers that the journal has under a name, or those that are measured now.
fn known(journal: &mut Journal, name: &str, measure: impl FnOnce() -> Result<Vec<f64>>) -> Result<Vec<f64>> {
    if let Some(bytes) = journal.blocks(name, 0)? {
        return Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect());
    }
    let numbers = measure()?;
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    journal.add(name, 0, json!({ "name": name, "part": 0 }), &bytes)?;
    Ok(numbers)
}

fn too_few(policy: &Policy, bits: f64, weights: usize) -> Error {
    let least = policy.grid.block_type();
    let usual = bytes(least, weights) as f64 * 8.0 / weights.max(1) as f64;
    Error::argument("bits_per_weight", bits, format_args!("at least {usual}, the bits of {least}"))
}

/// Whether there are bits for a finer format of any tensor.
///
/// # Errors
/// [`Error::InvalidArgument`] when there are not even enough for the usual one.
fn spare(checkpoint: &dyn Checkpoint, layers: usize, policy: &Policy, bits: f64) -> Result<bool> {
    let (usual, finer) = (policy.grid.block_type(), FINER[0].block_type());
    let of_layer = |index| formats(checkpoint, policy, index).map(|(_, tensor, _)| tensor.dims.iter().product());
    let sizes: Vec<usize> = (0..layers).flat_map(of_layer).collect();
    let weights = sizes.iter().sum();
    let Some(left) = ((bits * weights as f64 / 8.0) as u64).checked_sub(bytes(usual, weights)) else {
        return Err(too_few(policy, bits, weights));
    };
    Ok(sizes.iter().any(|size| bytes(finer, *size) <= left + bytes(usual, *size)))
}

fn bytes(block_type: BlockType, weights: usize) -> u64 {
    (weights / block_type.block_len() * block_type.block_bytes()) as u64
}

/// A linear layer whose format is the usual one.
struct Linear {
    name: String,
    /// `(rows, columns)`; the rows of all experts.
    weights: Vec<f32>,
    rows: usize,
    columns: usize,
    format: Format,
}

/// The names of what [`linear`] reads, with the formats.
fn formats<'a>(
    checkpoint: &'a dyn Checkpoint,
    policy: &Policy,
    index: usize,
) -> impl Iterator<Item = (&'a str, Tensor<'a>, Format)> {
    let prefix = format!("blk.{index}.");
    let names: Vec<&str> = checkpoint.names().into_iter().filter(|name| name.starts_with(&prefix)).collect();
    names.into_iter().filter_map(move |name| {
        let tensor = checkpoint.tensor(name).filter(|_| is_linear(name.strip_suffix(".weight").unwrap_or(name)))?;
        match policy.stored(name, &tensor.dims) {
            // What the user keeps in a type is not for us to change.
            Stored::Solved(format) if format.grid == policy.grid => Some((name, tensor, format)),
            _ => None,
        }
    })
}

/// The linear layers of a block of the model that the policy leaves to recipes, one at a time.
fn linear(checkpoint: &dyn Checkpoint, policy: &Policy, index: usize) -> impl Iterator<Item = Linear> {
    formats(checkpoint, policy, index).filter_map(|(name, tensor, format)| {
        let (columns, rows) = (*tensor.dims.first()?, tensor.dims.iter().skip(1).product());
        let weights = read_rows(&tensor, 0, rows).ok()?;
        Some(Linear { name: name.to_owned(), weights, rows, columns, format })
    })
}

/// All logits after the last layer `(tokens, vocabulary)`.
fn logits(calibration: &mut Calibration<'_>, windows: usize) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for window in 0..windows {
        all.extend(calibration.logits(window)?);
    }
    Ok(all)
}

/// The mean over rows of the Kullback-Leibler divergence of `found` from `reference`, both `(rows, vocabulary)`, in nats.
fn divergence(reference: &[f32], found: &[f32], vocabulary: usize) -> f64 {
    let normalizer = |row: &[f32]| {
        let most = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        f64::from(most) + row.iter().map(|x| f64::from((x - most).exp())).sum::<f64>().ln()
    };
    let rows = reference.chunks(vocabulary).zip(found.chunks(vocabulary));
    let each = rows.map(|(a, b)| {
        let (all_a, all_b) = (normalizer(a), normalizer(b));
        a.iter()
            .zip(b)
            .map(|(a, b)| {
                let (a, b) = (f64::from(*a) - all_a, f64::from(*b) - all_b);
                a.exp() * (a - b)
            })
            .sum::<f64>()
    });
    each.sum::<f64>() / (reference.len() / vocabulary).max(1) as f64
}

/// Takes windows through the layers of a checkpoint and changes nothing.
pub(super) struct Through<'a>(pub(super) &'a dyn Checkpoint);

impl Visitor for Through<'_> {
    fn wants(&self, _: usize, _: Site) -> bool {
        false
    }

    fn visit(&mut self, _: usize, _: Site, _: Option<Moments>) -> Result<()> {
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        self.0
    }

    fn step(&self, _: usize, _: Site, _: usize) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_that_of_the_distributions() {
        // (1/2, 1/2) against (1/4, 3/4), whatever is added to the logits; the second row is equal.
        let reference = [0.0, 0.0, 5.0, 1.0];
        let found = [7.0, 7.0 + 3f32.ln(), -5.0, -9.0];
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((divergence(&reference, &found, 2) - expected / 2.0).abs() < 1e-6);
    }
}
