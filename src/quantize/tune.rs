//! Tuning, when all codes are found: the scales of groups and the weights of norms take small steps down the slope of the
//! mean divergence from the full-precision model, which is followed back through the whole model (in the manner of the second
//! phase of EfficientQAT, Chen et al. 2024, arXiv 2407.11062, and of QuIP#'s fine-tuning, Tseng et al. 2024, arXiv
//! 2402.04396; steps by Adam, Kingma and Ba 2014, arXiv 1412.6980).
//!
//! What recipes do a layer at a time keeps that layer's output; here errors of different layers learn to cancel. Codes stay
//! as they are, so the file has the same size and the same format. Only models of plain decoder blocks have it: those of
//! Llama, Mistral and Qwen2, and what is made alike.

use std::path::Path;

use half::f16;
use serde_json::json;

use super::calibrate::Calibration;
use super::compute::{Compute, packed_of};
use super::decoder::{Block, Decoder, MATRICES, NORMS};
use super::flow::{Progress, beside};
use super::journal::{self, Journal};
use super::learned::{Factors, Learned, State, scaled};
use super::overlay::read_rows;
use super::policy::{Policy, Stored};
use super::problem::{BLOCK, Grid, rounded};
use super::saved::{Pace, Saved};
use super::sensitivity::Through;
use crate::error::{Error, Result};
use crate::format::{Checkpoint, Tensor};
use crate::kernels::{Activation, Kernel};
use crate::model::arch::{NormKind, Position};
use crate::model::config::Config;
use crate::model::layerwise::Layerwise;
use crate::quant::packed::Packed;

/// Logits that are in memory at a time.
const LOGITS: usize = 1 << 22;
/// Steps until the first full one.
const WARM_UP: usize = 3;
/// The tensors that blocks may have besides matrices and norms.
const BIASES: [&str; 3] = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Times that the text is gone through.
    pub rounds: usize,
    /// Windows that make one step.
    pub batch: usize,
    /// The length of the first full step, as a share of a scale or weight. Later ones are shorter.
    pub rate: f32,
}

impl Default for Options {
    fn default() -> Self {
        Options { rounds: 1, batch: 4, rate: 1e-3 }
    }
}

/// Whether a checkpoint is made of plain decoder blocks. Otherwise what stands in the way.
pub(super) fn supports(checkpoint: &dyn Checkpoint, config: &Config) -> std::result::Result<(), String> {
    let known = |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, part)) => {
            let weight = part.strip_suffix(".weight");
            weight.is_some_and(|stem| MATRICES.contains(&stem) || NORMS.contains(&stem)) || BIASES.contains(&part)
        }
        None => matches!(name, "token_embd.weight" | "output_norm.weight" | "output.weight" | "rope_freqs.weight"),
    };
    if let Some(name) = checkpoint.names().into_iter().find(|name| !known(name)) {
        return Err(format!("the tensor {name}"));
    }
    let matrices = config.layers.len() * (MATRICES.len() + NORMS.len());
    let blocks = checkpoint.names().into_iter().filter(|name| name.starts_with("blk.") && name.ends_with(".weight"));
    let is_usual = config.family.norm == NormKind::Rms
        && matches!(config.family.position, Position::Rope | Position::RopeAdjacent)
        && config.activation == Activation::Silu
        && !config.parallel
        && config.alibi.is_none()
        && config.clamp_qkv.is_none()
        && config.attention_cap.is_none()
        && config.logit_cap.is_none()
        && (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1.0)
        && config.layers.iter().all(|layer| layer.rotated)
        && config.ropes[0] == config.ropes[1]
        && blocks.count() == matrices;
    if is_usual { Ok(()) } else { Err(format!("a model of the family {}", config.family.name)) }
}

/// What tuning works on.
pub(super) struct Tuning<'a> {
    pub(super) checkpoint: &'a dyn Checkpoint,
    pub(super) layers: &'a Layerwise,
    pub(super) policy: &'a Policy,
    pub(super) windows: &'a [Vec<u32>],
    /// What files with what is done lie beside.
    pub(super) work: &'a Path,
    /// Where temporary files go.
    pub(super) folder: &'a Path,
    pub(super) progress: Progress<'a>,
    pub(super) interrupted: &'a (dyn Fn() -> bool + Sync),
}

/// The name under which the journal has a tensor as tuning left it.
pub(super) fn tuned(name: &str) -> String {
    format!("tuned {name}")
}

/// The stream of all windows after the last layer of the full-precision model.
struct Reference {
    saved: Saved,
    /// Where each window ends.
    ends: Vec<usize>,
}

impl Reference {
    /// Appends a window's stream `(tokens, hidden)` to `out`.
    fn read(&self, window: usize, out: &mut Vec<f32>) -> Result<()> {
        let (start, at) = (if window == 0 { 0 } else { self.ends[window - 1] }, out.len());
        out.resize(at + self.ends[window] - start, 0.0);
        self.saved.read(start, &mut out[at..])
    }
}

/// One step: its windows, its number from 1 on, and how far factors move.
struct Step<'a> {
    windows: &'a [usize],
    number: usize,
    rate: f32,
}

impl Tuning<'_> {
    /// Tunes what the journal of the run with that `key` has, and adds the result to it, if that is not done.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; those of reading and writing.
    pub(super) fn run(&self, options: &Options, key: u64, journal: &mut Journal) -> Result<()> {
        let key = journal::key(self.checkpoint, (key, format!("{options:?}")), self.windows);
        // What has this has all.
        let last = journal.description(&tuned("output_norm.weight"), 0);
        if last.is_some_and(|last| last["key"].as_u64() == Some(key)) {
            return Ok(());
        }
        let reference = self.reference(key)?;
        let decoder = self.decoder();
        let count = self.layers.config().layers.len();
        let head = Head::new(self, journal)?;
        let output_norm = (self.numbers(journal, "output_norm.weight")?, Factors::new(decoder.hidden));
        let blocks = (0..count).map(|index| self.learned(journal, index, &decoder)).collect();
        let mut state = State { blocks, output_norm };
        let (path, mut pace) = (beside(self.work, ".resume-tuning"), Pace::new());
        let first = state.resume(&path, key)?;
        let batches = self.batches(options);
        for (at, windows) in batches.iter().enumerate().skip(first) {
            let warm = ((at + 1) as f32 / WARM_UP as f32).min(1.0);
            let left = 1.0 - at as f32 / batches.len() as f32;
            let step = Step { windows, number: at + 1, rate: options.rate * warm * left };
            let tell = |done: usize| (self.progress)("tuning", 2 * count * at + done, 2 * count * batches.len());
            self.step(&step, &decoder, &head, &reference, journal, &mut state, &tell)?;
            // What was computed after that is no step.
            self.check()?;
            if pace.is_due() {
                pace.save(|| state.save(&path, key, at + 1))?;
            }
        }
        self.store(journal, &state, key)
    }

    /// What the full-precision model makes of all windows, in a file: one step needs few of them.
    fn reference(&self, key: u64) -> Result<Reference> {
        let (path, mut pace) = (beside(self.work, ".resume-reference"), Pace::new());
        let count = self.layers.config().layers.len();
        let found = Calibration::resume(self.layers, self.windows, self.folder, &path, key)?;
        let (mut calibration, first) = match found.filter(|(_, layer)| *layer <= count) {
            Some(found) => found,
            None => (Calibration::start(self.layers, self.windows, self.folder)?, 0),
        };
        for index in first..count {
            self.check()?;
            (self.progress)("tuning: full precision", index, count);
            calibration.layer(index, &mut Through(self.checkpoint))?;
            self.release(index);
            if pace.is_due() || index + 1 == count {
                pace.save(|| calibration.save(&path, key, index + 1))?;
            }
        }
        drop(calibration);
        let width = self.layers.config().hidden;
        let ends = self.windows.iter().scan(0, |end, window| {
            *end += window.len() * width;
            Some(*end)
        });
        let ends: Vec<usize> = ends.collect();
        match Saved::open(&path, key, ends.last().copied().unwrap_or(0))? {
            Some(saved) => Ok(Reference { saved, ends }),
            None => {
                let found = format_args!("{}, which has changed", path.display()).to_string();
                Err(Error::argument("out", found, "files that only this run writes to"))
            }
        }
    }

    fn decoder(&self) -> Decoder<'_> {
        let config = self.layers.config();
        let longest = self.windows.iter().map(Vec::len).max().unwrap_or(0);
        let (cos, sin, pairs) = self.layers.rotations(longest);
        let up = self.checkpoint.tensor("blk.0.ffn_up.weight");
        Decoder {
            compute: Compute::new(self.layers.pool(), self.layers.kernel()).until(self.interrupted),
            hidden: config.hidden,
            width: up.and_then(|up| up.dims.get(1).copied()).unwrap_or(0),
            heads: config.heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            eps: config.norm_eps,
            scale: config.attention_scale,
            adjacent: config.family.position == Position::RopeAdjacent,
            angles: (cos, sin),
            pairs,
        }
    }

    /// Takes the windows of a step through the model and back, and moves all factors.
    #[allow(clippy::too_many_arguments, reason = "what all steps share, and what each has")]
    fn step(
        &self,
        step: &Step<'_>,
        decoder: &Decoder<'_>,
        head: &Head,
        reference: &Reference,
        journal: &Journal,
        state: &mut State,
        tell: &dyn Fn(usize),
    ) -> Result<()> {
        let lengths: Vec<usize> = step.windows.iter().map(|window| self.windows[*window].len()).collect();
        let (mut x, mut wanted) = (Vec::new(), Vec::new());
        for window in step.windows {
            reference.read(*window, &mut wanted)?;
            for token in &self.windows[*window] {
                let at = x.len();
                x.resize(at + decoder.hidden, 0.0);
                head.embedding.decode_row(*token as usize, &mut x[at..]);
            }
        }
        let mut inputs = Vec::new();
        for (index, learned) in state.blocks.iter().enumerate() {
            self.check()?;
            tell(index);
            inputs.push(x.clone());
            decoder.forward(&self.block(journal, index, learned)?, &mut x, &lengths);
        }
        let (plain, factors) = &mut state.output_norm;
        let (of_norm, mut slope) = head.slopes(self.layers, decoder, &scaled(plain, factors), &x, &wanted);
        factors.step(step.number, step.rate, |i| of_norm[i] * plain[i]);
        let count = state.blocks.len();
        for (index, learned) in state.blocks.iter_mut().enumerate().rev() {
            self.check()?;
            tell(2 * count - 1 - index);
            let block = self.block(journal, index, learned)?;
            let mut slopes: [Vec<f32>; 7] = Default::default();
            let mut sink = |part: usize, slope: &[f32]| {
                if let Some((group, factors)) = &learned.groups[part] {
                    // Of a factor: the sum over its weights of slope and weight without the factor.
                    let pairs = slope.chunks(*group).zip(block.matrices[part].chunks(*group)).zip(&factors.more);
                    let of = |((slope, weights), more): ((&[f32], &[f32]), &f32)| {
                        slope.iter().zip(weights).map(|(slope, weight)| slope * weight).sum::<f32>() / (1.0 + more)
                    };
                    slopes[part] = pairs.map(of).collect();
                }
            };
            let x = inputs.pop().unwrap_or_default();
            let of_norms = decoder.backward(&block, &x, &lengths, &mut slope, &mut sink);
            for (learned, slopes) in learned.groups.iter_mut().zip(&slopes) {
                if let Some((_, factors)) = learned {
                    factors.step(step.number, step.rate, |i| slopes[i]);
                }
            }
            for (factors, (norm, slopes)) in learned.norms.iter_mut().zip(block.norms.iter().zip(&of_norms)) {
                let before = factors.more.clone();
                factors.step(step.number, step.rate, |i| slopes[i] * norm[i] / (1.0 + before[i]));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if (self.interrupted)() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// The numbers of windows in each step: all windows of a round in an order that looks drawn, but is always the same.
    fn batches(&self, options: &Options) -> Vec<Vec<usize>> {
        let mut state = 1u32;
        let mut below = |count: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize % count
        };
        let mut batches = Vec::new();
        for _ in 0..options.rounds {
            let mut order: Vec<usize> = (0..self.windows.len()).filter(|i| !self.windows[*i].is_empty()).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, below(i + 1));
            }
            batches.extend(order.chunks(options.batch.max(1)).map(<[usize]>::to_vec));
        }
        batches
    }

    /// The tensor that a name stands for.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || Error::argument("source", format_args!("no tensor {name}"), "a model of plain decoder blocks");
        self.checkpoint.tensor(name).ok_or_else(missing)
    }

    /// A tensor with the values that the file will have before tuning.
    fn numbers(&self, journal: &Journal, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let count = tensor.dims.iter().skip(1).product();
        let stored = self.policy.stored(name, &tensor.dims);
        let (block_type, blocks) = match (journal.blocks(name, 0)?, stored) {
            (Some(blocks), stored) => (stored.block_type(), blocks),
            (None, stored) => {
                let mut blocks = Vec::new();
                stored.block_type().encode(&read_rows(&tensor, 0, count)?, &mut blocks)?;
                (stored.block_type(), blocks)
            }
        };
        let mut values = vec![0.0; tensor.dims.iter().product()];
        block_type.decode(&blocks, &mut values)?;
        Ok(values)
    }

    /// Gives back the memory of a layer that is not needed now.
    fn release(&self, index: usize) {
        for stem in MATRICES.into_iter().chain(NORMS) {
            self.checkpoint.release(&format!("blk.{index}.{stem}.weight"));
        }
    }

    fn learned(&self, journal: &Journal, index: usize, decoder: &Decoder<'_>) -> Learned {
        let group = |part: usize| {
            let name = format!("blk.{index}.{}.weight", MATRICES[part]);
            let (rows, columns) = (decoder.rows(part), decoder.columns(part));
            match self.policy.stored(&name, &[columns, rows]) {
                Stored::Solved(format) if journal.description(&name, 0).is_some() => {
                    Some((format.group, Factors::new(rows * format.groups(columns))))
                }
                _ => None,
            }
        };
        Learned { groups: std::array::from_fn(group), norms: NORMS.map(|_| Factors::new(decoder.hidden)) }
    }

    /// The weights of a block with what has been learned.
    fn block(&self, journal: &Journal, index: usize, learned: &Learned) -> Result<Block> {
        let name = |stem: &str| format!("blk.{index}.{stem}.weight");
        let window = self.layers.config().layers[index].window.unwrap_or(usize::MAX);
        let mut block =
            Block { matrices: Default::default(), biases: Default::default(), norms: Default::default(), window };
        for (part, matrix) in block.matrices.iter_mut().enumerate() {
            *matrix = self.numbers(journal, &name(MATRICES[part]))?;
            if let Some((group, factors)) = &learned.groups[part] {
                for (weights, more) in matrix.chunks_mut(*group).zip(&factors.more) {
                    weights.iter_mut().for_each(|weight| *weight *= 1.0 + more);
                }
            }
        }
        for (bias, stem) in block.biases.iter_mut().zip(BIASES) {
            let name = format!("blk.{index}.{stem}");
            if self.checkpoint.tensor(&name).is_some() {
                *bias = self.numbers(journal, &name)?;
            }
        }
        for (at, norm) in block.norms.iter_mut().enumerate() {
            *norm = scaled(&self.numbers(journal, &name(NORMS[at]))?, &learned.norms[at]);
        }
        self.release(index);
        Ok(block)
    }

    /// Adds what was learned to the journal.
    fn store(&self, journal: &mut Journal, state: &State, key: u64) -> Result<()> {
        let add = |journal: &mut Journal, name: &str, bytes: &[u8]| {
            let name = tuned(name);
            journal.add(&name, 0, json!({ "name": name, "part": 0, "key": key }), bytes)
        };
        let bytes = |values: Vec<f32>| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        for (index, learned) in state.blocks.iter().enumerate() {
            for (stem, group) in MATRICES.iter().zip(&learned.groups) {
                let name = format!("blk.{index}.{stem}.weight");
                let (Some((group, factors)), Some(mut blocks)) = (group, journal.blocks(&name, 0)?) else { continue };
                let block_type = self.policy.stored(&name, &self.tensor(&name)?.dims).block_type();
                let has_min = Grid::of(block_type).is_some_and(Grid::has_min);
                for (at, block) in blocks.chunks_mut(block_type.block_bytes()).enumerate() {
                    let factor = 1.0 + factors.more[at * BLOCK / group];
                    for number in block.as_chunks_mut::<2>().0.iter_mut().take(if has_min { 2 } else { 1 }) {
                        let value = f16::from_le_bytes(*number).to_f32() * factor;
                        *number = f16::from_f32(rounded(value)).to_le_bytes();
                    }
                }
                add(journal, &name, &blocks)?;
            }
            for (stem, factors) in NORMS.iter().zip(&learned.norms) {
                let name = format!("blk.{index}.{stem}.weight");
                let norm = scaled(&self.numbers(journal, &name)?, factors);
                add(journal, &name, &bytes(norm))?;
            }
        }
        add(journal, "output_norm.weight", &bytes(scaled(&state.output_norm.0, &state.output_norm.1)))
    }
}

/// What stands before the first block and after the last.
struct Head {
    /// `(vocabulary, hidden)`
    embedding: Packed,
    /// `(vocabulary, hidden)`, the embedding where there is none.
    output: Option<Packed>,
    /// `(hidden, vocabulary)`: the output matrix.
    transposed: Packed,
}

impl Head {
    fn new(tuning: &Tuning<'_>, journal: &Journal) -> Result<Head> {
        let hidden = tuning.layers.config().hidden;
        let matrix = |name: &str| {
            let rows = tuning.numbers(journal, name)?;
            tuning.checkpoint.release(name);
            Ok::<_, Error>(rows)
        };
        let by_rows = |x: &[f32]| packed_of(x.len() / hidden, hidden, |row, column| x[row * hidden + column]);
        let by_columns = |x: &[f32]| packed_of(hidden, x.len() / hidden, |row, column| x[column * hidden + row]);
        let embedding = matrix("token_embd.weight")?;
        if tuning.checkpoint.tensor("output.weight").is_none() {
            return Ok(Head { embedding: by_rows(&embedding), output: None, transposed: by_columns(&embedding) });
        }
        let embedding = by_rows(&embedding);
        let output = matrix("output.weight")?;
        Ok(Head { embedding, output: Some(by_rows(&output)), transposed: by_columns(&output) })
    }

    /// The slopes of the mean divergence of what the stream `x` predicts from what `wanted`, that of the full-precision
    /// model, does: at the last norm's weights `norm`, and at `x`.
    fn slopes(
        &self,
        layers: &Layerwise,
        decoder: &Decoder<'_>,
        norm: &[f32],
        x: &[f32],
        wanted: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (compute, hidden) = (&decoder.compute, decoder.hidden);
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        let (vocabulary, tokens) = (output.rows(), x.len() / hidden);
        let normed = decoder.norm(x, norm);
        let mut of_normed = vec![0.0; x.len()];
        let rows = (LOGITS / vocabulary).max(1) * hidden;
        for ((normed, wanted), slope) in normed.chunks(rows).zip(wanted.chunks(rows)).zip(of_normed.chunks_mut(rows)) {
            let mut wanted = layers.logits(wanted.to_vec());
            let mut found = vec![0.0; wanted.len()];
            compute.for_each_product(normed, output, &mut found, vocabulary, |product, out| {
                out.copy_from_slice(product);
            });
            let logits = wanted.chunks_mut(vocabulary).zip(found.chunks_mut(vocabulary));
            let mut tasks: Vec<_> = logits.collect();
            compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
                tasks.iter_mut().for_each(|(wanted, found)| slope_of_row(compute.kernel, wanted, found, tokens));
            });
            compute.for_each_product(&found, &self.transposed, slope, hidden, |product, out| {
                out.copy_from_slice(product);
            });
        }
        let mut slope = vec![0.0; x.len()];
        let of_norm = decoder.norm_back(x, norm, &of_normed, &mut slope);
        (of_norm, slope)
    }
}

/// Turns a row of logits into the slope of its divergence from those that are `wanted`, which become likelihoods, over the
/// number of `tokens`: the difference of both models' likelihoods.
fn slope_of_row(kernel: &Kernel, wanted: &mut [f32], found: &mut [f32], tokens: usize) {
    let ((_, sum_wanted), (_, sum_found)) = (kernel.exp_segment(wanted), kernel.exp_segment(found));
    for (wanted, found) in wanted.iter_mut().zip(found) {
        *wanted /= sum_wanted;
        *found = (*found / sum_found - *wanted) / tokens as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_of_the_divergence_is_that_which_small_steps_find() {
        let (wanted, found) = ([1.0f32, -0.5, 2.0, 0.3], [0.2f32, 0.4, 1.0, -1.0]);
        let divergence = |found: [f32; 4]| -> f64 {
            let sum = |x: [f32; 4]| x.iter().map(|x| f64::from(*x).exp()).sum::<f64>();
            let likelihood = |x: [f32; 4], i: usize| f64::from(x[i]).exp() / sum(x);
            (0..4).map(|i| likelihood(wanted, i) * (likelihood(wanted, i) / likelihood(found, i)).ln()).sum()
        };
        let (mut likelihoods, mut slope) = (wanted, found);
        slope_of_row(crate::kernels::best(), &mut likelihoods, &mut slope, 2);
        assert!((likelihoods.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        for i in 0..4 {
            let [up, down] = [0.01, -0.01].map(|step| {
                let mut found = found;
                found[i] += step;
                divergence(found)
            });
            assert!((2.0 * f64::from(slope[i]) - (up - down) / 0.02).abs() < 1e-4, "{i}: {}", slope[i]);
        }
    }
}
