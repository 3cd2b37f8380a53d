//! A sequence: its tokens, its KV cache, and its sampler.

use std::ops::Range;

use super::constrained_sampler::{ConstrainedSampler, compute_and_find_allowed};
#[cfg(feature = "grammar")]
use super::constraint::Constraint;
use super::sampler::{Sampled, Sampler, SamplingOptions};
use crate::error::{Error, Result};
use crate::model::{Input, Logits, Model, Session};

/// A prompt and its completion so far. [`step`] computes the pending tokens and samples the next one.
#[derive(Debug)]
pub struct Sequence {
    pub(super) session: Session,
    /// All tokens: computed, pending and sampled.
    pub(super) tokens: Vec<u32>,
    /// Tokens that the next step computes. During a step of a scheduler, draft tokens follow them.
    pub(super) pending: Vec<u32>,
    pub(super) sampler: ConstrainedSampler,
    vocabulary: usize,
    /// Tokens that end it.
    ends: Vec<u32>,
    has_ended: bool,
}

impl Sequence {
    /// A sequence that starts with `prompt`. The penalties count the prompt, too. It ends with one of the model's own
    /// [`ends`](Model::ends), unless [`with_ends`](Sequence::with_ends) says otherwise.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range or a prompt that is empty or has unknown tokens;
    /// [`Error::ContextFull`] when the prompt does not fit; those of [`Model::ends`].
    pub fn new(model: &Model, prompt: &[u32], options: SamplingOptions) -> Result<Sequence> {
        Sequence::resume(model, model.session(), prompt, options)
    }

    /// A sequence that continues `tokens`. `session` has computed a beginning of them. The penalties count all `tokens`.
    /// If `session` has computed all of them, the last one is computed again, because its logits are needed.
    ///
    /// # Errors
    /// As for [`Sequence::new`].
    pub fn resume(model: &Model, session: Session, tokens: &[u32], options: SamplingOptions) -> Result<Sequence> {
        let limits = model.limits()?;
        let mut sequence = Sequence::resume_endless(model, session, tokens, options)?.with_ends(limits.ends.as_slice());
        sequence.exclude(limits.missing.clone());
        Ok(sequence)
    }

    /// As [`Sequence::resume`], but no token ends it, and rows without a token may be sampled.
    pub(crate) fn resume_endless(
        model: &Model,
        mut session: Session,
        tokens: &[u32],
        options: SamplingOptions,
    ) -> Result<Sequence> {
        let vocabulary = model.vocabulary();
        let sampler = ConstrainedSampler::new(Sampler::new(options, vocabulary)?);
        let Some(before_last) = tokens.len().checked_sub(1) else {
            return Err(Error::argument("prompt", "no tokens", "at least one token"));
        };
        session.truncate(before_last);
        let (computed, new) = tokens.split_at(session.len());
        let mut sequence = Sequence {
            session,
            tokens: computed.to_vec(),
            pending: Vec::new(),
            sampler,
            vocabulary,
            ends: Vec::new(),
            has_ended: false,
        };
        computed.iter().for_each(|token| sequence.sampler.accept(*token));
        sequence.push(new)?;
        Ok(sequence)
    }

    /// Sets the tokens that end the sequence. Without any, nothing but the caller ends it.
    pub fn with_ends(mut self, ends: impl Into<Vec<u32>>) -> Sequence {
        self.ends = ends.into();
        self.sampler.set_ends(&self.ends);
        self
    }

    /// Sets the tokens that `min_tokens` concerns, where the caller ends the sequence.
    #[cfg(feature = "python")]
    pub(crate) fn hold(&mut self, ends: &[u32]) {
        self.sampler.set_ends(ends);
    }

    /// Whether the last token sampled ends the sequence. It continues after [`push`](Sequence::push).
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// All tokens: the prompt, and those sampled. The session has computed a beginning of them.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Allows only tokens that follow `constraint` from now on. The tokens so far do not count for it.
    #[cfg(feature = "grammar")]
    pub fn constrain(&mut self, constraint: Constraint) {
        self.sampler.constrain(constraint);
    }

    /// Never samples ids in these ranges. Pass the rows of the output matrix that have no token in the vocabulary.
    pub fn exclude(&mut self, ids: Vec<Range<u32>>) {
        self.sampler.exclude(ids);
    }

    /// Appends tokens for the next step to compute, such as the user's next turn of a chat.
    ///
    /// # Errors
    /// As for [`Sequence::new`]; the sequence is then unchanged.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let (used, context) = (self.len(), self.session.context());
        if tokens.len() > context - used.min(context) {
            return Err(Error::ContextFull { used, requested: tokens.len(), context });
        }
        let vocabulary = self.vocabulary;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(Error::argument("token", token, format_args!("an id below {vocabulary}")));
        }
        tokens.iter().for_each(|token| self.sampler.accept(*token));
        self.tokens.extend_from_slice(tokens);
        self.pending.extend_from_slice(tokens);
        self.has_ended &= tokens.is_empty();
        Ok(())
    }

    /// Number of tokens, computed and pending.
    pub fn len(&self) -> usize {
        self.session.len() + self.pending.len()
    }

    /// Whether there are no tokens. Always false after [`Sequence::new`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that the next step computes. After a step: the token it sampled.
    pub fn pending(&self) -> &[u32] {
        &self.pending
    }

    /// The KV cache of the tokens computed so far.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The KV cache of the tokens computed so far, without the rest of the sequence.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// Samples a token from `logits` and appends it. It is not pending yet.
    ///
    /// # Errors
    /// [`Error::CacheOverflow`] and [`Error::BadLogits`].
    pub(super) fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        // This error says more than the one about logits, which are NaN for the same reason.
        self.session.check_cache()?;
        let sampled = self.sampler.sample(logits)?;
        self.tokens.push(sampled.token);
        self.has_ended = self.ends.contains(&sampled.token);
        Ok(sampled)
    }

    /// Checks that there is something to compute.
    pub(super) fn check_continues(&self) -> Result<()> {
        if self.has_ended {
            let expected = "one that continues: push tokens, or set other ends";
            return Err(Error::argument("sequence", "a sequence that has ended", expected));
        }
        Ok(())
    }
}

/// Computes the pending tokens of every sequence in one batch and samples one token for each, which is then pending.
///
/// A sequence's tokens are bit-identical to those it gets alone.
///
/// # Errors
/// Those of [`Model::forward`], with all sequences as they were before; [`Error::CacheOverflow`], and [`Error::BadLogits`]
/// when nothing can be sampled; [`Error::InvalidArgument`] for a sequence that has ended or has no pending tokens.
pub fn step(
    model: &Model,
    sequences: &mut [&mut Sequence],
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Sampled>> {
    sequences.iter().try_for_each(|sequence| sequence.check_continues())?;
    let mut logits = Vec::new();
    let mut inputs = Vec::with_capacity(sequences.len());
    let mut samplers = Vec::with_capacity(sequences.len());
    for sequence in sequences.iter_mut() {
        let Sequence { session, pending, sampler, .. } = &mut **sequence;
        samplers.push(sampler);
        inputs.push(Input::new(session, pending, Logits::Last));
    }
    compute_and_find_allowed(samplers, || model.forward(&mut inputs, &mut logits, interrupted))?;
    let rows = logits.chunks_mut(model.vocabulary());
    let sample = |(sequence, logits): (&mut &mut Sequence, &mut [f32])| {
        let sampled = sequence.sample(logits);
        sequence.pending.clear();
        if let Ok(sampled) = &sampled {
            sequence.pending.push(sampled.token);
        }
        sampled
    };
    sequences.iter_mut().zip(rows).map(sample).collect()
}
