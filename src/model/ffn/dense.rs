//! A dense feed-forward network, with a gate (Shazeer 2020, arXiv 2002.05202) or without.

use crate::error::Result;
use crate::kernels::Activation;
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::Norm;
use crate::model::pass::{Pass, TASK_ROWS};
use crate::model::weights::loader::{Loader, Part, RowMap};

/// The weights of a network: gate, up and down.
#[derive(Debug)]
pub(in crate::model) struct Mlp {
    /// Gate and up, or up alone.
    pub(super) up: Linear,
    /// `(hidden, width)`
    pub(in crate::model) down: Linear,
    /// Width between up and down.
    pub(in crate::model) width: usize,
    inner: Inner,
    /// Of the input of `down`.
    inner_norm: Option<Norm>,
    /// How many deviations above the mean of its row a gate must be, and what is subtracted from it; `None` for all.
    sparsity: Option<f32>,
}

/// What is between up and down.
#[derive(Debug, Clone, Copy)]
enum Inner {
    /// `activation(gate) * up`, or `activation(up)`.
    Activation(Activation),
    /// The clamped gate with these numbers: the factor inside the sigmoid, and the bound.
    Clamped(f32, f32),
    /// xIELU with its parameters.
    Xielu([f32; 4]),
}

/// The workspace of a network.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// `(rows, width of up)`: gate and up.
    pub(super) up: Buffer,
    /// `(tasks, width)`: a row for the norm of each task.
    rows: Vec<f32>,
}

/// Subtracts what lies `deviations` above the mean from all gates of a row, and makes those below it 0: the few largest stay
/// (Gemma 3n).
fn sparsify(gates: &mut [f32], deviations: f32) {
    let count = gates.len() as f64;
    let mean = gates.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = gates.iter().map(|x| (f64::from(*x) - mean) * (f64::from(*x) - mean)).sum::<f64>() / count;
    let cutoff = (mean + variance.sqrt() * f64::from(deviations)) as f32;
    for x in gates {
        let above = *x - cutoff;
        // NaN stays.
        *x = if above < 0.0 { 0.0 } else { above };
    }
}

impl Mlp {
    /// The name of the tensor of `part` in a layer, without `.weight`.
    fn name(index: usize, part: &str, suffix: &str) -> String {
        format!("blk.{index}.ffn_{part}{suffix}")
    }

    /// Reads the network whose tensors in layer `index` have this suffix. For an expert of a stack, `expert` holds its
    /// number and the number of all experts.
    pub(in crate::model) fn load(
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
        suffix: &str,
        expert: Option<(usize, usize)>,
    ) -> Result<Mlp> {
        Mlp::load_of_width(loader, config, index, suffix, expert, config.hidden)
    }

    /// As [`Mlp::load`], with inputs and outputs of `hidden` numbers.
    pub(super) fn load_of_width(
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
        suffix: &str,
        expert: Option<(usize, usize)>,
        hidden: usize,
    ) -> Result<Mlp> {
        let tensor = |part: &str| Mlp::name(index, part, suffix);
        let dims = |part: &str| loader.dims(&format!("{}.weight", tensor(part)));
        let required =
            |part: &str| dims(part).ok_or_else(|| loader.missing(&format!("{}.weight", tensor(part)), "a matrix"));
        // Gate and up may be one tensor, under either name.
        let fused = if dims("gate_up").is_some() { "gate_up" } else { "up" };
        let (up, down) = (required(fused)?, required("down")?);
        let (width, rows) = (down.first().copied().unwrap_or(0), up.get(1).copied().unwrap_or(0));
        let stack = expert.map(|(_, count)| count);
        // The first row of the expert in a tensor that has `rows` rows per expert.
        let first = |rows: usize| expert.map_or(0, |(index, _)| index * rows);
        let (up_row, down_row, both_row) = (first(width), first(hidden), first(2 * width));
        let up_order = move |row| up_row + row;
        let down_order = move |row| down_row + row;
        let (fused_gate, fused_up) = (move |row| both_row + row, move |row| both_row + width + row);
        let part = |part: &str, rows: usize, of: usize, order| Part { name: tensor(part), rows, order, of, stack };
        let up = if dims("gate").is_some() {
            vec![part("gate", width, width, &up_order as RowMap<'_>), part("up", width, width, &up_order)]
        } else if rows == 2 * width {
            // Gate and up one after the other in one tensor.
            vec![part(fused, width, rows, &fused_gate as RowMap<'_>), part(fused, width, rows, &fused_up)]
        } else {
            vec![part("up", width, width, &up_order as RowMap<'_>)]
        };
        let inner = match (config.clamped_gate, config.xielu.get(index)) {
            (Some((alpha, limit)), _) => Inner::Clamped(alpha, limit),
            (None, Some(parameters)) => Inner::Xielu(*parameters),
            (None, None) => Inner::Activation(config.activation),
        };
        let is_dense = suffix.is_empty();
        Ok(Mlp {
            up: loader.linear(&up, hidden)?,
            down: loader.linear(&[part("down", hidden, hidden, &down_order)], width)?,
            width,
            inner,
            inner_norm: match is_dense {
                true => loader.norm_of(&tensor("sub_norm"), config, width, config.norm_eps)?,
                false => None,
            },
            sparsity: config.sparsity.get(index).copied().flatten().filter(|_| is_dense),
        })
    }

    /// `out (rows, hidden rounded up to panels) = down(inner(input (rows, hidden)))`. Overwrites `input`.
    pub(in crate::model) fn forward(
        &self,
        pass: &Pass<'_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) {
        self.forward_with([&self.up, &self.down], pass, input, workspace, out);
    }

    /// As [`Mlp::forward`], with the weights of `up` and `down`, which may not be in memory as a part of the network.
    pub(super) fn forward_with(
        &self,
        [up, down]: [&Linear; 2],
        pass: &Pass<'_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) {
        self.inner_with(up, pass, input, workspace);
        pass.linear(down, input, out);
    }

    /// Replaces `input (rows, hidden)` by the input of `down (rows, width)`: `activation(gate(input)) * up(input)`,
    /// `activation(up(input))` where there is no gate, or what else the family has between them.
    pub(in crate::model) fn inner(&self, pass: &Pass<'_>, input: &mut LinearInput, workspace: &mut Workspace) {
        self.inner_with(&self.up, pass, input, workspace);
    }

    fn inner_with(&self, weights: &Linear, pass: &Pass<'_>, input: &mut LinearInput, workspace: &mut Workspace) {
        pass.linear(weights, input, &mut workspace.up);
        let (width, stride) = (self.width, weights.width());
        let gated = weights.parts().len() == 2;
        let Workspace { up, rows } = workspace;
        let up = &*up;
        input.resize(up.len() / stride, width);
        let size = if self.inner_norm.is_some() { width } else { 0 };
        pass.scope.for_each_chunk_with(&mut input.values, TASK_ROWS * width, rows, size, |i, chunk, buffer| {
            for (row, out) in up[i * TASK_ROWS * stride..].chunks(stride).zip(chunk.chunks_mut(width)) {
                out.copy_from_slice(&row[..width]);
                if let Some(deviations) = self.sparsity {
                    sparsify(out, deviations);
                }
                let other = if gated { &row[weights.start(1)..][..width] } else { &[] };
                match self.inner {
                    Inner::Activation(activation) if gated => pass.kernel.gate(activation, out, other),
                    Inner::Activation(activation) => pass.kernel.activate(activation, out),
                    Inner::Clamped(alpha, limit) => pass.kernel.clamped_gate(out, other, alpha, limit),
                    Inner::Xielu(parameters) => pass.kernel.xielu(out, parameters),
                }
                if let Some(norm) = &self.inner_norm {
                    norm.apply(pass.config, pass.kernel, out, buffer);
                    out.copy_from_slice(buffer);
                }
            }
        });
    }

    pub(super) fn linears(&self) -> [&Linear; 2] {
        [&self.up, &self.down]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.up, &mut self.down]
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        self.fingerprint_with(self.linears(), hasher);
    }

    /// As [`Mlp::fingerprint`], with the weights of `up` and `down`, which may not be in memory as a part of the network.
    pub(super) fn fingerprint_with(&self, [up, down]: [&Linear; 2], hasher: &mut FingerprintHasher) {
        // What is between them follows from the configuration.
        let Mlp { up: _, down: _, width, inner: _, inner_norm, sparsity: _ } = self;
        hasher.number(*width);
        hasher.linear(up);
        hasher.linear(down);
        // Hashed only where it exists, so that models without it keep their fingerprints.
        if let Some(norm) = inner_norm {
            hasher.norm(norm);
        }
    }
}
