//! Draft tokens of a step: from the sequences themselves, their constraints, or the draft model.

use std::sync::Arc;

use super::super::speculation::{MAX_AUTO_ROWS, MAX_DRAFT, MAX_DRAFT_ROWS, Speculation, ngram_lookup};
use super::entry::Entry;
use crate::error::{Error, Result};
use crate::model::{Input, Logits, Model};

/// Tokens of a sequence that the draft model computes in each step until it has caught up and can draft.
const CATCH_UP: usize = 64;

/// Adds draft tokens to sequences before a step.
#[derive(Debug)]
pub(super) struct Drafter {
    pub(super) speculation: Speculation,
    pub(super) model: Option<Arc<Model>>,
}

impl Drafter {
    /// Appends draft tokens to the pending tokens of the sequences that decode.
    ///
    /// # Errors
    /// [`Error::Interrupted`], without any draft tokens.
    pub(super) fn propose(&self, running: &mut [Entry], interrupted: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if self.speculation == Speculation::Off {
            return Ok(());
        }
        let decoding = running.iter().filter(|entry| entry.is_decoding()).count();
        let mut budget = match self.speculation {
            Speculation::Auto => MAX_AUTO_ROWS.saturating_sub(decoding),
            Speculation::On | Speculation::Off => MAX_DRAFT_ROWS,
        };
        let mut wanted = Vec::with_capacity(running.len());
        for entry in running.iter_mut() {
            let mut count = 0;
            if entry.is_decoding() {
                // The last token of the limit is sampled but never computed, so it needs no draft.
                count = entry.acceptance.draft_len(self.speculation).min(entry.remaining - 1).min(budget);
                budget -= count;
            }
            // A constraint predicts the next tokens better than a draft model does.
            if self.model.is_none() || entry.sequence.sampler.constraint().is_some() {
                look_ahead(entry, std::mem::take(&mut count));
            }
            wanted.push(count);
        }
        match &self.model {
            Some(model) => ask(model, running, wanted, interrupted),
            None => Ok(()),
        }
    }
}

/// Appends up to `count` draft tokens from the sequence itself and from its constraint.
fn look_ahead(entry: &mut Entry, count: usize) {
    let sequence = &mut entry.sequence;
    let mut draft = match sequence.sampler.constraint() {
        _ if count == 0 => Vec::new(),
        None => ngram_lookup(&sequence.tokens, count),
        Some(constraint) => constraint.draft(count, |draft| ngram_lookup(&[&sequence.tokens, draft].concat(), count)),
    };
    entry.drafted = draft.len();
    entry.rows += draft.len();
    sequence.pending.append(&mut draft);
}

/// Lets the draft model generate up to `wanted` tokens for each sequence. It samples like the sequence's own sampler, with the
/// random numbers that the sequence will use, so a good draft model is right with seeds, too.
fn ask(
    model: &Model,
    running: &mut [Entry],
    mut wanted: Vec<usize>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let mut samplers: Vec<_> = running.iter().map(|_| None).collect();
    for round in 0..MAX_DRAFT {
        let mut logits = Vec::new();
        let mut inputs = Vec::new();
        let mut asked = Vec::new();
        for (i, entry) in running.iter_mut().enumerate() {
            if round >= wanted[i] {
                continue;
            }
            let Entry { draft_session, sequence, drafted, .. } = entry;
            let session = draft_session.get_or_insert_with(|| model.session());
            // After the first round only the last draft token is new to the draft model.
            let new = if round == 0 { &sequence.tokens[session.len()..] } else { &sequence.pending[*drafted..] };
            let is_behind = round == 0 && new.len() > CATCH_UP;
            let new = &new[..new.len().min(CATCH_UP)];
            if new.len() > session.context() - session.len() {
                wanted[i] = 0;
                continue;
            }
            if is_behind {
                wanted[i] = 0;
            }
            asked.push((i, !is_behind));
            let logits = if is_behind { Logits::None } else { Logits::Last };
            inputs.push(Input::new(session, new, logits));
        }
        if inputs.is_empty() {
            break;
        }
        match model.forward(&mut inputs, &mut logits, interrupted) {
            Ok(()) => {}
            // Without memory for the draft model, sequences continue without it.
            Err(Error::OutOfMemory { .. }) => break,
            Err(error) => {
                running.iter_mut().for_each(Entry::forget_drafts);
                return Err(error);
            }
        }
        let asked = asked.into_iter().filter_map(|(i, has_logits)| has_logits.then_some(i));
        for (i, row) in asked.zip(logits.chunks_mut(model.vocabulary())) {
            let entry = &mut running[i];
            let sampler = samplers[i].get_or_insert_with(|| entry.sequence.sampler.unconstrained().clone());
            // Where the draft model gives no usable logits, the model continues alone.
            let Ok(sampled) = sampler.sample(row) else {
                wanted[i] = 0;
                continue;
            };
            sampler.accept(sampled.token);
            entry.sequence.pending.push(sampled.token);
            entry.drafted += 1;
            entry.rows += 1;
        }
    }
    Ok(())
}
