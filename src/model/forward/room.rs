//! Memory for a pass, asked for before it begins: what cannot be had is an error then, and not the end of the process.

use std::collections::TryReserveError;

use super::{Input, Logits, Row, Scratch};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::Config;
use crate::model::weights::{Ffn, Weights};
use crate::quant::packed::PANEL;
use crate::system::memory;

/// The widest of what a model computes, in numbers a row.
#[derive(Debug, Default)]
pub(in crate::model) struct Widths {
    qkv: usize,
    /// Gate and up.
    ffn: usize,
    /// What the feed-forward layer's last matrix reads.
    inner: usize,
    /// What joins the stream, or chooses experts.
    joining: usize,
    /// What any matrix reads.
    input: usize,
    has_experts: bool,
}

impl Widths {
    pub(in crate::model) fn of(config: &Config, weights: &Weights) -> Widths {
        let (hidden, queries) = (config.hidden, config.heads * config.head_dim);
        let mut widths = Widths { joining: hidden.next_multiple_of(PANEL), ..Widths::default() };
        for layer in &weights.layers {
            widths.qkv = widths.qkv.max(layer.qkv.width());
            let (mlps, shared) = match &layer.ffn {
                Ffn::Dense(mlp) => (std::slice::from_ref(mlp), None),
                Ffn::Experts { router, experts, shared } => {
                    widths.has_experts = true;
                    widths.joining = widths.joining.max(router.width());
                    (&experts[..], shared.as_ref().map(|(mlp, _)| mlp))
                }
            };
            for mlp in mlps.iter().chain(shared) {
                widths.ffn = widths.ffn.max(mlp.up.width());
                widths.inner = widths.inner.max(mlp.width);
            }
        }
        for linear in weights.projections.iter().flatten() {
            widths.joining = widths.joining.max(linear.width());
            widths.input = widths.input.max(linear.parts().iter().map(|part| part.columns()).max().unwrap_or(0));
        }
        widths.input = widths.input.max(hidden).max(queries).max(widths.inner);
        widths
    }
}

/// Makes room for all logits, or hidden states, that the inputs ask for.
pub(super) fn for_logits(inputs: &[Input<'_>], model: &Model, logits: &mut Vec<f32>) -> Result<()> {
    let wanted = inputs.iter().map(|input| match input.logits {
        Logits::None => 0,
        Logits::Last => model.vocabulary(),
        Logits::All => input.tokens.len().saturating_mul(model.vocabulary()),
        Logits::Hidden => input.tokens.len().saturating_mul(model.config.hidden),
    });
    let count = wanted.fold(0, usize::saturating_add);
    let bytes = count.saturating_mul(size_of::<f32>());
    if count > logits.capacity() {
        memory::check_allocation("logits", bytes)?;
    }
    logits.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "logits", bytes, left: None })
}

impl Scratch {
    /// Makes room for the rows that were gathered.
    pub(super) fn reserve(&mut self, model: &Model, inputs: &[Input<'_>]) -> Result<()> {
        let (widths, config) = (&model.widths, &model.config);
        let rows = self.rows.len();
        let has_logits = |row: &&Row| row.wanted && inputs[row.input].logits != Logits::Hidden;
        let wanted = self.rows.iter().filter(has_logits).count();
        let longest = self.spans.iter().map(|span| span.len).max().unwrap_or(0);
        let angles = 2 * rows * model.ropes[0].pairs();
        let of_rows = [
            (&mut self.cos, angles),
            (&mut self.sin, angles),
            (&mut self.x, rows * config.hidden),
            (&mut self.qkv, rows * widths.qkv),
            (&mut self.attended, self.spans.len() * longest * config.heads * config.head_dim),
            (&mut self.ffn, rows * widths.ffn),
            (&mut self.joining, rows * widths.joining),
            (&mut self.joining_later, if config.parallel { rows * widths.joining } else { 0 }),
            (&mut self.logits, wanted * model.weights.output().width()),
        ];
        let numbers = of_rows.iter().map(|(_, len)| len).sum::<usize>() + rows * widths.input;
        let (what, bytes) = ("the buffers of a pass", numbers * size_of::<f32>());
        for (buffer, len) in of_rows.iter().filter(|(buffer, len)| *len > buffer.capacity()) {
            memory::check_allocation(what, (len - buffer.len()) * size_of::<f32>())?;
        }
        let reserve = || -> Result<(), TryReserveError> {
            for (buffer, len) in of_rows {
                buffer.try_reserve_exact(len.saturating_sub(buffer.len()))?;
            }
            self.input.try_reserve(rows, widths.input)?;
            if widths.has_experts {
                self.expert.try_reserve(rows, config.hidden, widths.inner, widths.joining)?;
            }
            Ok(())
        };
        reserve().map_err(|_| Error::OutOfMemory { what, bytes, left: None })
    }
}
