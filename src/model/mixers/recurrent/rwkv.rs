//! RWKV, version 4 (Peng et al. 2023, arXiv 2305.13048): a mean of all values so far, weighted by keys that decay, and a
//! feed-forward layer that reads the position before, too.

use super::{Widths, Workspace, advance_tail, panels_of_task, run_of};
use crate::error::Result;
use crate::kernels::{Activation, Kernel, WkvStep};
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::mixers::context::MixerContext;
use crate::model::pass::{Pass, TASK_ROWS};
use crate::model::state::recurrent::{LayerStep, LogRows, Recurrent};
use crate::model::weights::loader::{Loader, Part};
use crate::quant::packed::PANEL;

/// Rows of a panel of the state: sum of weighted values, sum of weights, and the exponent that both lack.
const ROWS: usize = 3;

/// What a linear layer reads: shares of the current input, the rest being the one before.
#[derive(Debug)]
struct Shifted {
    /// `(hidden)`
    share: Vec<f32>,
    linear: Linear,
}

/// The half of a layer that averages values.
#[derive(Debug)]
pub(in crate::model) struct TimeMix {
    key: Shifted,
    value: Shifted,
    receptance: Shifted,
    /// `(inner)`, in whole panels: what exponents of keys lose per position, negative; and what that of the current one gains.
    decay: Vec<f32>,
    first: Vec<f32>,
    out_proj: Linear,
}

/// The feed-forward half of a layer.
#[derive(Debug)]
pub(in crate::model) struct ChannelMix {
    key: Shifted,
    receptance: Shifted,
    value: Linear,
}

impl Shifted {
    fn load(
        loader: &Loader<'_>,
        config: &Config,
        [share, matrix]: [String; 2],
        rows: Option<usize>,
    ) -> Result<Shifted> {
        let hidden = config.hidden;
        let dims = loader.dims(&format!("{matrix}.weight"));
        let rows = rows.unwrap_or(dims.and_then(|dims| dims.get(1).copied()).unwrap_or(1));
        Ok(Shifted {
            share: loader.numbers_of(&format!("{share}.weight"), &[hidden])?,
            linear: loader.linear(&[Part::new(matrix, rows)], hidden)?,
        })
    }

    fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let Shifted { share, linear } = self;
        hasher.bytes(bytemuck::cast_slice(share));
        hasher.linear(linear);
    }

    /// `out = linear(x * share + before * (1 - share))` for all rows of `inputs (rows, hidden)`.
    fn forward(
        &self,
        context: &MixerContext<'_, '_>,
        state: usize,
        inputs: &[f32],
        workspace: (&[super::Run], &mut LinearInput),
        out: &mut Buffer,
    ) {
        let (pass, hidden) = (context.pass, self.share.len());
        let (runs, mixed) = workspace;
        let sessions = &*context.inputs;
        mixed.resize(inputs.len() / hidden, hidden);
        pass.scope.for_each_chunk(&mut mixed.values, TASK_ROWS * hidden, |i, chunk| {
            for (r, out) in chunk.chunks_exact_mut(hidden).enumerate() {
                let row = i * TASK_ROWS + r;
                let run = runs[run_of(runs, row)];
                let before = match row.checked_sub(run.row + 1) {
                    Some(at) => Some(&inputs[(run.row + at) * hidden..][..hidden]),
                    None => sessions[run.input].session.state().and_then(|states| states.earlier(state, 1)),
                };
                let x = &inputs[row * hidden..][..hidden];
                for (number, out) in out.iter_mut().enumerate() {
                    let before = before.map_or(0.0, |before| before[number]);
                    *out = x[number] * self.share[number] + before * (1.0 - self.share[number]);
                }
            }
        });
        pass.linear(&self.linear, mixed, out);
    }
}

/// The index of the state of a layer's first half; that of the second follows it.
pub(in crate::model) fn state_of(layer: usize) -> usize {
    2 * layer
}

impl TimeMix {
    /// Reads the weights of layer `index`.
    pub(in crate::model::mixers) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<TimeMix> {
        let name = |suffix: &str| format!("blk.{index}.time_mix_{suffix}");
        let inner = config.recurrent.map_or(config.hidden, |recurrent| recurrent.inner);
        let shifted =
            |share: &str, matrix: &str| Shifted::load(loader, config, [name(share), name(matrix)], Some(inner));
        let padded = |suffix: &str, of: fn(f32) -> f32| -> Result<Vec<f32>> {
            let mut numbers = loader.numbers_of(&name(&format!("{suffix}.weight")), &[inner])?;
            numbers.iter_mut().for_each(|number| *number = of(*number));
            numbers.resize(inner.next_multiple_of(PANEL), 0.0);
            Ok(numbers)
        };
        Ok(TimeMix {
            key: shifted("lerp_k", "key")?,
            value: shifted("lerp_v", "value")?,
            receptance: shifted("lerp_r", "receptance")?,
            decay: padded("decay", |number| -libm::expf(number))?,
            first: padded("first", |number| number)?,
            out_proj: load_out_proj(loader, config, index, inner)?,
        })
    }

    pub(in crate::model::mixers) fn in_proj(&self) -> &Linear {
        &self.key.linear
    }

    pub(in crate::model::mixers) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(in crate::model::mixers) fn linears(&self) -> Vec<&Linear> {
        vec![&self.key.linear, &self.value.linear, &self.receptance.linear, &self.out_proj]
    }

    pub(in crate::model::mixers) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let TimeMix { key, value, receptance, decay, first, out_proj } = self;
        [key, value, receptance].into_iter().for_each(|shifted| shifted.fingerprint(hasher));
        hasher.bytes(bytemuck::cast_slice(decay));
        hasher.bytes(bytemuck::cast_slice(first));
        hasher.linear(out_proj);
    }

    pub(in crate::model::mixers) fn widen(&self, config: &Config, widths: &mut Widths) {
        let width = self.key.linear.width().max(config.hidden);
        widths.in_proj = widths.in_proj.max(width);
        widths.convolved = widths.convolved.max(width);
        widths.mixed = widths.mixed.max(2 * self.decay.len());
        widths.inner = widths.inner.max(width);
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, inner)`.
    pub(in crate::model::mixers) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
    ) {
        let (pass, inner, padded) = (context.pass, self.out_proj.columns(), self.decay.len());
        let hidden = pass.config.hidden;
        let index = state_of(context.layer);
        let count = context.batch.rows.len();
        workspace.find_runs(context.batch);
        let Workspace { in_proj: raw, mixed, input: joined, out, convolved, runs, columns, tail, rows: _ } = workspace;
        raw.copy_from(&input.values);
        let [keys, values] = out;
        self.key.forward(context, index, raw, (runs, joined), keys);
        self.value.forward(context, index, raw, (runs, joined), values);
        self.receptance.forward(context, index, raw, (runs, joined), convolved);
        // Keys and values side by side, in whole panels.
        let width = self.key.linear.width();
        mixed.resize(count * 2 * padded);
        for ((out, key), value) in
            mixed.chunks_exact_mut(2 * padded).zip(keys.chunks_exact(width)).zip(values.chunks_exact(width))
        {
            out[..padded].copy_from_slice(&key[..padded]);
            out[padded..].copy_from_slice(&value[..padded]);
        }
        for (run, columns) in runs.iter().zip(&mut *columns) {
            let Some(state) = context.inputs[run.input].session.state_mut() else { continue };
            let Some(mut step) = state.step(index) else { continue };
            let own = &mixed[run.row * 2 * padded..][..run.len * 2 * padded];
            self.advance(pass, &mut step, own, run.len, columns);
            advance_tail(&mut step, hidden, &raw[run.row * hidden..], [0, hidden], run.len, tail);
            state.end_layer(index);
        }
        input.resize(count, inner);
        let (runs, columns, receptance) = (&*runs, &*columns, &*convolved);
        let stride = self.receptance.linear.width();
        let kernel = pass.kernel;
        pass.scope.for_each_chunk(&mut input.values, TASK_ROWS * inner, |i, chunk| {
            for (r, out) in chunk.chunks_exact_mut(inner).enumerate() {
                let row = i * TASK_ROWS + r;
                let run = run_of(runs, row);
                out.copy_from_slice(&receptance[row * stride..][..inner]);
                kernel.activate(Activation::Sigmoid, out);
                for (panel, out) in out.chunks_mut(PANEL).enumerate() {
                    let at = panel * runs[run].len + row - runs[run].row;
                    kernel.multiply(out, &columns[run][at * PANEL..][..PANEL]);
                }
            }
        });
    }

    /// Takes the panels of a layer's state through the rows of a run, keys and values `(len, 2, inner)`, and writes the output
    /// to `columns (panels, len, 16)`.
    fn advance(&self, pass: &Pass<'_>, step: &mut LayerStep<'_>, mixed: &[f32], len: usize, columns: &mut Vec<f32>) {
        let (panel, padded) = (ROWS * PANEL, self.decay.len());
        let count = panels_of_task(padded / PANEL, pass.threads);
        let size = len * PANEL;
        let LayerStep { matrix, source, pending, log, .. } = step;
        let (source, records) = (source.as_ref().map(|[_, matrix]| *matrix), log.is_some());
        pass.scope.for_each_chunk_with(matrix, count * panel, columns, count * size, |i, matrix, columns| {
            for (j, state) in matrix.chunks_exact_mut(panel).enumerate() {
                let index = i * count + j;
                if let Some(source) = source {
                    state.copy_from_slice(&source[index * panel..][..panel]);
                }
                self.apply_pending(pass.kernel, index, state, pending);
                let mut copy = [0.0; ROWS * PANEL];
                let state = if records {
                    copy.copy_from_slice(state);
                    &mut copy[..]
                } else {
                    state
                };
                let outputs = columns[j * size..][..size].as_chunks_mut::<PANEL>().0;
                for (row, output) in mixed.chunks_exact(2 * padded).zip(outputs) {
                    let of = |start: usize| row[start + index * PANEL..].first_chunk::<PANEL>();
                    if let (Some(key), Some(value)) = (of(0), of(padded)) {
                        pass.kernel.wkv_step(state, self.step(index, key, value), output);
                    }
                }
            }
        });
        if let Some(log) = log {
            for (vectors, row) in log.vectors.chunks_exact_mut(padded).zip(mixed.chunks_exact(2 * padded)) {
                vectors.copy_from_slice(&row[..padded]);
            }
            for (panel, log) in log.columns.chunks_exact_mut(size).enumerate() {
                for (log, row) in log.chunks_exact_mut(PANEL).zip(mixed.chunks_exact(2 * padded)) {
                    log.copy_from_slice(&row[padded + panel * PANEL..][..PANEL]);
                }
            }
        }
    }

    fn step<'a>(&'a self, index: usize, key: &'a [f32; PANEL], value: &'a [f32; PANEL]) -> WkvStep<'a> {
        let of = |numbers: &'a [f32]| numbers[index * PANEL..].first_chunk().unwrap_or(&[0.0; PANEL]);
        WkvStep { decay: of(&self.decay), first: of(&self.first), key, value }
    }

    /// Applies the rows that are recorded to panel `index`.
    fn apply_pending(&self, kernel: &Kernel, index: usize, state: &mut [f32], pending: &LogRows<'_>) {
        let recorded = pending.columns[index * pending.rows * PANEL..][..pending.rows * PANEL].as_chunks::<PANEL>().0;
        let rows = pending.vectors.chunks_exact(self.decay.len()).zip(recorded).take(pending.count);
        for (keys, value) in rows {
            if let Some(key) = keys[index * PANEL..].first_chunk() {
                kernel.wkv_step(state, self.step(index, key, value), &mut [0.0; PANEL]);
            }
        }
    }

    /// Applies the rows that are recorded to the states of layer `layer`.
    pub(in crate::model::mixers) fn settle(&self, kernel: &Kernel, state: &mut Recurrent, layer: usize) {
        let index = state_of(layer);
        if let Some(step) = state.step(index) {
            for (panel, state) in step.matrix.chunks_exact_mut(ROWS * PANEL).enumerate() {
                self.apply_pending(kernel, panel, state, &step.pending);
            }
        }
        super::settle_tail(state, index, &mut Vec::new());
        super::settle_tail(state, index + 1, &mut Vec::new());
    }
}

impl ChannelMix {
    /// Reads the weights of layer `index`.
    pub(in crate::model) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<ChannelMix> {
        let name = |suffix: &str| format!("blk.{index}.channel_mix_{suffix}");
        let key = Shifted::load(loader, config, [name("lerp_k"), name("key")], None)?;
        let width = key.linear.parts()[0].rows();
        let receptance = Shifted::load(loader, config, [name("lerp_r"), name("receptance")], Some(config.hidden))?;
        let value = loader.linear(&[Part::new(name("value"), config.hidden)], width)?;
        Ok(ChannelMix { key, receptance, value })
    }

    pub(in crate::model) fn linears(&self) -> Vec<&Linear> {
        vec![&self.key.linear, &self.receptance.linear, &self.value]
    }

    pub(in crate::model) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let ChannelMix { key, receptance, value } = self;
        [key, receptance].into_iter().for_each(|shifted| shifted.fingerprint(hasher));
        hasher.linear(value);
    }

    pub(in crate::model) fn widen(&self, widths: &mut Widths) {
        let widest = self.linears().into_iter().map(|linear| linear.width().max(linear.columns())).max();
        widths.inner = widths.inner.max(widest.unwrap_or(0));
        widths.in_proj = widths.in_proj.max(self.value.width());
    }

    /// `out (rows, hidden rounded up to panels)`, from `input (rows, hidden)`, which is overwritten.
    pub(in crate::model) fn forward(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) {
        let (pass, index) = (context.pass, state_of(context.layer) + 1);
        let (hidden, count) = (pass.config.hidden, context.batch.rows.len());
        workspace.find_runs(context.batch);
        let Workspace { in_proj: raw, input: joined, out: buffers, runs, tail, .. } = workspace;
        raw.copy_from(&input.values);
        let [keys, receptances] = buffers;
        self.key.forward(context, index, raw, (runs, joined), keys);
        self.receptance.forward(context, index, raw, (runs, joined), receptances);
        for run in &*runs {
            let Some(state) = context.inputs[run.input].session.state_mut() else { continue };
            let Some(mut step) = state.step(index) else { continue };
            advance_tail(&mut step, hidden, &raw[run.row * hidden..], [0, hidden], run.len, tail);
            state.end_layer(index);
        }
        let (columns, width) = (self.value.columns(), self.key.linear.width());
        joined.resize(count, columns);
        let keys = &*keys;
        pass.scope.for_each_chunk(&mut joined.values, TASK_ROWS * columns, |i, chunk| {
            for (r, row) in chunk.chunks_exact_mut(columns).enumerate() {
                row.copy_from_slice(&keys[(i * TASK_ROWS + r) * width..][..columns]);
                pass.kernel.activate(Activation::Relu2, row);
            }
        });
        pass.linear(&self.value, joined, out);
        let (stride, width) = (self.receptance.linear.width(), self.value.width());
        for (out, receptance) in out.chunks_exact_mut(width).zip(receptances.chunks_exact_mut(stride)) {
            pass.kernel.activate(Activation::Sigmoid, &mut receptance[..hidden]);
            pass.kernel.multiply(&mut out[..hidden], &receptance[..hidden]);
        }
    }
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize, columns: usize) -> Result<Linear> {
    loader.linear(&[Part::new(format!("blk.{index}.time_mix_output"), config.hidden)], columns)
}
