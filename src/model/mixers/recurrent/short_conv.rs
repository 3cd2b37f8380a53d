//! A short convolution between two gates: `C * conv(B * x)` (Liquid AI 2025, LFM2).

use super::{Convolution, Widths, Workspace, advance_tail};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::mixers::context::MixerContext;
use crate::model::pass::TASK_ROWS;
use crate::model::state::recurrent::Recurrent;
use crate::model::weights::loader::{Loader, Part, RowMap};

/// The weights of a short convolution.
#[derive(Debug)]
pub(in crate::model) struct ShortConvolution {
    /// B, C and x.
    in_proj: Linear,
    convolution: Convolution,
    out_proj: Linear,
}

impl ShortConvolution {
    /// Reads the weights of layer `index`.
    pub(in crate::model::mixers) fn load(
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
    ) -> Result<ShortConvolution> {
        let kernel = config.recurrent.as_ref().map_or(1, |recurrent| recurrent.kernel);
        let tensor = [(format!("blk.{index}.shortconv.conv"), config.hidden)];
        Ok(ShortConvolution {
            in_proj: load_in_proj(loader, config, index)?,
            convolution: Convolution::load(loader, &tensor, kernel, None)?,
            out_proj: load_out_proj(loader, config, index)?,
        })
    }

    pub(in crate::model::mixers) fn in_proj(&self) -> &Linear {
        &self.in_proj
    }

    pub(in crate::model::mixers) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(in crate::model::mixers) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let ShortConvolution { in_proj, convolution, out_proj } = self;
        hasher.linear(in_proj);
        convolution.fingerprint(hasher);
        hasher.linear(out_proj);
    }

    pub(in crate::model::mixers) fn widen(&self, widths: &mut Widths) {
        widths.in_proj = widths.in_proj.max(self.in_proj.width());
        widths.convolved = widths.convolved.max(self.convolution.channels);
        widths.mixed = widths.mixed.max(self.convolution.channels);
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, hidden)`.
    pub(in crate::model::mixers) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
    ) {
        let (pass, hidden, stride) = (context.pass, self.convolution.channels, self.in_proj.width());
        let (count, second, third) = (context.batch.rows.len(), self.in_proj.start(1), self.in_proj.start(2));
        pass.linear(&self.in_proj, input, &mut workspace.in_proj);
        workspace.find_runs(context.batch);
        let Workspace { in_proj, convolved, mixed, runs, tail, .. } = workspace;
        let in_proj = &*in_proj;
        mixed.resize(count * hidden);
        pass.scope.for_each_chunk(mixed, TASK_ROWS * hidden, |i, chunk| {
            for (r, out) in chunk.chunks_exact_mut(hidden).enumerate() {
                let row = &in_proj[(i * TASK_ROWS + r) * stride..][..stride];
                out.copy_from_slice(&row[..hidden]);
                pass.kernel.multiply(out, &row[third..][..hidden]);
            }
        });
        let at = [0, hidden];
        self.convolution.apply(context, runs, mixed, at, convolved);
        for run in &*runs {
            let Some(state) = context.inputs[run.input].session.state_mut() else { continue };
            let Some(mut step) = state.step(context.layer) else { continue };
            advance_tail(&mut step, hidden, &mixed[run.row * hidden..], at, run.len, tail);
            state.end_layer(context.layer);
        }
        input.resize(count, hidden);
        let convolved = &*convolved;
        pass.scope.for_each_chunk(&mut input.values, TASK_ROWS * hidden, |i, chunk| {
            for (r, out) in chunk.chunks_exact_mut(hidden).enumerate() {
                let row = i * TASK_ROWS + r;
                out.copy_from_slice(&convolved[row * hidden..][..hidden]);
                pass.kernel.multiply(out, &in_proj[row * stride + second..][..hidden]);
            }
        });
    }

    /// Applies the rows that are recorded to the state of layer `index`.
    pub(in crate::model::mixers) fn settle(&self, state: &mut Recurrent, index: usize) {
        super::settle_tail(state, index, &mut Vec::new());
    }
}

fn load_in_proj(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    let hidden = config.hidden;
    let (second, third) = (move |row| hidden + row, move |row| 2 * hidden + row);
    let orders: [RowMap<'_>; 3] = [&|row| row, &second, &third];
    let name = || format!("blk.{index}.shortconv.in_proj");
    let part = |order| Part { name: name(), rows: hidden, order, of: 3 * hidden, stack: None };
    loader.linear(&orders.map(part), hidden)
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    loader.linear(&[Part::new(format!("blk.{index}.shortconv.out_proj"), config.hidden)], config.hidden)
}
