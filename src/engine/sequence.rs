//! A sequence: a session, the tokens that it has not seen yet, and how its next token is chosen.

use super::constraint::{Allowed, Constraint};
use super::sampler::{Sampled, Sampler, SamplingOptions};
use crate::error::{Error, Result};
use crate::model::{Input, Logits, Model, Session};

/// Text in the making: tokens go in, [`step`] computes them and samples the next.
#[derive(Debug)]
pub struct Sequence {
    pub(super) session: Session,
    pub(super) pending: Vec<u32>,
    pub(super) sampler: Sampler,
    pub(super) constraint: Option<Constraint>,
    vocabulary: usize,
}

impl Sequence {
    /// A sequence that starts with `prompt`, which counts for penalties too.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range or a prompt that is empty or has unknown tokens;
    /// [`Error::ContextFull`] when the prompt does not fit.
    pub fn new(model: &Model, prompt: &[u32], options: SamplingOptions) -> Result<Sequence> {
        let vocabulary = model.vocabulary();
        let sampler = Sampler::new(options, vocabulary)?;
        let mut sequence =
            Sequence { session: model.session(), pending: Vec::new(), sampler, constraint: None, vocabulary };
        if prompt.is_empty() {
            return Err(Error::argument("prompt", "no tokens", "at least one token"));
        }
        sequence.push(prompt)?;
        Ok(sequence)
    }

    /// Lets only tokens follow that `constraint` allows. Those that are there already do not count for it.
    pub fn constrain(&mut self, constraint: Constraint) {
        self.constraint = Some(constraint);
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

    /// Chooses the next token by the logits after the last one, among what its constraint has `allowed`, and counts it for what
    /// comes after.
    pub(super) fn take(&mut self, logits: &mut [f32], allowed: Option<Result<Allowed>>) -> Result<Sampled> {
        let allowed = allowed.transpose()?;
        let sampled = self.sampler.sample_among(logits, allowed.as_ref())?;
        self.sampler.accept(sampled.token);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(sampled.token)?;
        }
        Ok(sampled)
    }

    /// Whether tokens may be guessed ahead, to be confirmed several at once. A constraint tells only what may come next.
    pub(super) fn may_speculate(&self) -> bool {
        self.constraint.is_none()
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
    let mut constraints: Vec<Option<&mut Constraint>> = Vec::with_capacity(sequences.len());
    let mut inputs = Vec::with_capacity(sequences.len());
    for sequence in sequences.iter_mut() {
        let Sequence { session, pending, constraint, .. } = &mut **sequence;
        constraints.push(constraint.as_mut());
        inputs.push(Input { session, tokens: pending, logits: Logits::Last });
    }
    let allowed = beside(&mut constraints, || model.forward(&mut inputs, &mut logits, interrupted))?;
    let rows = logits.chunks_mut(model.vocabulary());
    let sample = |((sequence, logits), allowed): ((&mut &mut Sequence, &mut [f32]), Option<Result<Allowed>>)| {
        let sampled = sequence.take(logits, allowed);
        sequence.pending.clear();
        if let Ok(sampled) = &sampled {
            sequence.pending.push(sampled.token);
        }
        sampled
    };
    sequences.iter_mut().zip(rows).zip(allowed).map(sample).collect()
}

/// Runs `compute`, and beside it, in a thread of its own, finds out what each constraint allows.
pub(super) fn beside(
    constraints: &mut [Option<&mut Constraint>],
    compute: impl FnOnce() -> Result<()>,
) -> Result<Vec<Option<Result<Allowed>>>> {
    if constraints.iter().all(Option::is_none) {
        compute()?;
        return Ok(constraints.iter().map(|_| None).collect());
    }
    std::thread::scope(|scope| {
        let look = || constraints.iter_mut().map(|constraint| Some(constraint.as_mut()?.allowed())).collect();
        let looking = scope.spawn(look);
        compute()?;
        Ok(looking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
