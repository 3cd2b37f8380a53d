//! A sequence: a session, the tokens that it has not seen yet, and how its next token is chosen.

use super::constraint::{Constraint, Held, beside};
use super::sampler::{Sampled, Sampler, SamplingOptions};
use crate::error::{Error, Result};
use crate::model::{Input, Logits, Model, Session};

/// Text in the making: tokens go in, [`step`] computes them and samples the next.
#[derive(Debug)]
pub struct Sequence {
    pub(super) session: Session,
    pub(super) pending: Vec<u32>,
    pub(super) sampler: Sampler,
    pub(super) held: Option<Held>,
    vocabulary: usize,
}

impl Sequence {
    /// A sequence that starts with `prompt`, which counts for penalties too.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range or a prompt that is empty or has unknown tokens;
    /// [`Error::ContextFull`] when the prompt does not fit.
    pub fn new(model: &Model, prompt: &[u32], options: SamplingOptions) -> Result<Sequence> {
        Sequence::resume(model, model.session(), prompt, options)
    }

    /// A sequence that goes on with `session`, which has seen a beginning of `tokens`: all of a text, which counts for
    /// penalties. The last token is seen again where nothing else is left to see.
    ///
    /// # Errors
    /// As for [`Sequence::new`].
    pub fn resume(model: &Model, mut session: Session, tokens: &[u32], options: SamplingOptions) -> Result<Sequence> {
        let vocabulary = model.vocabulary();
        let sampler = Sampler::new(options, vocabulary)?;
        let Some(before_last) = tokens.len().checked_sub(1) else {
            return Err(Error::argument("prompt", "no tokens", "at least one token"));
        };
        session.truncate(before_last);
        let (seen, unseen) = tokens.split_at(session.len());
        let mut sequence = Sequence { session, pending: Vec::new(), sampler, held: None, vocabulary };
        seen.iter().for_each(|token| sequence.sampler.accept(*token));
        sequence.push(unseen)?;
        Ok(sequence)
    }

    /// Lets only tokens follow that `constraint` allows. Those that are there already do not count for it.
    pub fn constrain(&mut self, constraint: Constraint) {
        self.held = Some(Held::new(constraint));
    }

    /// Adds tokens to be seen at the next step, as a chat does with the user's next words.
    ///
    /// # Errors
    /// As for [`Sequence::new`]; the sequence is then unchanged.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let (used, context) = (self.session.len() + self.pending.len(), self.session.context());
        if tokens.len() > context - used.min(context) {
            return Err(Error::ContextFull { used, requested: tokens.len(), context });
        }
        let vocabulary = self.vocabulary;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(Error::argument("token", token, format_args!("an id below {vocabulary}")));
        }
        tokens.iter().for_each(|token| self.sampler.accept(*token));
        self.pending.extend_from_slice(tokens);
        Ok(())
    }

    /// Tokens in the sequence, seen or pending.
    pub fn len(&self) -> usize {
        self.session.len() + self.pending.len()
    }

    /// Whether there is no token at all. Never so after [`Sequence::new`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that are still to be seen. One after a step: the token that was sampled.
    pub fn pending(&self) -> &[u32] {
        &self.pending
    }

    /// The keys and values of the tokens seen.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Chooses the next token by the logits after the last one, and counts it for what comes after.
    pub(super) fn take(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        let sampled = match &mut self.held {
            Some(held) => held.sample(&mut self.sampler, logits)?,
            None => self.sampler.sample(logits)?,
        };
        self.sampler.accept(sampled.token);
        Ok(sampled)
    }
}

/// Feeds every sequence its pending tokens, all in one batch, and samples one token for each, which is then pending.
///
/// A sequence's result has the same bits alone and among others.
///
/// # Errors
/// Those of [`Model::forward`], with all sequences as they were before; [`Error::BadLogits`] when nothing can be sampled.
/// [`Error::InvalidArgument`] for a sequence without pending tokens.
pub fn step(
    model: &Model,
    sequences: &mut [&mut Sequence],
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Sampled>> {
    let mut logits = Vec::new();
    let mut inputs = Vec::with_capacity(sequences.len());
    let mut held = Vec::new();
    for sequence in sequences.iter_mut() {
        let Sequence { session, pending, held: own, .. } = &mut **sequence;
        held.extend(own);
        inputs.push(Input { session, tokens: pending, logits: Logits::Last });
    }
    beside(held, || model.forward(&mut inputs, &mut logits, interrupted))?;
    let rows = logits.chunks_mut(model.vocabulary());
    let sample = |(sequence, logits): (&mut &mut Sequence, &mut [f32])| {
        let sampled = sequence.take(logits);
        sequence.pending.clear();
        if let Ok(sampled) = &sampled {
            sequence.pending.push(sampled.token);
        }
        sampled
    };
    sequences.iter_mut().zip(rows).map(sample).collect()
}
