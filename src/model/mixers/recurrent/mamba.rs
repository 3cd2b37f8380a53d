//! Mamba: a state per channel, with a rate of decay for each of its numbers (Gu and Dao 2023, arXiv 2312.00752).

use std::cell::Cell;

use super::{Convolution, Widths, Workspace, advance_tail, panels_of_task, run_of, sizes};
use crate::error::Result;
use crate::kernels::{Activation, Kernel, SelectiveStep};
use crate::model::buffer::Buffer;
use crate::model::config::{Config, RecurrentConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::mixers::context::MixerContext;
use crate::model::norm::Norm;
use crate::model::pass::{Pass, TASK_ROWS};
use crate::model::state::recurrent::{LayerStep, Recurrent};
use crate::model::weights::loader::{Loader, Part};
use crate::quant::packed::PANEL;

thread_local! {
    /// A panel of the state, kept by the thread.
    static COPY: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The weights of a Mamba mixer.
#[derive(Debug)]
pub(in crate::model) struct Mamba {
    /// Channels.
    inner: usize,
    /// Numbers of a channel's state.
    state: usize,
    /// Width of the vector that steps are a product of.
    rank: usize,
    /// Values, and the gate of the output.
    in_proj: Linear,
    convolution: Convolution,
    /// From values to the vector of steps, B and C.
    x_proj: Linear,
    /// Of the vector of steps, B and C.
    norms: [Option<Norm>; 3],
    /// From the vector to the steps of all channels.
    time_proj: Linear,
    /// `(panels, state, 16)`: rates of decay, negative.
    rates: Vec<f32>,
    /// `(inner)`: the share of a value that reaches the output directly.
    skip: Vec<f32>,
    out_proj: Linear,
}

/// Where the parts of a row start that the recurrence reads: B and steps, then C and values, the latter in whole panels.
#[derive(Debug, Clone, Copy)]
struct Parts {
    time: usize,
    query: usize,
    value: usize,
    width: usize,
}

impl Mamba {
    /// Reads the weights of layer `index`.
    pub(in crate::model::mixers) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Mamba> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let recurrent = sizes(loader, config, &name("ssm_a"))?;
        let RecurrentConfig { inner, state, heads: rank, kernel, .. } = recurrent;
        let norm = |suffix: &str, width: usize| {
            let norm = loader.norm_of(&name(suffix), config, width, config.norm_eps)?;
            Ok(norm.or(recurrent.unweighted_norms.map(|eps| Norm::unweighted(width, eps))))
        };
        let by_channel = loader.numbers_of(&name("ssm_a"), &[state, inner])?;
        let panels = inner.div_ceil(PANEL);
        let mut rates = vec![0.0; panels * state * PANEL];
        for (channel, own) in by_channel.chunks_exact(state).enumerate() {
            for (number, rate) in own.iter().enumerate() {
                rates[(channel / PANEL * state + number) * PANEL + channel % PANEL] = *rate;
            }
        }
        Ok(Mamba {
            inner,
            state,
            rank,
            in_proj: load_in_proj(loader, config, index, inner)?,
            convolution: Convolution::load(loader, &[(name("ssm_conv1d"), inner)], kernel, Some(Activation::Silu))?,
            x_proj: loader.linear(&[Part::new(name("ssm_x"), rank + 2 * state)], inner)?,
            norms: [norm("ssm_dt_norm", rank)?, norm("ssm_b_norm", state)?, norm("ssm_c_norm", state)?],
            time_proj: loader.linear(&[Part::new(name("ssm_dt"), inner)], rank)?,
            rates,
            skip: loader.numbers_of(&name("ssm_d"), &[inner])?,
            out_proj: load_out_proj(loader, config, index, inner)?,
        })
    }

    pub(in crate::model::mixers) fn in_proj(&self) -> &Linear {
        &self.in_proj
    }

    pub(in crate::model::mixers) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(in crate::model::mixers) fn linears(&self) -> Vec<&Linear> {
        vec![&self.in_proj, &self.x_proj, &self.time_proj, &self.out_proj]
    }

    pub(in crate::model::mixers) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten. What follows from the configuration is not hashed.
        let Mamba {
            inner: _,
            state: _,
            rank: _,
            in_proj,
            convolution,
            x_proj,
            norms,
            time_proj,
            rates,
            skip,
            out_proj,
        } = self;
        for linear in [in_proj, x_proj, time_proj, out_proj] {
            hasher.linear(linear);
        }
        convolution.fingerprint(hasher);
        norms.iter().for_each(|norm| hasher.optional(norm.as_ref(), FingerprintHasher::norm));
        hasher.bytes(bytemuck::cast_slice(rates));
        hasher.bytes(bytemuck::cast_slice(skip));
    }

    pub(in crate::model::mixers) fn widen(&self, widths: &mut Widths) {
        widths.in_proj = widths.in_proj.max(self.in_proj.width());
        widths.convolved = widths.convolved.max(self.inner);
        widths.mixed = widths.mixed.max(self.parts().width);
        let inner = [self.inner, self.x_proj.width(), self.time_proj.width(), self.rank].into_iter().max();
        widths.inner = widths.inner.max(inner.unwrap_or(0));
    }

    fn parts(&self) -> Parts {
        let (state, padded) = (self.state, self.inner.next_multiple_of(PANEL));
        let (time, query) = (state, state + padded);
        let value = query + state;
        Parts { time, query, value, width: (value + padded).next_multiple_of(PANEL) }
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, inner)`.
    pub(in crate::model::mixers) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
    ) {
        let (pass, inner, parts) = (context.pass, self.inner, self.parts());
        let (count, stride) = (context.batch.rows.len(), self.in_proj.width());
        pass.linear(&self.in_proj, input, &mut workspace.in_proj);
        workspace.find_runs(context.batch);
        let Workspace { in_proj, convolved, mixed, input: joined, out, runs, columns, tail, rows } = workspace;
        let at = [0, stride];
        self.convolution.apply(context, runs, in_proj, at, convolved);
        // Steps, B and C.
        let [projected, times] = out;
        joined.resize(count, inner);
        joined.values.copy_from_slice(convolved);
        pass.linear(&self.x_proj, joined, projected);
        self.normalize(context, projected, rows);
        let width = self.x_proj.width();
        joined.resize(count, self.rank);
        for (to, row) in joined.values.chunks_exact_mut(self.rank).zip(projected.chunks(width)) {
            to.copy_from_slice(&row[..self.rank]);
        }
        pass.linear(&self.time_proj, joined, times);
        self.mix_rows(context, [convolved, projected, times], mixed);
        // The recurrence.
        for (run, columns) in runs.iter().zip(&mut *columns) {
            let Some(state) = context.inputs[run.input].session.state_mut() else { continue };
            let Some(mut step) = state.step(context.layer) else { continue };
            let own = &mixed[run.row * parts.width..][..run.len * parts.width];
            self.advance(pass, &mut step, own, run.len, columns);
            advance_tail(&mut step, inner, &in_proj[run.row * stride..], at, run.len, tail);
            state.end_layer(context.layer);
        }
        // The direct share, and the gate.
        input.resize(count, inner);
        let (runs, columns, in_proj, convolved) = (&*runs, &*columns, &*in_proj, &*convolved);
        let start = self.in_proj.start(1);
        pass.scope.for_each_chunk_with(&mut input.values, TASK_ROWS * inner, rows, inner, |i, chunk, gate| {
            for (r, out) in chunk.chunks_exact_mut(inner).enumerate() {
                let row = i * TASK_ROWS + r;
                let index = run_of(runs, row);
                for (panel, out) in out.chunks_mut(PANEL).enumerate() {
                    let at = (panel * 2 + 1) * runs[index].len + row - runs[index].row;
                    out.copy_from_slice(&columns[index][at * PANEL..][..out.len()]);
                }
                pass.kernel.add_product(out, &convolved[row * inner..][..inner], &self.skip);
                gate.copy_from_slice(&in_proj[row * stride + start..][..inner]);
                pass.kernel.activate(Activation::Silu, gate);
                pass.kernel.multiply(out, gate);
            }
        });
    }

    /// Normalizes the vector of steps, B and C in place.
    fn normalize(&self, context: &MixerContext<'_, '_>, projected: &mut Buffer, buffers: &mut Vec<f32>) {
        if self.norms.iter().all(Option::is_none) {
            return;
        }
        let (pass, width, size) = (context.pass, self.x_proj.width(), self.rank.max(self.state));
        pass.scope.for_each_chunk_with(projected, TASK_ROWS * width, buffers, size, |_, chunk, buffer| {
            for row in chunk.chunks_exact_mut(width) {
                let (vector, rest) = row.split_at_mut(self.rank);
                let (b, rest) = rest.split_at_mut(self.state);
                for (part, norm) in [vector, b, &mut rest[..self.state]].into_iter().zip(&self.norms) {
                    if let Some(norm) = norm {
                        let out = &mut buffer[..part.len()];
                        pass.kernel.rms_norm(part, &norm.weight, norm.eps, out);
                        part.copy_from_slice(out);
                    }
                }
            }
        });
    }

    /// Computes what the recurrence reads, `mixed (rows, width)`.
    fn mix_rows(
        &self,
        context: &MixerContext<'_, '_>,
        [convolved, projected, times]: [&Buffer; 3],
        mixed: &mut Buffer,
    ) {
        let (kernel, parts, inner, state) = (context.pass.kernel, self.parts(), self.inner, self.state);
        let padded = inner.next_multiple_of(PANEL);
        mixed.resize(context.batch.rows.len() * parts.width);
        context.pass.scope.for_each_chunk(mixed, TASK_ROWS * parts.width, |i, chunk| {
            for (r, row) in chunk.chunks_exact_mut(parts.width).enumerate() {
                let index = i * TASK_ROWS + r;
                let projected = &projected[index * self.x_proj.width() + self.rank..][..2 * state];
                row[..state].copy_from_slice(&projected[..state]);
                row[parts.query..][..state].copy_from_slice(&projected[state..]);
                let time = &mut row[parts.time..][..padded];
                time[..inner].copy_from_slice(&times[index * self.time_proj.width()..][..inner]);
                time[inner..].fill(0.0);
                kernel.activate(Activation::Softplus, &mut time[..inner]);
                let value = &mut row[parts.value..][..padded];
                value[..inner].copy_from_slice(&convolved[index * inner..][..inner]);
                value[inner..].fill(0.0);
            }
        });
    }

    /// Takes the panels of a layer's state through the rows of a run, `mixed (len, width)`. Writes to `columns (panels, 2, len,
    /// 16)` what each row adds, and its output.
    fn advance(&self, pass: &Pass<'_>, step: &mut LayerStep<'_>, mixed: &[f32], len: usize, columns: &mut Vec<f32>) {
        let (panel, parts) = (self.state * PANEL, self.parts());
        let count = panels_of_task(self.rates.len() / panel, pass.threads);
        let size = 2 * len * PANEL;
        let LayerStep { matrix, source, pending, log, .. } = step;
        let (source, records) = (source.as_ref().map(|[_, matrix]| *matrix), log.is_some());
        pass.scope.for_each_chunk_with(matrix, count * panel, columns, count * size, |i, matrix, columns| {
            // Where the state stays, a copy continues.
            let mut copy = COPY.take();
            copy.resize(panel, 0.0);
            for (j, state) in matrix.chunks_exact_mut(panel).enumerate() {
                let index = i * count + j;
                if let Some(source) = source {
                    state.copy_from_slice(&source[index * panel..][..panel]);
                }
                self.apply_pending(pass.kernel, index, state, pending);
                let (deltas, outputs) = columns[j * size..][..size].split_at_mut(len * PANEL);
                let (deltas, outputs) = (deltas.as_chunks_mut::<PANEL>().0, outputs.as_chunks_mut::<PANEL>().0);
                let state = if records {
                    copy.copy_from_slice(state);
                    &mut copy
                } else {
                    state
                };
                let rows = mixed.chunks_exact(parts.width).zip(deltas.iter_mut().zip(outputs));
                for (row, (delta, output)) in rows {
                    let of = |start: usize| row[start + index * PANEL..].first_chunk::<PANEL>();
                    let (Some(time), Some(value)) = (of(parts.time), of(parts.value)) else { continue };
                    for lane in 0..PANEL {
                        delta[lane] = time[lane] * value[lane];
                    }
                    let (key, read) = (&row[..self.state], &row[parts.query..][..self.state]);
                    let step = SelectiveStep { rates: self.rates(index), time, delta, key, read };
                    pass.kernel.selective_step(state, step, output);
                }
            }
            COPY.set(copy);
        });
        if let Some(log) = log {
            for (vectors, row) in log.vectors.chunks_exact_mut(parts.query).zip(mixed.chunks_exact(parts.width)) {
                vectors.copy_from_slice(&row[..parts.query]);
            }
            for (log, columns) in log.columns.chunks_exact_mut(size / 2).zip(columns.chunks_exact(size)) {
                log.copy_from_slice(&columns[..size / 2]);
            }
        }
    }

    /// The rates of panel `index`, `(state, 16)`.
    fn rates(&self, index: usize) -> &[f32] {
        let panel = self.state * PANEL;
        &self.rates[index * panel..][..panel]
    }

    /// Applies the rows that are recorded to panel `index`.
    fn apply_pending(
        &self,
        kernel: &Kernel,
        index: usize,
        state: &mut [f32],
        pending: &crate::model::state::recurrent::LogRows<'_>,
    ) {
        let parts = self.parts();
        let recorded = pending.columns[index * pending.rows * PANEL..][..pending.rows * PANEL].as_chunks::<PANEL>().0;
        let rows = pending.vectors.chunks_exact(parts.query).zip(recorded).take(pending.count);
        for (vectors, delta) in rows {
            let Some(time) = vectors[parts.time + index * PANEL..].first_chunk() else { continue };
            let step = SelectiveStep { rates: self.rates(index), time, delta, key: &vectors[..self.state], read: &[] };
            kernel.selective_step(state, step, &mut [0.0; PANEL]);
        }
    }

    /// Applies the rows that are recorded to the state of layer `index`.
    pub(in crate::model::mixers) fn settle(&self, kernel: &Kernel, state: &mut Recurrent, index: usize) {
        if let Some(step) = state.step(index) {
            for (panel, state) in step.matrix.chunks_exact_mut(self.state * PANEL).enumerate() {
                self.apply_pending(kernel, panel, state, &step.pending);
            }
        }
        super::settle_tail(state, index, &mut Vec::new());
    }
}

fn load_in_proj(loader: &Loader<'_>, config: &Config, index: usize, inner: usize) -> Result<Linear> {
    let gate_order = move |row| inner + row;
    let name = || format!("blk.{index}.ssm_in");
    let part = |order| Part { name: name(), rows: inner, order, of: 2 * inner, stack: None };
    loader.linear(&[part(&|row| row), part(&gate_order)], config.hidden)
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize, columns: usize) -> Result<Linear> {
    loader.linear(&[Part::new(format!("blk.{index}.ssm_out"), config.hidden)], columns)
}
