//! The gated delta rule (Yang et al. 2024, arXiv 2412.06464), with one gate a head, as in Qwen 3.5, or one per number of a key,
//! as in Kimi Linear (Kimi Team 2025, arXiv 2510.26692).

use super::matrix::{self, Shape};
use super::{Convolution, Widths, Workspace, advance_tail, gated_norm, sizes};
use crate::error::Result;
use crate::kernels::{Activation, Kernel};
use crate::model::arch::MixerKind;
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::mixers::context::MixerContext;
use crate::model::norm::Norm;
use crate::model::pass::TASK_ROWS;
use crate::model::state::recurrent::Recurrent;
use crate::model::weights::loader::{Loader, Part, RowMap};
use crate::quant::packed::PANEL;

/// Added to the sum of squares of keys and queries.
const KEY_EPS: f32 = 1e-6;

/// The weights of a gated delta net.
#[derive(Debug)]
pub(in crate::model) struct GatedDelta {
    shape: Shape,
    in_proj: InProj,
    /// From the vectors that gates of the state and of the output are products of, to these gates.
    inner: Option<[Linear; 2]>,
    convolution: Convolution,
    /// `(heads, gates)`: added to the gates' inputs.
    time_bias: Vec<f32>,
    /// `(heads)`: rates of decay, negative.
    rates: Vec<f32>,
    beta_scale: f32,
    /// `(rows)`: factors of keys and of queries, and their epsilon.
    units: [Vec<f32>; 2],
    norm: Norm,
    activation: Activation,
    out_proj: Linear,
}

/// The projection of the input, and where its parts start.
#[derive(Debug)]
struct InProj {
    /// Query, key and value; the gate of the output, or a vector that it is a product of; then the other inputs.
    linear: Linear,
    /// Query, key and value: where they start, and how wide they are.
    qkv: Vec<(usize, usize)>,
    output_gate: usize,
    gate: usize,
    beta: usize,
}

impl GatedDelta {
    /// Reads the weights of layer `index`.
    pub(in crate::model::mixers) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<GatedDelta> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let is_kimi = config.layers[index].kind.mixer == MixerKind::KimiDelta;
        let recurrent = sizes(loader, config, &name("ssm_a"))?;
        let shape = Shape {
            groups: recurrent.groups,
            heads: recurrent.heads,
            rows: recurrent.state,
            columns: recurrent.head_dim(),
            gates: if is_kimi { recurrent.state } else { 1 },
            grouped: recurrent.grouped_values,
            delta_rule: true,
        };
        let (heads, rows) = (shape.heads, shape.rows);
        let keys = shape.groups * rows;
        let convolution = match is_kimi {
            true => ["q", "k", "v"].map(|part| (name(&format!("ssm_conv1d_{part}")), keys)).to_vec(),
            false => vec![(name("ssm_conv1d"), 2 * keys + recurrent.inner)],
        };
        let root = 1.0 / (rows as f32).sqrt();
        let norm = name("ssm_norm");
        let eps = recurrent.norm_eps.unwrap_or(config.norm_eps);
        let in_proj = InProj::load(loader, config, &shape, index)?;
        let inner = match is_kimi {
            false => None,
            true => {
                let matrix =
                    |suffix: &str, columns: usize| loader.linear(&[Part::new(name(suffix), heads * rows)], columns);
                let width = |suffix: &str| loader.dims(&name(suffix)).and_then(|dims| dims.get(1).copied());
                let [gate, output] = ["ssm_f_a.weight", "ssm_g_a.weight"].map(|suffix| width(suffix).unwrap_or(1));
                Some([matrix("ssm_f_b", gate)?, matrix("ssm_g_b", output)?])
            }
        };
        Ok(GatedDelta {
            in_proj,
            inner,
            convolution: Convolution::load(loader, &convolution, recurrent.kernel, Some(Activation::Silu))?,
            time_bias: loader.numbers_of(&name("ssm_dt.bias"), &[heads * shape.gates])?,
            rates: loader.numbers_of(&name("ssm_a"), &[heads])?,
            beta_scale: recurrent.beta_scale,
            units: [vec![root; rows], vec![root * root; rows]],
            norm: match loader.norm_of(&norm, config, shape.columns, eps)? {
                Some(norm) => norm,
                None => {
                    return Err(loader.missing(&format!("{norm}.weight"), format_args!("{} numbers", shape.columns)));
                }
            },
            activation: if is_kimi { Activation::Sigmoid } else { Activation::Silu },
            out_proj: load_out_proj(loader, config, index, recurrent.inner)?,
            shape,
        })
    }

    pub(in crate::model::mixers) fn in_proj(&self) -> &Linear {
        &self.in_proj.linear
    }

    pub(in crate::model::mixers) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(in crate::model::mixers) fn linears(&self) -> Vec<&Linear> {
        let inner = self.inner.iter().flatten();
        [&self.in_proj.linear].into_iter().chain(inner).chain([&self.out_proj]).collect()
    }

    pub(in crate::model::mixers) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten. What follows from the configuration is not hashed.
        let GatedDelta {
            shape: _,
            in_proj,
            inner,
            convolution,
            time_bias,
            rates,
            beta_scale: _,
            units: _,
            norm,
            activation: _,
            out_proj,
        } = self;
        hasher.linear(&in_proj.linear);
        inner.iter().flatten().for_each(|linear| hasher.linear(linear));
        convolution.fingerprint(hasher);
        hasher.bytes(bytemuck::cast_slice(time_bias));
        hasher.bytes(bytemuck::cast_slice(rates));
        hasher.norm(norm);
        hasher.linear(out_proj);
    }

    pub(in crate::model::mixers) fn widen(&self, widths: &mut Widths) {
        widths.in_proj = widths.in_proj.max(self.in_proj.linear.width());
        widths.convolved = widths.convolved.max(self.convolution.channels);
        widths.mixed = widths.mixed.max(self.shape.parts().width);
        let inner = self.inner.iter().flatten().map(|linear| linear.width().max(linear.columns())).max();
        widths.inner = widths.inner.max(inner.unwrap_or(0)).max(self.convolution.channels);
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, heads * columns)`.
    pub(in crate::model::mixers) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
    ) {
        let (pass, shape) = (context.pass, self.shape);
        let stride = self.in_proj.linear.width();
        let count = context.batch.rows.len();
        pass.linear(&self.in_proj.linear, input, &mut workspace.in_proj);
        workspace.find_runs(context.batch);
        if let Some(inner) = &self.inner {
            let starts = [self.in_proj.gate, self.in_proj.output_gate];
            for ((linear, start), out) in inner.iter().zip(starts).zip(&mut workspace.out) {
                let columns = linear.columns();
                workspace.input.resize(count, columns);
                let rows = workspace.input.values.chunks_exact_mut(columns).zip(workspace.in_proj.chunks(stride));
                rows.for_each(|(to, row)| to.copy_from_slice(&row[start..][..columns]));
                pass.linear(linear, &mut workspace.input, out);
            }
        }
        // Query, key and value, one after the other.
        let channels = self.convolution.channels;
        let Workspace { in_proj, convolved, mixed, input: joined, out, runs, columns, tail, rows } = workspace;
        let (raw, at) = match self.in_proj.is_contiguous() {
            true => (&**in_proj, [self.in_proj.qkv[0].0, stride]),
            false => {
                joined.resize(count, channels);
                for (to, row) in joined.values.chunks_exact_mut(channels).zip(in_proj.chunks(stride)) {
                    let mut to = to;
                    for (start, width) in &self.in_proj.qkv {
                        let (own, rest) = to.split_at_mut(*width);
                        own.copy_from_slice(&row[*start..][..*width]);
                        to = rest;
                    }
                }
                (&*joined.values, [0, channels])
            }
        };
        self.convolution.apply(context, runs, raw, at, convolved);
        self.mix_rows(context, convolved, in_proj, out, mixed);
        matrix::advance_all((pass, context.inputs, context.layer), &shape, runs, mixed, &[], columns, |step, run| {
            advance_tail(step, channels, &raw[run.row * at[1]..], at, run.len, tail)
        });
        // The gated norm of each head.
        let width = shape.heads * shape.columns;
        input.resize(count, width);
        let (gates, gate_at) = match &self.inner {
            Some([_, linear]) => (&*out[1], [0, linear.width()]),
            None => (&**in_proj, [self.in_proj.output_gate, stride]),
        };
        let (runs, columns) = (&*runs, &*columns);
        pass.scope.for_each_chunk_with(
            &mut input.values,
            TASK_ROWS * width,
            rows,
            2 * shape.columns,
            |i, chunk, buffer| {
                for (r, out) in chunk.chunks_exact_mut(width).enumerate() {
                    let row = i * TASK_ROWS + r;
                    let gate = &gates[row * gate_at[1] + gate_at[0]..][..width];
                    for (head, (out, gate)) in
                        out.chunks_exact_mut(shape.columns).zip(gate.chunks_exact(shape.columns)).enumerate()
                    {
                        matrix::output(&shape, runs, columns, row, head, out);
                        let weights = [&*self.norm.weight, gate];
                        gated_norm(
                            pass.kernel,
                            weights,
                            shape.columns,
                            self.norm.eps,
                            (self.activation, false),
                            out,
                            buffer,
                        );
                    }
                }
            },
        );
    }

    /// Computes what the recurrence reads, `mixed (rows, width)`.
    fn mix_rows(
        &self,
        context: &MixerContext<'_, '_>,
        convolved: &[f32],
        in_proj: &[f32],
        out: &[Buffer; 2],
        mixed: &mut Buffer,
    ) {
        let (kernel, shape, parts) = (context.pass.kernel, self.shape, self.shape.parts());
        let (n, stride) = (shape.rows, self.in_proj.linear.width());
        let keys = shape.groups * n;
        let [key_unit, query_unit] = &self.units;
        mixed.resize(context.batch.rows.len() * parts.width);
        context.pass.scope.for_each_chunk(mixed, TASK_ROWS * parts.width, |i, chunk| {
            for (r, row) in chunk.chunks_exact_mut(parts.width).enumerate() {
                let index = i * TASK_ROWS + r;
                let raw = &in_proj[index * stride..][..stride];
                let convolved = &convolved[index * self.convolution.channels..][..self.convolution.channels];
                let (queries, rest) = convolved.split_at(keys);
                let (new_keys, values) = rest.split_at(keys);
                // Keys and queries of unit length, and queries divided by the root of their width.
                let eps = KEY_EPS / n as f32;
                for group in 0..shape.groups {
                    let own = group * n..(group + 1) * n;
                    kernel.rms_norm(&new_keys[own.clone()], key_unit, eps, &mut row[own.clone()]);
                    kernel.rms_norm(&queries[own.clone()], query_unit, eps, &mut row[parts.query..][own.clone()]);
                    row[parts.product + group] = kernel.dot(&row[own.clone()], &row[parts.query..][own]);
                }
                // Gates of the state: exp(rate softplus(input + bias)).
                let gates = &mut row[parts.gate..parts.query];
                let inputs = match &self.inner {
                    Some([linear, _]) => &out[0][index * linear.width()..],
                    None => &raw[self.in_proj.gate..],
                };
                gates.copy_from_slice(&inputs[..gates.len()]);
                kernel.add_scaled(gates, &self.time_bias, 1.0);
                kernel.activate(Activation::Softplus, gates);
                for (own, rate) in gates.chunks_exact_mut(shape.gates).zip(&self.rates) {
                    own.iter_mut().for_each(|gate| *gate *= rate);
                }
                kernel.activate(Activation::Exp, gates);
                if shape.gates > 1 {
                    for (to, from) in [(parts.gated, 0), (parts.gated + keys, parts.query)] {
                        for number in 0..keys {
                            row[to + number] = row[from + number] * row[parts.gate + number];
                        }
                    }
                }
                // What is written of a value.
                let betas = &mut row[parts.beta..][..shape.heads];
                betas.copy_from_slice(&raw[self.in_proj.beta..][..shape.heads]);
                kernel.activate(Activation::Sigmoid, betas);
                betas.iter_mut().for_each(|beta| *beta *= self.beta_scale);
                pad_heads(values, shape.columns, &mut row[parts.value..parts.beta]);
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

/// Copies heads of `columns` numbers to whole panels.
pub(super) fn pad_heads(values: &[f32], columns: usize, out: &mut [f32]) {
    let padded = columns.next_multiple_of(PANEL);
    for (to, from) in out.chunks_exact_mut(padded).zip(values.chunks_exact(columns)) {
        to[..columns].copy_from_slice(from);
        to[columns..].fill(0.0);
    }
}

impl InProj {
    fn load(loader: &Loader<'_>, config: &Config, shape: &Shape, index: usize) -> Result<InProj> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let (heads, keys) = (shape.heads, shape.groups * shape.rows);
        let inner = heads * shape.columns;
        let of = |suffix: &str, rows: usize| Part::new(name(suffix), rows);
        let width = |suffix: &str| loader.dims(&name(suffix)).and_then(|dims| dims.get(1).copied()).unwrap_or(1);
        // For each head of keys: its heads' betas, then their gates.
        let share = heads / shape.groups;
        let beta_order = move |row: usize| row / share * 2 * share + row % share;
        let gate_order = move |row: usize| beta_order(row) + share;
        let (parts, qkv): (Vec<Part<'_>>, usize) = if loader.has(&name("ssm_f_a.weight")) {
            let (gate, output) = (width("ssm_f_a.weight"), width("ssm_g_a.weight"));
            let qkv = ["attn_q", "attn_k", "attn_v"].map(|suffix| of(suffix, keys));
            let others = [of("ssm_g_a", output), of("ssm_f_a", gate), of("ssm_beta", heads)];
            (qkv.into_iter().chain(others).collect(), 3)
        } else {
            let mut parts = vec![of("attn_qkv", 2 * keys + inner), of("attn_gate", inner)];
            if loader.has(&name("ssm_ba.weight")) {
                let part = |order| Part { name: name("ssm_ba"), rows: heads, order, of: 2 * heads, stack: None };
                parts.extend([part(&gate_order as RowMap<'_>), part(&beta_order)]);
            } else {
                parts.extend([of("ssm_alpha", heads), of("ssm_beta", heads)]);
            }
            (parts, 1)
        };
        let linear = loader.linear(&parts, config.hidden)?;
        let starts = |part: usize| linear.start(part);
        Ok(InProj {
            qkv: (0..qkv).map(|part| (starts(part), parts[part].rows)).collect(),
            output_gate: starts(qkv),
            gate: starts(qkv + 1),
            beta: starts(qkv + 2),
            linear,
        })
    }

    /// Whether query, key and value follow each other without gaps.
    fn is_contiguous(&self) -> bool {
        self.qkv.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0)
    }
}

/// The output projection: `ssm_out`, or the one of attention's name.
fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize, columns: usize) -> Result<Linear> {
    let names = [format!("blk.{index}.ssm_out"), format!("blk.{index}.attn_output")];
    let [first, second] = names;
    let name = if loader.has(&format!("{second}.weight")) { second } else { first };
    loader.linear(&[Part::new(name, config.hidden)], columns)
}
