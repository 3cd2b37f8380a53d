//! Leaves out the experts of each layer that a text uses least.
//!
//! All layers keep the same number of experts, as `expert_count` of a GGUF file is one number. Where experts form groups, each group
//! keeps the same number. Lu et al. 2024 (arXiv 2402.14800) compare all choices of two experts by the outputs of a layer; counting
//! works for any number.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::context::RunContext;
use super::eval::{Divergence, Reference};
use crate::error::{Error, Place, Result};
use crate::format::gguf::Metadata;
use crate::format::{Checkpoint, Tensor};
use crate::model::{ExpertMemory, Input, LoadOptions, Logits, Model, layer_of};
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// Windows on which the loss is measured, at most, and at most a quarter of all. The others count what is chosen.
const MEASURED: usize = 16;

/// The experts of a model that stay.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruning {
    /// By layer, in ascending order.
    kept: BTreeMap<usize, Vec<usize>>,
    /// Experts of a layer, before and after.
    pub experts: [usize; 2],
    /// The share of the experts that tokens chose which are left out.
    pub left_out: f64,
    /// What leaving them out costs, without any other quantization than that of loading the model.
    pub divergence: Divergence,
}

impl Pruning {
    /// Counts the experts that the windows of the context choose, and keeps the `count` that are chosen most in each layer. The last
    /// quarter of the windows measures the loss.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a number of experts that the model cannot have, a model without experts, and fewer than four
    /// windows; [`Error::Unsupported`] for a model with experts that are not counted; those of [`Model::load`] and
    /// [`Model::forward`].
    pub fn choose(context: &RunContext<'_>, count: usize) -> Result<Pruning> {
        let windows = context.windows;
        let measured = (windows.len() / 4).min(MEASURED);
        if measured == 0 {
            let found = format_args!("{} windows of text", windows.len());
            return Err(Error::argument("prune_experts", found, "at least 4"));
        }
        let (counted, measured) = windows.split_at(windows.len() - measured);
        // A text of another length than the windows ends in a shorter one.
        let length = measured.iter().map(Vec::len).max().unwrap_or(0);
        let measured: Vec<Vec<u32>> = measured.iter().filter(|window| window.len() == length).cloned().collect();
        let options = LoadOptions { threads: context.threads, ..LoadOptions::default() }
            .with_expert_memory(ExpertMemory::Auto)
            .with_mtp(false);
        let progress = |done: usize, total: usize| {
            (context.progress)("measuring experts", done, total);
            Ok(())
        };
        let model = Model::load(context.source, &options.clone().with_expert_skip(0.0))?;
        let before = model.config().experts.count;
        check_count(&model, count)?;
        for (done, window) in counted.iter().enumerate() {
            progress(done, windows.len())?;
            let mut session = model.session();
            let input = Input::new(&mut session, window, Logits::None);
            model.forward(&mut [input], &mut Vec::new(), context.interrupted)?;
        }
        let chosen = model.expert_use().chosen;
        let groups = model.config().experts.groups.map_or(1, |groups| groups.count);
        let mut reference = Reference::record(
            &model,
            &measured,
            &|done, _| progress(counted.len() + done, windows.len()),
            context.interrupted,
        )?;
        drop(model);
        let layers = context.with_source(|checkpoint| Ok(layers(checkpoint)))?;
        if layers.len() != chosen.len() {
            return Err(Error::Unsupported {
                path: context.source.to_path_buf(),
                place: Place::File,
                what: "leaving out experts of a head for multi-token prediction".to_owned(),
                supported: "supported: models whose head has no experts".to_owned(),
            });
        }
        let kept: BTreeMap<usize, Vec<usize>> =
            layers.into_iter().zip(&chosen).map(|(layer, chosen)| (layer, most(chosen, count, groups))).collect();
        let all: u64 = chosen.iter().flatten().sum();
        let stay: u64 = kept.values().zip(&chosen).flat_map(|(kept, chosen)| kept.iter().map(|at| chosen[*at])).sum();
        let model = Model::load_changed(context.source, &options, &|all| PrunedCheckpoint::boxed(all, &kept, count))?;
        let evaluation = reference.compare(&model, &|_, _| Ok(()), context.interrupted)?;
        let divergence = evaluation.divergence.expect("a comparison");
        Ok(Pruning { kept, experts: [before, count], left_out: 1.0 - stay as f64 / all.max(1) as f64, divergence })
    }

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

/// Checks that layers of a model may have `count` experts.
fn check_count(model: &Model, count: usize) -> Result<()> {
    let experts = &model.config().experts;
    if experts.count == 0 {
        let found = format_args!("{count} for a model without experts");
        return Err(Error::argument("prune_experts", found, "None, or a model with experts"));
    }
    let (groups, least) = experts.groups.map_or((1, experts.used), |groups| {
        (groups.count, (experts.used.div_ceil(groups.used)).max(groups.best) * groups.count)
    });
    if count < least || count >= experts.count || !count.is_multiple_of(groups) {
        let of_groups = if groups > 1 { format!(", a multiple of {groups}") } else { String::new() };
        let expected = format_args!("{least} to {}{of_groups}", experts.count - 1);
        return Err(Error::argument("prune_experts", count, expected));
    }
    Ok(())
}

/// The layers with experts, in order.
fn layers(checkpoint: &dyn Checkpoint) -> Vec<usize> {
    let names = checkpoint.names();
    let mut layers: Vec<usize> =
        names.into_iter().filter(|name| name.ends_with(".ffn_down_exps.weight")).filter_map(layer_of).collect();
    layers.sort_unstable();
    layers
}

/// The `count` experts that were chosen most, equally many of each group, ties to the lower number; in ascending order.
fn most(chosen: &[u64], count: usize, groups: usize) -> Vec<usize> {
    let size = (chosen.len() / groups).max(1);
    let mut kept = Vec::with_capacity(count);
    for group in 0..groups {
        let mut own: Vec<usize> = (group * size..(group + 1) * size).collect();
        own.sort_by_key(|expert| std::cmp::Reverse(chosen[*expert]));
        kept.extend_from_slice(&own[..count / groups]);
    }
    kept.sort_unstable();
    kept
}

/// A checkpoint without some of its experts.
struct PrunedCheckpoint<'a> {
    source: &'a dyn Checkpoint,
    metadata: Metadata,
    kept: BTreeMap<usize, Vec<usize>>,
}

impl<'a> PrunedCheckpoint<'a> {
    fn boxed(
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
        if self.each > 0 {
            return self.rows.row(self.kept[index / self.each] * self.each + index % self.each, scratch);
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
    fn the_experts_that_are_chosen_most_stay() {
        assert_eq!(most(&[5, 9, 9, 1, 7], 3, 1), [1, 2, 4]);
        assert_eq!(most(&[5, 9, 9, 5], 3, 1), [0, 1, 2]);
        // As many of each group.
        assert_eq!(most(&[5, 9, 8, 1, 0, 2, 3, 4], 4, 2), [1, 2, 6, 7]);
    }

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
