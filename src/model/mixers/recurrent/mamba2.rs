//! Mamba-2: a state per head, with one rate of decay each (Dao and Gu 2024, arXiv 2405.21060).

use super::gated_delta::pad_heads;
use super::matrix::{self, Shape};
use super::{Convolution, Widths, Workspace, advance_tail, gated_norm, sizes};
use crate::error::Result;
use crate::kernels::{Activation, Kernel};
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::mixers::context::MixerContext;
use crate::model::pass::TASK_ROWS;
use crate::model::state::recurrent::Recurrent;
use crate::model::weights::loader::{Loader, Part};

/// The weights of a Mamba-2 mixer.
#[derive(Debug)]
pub(in crate::model) struct Mamba2 {
    shape: Shape,
    /// The gate of the output; values, B and C; steps.
    in_proj: Linear,
    /// Of values, B and C.
    convolution: Convolution,
    /// `(heads)`: added to the steps.
    time_bias: Vec<f32>,
    step_limits: [f32; 2],
    /// `(heads)`: rates of decay, negative.
    rates: Vec<f32>,
    /// `(heads)`: the share of a value that reaches the output directly.
    skip: Vec<f32>,
    /// `(inner)`, in groups; or empty.
    norm: Vec<f32>,
    eps: f32,
    norm_before_gate: bool,
    out_proj: Linear,
}

impl Mamba2 {
    /// Reads the weights of layer `index`.
    pub(in crate::model::mixers) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Mamba2> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let recurrent = sizes(loader, config, &name("ssm_a"))?;
        let shape = Shape {
            groups: recurrent.groups,
            heads: recurrent.heads,
            rows: recurrent.state,
            columns: recurrent.head_dim(),
            gates: 1,
            grouped: true,
            delta_rule: false,
        };
        let (inner, heads, groups) = (recurrent.inner, shape.heads, shape.groups);
        let channels = inner + 2 * groups * shape.rows;
        let norm = name("ssm_norm.weight");
        Ok(Mamba2 {
            in_proj: load_in_proj(loader, config, index)?,
            convolution: Convolution::load(
                loader,
                &[(name("ssm_conv1d"), channels)],
                recurrent.kernel,
                Some(Activation::Silu),
            )?,
            time_bias: loader.numbers_of(&name("ssm_dt.bias"), &[heads])?,
            step_limits: recurrent.step_limits,
            rates: loader.numbers_of(&name("ssm_a"), &[heads])?,
            skip: loader.numbers_of(&name("ssm_d"), &[heads])?,
            norm: if loader.has(&norm) { loader.numbers_of(&norm, &[inner / groups, groups])? } else { Vec::new() },
            eps: recurrent.norm_eps.unwrap_or(config.norm_eps),
            norm_before_gate: recurrent.norm_before_gate,
            out_proj: load_out_proj(loader, config, index, inner)?,
            shape,
        })
    }

    pub(in crate::model::mixers) fn in_proj(&self) -> &Linear {
        &self.in_proj
    }

    pub(in crate::model::mixers) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(in crate::model::mixers) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten. What follows from the configuration is not hashed.
        let Mamba2 {
            shape: _,
            in_proj,
            convolution,
            time_bias,
            step_limits: _,
            rates,
            skip,
            norm,
            eps: _,
            norm_before_gate: _,
            out_proj,
        } = self;
        hasher.linear(in_proj);
        convolution.fingerprint(hasher);
        for numbers in [time_bias, rates, skip, norm] {
            hasher.bytes(bytemuck::cast_slice(numbers));
        }
        hasher.linear(out_proj);
    }

    pub(in crate::model::mixers) fn widen(&self, widths: &mut Widths) {
        widths.in_proj = widths.in_proj.max(self.in_proj.width());
        widths.convolved = widths.convolved.max(self.convolution.channels);
        widths.mixed = widths.mixed.max(self.shape.parts().width);
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, heads * columns)`.
    pub(in crate::model::mixers) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
    ) {
        let (pass, shape) = (context.pass, self.shape);
        let (stride, channels) = (self.in_proj.width(), self.convolution.channels);
        pass.linear(&self.in_proj, input, &mut workspace.in_proj);
        workspace.find_runs(context.batch);
        let Workspace { in_proj, convolved, mixed, runs, columns, tail, rows, .. } = workspace;
        let at = [self.in_proj.start(1), stride];
        self.convolution.apply(context, runs, in_proj, at, convolved);
        self.mix_rows(context, convolved, in_proj, mixed);
        matrix::advance_all(
            (pass, context.inputs, context.layer),
            &shape,
            runs,
            mixed,
            &self.skip,
            columns,
            |step, run| advance_tail(step, channels, &in_proj[run.row * stride..], at, run.len, tail),
        );
        // The gated norm.
        let width = shape.heads * shape.columns;
        input.resize(context.batch.rows.len(), width);
        let (runs, columns, in_proj) = (&*runs, &*columns, &*in_proj);
        pass.scope.for_each_chunk_with(&mut input.values, TASK_ROWS * width, rows, 2 * width, |i, chunk, buffer| {
            for (r, out) in chunk.chunks_exact_mut(width).enumerate() {
                let row = i * TASK_ROWS + r;
                for (head, out) in out.chunks_exact_mut(shape.columns).enumerate() {
                    matrix::output(&shape, runs, columns, row, head, out);
                }
                let weights = [&*self.norm, &in_proj[row * stride..][..width]];
                let gate = (Activation::Silu, !self.norm_before_gate);
                gated_norm(pass.kernel, weights, width / shape.groups, self.eps, gate, out, buffer);
            }
        });
    }

    /// Computes what the recurrence reads, `mixed (rows, width)`.
    fn mix_rows(&self, context: &MixerContext<'_, '_>, convolved: &[f32], in_proj: &[f32], mixed: &mut Buffer) {
        let (kernel, shape, parts) = (context.pass.kernel, self.shape, self.shape.parts());
        let (n, stride, channels) = (shape.rows, self.in_proj.width(), self.convolution.channels);
        let (inner, keys) = (shape.heads * shape.columns, shape.groups * n);
        let [least, most] = self.step_limits;
        let steps = self.in_proj.start(2);
        mixed.resize(context.batch.rows.len() * parts.width);
        context.pass.scope.for_each_chunk(mixed, TASK_ROWS * parts.width, |i, chunk| {
            for (r, row) in chunk.chunks_exact_mut(parts.width).enumerate() {
                let index = i * TASK_ROWS + r;
                let convolved = &convolved[index * channels..][..channels];
                row[..keys].copy_from_slice(&convolved[inner..][..keys]);
                row[parts.query..][..keys].copy_from_slice(&convolved[inner + keys..][..keys]);
                pad_heads(&convolved[..inner], shape.columns, &mut row[parts.value..parts.beta]);
                for group in 0..shape.groups {
                    let own = group * n..(group + 1) * n;
                    row[parts.product + group] = kernel.dot(&row[own.clone()], &row[parts.query..][own]);
                }
                // The length of the step, and how much of the state it leaves.
                let betas = &mut row[parts.beta..][..shape.heads];
                betas.copy_from_slice(&in_proj[index * stride + steps..][..shape.heads]);
                kernel.add_scaled(betas, &self.time_bias, 1.0);
                kernel.activate(Activation::Softplus, betas);
                // Comparisons that are false for NaN, which passes through.
                for step in betas {
                    let floored = if *step < least { least } else { *step };
                    *step = if floored > most { most } else { floored };
                }
                row.copy_within(parts.beta..parts.beta + shape.heads, parts.gate);
                let gates = &mut row[parts.gate..parts.query];
                kernel.multiply(gates, &self.rates);
                kernel.activate(Activation::Exp, gates);
            }
        });
    }

    /// Applies the rows that are recorded to the state of layer `index`.
    pub(in crate::model::mixers) fn settle(&self, kernel: &Kernel, state: &mut Recurrent, index: usize) {
        if let Some(mut step) = state.step(index) {
            matrix::settle(kernel, &self.shape, &mut step);
        }
        super::settle_tail(state, index, &mut Vec::new());
    }
}

fn load_in_proj(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    let recurrent = config.recurrent.as_ref();
    let sizes = recurrent.map(|own| [own.inner, own.inner + 2 * own.groups * own.state, own.heads]);
    let [gate, channels, heads] = sizes.unwrap_or_default();
    let of = gate + channels + heads;
    let (second, third) = (move |row| gate + row, move |row| gate + channels + row);
    let name = || format!("blk.{index}.ssm_in");
    let parts = [
        Part { name: name(), rows: gate, order: &|row| row, of, stack: None },
        Part { name: name(), rows: channels, order: &second, of, stack: None },
        Part { name: name(), rows: heads, order: &third, of, stack: None },
    ];
    loader.linear(&parts, config.hidden)
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize, columns: usize) -> Result<Linear> {
    loader.linear(&[Part::new(format!("blk.{index}.ssm_out"), config.hidden)], columns)
}
