//! A dense feed-forward network, with a gate (Shazeer 2020, arXiv 2002.05202) or without.

use crate::error::Result;
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
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
}

/// The workspace of a network.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// `(rows, width of up)`: gate and up.
    pub(super) up: Buffer,
}

impl Mlp {
    /// Reads the network whose tensors in layer `index` have this suffix. For an expert of a stack, `expert` holds its
    /// number and the number of all experts.
    pub(in crate::model) fn load(
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
        suffix: &str,
        expert: Option<(usize, usize)>,
    ) -> Result<Mlp> {
        let tensor = |part: &str| format!("blk.{index}.ffn_{part}{suffix}");
        let dims = |part: &str| loader.dims(&format!("{}.weight", tensor(part)));
        let required =
            |part: &str| dims(part).ok_or_else(|| loader.missing(&format!("{}.weight", tensor(part)), "a matrix"));
        let (up, down) = (required("up")?, required("down")?);
        let (width, rows) = (down.first().copied().unwrap_or(0), up.get(1).copied().unwrap_or(0));
        let stack = expert.map(|(_, count)| count);
        // The first row of the expert in a tensor that has `rows` rows per expert.
        let first = |rows: usize| expert.map_or(0, |(index, _)| index * rows);
        let (up_row, down_row, both_row) = (first(width), first(config.hidden), first(2 * width));
        let up_order = move |row| up_row + row;
        let down_order = move |row| down_row + row;
        let (fused_gate, fused_up) = (move |row| both_row + row, move |row| both_row + width + row);
        let part = |part: &str, rows: usize, of: usize, order| Part { name: tensor(part), rows, order, of, stack };
        let up = if dims("gate").is_some() {
            vec![part("gate", width, width, &up_order as RowMap<'_>), part("up", width, width, &up_order)]
        } else if rows == 2 * width {
            // Gate and up one after the other in one tensor.
            vec![part("up", width, rows, &fused_gate as RowMap<'_>), part("up", width, rows, &fused_up)]
        } else {
            vec![part("up", width, width, &up_order as RowMap<'_>)]
        };
        Ok(Mlp {
            up: loader.linear(&up, config.hidden)?,
            down: loader.linear(&[part("down", config.hidden, config.hidden, &down_order)], width)?,
            width,
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
        self.inner(pass, input, workspace);
        pass.linear(&self.down, input, out);
    }

    /// Replaces `input (rows, hidden)` by the input of `down (rows, width)`: `activation(gate(input)) * up(input)`, or
    /// `activation(up(input))` where there is no gate.
    pub(in crate::model) fn inner(&self, pass: &Pass<'_>, input: &mut LinearInput, workspace: &mut Workspace) {
        pass.linear(&self.up, input, &mut workspace.up);
        let (width, stride, activation) = (self.width, self.up.width(), pass.config.activation);
        let gated = self.up.parts().len() == 2;
        let up = &workspace.up;
        input.resize(up.len() / stride, width);
        pass.scope.for_each_chunk(&mut input.values, TASK_ROWS * width, |i, chunk| {
            for (row, out) in up[i * TASK_ROWS * stride..].chunks(stride).zip(chunk.chunks_mut(width)) {
                out.copy_from_slice(&row[..width]);
                if gated {
                    pass.kernel.gate(activation, out, &row[self.up.start(1)..][..width]);
                } else {
                    pass.kernel.activate(activation, out);
                }
            }
        });
    }

    pub(super) fn linears(&self) -> [&Linear; 2] {
        [&self.up, &self.down]
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let Mlp { up, down, width } = self;
        hasher.number(*width);
        hasher.linear(up);
        hasher.linear(down);
    }
}
