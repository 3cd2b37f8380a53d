//! AWQ's column factors, divided out of the norm that produces the columns.

use serde_json::json;

use super::awq;
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::layerwise::{Network, Site};
use crate::quantize::calibration::{MIN_TOKENS, Moments, read_rows};
use crate::quantize::compute::Compute;
use crate::quantize::format::GroupedFormat;
use crate::quantize::layer::LayerProblem;
use crate::quantize::resume::ResumeLog;

/// A norm whose output is read by the layers of one site only.
pub(in crate::quantize) struct NormScaling<'a> {
    checkpoint: &'a dyn Checkpoint,
    /// The name of the norm, without `.weight`.
    norm: String,
}

impl<'a> NormScaling<'a> {
    /// The norm before a site; `None` if other layers read its output too.
    pub(in crate::quantize) fn before(checkpoint: &'a dyn Checkpoint, layer: usize, site: Site) -> Option<Self> {
        let has = |name: &str| checkpoint.tensor(&format!("blk.{layer}.{name}.weight")).is_some();
        // Attention and feed-forward network may share a norm, and a router reads one: they would need the factors too.
        if !has("attn_norm") || !has("ffn_norm") || has("ffn_gate_inp") {
            return None;
        }
        let norm = match site {
            Site::Qkv => format!("blk.{layer}.attn_norm"),
            Site::Up(Network::Dense) => format!("blk.{layer}.ffn_norm"),
            _ => return None,
        };
        Some(NormScaling { checkpoint, norm })
    }

    /// Whether the log has the scaled norm.
    pub(in crate::quantize) fn is_done(&self, log: &ResumeLog) -> bool {
        log.description(&self.weight(), 0).is_some()
    }

    /// Finds the factors for `layers`, the weights that read the norm, and adds the norm divided by them to the log. With too
    /// few tokens nothing is added.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; those of the log.
    pub(in crate::quantize) fn find(
        &self,
        layers: &[(Vec<f32>, GroupedFormat)],
        moments: &Moments,
        log: &mut ResumeLog,
        compute: &Compute<'_>,
    ) -> Result<()> {
        let columns = moments.magnitude.len();
        let Some((_, grouped)) = layers.first().filter(|_| moments.tokens >= MIN_TOKENS) else { return Ok(()) };
        let problem = |weights| LayerProblem {
            weights,
            rows: weights.len() / columns,
            columns,
            hessian: &moments.hessian,
            magnitude: &moments.magnitude,
            squares: &[],
            sparsity: None,
        };
        let problems: Vec<LayerProblem<'_>> = layers.iter().map(|(weights, _)| problem(weights)).collect();
        let factors = awq::factors(&problems, grouped, compute);
        if compute.is_stopped() {
            return Err(Error::Interrupted);
        }
        // The weight comes last: a log that has it has the bias too.
        for name in [format!("{}.bias", self.norm), self.weight()] {
            let Some(tensor) = self.checkpoint.tensor(&name) else { continue };
            let values = read_rows(&tensor, 0, 1)?;
            let bytes: Vec<u8> =
                values.iter().zip(&factors).flat_map(|(x, factor)| (x / factor).to_le_bytes()).collect();
            log.add(&name, 0, json!({ "name": name, "part": 0, "recipe": "folded" }), &bytes)?;
        }
        Ok(())
    }

    /// The factors `(columns)` by which the norm in the log was divided. A resumed run reads the same bits as the first.
    ///
    /// # Errors
    /// Those of the log.
    pub(in crate::quantize) fn factors(&self, log: &ResumeLog) -> Result<Option<Vec<f32>>> {
        let name = self.weight();
        let (Some(tensor), Some(scaled)) = (self.checkpoint.tensor(&name), log.blocks(&name, 0)?) else {
            return Ok(None);
        };
        let values = read_rows(&tensor, 0, 1)?;
        let scaled = scaled.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let factor = |(x, scaled): (f32, f32)| if scaled != 0.0 && (x / scaled).is_normal() { x / scaled } else { 1.0 };
        Ok(Some(values.into_iter().zip(scaled).map(factor).collect()))
    }

    fn weight(&self) -> String {
        format!("{}.weight", self.norm)
    }
}
