//! Routers choose the experts for each row.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::kernels::{self, Activation, Kernel};
use crate::model::arch::Gating;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, ExpertsConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::Norm;
use crate::model::pass::Pass;
use crate::model::weights::loader::{Loader, Part};

/// An expert that a row chose, and the weight of its output.
pub(in crate::model) type Choice = (usize, f32);

/// The number in place of an expert that is left out. Its weight is 0.
const LEFT_OUT: usize = usize::MAX;

/// Steps in which the shares of weights are counted: hundredths, and the largest one.
const SHARES: usize = 101;

/// Chooses experts by the logits of all.
#[derive(Debug)]
pub(super) struct Router {
    /// `(experts, hidden)`
    pub(super) logits: Linear,
    /// `(experts)`, or empty: added to the scores for the choice, but not to the weights.
    selection_bias: Vec<f32>,
    /// `(experts)`, or empty: factors of the weights.
    expert_scale: Vec<f32>,
    /// Of the residual stream, in routers that read it through a norm of their own.
    input_norm: Option<Norm>,
    /// Where experts may be left out: those that were chosen, and their weights.
    choices: ChoiceCounts,
}

/// The workspace of a router.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// `(experts)`
    scores: Vec<f32>,
    /// `(groups)`
    groups: Vec<f32>,
}

impl Router {
    /// The name of its matrix in layer `index`.
    pub(super) fn name(index: usize) -> String {
        format!("blk.{index}.ffn_gate_inp")
    }

    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Router> {
        let (name, count) = (Router::name(index), config.experts.count);
        if count == 0 {
            let name = format!("{name}.weight");
            return Err(loader.malformed(&name, "a router", "expert_count above 0 among the keys"));
        }
        let optional = |name: &str, width: usize| match loader.has(name) {
            true => loader.vector(name, width),
            false => Ok(Vec::new()),
        };
        let bias = ["exp_probs_b.bias", "exp_probs_b", "exp_probs_b.weight"].map(|name| format!("blk.{index}.{name}"));
        let bias = bias.iter().find(|name| loader.has(name)).unwrap_or(&bias[0]);
        let input_scale = optional(&format!("{name}.scale"), config.hidden)?;
        let root = (config.hidden as f32).sqrt();
        Ok(Router {
            logits: loader.linear(&[Part::new(name, count)], config.hidden)?,
            selection_bias: optional(bias, count)?,
            expert_scale: optional(&format!("blk.{index}.ffn_down_exps.scale"), count)?,
            input_norm: (!input_scale.is_empty()).then(|| Norm {
                weight: input_scale.iter().map(|scale| scale / root).collect(),
                bias: Vec::new(),
                eps: config.norm_eps,
            }),
            choices: ChoiceCounts::new(count),
        })
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let Router { logits, selection_bias, expert_scale, input_norm, choices: _ } = self;
        hasher.linear(logits);
        // Hashed only where they exist, so that models without them keep their fingerprints.
        for numbers in [selection_bias, expert_scale].into_iter().filter(|numbers| !numbers.is_empty()) {
            hasher.bytes(bytemuck::cast_slice(numbers));
        }
        if let Some(norm) = input_norm {
            hasher.norm(norm);
        }
    }

    /// Makes `input` the norm of the residual stream `x (rows, hidden)`, where the router has one.
    pub(super) fn prepare(&self, pass: &Pass<'_>, x: &[f32], input: &mut LinearInput) {
        if self.input_norm.is_some() {
            pass.norm(x, self.input_norm.as_ref(), input);
        }
    }

    /// Writes the experts that each row of `input` chooses to `choices (rows, experts used)`. Overwrites `logits`.
    pub(super) fn route(
        &self,
        pass: &Pass<'_>,
        input: &mut LinearInput,
        logits: &mut Buffer,
        scratch: &mut Scratch,
        choices: &mut Vec<Choice>,
    ) {
        let experts = &pass.config.experts;
        pass.linear(&self.logits, input, logits);
        choices.clear();
        for logits in logits.chunks_mut(self.logits.width()) {
            self.choose(pass.kernel, &mut logits[..experts.count], experts, scratch, choices);
        }
    }

    /// Appends the experts of one row, ties to the lower number.
    fn choose(
        &self,
        kernel: &Kernel,
        logits: &mut [f32],
        experts: &ExpertsConfig,
        scratch: &mut Scratch,
        choices: &mut Vec<Choice>,
    ) {
        let Scratch { scores, groups } = scratch;
        if let Some(cap) = experts.logit_cap {
            kernel.soft_cap(logits, cap);
        }
        let first = choices.len();
        if experts.gating == Gating::SparseMixer {
            sparse_mixer(logits, experts.tolerance, scores, choices);
        } else {
            // The weights of all, except for a softmax over the chosen, whose order is that of the logits.
            let sum = match experts.gating {
                Gating::Softmax => kernel.exp_segment(logits).1,
                Gating::Sigmoid => {
                    kernel.activate(Activation::Sigmoid, logits);
                    1.0
                }
                Gating::SoftmaxOfChosen | Gating::SparseMixer => 1.0,
            };
            scores.clear();
            scores.extend_from_slice(logits);
            if !self.selection_bias.is_empty() {
                // Biases are meant for weights that are divided already.
                scores.iter_mut().zip(&self.selection_bias).for_each(|(score, bias)| *score = *score / sum + bias);
            }
            keep_groups(scores, experts, groups);
            for _ in 0..experts.used {
                let best = best(scores);
                choices.push((best, logits[best] / sum));
                scores[best] = f32::NEG_INFINITY;
            }
        }
        let chosen = &mut choices[first..];
        if experts.gating == Gating::SoftmaxOfChosen {
            softmax(chosen);
        }
        let has_skipped = experts.skip.is_some_and(|ratio| self.leave_out(ratio, chosen));
        let normalized = match experts.gating {
            Gating::Softmax | Gating::Sigmoid => experts.normalized,
            Gating::SoftmaxOfChosen => has_skipped,
            Gating::SparseMixer => false,
        };
        let total: f32 = if normalized { chosen.iter().map(|(_, weight)| weight).sum() } else { 1.0 };
        chosen.iter_mut().for_each(|(_, weight)| *weight *= experts.scale / total);
        if !self.expert_scale.is_empty() {
            let chosen = chosen.iter_mut().filter(|(expert, _)| *expert != LEFT_OUT);
            chosen.for_each(|(expert, weight)| *weight *= self.expert_scale[*expert]);
        }
    }

    /// Leaves out the experts of a row whose weights are below `ratio` of the largest one (Lu et al. 2024, arXiv 2402.14800, where
    /// a row has two experts). Returns whether there are any.
    fn leave_out(&self, ratio: f32, chosen: &mut [Choice]) -> bool {
        let largest = chosen.iter().map(|(_, weight)| *weight).fold(0.0, f32::max);
        self.choices.add(largest, chosen);
        let mut has_skipped = false;
        for choice in chosen.iter_mut().filter(|(_, weight)| *weight < ratio * largest) {
            *choice = (LEFT_OUT, 0.0);
            has_skipped = true;
        }
        has_skipped
    }

    /// The experts that were chosen so far, where some may be left out.
    pub(super) fn choices(&self) -> &ChoiceCounts {
        &self.choices
    }
}

/// Counts the experts that rows choose.
#[derive(Debug)]
pub(in crate::model) struct ChoiceCounts {
    /// `(experts)`: rows that chose each.
    experts: Vec<AtomicU64>,
    /// Choices by their weights, as shares of the largest one of their row.
    shares: Vec<AtomicU64>,
}

impl ChoiceCounts {
    fn new(experts: usize) -> ChoiceCounts {
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        ChoiceCounts { experts: zeros(experts), shares: zeros(SHARES) }
    }

    fn add(&self, largest: f32, chosen: &[Choice]) {
        for (expert, weight) in chosen {
            // The last one is the largest weight itself.
            let share = (weight / largest * (SHARES - 1) as f32) as usize;
            self.shares[share.min(SHARES - 1)].fetch_add(1, Ordering::Relaxed);
            self.experts[*expert].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `(experts)`: rows that chose each.
    pub(in crate::model) fn experts(&self) -> Vec<u64> {
        self.experts.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// `(shares)`: choices with each share of the largest weight of their row.
    pub(in crate::model) fn shares(&self) -> Vec<u64> {
        self.shares.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

/// The first of the largest scores. Scores of minus infinity belong to what is taken already.
fn best(scores: &[f32]) -> usize {
    let is_worse = |best: usize, other: usize| scores[best] >= scores[other] || scores[other] == f32::NEG_INFINITY;
    (1..scores.len()).fold(0, |best, other| if is_worse(best, other) { best } else { other })
}

/// Makes the scores of all experts minus infinity except for those of the best groups. Overwrites `of_groups`.
fn keep_groups(scores: &mut [f32], experts: &ExpertsConfig, of_groups: &mut Vec<f32>) {
    let Some(groups) = experts.groups else { return };
    let size = scores.len() / groups.count;
    // The sum of the best of a group: each is the best of those that are not better than the one before.
    let score = |group: &[f32]| {
        let mut left = groups.best;
        let (mut sum, mut below) = (0.0, f32::INFINITY);
        while left > 0 {
            let next = group.iter().copied().filter(|score| *score < below).fold(f32::NEG_INFINITY, f32::max);
            let count = group.iter().filter(|score| **score == next).count().clamp(1, left);
            (0..count).for_each(|_| sum += next);
            (left, below) = (left - count, next);
        }
        sum
    };
    of_groups.clear();
    of_groups.extend(scores.chunks(size).map(score));
    for _ in 0..groups.used {
        let best = best(of_groups);
        of_groups[best] = f32::NEG_INFINITY;
    }
    for (group, score) in scores.chunks_mut(size).zip(of_groups) {
        if *score != f32::NEG_INFINITY {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Makes the weights a softmax of themselves.
fn softmax(chosen: &mut [Choice]) {
    let max = chosen.iter().map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
    chosen.iter_mut().for_each(|(_, weight)| *weight = kernels::exp(*weight - max));
    let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
    chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
}

/// Appends the best expert and the next one, each with its share of a softmax over the logits that come close to its own:
/// not further below than the tolerance, as a share of the magnitude. Overwrites `left`.
fn sparse_mixer(logits: &[f32], tolerance: f32, left: &mut Vec<f32>, choices: &mut Vec<Choice>) {
    left.clear();
    left.extend_from_slice(logits);
    for _ in 0..2 {
        let chosen = best(left);
        let max = left[chosen];
        let close = |(logit, left): (&f32, &f32)| {
            let magnitude = logit.abs().max(max);
            let counts = *left > f32::NEG_INFINITY && (max - logit) / magnitude <= tolerance;
            if counts { kernels::exp(left - max) } else { 0.0 }
        };
        let sum: f32 = logits.iter().zip(&*left).map(close).sum();
        choices.push((chosen, 1.0 / sum));
        left[chosen] = f32::NEG_INFINITY;
    }
}
