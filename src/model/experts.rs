//! Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): only the chosen ones compute.

use std::collections::TryReserveError;

use super::config::Experts;
use super::forward::Pass;
use super::linear::{Linear, Rows};
use super::weights::Mlp;
use crate::kernels::{self, Kernel};
use crate::quant::packed::PANEL;

/// Buffers of one expert's rows.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// What all experts read `(rows, hidden)`.
    source: Vec<f32>,
    /// `(rows, experts used)`: expert and weight.
    choice: Vec<(usize, f32)>,
    /// Rows that chose this expert, and its weight.
    rows: Vec<(usize, f32)>,
    input: Rows,
    out: Vec<f32>,
    /// `(rows)`: weights of the expert that all rows use.
    gates: Vec<f32>,
}

impl Buffers {
    /// Makes room for `rows` rows: of `hidden` numbers, of an expert's `inner` ones, and of `out`, the widest output.
    pub(super) fn try_reserve(
        &mut self,
        rows: usize,
        hidden: usize,
        inner: usize,
        out: usize,
    ) -> Result<(), TryReserveError> {
        self.source.try_reserve_exact((rows * hidden).saturating_sub(self.source.len()))?;
        self.out.try_reserve_exact((rows * out).saturating_sub(self.out.len()))?;
        self.input.try_reserve(rows, hidden.max(inner))
    }
}

impl Pass<'_> {
    /// Mixture of experts: each row goes to the experts that the router likes best, rows grouped by expert.
    ///
    /// A row's results are added in the order of the experts' numbers, so its bits do not depend on the other rows.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn experts(
        &self,
        router: &Linear,
        experts: &[Mlp],
        shared: Option<&(Mlp, Option<Linear>)>,
        input: &mut Rows,
        ffn: &mut Vec<f32>,
        own: &mut Buffers,
        joining: &mut Vec<f32>,
    ) {
        let (config, kernel) = (&self.model.config, self.kernel);
        let hidden = config.hidden;
        let rows = input.values.len() / hidden;
        let width = hidden.next_multiple_of(PANEL);
        // The input is needed again for every expert.
        own.source.clear();
        own.source.extend_from_slice(&input.values);
        self.route(router, input, &mut own.out, &mut own.choice);
        joining.clear();
        joining.resize(rows * width, 0.0);
        for (expert, mlp) in experts.iter().enumerate() {
            own.rows.clear();
            own.rows.extend(
                own.choice
                    .iter()
                    .enumerate()
                    .filter(|(_, (chosen, _))| *chosen == expert)
                    .map(|(at, (_, weight))| (at / config.experts.used, *weight)),
            );
            if own.rows.is_empty() {
                continue;
            }
            own.input.values.clear();
            for (row, _) in &own.rows {
                own.input.values.extend_from_slice(&own.source[row * hidden..][..hidden]);
            }
            self.mlp(mlp, &mut own.input, ffn, &mut own.out);
            for ((row, weight), out) in own.rows.iter().zip(own.out.chunks(width)) {
                kernel.add_scaled(&mut joining[row * width..][..hidden], &out[..hidden], *weight);
            }
        }
        let Some((mlp, gate)) = shared else { return };
        own.input.values.clone_from(&own.source);
        self.shared_weights(gate.as_ref(), &mut own.input, &mut own.out, &mut own.gates);
        self.mlp(mlp, &mut own.input, ffn, &mut own.out);
        for ((joining, out), weight) in joining.chunks_mut(width).zip(own.out.chunks(width)).zip(&own.gates) {
            kernel.add_scaled(&mut joining[..hidden], &out[..hidden], *weight);
        }
    }
}

impl Pass<'_> {
    /// The experts that each row of `input` chooses, and their weights `(rows, experts used)`.
    pub(super) fn route(
        &self,
        router: &Linear,
        input: &mut Rows,
        buffer: &mut Vec<f32>,
        choice: &mut Vec<(usize, f32)>,
    ) {
        let experts = &self.model.config.experts;
        self.linear(router, input, buffer);
        choice.clear();
        for logits in buffer.chunks_mut(router.width()) {
            choose(self.kernel, &mut logits[..experts.count], experts, choice);
        }
    }

    /// What the shared expert's output is multiplied with, into `weights (rows)`.
    pub(super) fn shared_weights(
        &self,
        gate: Option<&Linear>,
        input: &mut Rows,
        buffer: &mut Vec<f32>,
        weights: &mut Vec<f32>,
    ) {
        weights.clear();
        weights.resize(input.values.len() / self.model.config.hidden, 1.0);
        if let Some(gate) = gate {
            self.linear(gate, input, buffer);
            for (weight, out) in weights.iter_mut().zip(buffer.chunks(gate.width())) {
                *weight = 1.0 / (1.0 + kernels::exp(-out[0]));
            }
        }
    }
}

/// The experts of one row and their weights, by a softmax over all of `logits (experts)`, ties to the lower number.
fn choose(kernel: &Kernel, logits: &mut [f32], experts: &Experts, choice: &mut Vec<(usize, f32)>) {
    let (_, sum) = kernel.exp_segment(logits);
    let first = choice.len();
    for _ in 0..experts.used {
        let free = |expert: &usize| !choice[first..].iter().any(|(chosen, _)| chosen == expert);
        let best = (0..logits.len()).filter(free).fold(None, |best: Option<usize>, expert| match best {
            Some(best) if logits[best] >= logits[expert] => Some(best),
            _ => Some(expert),
        });
        // There are at least as many experts as are used.
        let best = best.unwrap_or(0);
        choice.push((best, logits[best] / sum));
    }
    let chosen = &mut choice[first..];
    let total: f32 = if experts.normalized { chosen.iter().map(|(_, weight)| weight).sum() } else { 1.0 };
    chosen.iter_mut().for_each(|(_, weight)| *weight *= experts.scale / total);
}
