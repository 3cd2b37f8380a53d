//! The training loop of tuning.

use half::f16;
use serde_json::json;

use super::adam::{AdamFactors, BlockFactors, TuningState};
use super::backprop::{Backprop, MATRICES, NORMS};
use super::head::Head;
use super::options::TuningOptions;
use super::targets::Targets;
use super::weights::{block, scaled, tensor, tuned, untuned};
use crate::error::Result;
use crate::model::arch::Position;
use crate::quantize::context::OpenRun;
use crate::quantize::format::{Format, rounded};
use crate::quantize::overrides::Stored;
use crate::quantize::resume::{ResumeLog, SavePace, SnapshotFile, run_key};

/// Steps until the first full one.
const WARM_UP: usize = 3;

/// Tunes the tensors in the log of the run with that `key`, and adds the result to the log.
///
/// # Errors
/// [`Error::Interrupted`](crate::error::Error::Interrupted); those of reading and writing.
pub(in crate::quantize) fn tune(
    run: &OpenRun<'_>,
    options: &TuningOptions,
    key: u64,
    log: &mut ResumeLog,
) -> Result<()> {
    let key = run_key(run.checkpoint, (key, options), run.context.windows);
    // The tensor that is added last: a log that has it has all.
    let last = log.description(&tuned("output_norm.weight"), 0);
    if last.is_some_and(|last| last["key"].as_u64() == Some(key)) {
        return Ok(());
    }
    let targets = Targets::compute(run, key)?;
    let tuner = Tuner { run, log, backprop: backprop(run), head: Head::new(run, log)?, targets };
    let mut state = tuner.initial_state()?;
    let (file, mut pace) = (SnapshotFile { path: run.files.tuning(), key }, SavePace::new());
    let first = state.resume(&file)?;
    let batches = batches(run.context.windows, options);
    for (at, windows) in batches.iter().enumerate().skip(first) {
        let warm = ((at + 1) as f32 / WARM_UP as f32).min(1.0);
        let left = 1.0 - at as f32 / batches.len() as f32;
        let step = Step { windows, number: at + 1, count: batches.len(), rate: options.rate * warm * left };
        tuner.step(&step, &mut state)?;
        // An interrupted computation leaves a meaningless state.
        run.check()?;
        if pace.is_due() {
            pace.save(|| state.save(&file, at + 1))?;
        }
    }
    store(run, log, &state, key)
}

/// The windows of each step. Every round uses all windows, in an order that depends on the seed only.
fn batches(windows: &[Vec<u32>], options: &TuningOptions) -> Vec<Vec<usize>> {
    let mut state = 1u32.wrapping_add(options.seed as u32 ^ (options.seed >> 32) as u32);
    let mut below = |count: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % count
    };
    let mut batches = Vec::new();
    for _ in 0..options.rounds {
        let mut order: Vec<usize> = (0..windows.len()).filter(|i| !windows[*i].is_empty()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, below(i + 1));
        }
        batches.extend(order.chunks(options.batch.max(1)).map(<[usize]>::to_vec));
    }
    batches
}

fn backprop<'a>(run: &OpenRun<'a>) -> Backprop<'a> {
    let config = run.layers.config();
    let longest = run.context.windows.iter().map(Vec::len).max().unwrap_or(0);
    let (cos, sin, pairs) = run.layers.rotations(longest);
    let up = run.checkpoint.tensor("blk.0.ffn_up.weight");
    Backprop {
        compute: run.compute(),
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

/// One step: its windows, its number counted from 1, the number of all steps, and the learning rate.
struct Step<'a> {
    windows: &'a [usize],
    number: usize,
    count: usize,
    rate: f32,
}

/// The shared context of all steps.
struct Tuner<'a, 'r> {
    run: &'a OpenRun<'r>,
    log: &'a ResumeLog,
    backprop: Backprop<'r>,
    head: Head,
    targets: Targets,
}

impl Tuner<'_, '_> {
    fn initial_state(&self) -> Result<TuningState> {
        let count = self.run.layers.config().layers.len();
        let output_norm = untuned(self.run, self.log, "output_norm.weight")?;
        Ok(TuningState {
            blocks: (0..count).map(|index| self.initial_factors(index)).collect(),
            output_norm: (output_norm, AdamFactors::new(self.backprop.hidden)),
        })
    }

    fn initial_factors(&self, index: usize) -> BlockFactors {
        let group = |part: usize| {
            let name = format!("blk.{index}.{}.weight", MATRICES[part]);
            let (rows, columns) = (self.backprop.rows(part), self.backprop.columns(part));
            match self.run.formats.stored(&name, &[columns, rows]) {
                Stored::Solved(grouped) if self.log.description(&name, 0).is_some() => {
                    Some((grouped.group, AdamFactors::new(rows * grouped.groups(columns))))
                }
                _ => None,
            }
        };
        BlockFactors {
            groups: std::array::from_fn(group),
            norms: NORMS.map(|_| AdamFactors::new(self.backprop.hidden)),
        }
    }

    /// Passes the windows of a step forward and backward through the model, and updates all factors.
    fn step(&self, step: &Step<'_>, state: &mut TuningState) -> Result<()> {
        let (run, windows, backprop) = (self.run, self.run.context.windows, &self.backprop);
        let lengths: Vec<usize> = step.windows.iter().map(|window| windows[*window].len()).collect();
        let (mut x, mut wanted) = (Vec::new(), Vec::new());
        for window in step.windows {
            self.targets.read(*window, &mut wanted)?;
            for token in &windows[*window] {
                let at = x.len();
                x.resize(at + backprop.hidden, 0.0);
                self.head.embedding.decode_row(*token as usize, &mut x[at..]);
            }
        }
        let count = state.blocks.len();
        let report = |done: usize| {
            run.report("tuning", 2 * count * (step.number - 1) + done, 2 * count * step.count);
        };
        let mut inputs = Vec::new();
        for (index, factors) in state.blocks.iter().enumerate() {
            run.check()?;
            report(index);
            inputs.push(x.clone());
            backprop.forward(&block(run, self.log, index, factors)?, &mut x, &lengths);
        }
        let (plain, factors) = &mut state.output_norm;
        let norm = scaled(plain, factors);
        let (of_norm, mut gradient) = self.head.gradients(run.layers, backprop, &norm, &x, &wanted);
        factors.step(step.number, step.rate, |i| of_norm[i] * plain[i]);
        for (index, factors) in state.blocks.iter_mut().enumerate().rev() {
            run.check()?;
            report(2 * count - 1 - index);
            let x = inputs.pop().unwrap_or_default();
            self.step_block(step, index, factors, &x, &lengths, &mut gradient)?;
        }
        Ok(())
    }

    /// Updates the factors of one block from the gradient at its output, and turns it into the gradient at its input `x`.
    fn step_block(
        &self,
        step: &Step<'_>,
        index: usize,
        factors: &mut BlockFactors,
        x: &[f32],
        lengths: &[usize],
        gradient: &mut [f32],
    ) -> Result<()> {
        let block = block(self.run, self.log, index, factors)?;
        let mut gradients: [Vec<f32>; 7] = Default::default();
        let mut sink = |part: usize, gradient: &[f32]| {
            if let Some((group, factors)) = &factors.groups[part] {
                // The derivative by a factor: the sum over its group of gradient times weight without the factor.
                let groups = gradient.chunks(*group).zip(block.matrices[part].chunks(*group)).zip(&factors.deltas);
                let of = |((gradient, weights), delta): ((&[f32], &[f32]), &f32)| {
                    gradient.iter().zip(weights).map(|(gradient, weight)| gradient * weight).sum::<f32>()
                        / (1.0 + delta)
                };
                gradients[part] = groups.map(of).collect();
            }
        };
        let of_norms = self.backprop.backward(&block, x, lengths, gradient, &mut sink);
        for (group, gradients) in factors.groups.iter_mut().zip(&gradients) {
            if let Some((_, factors)) = group {
                factors.step(step.number, step.rate, |i| gradients[i]);
            }
        }
        for (factors, (norm, gradients)) in factors.norms.iter_mut().zip(block.norms.iter().zip(&of_norms)) {
            let before = factors.deltas.clone();
            factors.step(step.number, step.rate, |i| gradients[i] * norm[i] / (1.0 + before[i]));
        }
        Ok(())
    }
}

/// Adds the tuned tensors to the log.
fn store(run: &OpenRun<'_>, log: &mut ResumeLog, state: &TuningState, key: u64) -> Result<()> {
    let add = |log: &mut ResumeLog, name: &str, bytes: &[u8]| {
        let name = tuned(name);
        log.add(&name, 0, json!({ "name": name, "part": 0, "key": key }), bytes)
    };
    let bytes = |values: Vec<f32>| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    for (index, factors) in state.blocks.iter().enumerate() {
        for (stem, group) in MATRICES.iter().zip(&factors.groups) {
            let name = format!("blk.{index}.{stem}.weight");
            let (Some((group, factors)), Some(mut blocks)) = (group, log.blocks(&name, 0)?) else { continue };
            let block_type = run.formats.stored(&name, &tensor(run, &name)?.dims).block_type();
            let has_min = Format::of(block_type).is_some_and(Format::has_min);
            for (at, block) in blocks.chunks_mut(block_type.block_bytes()).enumerate() {
                let factor = 1.0 + factors.deltas[at * block_type.block_len() / group];
                for number in block.as_chunks_mut::<2>().0.iter_mut().take(if has_min { 2 } else { 1 }) {
                    let value = f16::from_le_bytes(*number).to_f32() * factor;
                    *number = f16::from_f32(rounded(value)).to_le_bytes();
                }
            }
            add(log, &name, &blocks)?;
        }
        for (stem, factors) in NORMS.iter().zip(&factors.norms) {
            let name = format!("blk.{index}.{stem}.weight");
            let norm = scaled(&untuned(run, log, &name)?, factors);
            add(log, &name, &bytes(norm))?;
        }
    }
    add(log, "output_norm.weight", &bytes(scaled(&state.output_norm.0, &state.output_norm.1)))
}
