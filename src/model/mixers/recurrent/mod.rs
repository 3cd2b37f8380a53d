//! Mixers whose layers carry a state from one position to the next.
//!
//! Positions are computed one by one in order, whatever the batch, so results are bit-identical in prompts, batches and
//! decoding. A task takes panels of the state, whose columns are independent, through all rows of a session.

mod gated_delta;
mod mamba;
mod mamba2;
mod matrix;
mod rwkv;
mod short_conv;

pub(super) use gated_delta::GatedDelta;
pub(super) use mamba::Mamba;
pub(super) use mamba2::Mamba2;
pub(in crate::model) use rwkv::ChannelMix;
pub(super) use rwkv::TimeMix;
pub(super) use short_conv::ShortConvolution;

use std::ops::Range;

use super::context::MixerContext;
use crate::error::Result;
use crate::kernels::{Activation, Kernel};
use crate::model::batch::{Batch, Input};
use crate::model::buffer::Buffer;
use crate::model::config::{Config, RecurrentConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::pass::{TASK_ROWS, TASKS};
use crate::model::state::recurrent::{LayerStep, Recurrent};
use crate::model::weights::loader::Loader;
use crate::quant::packed::PANEL;
use crate::threads::Columns;

/// Consecutive rows of one session.
#[derive(Debug, Clone, Copy)]
struct Run {
    input: usize,
    /// Index of the first row.
    row: usize,
    len: usize,
}

/// The workspace of all recurrent mixers.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// `(rows, width of in_proj)`
    in_proj: Buffer,
    /// `(rows, channels)`: the output of the convolution.
    convolved: Buffer,
    /// `(rows, width)`: what the recurrence reads.
    mixed: Buffer,
    /// A further input and output of linear layers.
    input: crate::model::linear::LinearInput,
    out: [Buffer; 2],
    runs: Vec<Run>,
    /// `(runs)`: what each computes: see [`matrix`].
    columns: Vec<Vec<f32>>,
    /// `(tail, channels)`: the inputs of a convolution that stay.
    tail: Vec<f32>,
    /// `(tasks)` rows.
    rows: Vec<f32>,
}

/// The widest rows, in numbers.
#[derive(Debug, Default)]
pub(in crate::model) struct Widths {
    in_proj: usize,
    convolved: usize,
    mixed: usize,
    /// Inputs and outputs of linear layers between the first and the last.
    inner: usize,
}

impl Workspace {
    pub(super) fn reserve(&mut self, widths: &Widths, batch: &Batch) -> Result<()> {
        if widths.in_proj == 0 {
            return Ok(());
        }
        let rows = batch.rows.len();
        self.in_proj.reserve(rows * widths.in_proj)?;
        self.convolved.reserve(rows * widths.convolved)?;
        self.mixed.reserve(rows * widths.mixed)?;
        self.input.reserve(rows, widths.inner)?;
        self.out.iter_mut().try_for_each(|out| out.reserve(rows * widths.inner))
    }

    /// Finds the rows of each session.
    fn find_runs(&mut self, batch: &Batch) {
        self.runs.clear();
        for (index, row) in batch.rows.iter().enumerate() {
            match self.runs.last_mut() {
                Some(run) if run.input == row.input => run.len += 1,
                _ => self.runs.push(Run { input: row.input, row: index, len: 1 }),
            }
        }
        if self.columns.len() < self.runs.len() {
            self.columns.resize_with(self.runs.len(), Vec::new);
        }
    }
}

/// The sizes of recurrent layers. A file with `tensor` must have them.
fn sizes(loader: &Loader<'_>, config: &Config, tensor: &str) -> Result<RecurrentConfig> {
    config.recurrent.ok_or_else(|| loader.missing(tensor, "the widths of recurrent layers in the file's keys"))
}

/// The index of the run that row `row` belongs to.
fn run_of(runs: &[Run], row: usize) -> usize {
    runs.partition_point(|run| run.row <= row) - 1
}

/// A causal convolution of each channel by itself.
#[derive(Debug)]
struct Convolution {
    /// `(kernel, channels)`, the earliest position first.
    weight: Vec<f32>,
    /// `(channels)`, zeros where there is none.
    bias: Vec<f32>,
    channels: usize,
    /// Whether SiLU follows.
    activation: Option<Activation>,
}

impl Convolution {
    /// Reads tensors `(channels, kernel)` side by side: names without `.weight`, and channels.
    fn load(
        loader: &Loader<'_>,
        tensors: &[(String, usize)],
        kernel: usize,
        activation: Option<Activation>,
    ) -> Result<Convolution> {
        let channels = tensors.iter().map(|(_, channels)| channels).sum();
        let mut convolution =
            Convolution { weight: vec![0.0; kernel * channels], bias: vec![0.0; channels], channels, activation };
        let mut first = 0;
        for (name, own) in tensors {
            let numbers = loader.numbers_of(&format!("{name}.weight"), &[kernel, *own])?;
            for (channel, taps) in numbers.chunks_exact(kernel).enumerate() {
                for (tap, number) in taps.iter().enumerate() {
                    convolution.weight[tap * channels + first + channel] = *number;
                }
            }
            let bias = format!("{name}.bias");
            if loader.has(&bias) {
                convolution.bias[first..first + own].copy_from_slice(&loader.vector(&bias, *own)?);
            }
            first += own;
        }
        Ok(convolution)
    }

    fn kernel(&self) -> usize {
        self.weight.len() / self.channels
    }

    /// Computes `out (rows, channels)` from rows of `inputs`, each `channels` numbers at `start` of `stride`, and from what the
    /// sessions remember of earlier ones.
    fn apply(
        &self,
        context: &MixerContext<'_, '_>,
        runs: &[Run],
        inputs: &[f32],
        [start, stride]: [usize; 2],
        out: &mut Buffer,
    ) {
        let (kernel, channels, taps, layer) = (context.pass.kernel, self.channels, self.kernel(), context.layer);
        let sessions: &[Input<'_>] = context.inputs;
        let rows = context.batch.rows.len();
        out.resize(rows * channels);
        let compute = |row: usize, own: Range<usize>, out: &mut [f32]| {
            let run = runs[run_of(runs, row)];
            let state = sessions[run.input].session.state();
            // Not minus zero, so that products with zeros change nothing.
            out.iter_mut().zip(&self.bias[own.clone()]).for_each(|(out, bias)| *out = bias + 0.0);
            for (tap, weight) in self.weight.chunks_exact(channels).enumerate() {
                let back = taps - 1 - tap;
                let input = match (row - run.row).checked_sub(back) {
                    Some(at) => Some(&inputs[(run.row + at) * stride + start..][..channels]),
                    None => state.and_then(|state| state.earlier(layer, back - (row - run.row))),
                };
                if let Some(input) = input {
                    kernel.add_product(out, &input[own.clone()], &weight[own.clone()]);
                }
            }
            if let Some(activation) = self.activation {
                kernel.activate(activation, out);
            }
        };
        if rows < TASK_ROWS {
            // Too few rows to share out: a task takes some channels of all.
            let step = channels.div_ceil(TASKS * context.pass.threads).next_multiple_of(PANEL);
            let mut all = Columns::whole(out, rows, channels);
            context.pass.scope.for_each_columns(&mut all, step, |own, out| {
                (0..rows).for_each(|row| compute(row, own.clone(), out.row_mut(row)));
            });
            return;
        }
        context.pass.scope.for_each_chunk(out, TASK_ROWS * channels, |i, chunk| {
            for (r, out) in chunk.chunks_exact_mut(channels).enumerate() {
                compute(i * TASK_ROWS + r, 0..channels, out);
            }
        });
    }

    fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let Convolution { weight, bias, channels: _, activation: _ } = self;
        hasher.bytes(bytemuck::cast_slice(weight));
        hasher.bytes(bytemuck::cast_slice(bias));
    }
}

/// Replaces the earlier inputs of a layer's convolution by those after the rows that the step applies, and records the others.
/// `inputs` are the rows of the step, each at `start` of `stride`; `buffer` is overwritten.
fn advance_tail(
    step: &mut LayerStep<'_>,
    channels: usize,
    inputs: &[f32],
    [start, stride]: [usize; 2],
    len: usize,
    buffer: &mut Vec<f32>,
) {
    let row = |row: usize| &inputs[row * stride + start..][..channels];
    let tail = step.tail.len() / channels;
    let pending = step.pending.count;
    let applied = if step.log.is_some() { 0 } else { len };
    if pending == 0 && applied <= tail && step.source.is_none() {
        // What stays moves to the front, and the rows of the step follow.
        step.tail.copy_within(applied * channels.., 0);
        for (i, to) in step.tail[(tail - applied) * channels..].chunks_exact_mut(channels).enumerate() {
            to.copy_from_slice(row(i));
        }
        record(step, channels, row);
        return;
    }
    let before = step.source.map_or(&*step.tail, |[tail, _]| tail);
    buffer.clear();
    for i in 0..tail {
        // Counted from the earliest of: the tail so far, pending rows, rows of the step.
        let at = pending + applied + i;
        buffer.extend_from_slice(match () {
            () if at < tail => &before[at * channels..][..channels],
            () if at < tail + pending => &step.pending.raw[(at - tail) * channels..][..channels],
            () => row(at - tail - pending),
        });
    }
    step.tail.copy_from_slice(buffer);
    record(step, channels, row);
}

/// Records the inputs of rows that may be dropped again.
fn record<'a>(step: &mut LayerStep<'_>, channels: usize, row: impl Fn(usize) -> &'a [f32]) {
    if let Some(log) = &mut step.log {
        for (i, raw) in log.raw.chunks_exact_mut(channels).enumerate() {
            raw.copy_from_slice(row(i));
        }
    }
}

/// Applies the rows that are recorded to the convolution's earlier inputs alone.
fn settle_tail(state: &mut Recurrent, index: usize, buffer: &mut Vec<f32>) {
    let channels = state.layer(index).sizes.channels;
    if let Some(mut step) = state.step(index) {
        step.log = None;
        advance_tail(&mut step, channels, &[], [0, 0], 0, buffer);
    }
}

/// Panels that a task takes, so that there are tasks for all threads.
fn panels_of_task(panels: usize, threads: usize) -> usize {
    panels.div_ceil(crate::model::pass::TASKS * threads).max(1)
}

/// A gated norm of the output of a recurrence, in groups: `norm(x) * activation(gate)`, or `norm(x * activation(gate))`.
fn gated_norm(
    kernel: &Kernel,
    [weight, gate]: [&[f32]; 2],
    group: usize,
    eps: f32,
    (activation, first): (Activation, bool),
    x: &mut [f32],
    buffer: &mut [f32],
) {
    let (gates, normed) = buffer.split_at_mut(x.len());
    let mut multiply = |x: &mut [f32]| {
        gates.copy_from_slice(gate);
        kernel.activate(activation, gates);
        kernel.multiply(x, gates);
    };
    if first {
        multiply(x);
    }
    if !weight.is_empty() {
        for (x, weight) in x.chunks_exact_mut(group).zip(weight.chunks_exact(group).cycle()) {
            let normed = &mut normed[..group];
            kernel.rms_norm(x, weight, eps, normed);
            x.copy_from_slice(normed);
        }
    }
    if !first {
        multiply(x);
    }
}
