//! Guesses of a step: from the texts, or from the draft model.

use super::{Entry, Interrupted, Scheduler, Speculation, speculation};
use crate::error::{Error, Result};
use crate::model::{Input, Logits, Model};

/// Tokens of a text that the draft model reads beside a step, until it has caught up and can guess.
const CATCH_UP: usize = 64;

impl Entry {
    /// Puts up to `count` guesses from its text, and from what it is held to, behind the token that is due.
    fn look_ahead(&mut self, count: usize) {
        let mut guesses = Vec::new();
        match &self.sequence.held {
            _ if count == 0 => {}
            None => speculation::look_up(&self.tokens, count, &mut guesses),
            Some(held) => {
                guesses = held.guess(count, |known| {
                    let mut guesses = Vec::new();
                    speculation::look_up(&[&self.tokens, known].concat(), count, &mut guesses);
                    guesses
                });
            }
        }
        self.guesses = guesses.len();
        self.rows += guesses.len();
        self.sequence.pending.append(&mut guesses);
    }
}

impl Scheduler {
    /// Puts guesses behind the tokens that are due.
    ///
    /// # Errors
    /// [`Error::Interrupted`], without any guesses.
    pub(super) fn guess(&mut self, interrupted: Interrupted<'_>) -> Result<()> {
        let speculation = self.options.speculation;
        if speculation == Speculation::Off {
            return Ok(());
        }
        let texts = self.running.iter().filter(|entry| entry.is_writing()).count();
        let few = speculation == Speculation::Auto;
        let mut budget = if few { speculation::FEW_ROWS.saturating_sub(texts) } else { speculation::MOST_ROWS };
        let mut wanted = Vec::with_capacity(self.running.len());
        for entry in &mut self.running {
            let mut count = 0;
            if entry.is_writing() {
                // The last token that may be sampled is never fed, so it needs no guess.
                count = entry.acceptance.guesses(speculation).min(entry.left - 1).min(budget);
                budget -= count;
            }
            // A constraint knows more of what comes than a draft model does.
            if self.draft.is_none() || entry.sequence.held.is_some() {
                entry.look_ahead(std::mem::take(&mut count));
            }
            wanted.push(count);
        }
        match self.draft.clone() {
            Some(draft) => self.ask(&draft, wanted, interrupted),
            None => Ok(()),
        }
    }

    /// Takes guesses back: the step does not take place.
    pub(super) fn forget_guesses(&mut self) {
        for entry in &mut self.running {
            let known = entry.sequence.pending.len() - entry.guesses;
            entry.sequence.pending.truncate(known);
            (entry.guesses, entry.rows) = (0, 0);
            if let Some(draft) = &mut entry.draft {
                draft.truncate(entry.tokens.len() - 1);
            }
        }
    }

    /// Lets the draft model write on, up to `wanted` tokens of each text. It chooses as the text's own sampler would, with the
    /// random numbers that will decide later, so that a good draft is right with seeds, too.
    fn ask(&mut self, model: &Model, mut wanted: Vec<usize>, interrupted: Interrupted<'_>) -> Result<()> {
        let mut samplers: Vec<_> = self.running.iter().map(|_| None).collect();
        for round in 0..speculation::MOST {
            let mut logits = Vec::new();
            let mut inputs = Vec::new();
            let mut asked = Vec::new();
            for (i, entry) in self.running.iter_mut().enumerate() {
                if round >= wanted[i] {
                    continue;
                }
                let Entry { draft, tokens, sequence, guesses, .. } = entry;
                let draft = draft.get_or_insert_with(|| model.session());
                // Its last guess is the end of what is pending; everything before it, it has read.
                let unread = if round == 0 { &tokens[draft.len()..] } else { &sequence.pending[*guesses..] };
                let is_behind = round == 0 && unread.len() > CATCH_UP;
                let unread = &unread[..unread.len().min(CATCH_UP)];
                if unread.len() > draft.context() - draft.len() {
                    wanted[i] = 0;
                    continue;
                }
                if is_behind {
                    wanted[i] = 0;
                }
                asked.push((i, !is_behind));
                let logits = if is_behind { Logits::None } else { Logits::Last };
                inputs.push(Input { session: draft, tokens: unread, logits });
            }
            if inputs.is_empty() {
                break;
            }
            match model.forward(&mut inputs, &mut logits, interrupted) {
                Ok(()) => {}
                // Without memory for the draft model, texts go on without it.
                Err(Error::OutOfMemory { .. }) => break,
                Err(error) => {
                    self.forget_guesses();
                    return Err(error);
                }
            }
            let asked = asked.into_iter().filter_map(|(i, gives)| gives.then_some(i));
            for (i, row) in asked.zip(logits.chunks_mut(model.vocabulary())) {
                let entry = &mut self.running[i];
                let sampler = samplers[i].get_or_insert_with(|| entry.sequence.sampler.clone());
                // What a draft model cannot guess is left to the model.
                let Ok(sampled) = sampler.sample(row) else {
                    wanted[i] = 0;
                    continue;
                };
                sampler.accept(sampled.token);
                entry.sequence.pending.push(sampled.token);
                entry.guesses += 1;
                entry.rows += 1;
            }
        }
        Ok(())
    }
}
