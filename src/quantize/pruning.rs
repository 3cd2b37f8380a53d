//! A checkpoint without some of the experts of each layer.
//!
//! All layers keep the same number of experts, as `expert_count` of a GGUF file is one number.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::eval::Divergence;
use crate::error::{Error, Place, Result};
use crate::format::gguf::Metadata;
use crate::format::{Checkpoint, Tensor};
use crate::model::layer_of;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// The experts of a model that stay.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruning {
    /// By layer, in ascending order.
    pub(super) kept: BTreeMap<usize, Vec<usize>>,
    /// Experts of a layer, before and after.
    pub experts: [usize; 2],
    /// The share of the experts that tokens chose which are left out.
    pub left_out: f64,
    /// What leaving them out costs, without any other quantization than that of loading the model.
    pub divergence: Divergence,
}

impl Pruning {
    /// A number that differs between choices of experts.
    pub(super) fn digest(&self) -> u64 {
        let hash = blake3::hash(format!("{:?}", self.kept).as_bytes());
        u64::from_le_bytes(*hash.as_bytes().first_chunk().unwrap_or(&[0; 8]))
    }

    /// What was left out, and what that costs, as JSON.
    pub fn to_value(&self) -> Value {
        let [before, after] = self.experts;
        json!({
            "before": before,
            "after": after,
            "left_out": self.left_out,
            "kl_mean": self.divergence.kl_mean.value,
            "perplexity_ratio": self.divergence.ratio.value,
            "top_agreement": self.divergence.top_agreement.value,
        })
    }

    /// `checkpoint` with the experts that stay.
    pub(super) fn apply<'a>(&self, checkpoint: &'a dyn Checkpoint) -> Result<Box<dyn Checkpoint + 'a>> {
        PrunedCheckpoint::boxed(checkpoint, &self.kept, self.experts[1])
    }
}

/// A checkpoint without some of its experts.
pub(super) struct PrunedCheckpoint<'a> {
    source: &'a dyn Checkpoint,
    metadata: Metadata,
    kept: BTreeMap<usize, Vec<usize>>,
}

impl<'a> PrunedCheckpoint<'a> {
    /// `source` with the experts of `kept`, `count` in each layer.
    pub(super) fn boxed(
        source: &'a dyn Checkpoint,
        kept: &BTreeMap<usize, Vec<usize>>,
        count: usize,
    ) -> Result<Box<dyn Checkpoint + 'a>> {
        let mut metadata = source.metadata().clone();
        let key = metadata.iter().map(|(key, _)| key.to_owned()).find(|key| key.ends_with(".expert_count"));
        let missing = || Error::Missing {
            path: source.path().to_path_buf(),
            place: Place::Key("expert_count".to_owned()),
            expected: "the number of experts".to_owned(),
        };
        metadata.set(key.ok_or_else(missing)?, count as u32);
        Ok(Box::new(PrunedCheckpoint { source, metadata, kept: kept.clone() }))
    }
}

/// Which dimension of a tensor counts experts.
enum Experts {
    /// The last one of several, so that each expert has rows.
    Rows,
    /// The only one.
    Numbers,
}

/// How a tensor of a layer, by its name without `blk.N.`, holds experts.
fn experts_of(part: &str, dims: &[usize]) -> Option<Experts> {
    let is_own = part.contains("_exps.")
        || part.starts_with("ffn_gate_inp.") && part != "ffn_gate_inp.scale"
        || part.starts_with("exp_probs_b");
    match dims.len() {
        _ if !is_own => None,
        1 => Some(Experts::Numbers),
        _ => Some(Experts::Rows),
    }
}

impl Checkpoint for PrunedCheckpoint<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let Tensor { mut dims, rows } = self.source.tensor(name)?;
        let kept = layer_of(name).and_then(|layer| self.kept.get(&layer));
        let part = name.splitn(3, '.').nth(2);
        let (Some(kept), Some(part)) = (kept, part) else { return Some(Tensor { dims, rows }) };
        let Some(experts) = experts_of(part, &dims) else { return Some(Tensor { dims, rows }) };
        let each = match experts {
            Experts::Rows => dims[1..dims.len() - 1].iter().product(),
            Experts::Numbers => 0,
        };
        *dims.last_mut()? = kept.len();
        Some(Tensor { dims, rows: Box::new(KeptRows { rows, kept, each }) })
    }

    fn names(&self) -> Vec<&str> {
        self.source.names()
    }

    fn is_quantized(&self, name: &str) -> bool {
        self.source.is_quantized(name)
    }

    fn mtp_fault(&self) -> Option<&str> {
        self.source.mtp_fault()
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}

/// The rows of the experts that stay.
struct KeptRows<'a> {
    rows: Box<dyn Rows + 'a>,
    kept: &'a [usize],
    /// Rows of an expert; 0 where each has a number of one row.
    each: usize,
}

impl Rows for KeptRows<'_> {
    fn block_type(&self) -> BlockType {
        self.rows.block_type()
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        if let Some(place) = index.checked_div(self.each) {
            return self.rows.row(self.kept[place] * self.each + index % self.each, scratch);
        }
        let size = self.block_type().block_bytes();
        let mut whole = Vec::new();
        let row = self.rows.row(0, &mut whole);
        scratch.clear();
        self.kept.iter().for_each(|expert| scratch.extend_from_slice(&row[expert * size..][..size]));
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_experts_are_known_by_name() {
        let kind = |part: &str, dims: &[usize]| match experts_of(part, dims) {
            None => "none",
            Some(Experts::Rows) => "rows",
            Some(Experts::Numbers) => "numbers",
        };
        assert_eq!(kind("ffn_up_exps.weight", &[64, 32, 8]), "rows");
        assert_eq!(kind("ffn_up_exps.bias", &[32, 8]), "rows");
        assert_eq!(kind("ffn_gate_inp.weight", &[64, 8]), "rows");
        assert_eq!(kind("ffn_gate_inp.bias", &[8]), "numbers");
        assert_eq!(kind("exp_probs_b.bias", &[8]), "numbers");
        assert_eq!(kind("ffn_down_exps.scale", &[8]), "numbers");
        for part in ["ffn_gate_inp.scale", "ffn_gate_inp_shexp.weight", "ffn_up_shexp.weight", "attn_q.weight"] {
            assert_eq!(kind(part, &[64, 8]), "none", "{part}");
        }
    }
}
