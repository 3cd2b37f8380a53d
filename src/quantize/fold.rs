//! Factors of the inputs of layers, folded into the norm that makes these inputs.

use super::awq;
use super::calibrate::Moments;
use super::compute::Compute;
use super::flow::FEWEST_TOKENS;
use super::journal::Journal;
use super::overlay::read_rows;
use super::problem::{Format, Problem};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::layerwise::{Network, Site};
use serde_json::json;

/// The norm whose output only the layers at a site read, without its `.weight`.
pub(super) fn norm(checkpoint: &dyn Checkpoint, layer: usize, site: Site) -> Option<String> {
    let has = |name: &str| checkpoint.tensor(&format!("blk.{layer}.{name}.weight")).is_some();
    // Attention and feed-forward networks that share a norm, and a router that reads one, would need the factors too.
    if !has("attn_norm") || !has("ffn_norm") || has("ffn_gate_inp") {
        return None;
    }
    match site {
        Site::Qkv => Some(format!("blk.{layer}.attn_norm")),
        Site::Up(Network::Dense) => Some(format!("blk.{layer}.ffn_norm")),
        _ => None,
    }
}

/// Finds the factors of the columns of layers that read `norm` and adds the norm, divided by them, to the journal. Too few
/// inputs leave it as it is.
///
/// # Errors
/// [`Error::Interrupted`]; those of the journal.
pub(super) fn fold(
    checkpoint: &dyn Checkpoint,
    norm: &str,
    layers: &[(Vec<f32>, Format)],
    moments: &Moments,
    journal: &mut Journal,
    compute: &Compute<'_>,
) -> Result<()> {
    let columns = moments.magnitude.len();
    let Some((_, format)) = layers.first().filter(|_| moments.tokens >= FEWEST_TOKENS) else { return Ok(()) };
    let problem = |weights| Problem {
        weights,
        rows: weights.len() / columns,
        columns,
        hessian: &moments.hessian,
        magnitude: &moments.magnitude,
    };
    let problems: Vec<Problem<'_>> = layers.iter().map(|(weights, _)| problem(weights)).collect();
    let factors = awq::factors(&problems, format, compute);
    if compute.is_stopped() {
        return Err(Error::Interrupted);
    }
    // The weight comes last: what has one has all.
    for name in [format!("{norm}.bias"), format!("{norm}.weight")] {
        let Some(tensor) = checkpoint.tensor(&name) else { continue };
        let values = read_rows(&tensor, 0, 1)?;
        let bytes: Vec<u8> = values.iter().zip(&factors).flat_map(|(x, factor)| (x / factor).to_le_bytes()).collect();
        journal.add(&name, 0, json!({ "name": name, "part": 0, "recipe": "folded" }), &bytes)?;
    }
    Ok(())
}

/// The factors by which a norm in the journal was divided: those of this run and of one that resumes are the same to the bit.
///
/// # Errors
/// Those of the journal.
pub(super) fn factors(checkpoint: &dyn Checkpoint, norm: &str, journal: &Journal) -> Result<Option<Vec<f32>>> {
    let name = format!("{norm}.weight");
    let (Some(tensor), Some(folded)) = (checkpoint.tensor(&name), journal.blocks(&name, 0)?) else { return Ok(None) };
    let values = read_rows(&tensor, 0, 1)?;
    let folded = folded.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let factor = |(x, folded): (f32, f32)| if folded != 0.0 && (x / folded).is_normal() { x / folded } else { 1.0 };
    Ok(Some(values.into_iter().zip(folded).map(factor).collect()))
}
