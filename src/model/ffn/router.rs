//! Routers choose the experts for each row.

use crate::error::Result;
use crate::kernels::Kernel;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, ExpertsConfig};
use crate::model::linear::{Linear, LinearInput};
use crate::model::pass::Pass;
use crate::model::weights::loader::{Loader, Part};

/// An expert that a row chose, and the weight of its output.
pub(in crate::model) type Choice = (usize, f32);

/// Chooses experts by a softmax over the logits of all.
#[derive(Debug)]
pub(super) struct Router {
    /// `(experts, hidden)`
    pub(super) logits: Linear,
}

impl Router {
    /// The name of its matrix in layer `index`.
    pub(super) fn name(index: usize) -> String {
        format!("blk.{index}.ffn_gate_inp")
    }

    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Router> {
        let (name, count) = (Router::name(index), config.experts.count);
        if count == 0 {
            let name = format!("{name}.weight");
            return Err(loader.malformed(&name, "a router", "expert_count above 0 among the keys"));
        }
        Ok(Router { logits: loader.linear(&[Part::new(name, count)], config.hidden)? })
    }

    /// Writes the experts that each row of `input` chooses to `choices (rows, experts used)`. Overwrites `logits`.
    pub(super) fn route(
        &self,
        pass: &Pass<'_>,
        input: &mut LinearInput,
        logits: &mut Buffer,
        choices: &mut Vec<Choice>,
    ) {
        let experts = &pass.config.experts;
        pass.linear(&self.logits, input, logits);
        choices.clear();
        for logits in logits.chunks_mut(self.logits.width()) {
            choose(pass.kernel, &mut logits[..experts.count], experts, choices);
        }
    }
}

/// Appends the experts of one row: the likeliest by a softmax over all of `logits (experts)`, ties to the lower number.
fn choose(kernel: &Kernel, logits: &mut [f32], experts: &ExpertsConfig, choices: &mut Vec<Choice>) {
    let (_, sum) = kernel.exp_segment(logits);
    let first = choices.len();
    for _ in 0..experts.used {
        let free = |expert: &usize| !choices[first..].iter().any(|(chosen, _)| chosen == expert);
        let best = (0..logits.len()).filter(free).fold(None, |best: Option<usize>, expert| match best {
            Some(best) if logits[best] >= logits[expert] => Some(best),
            _ => Some(expert),
        });
        // There are at least as many experts as are used, so one is free.
        let best = best.unwrap_or(0);
        choices.push((best, logits[best] / sum));
    }
    let chosen = &mut choices[first..];
    let total: f32 = if experts.normalized { chosen.iter().map(|(_, weight)| weight).sum() } else { 1.0 };
    chosen.iter_mut().for_each(|(_, weight)| *weight *= experts.scale / total);
}
