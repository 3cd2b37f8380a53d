//! A sequence: its tokens, its KV cache, and its sampler.

use std::ops::Range;

use super::constrained_sampler::{ConstrainedSampler, compute_and_find_allowed};
#[cfg(feature = "grammar")]
use super::constraint::Constraint;
use super::processor::{Failure, LogitsProcessor};
use super::sampler::{Process, Sampled, Sampler, SamplingOptions};
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
    processor: Option<LogitsProcessor>,
    vocabulary: usize,
    /// Tokens that end it.
    pub(super) ends: Vec<u32>,
    pub(super) has_ended: bool,
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
            processor: None,
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
        if self.options().ignore_eos {
            self.sampler.ignore(&self.ends);
        }
        self
    }

    /// Calls `process` before each token is sampled, with all tokens so far, prompt included, and the logits `(vocabulary)` of the
    /// next one. It may set logits to minus infinity, but not to NaN or infinity; its errors end the sequence. Bias, penalties,
    /// filters and constraints follow it; log-probabilities are those before it.
    ///
    /// ```no_run
    /// # use nybble::engine::{Sequence, sampler::SamplingOptions};
    /// # let model = nybble::model::Model::load("model.gguf", &Default::default())?;
    /// let sequence = Sequence::new(&model, &[1, 2, 3], SamplingOptions::greedy())?;
    /// let sequence = sequence.with_logits_processor(|tokens, logits| {
    ///     // No token comes twice.
    ///     tokens.iter().for_each(|token| logits[*token as usize] = f32::NEG_INFINITY);
    ///     Ok(())
    /// });
    /// # Ok::<(), nybble::Error>(())
    /// ```
    pub fn with_logits_processor(
        mut self,
        process: impl Fn(&[u32], &mut [f32]) -> std::result::Result<(), Failure> + Send + Sync + 'static,
    ) -> Sequence {
        self.processor = Some(LogitsProcessor::new(process));
        self
    }

    /// Sets the tokens that end a completion where the caller ends the sequence: `ends`, which `min_tokens` holds back and beams end
    /// with, and of these those `ignored`, which are not sampled at all.
    #[cfg(feature = "python")]
    pub(crate) fn hold(&mut self, ends: Vec<u32>, ignored: &[u32]) {
        self.sampler.set_ends(&ends);
        self.sampler.ignore(ignored);
        if self.searches() {
            self.ends = ends;
        }
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

    /// Whether a beam search continues it.
    pub(super) fn searches(&self) -> bool {
        self.options().num_beams > 1
    }

    /// The options it was made with.
    pub(super) fn options(&self) -> &SamplingOptions {
        self.sampler.unconstrained().options()
    }

    /// Samples a token from `logits` and appends it. It is not pending yet.
    ///
    /// # Errors
    /// [`Error::CacheOverflow`] and [`Error::BadLogits`]; those of the logits processor.
    pub(super) fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        // This error says more than the one about logits, which are NaN for the same reason.
        self.session.check_cache()?;
        let Sequence { tokens, processor, sampler, .. } = self;
        let mut process = processor.as_ref().map(|processor| |logits: &mut [f32]| processor.apply(tokens, logits));
        let sampled = sampler.sample(logits, process.as_mut().map(|process| process as Process<'_>))?;
        self.tokens.push(sampled.token);
        self.has_ended = self.ends.contains(&sampled.token);
        Ok(sampled)
    }

    /// Makes the last token pending again if a beam search has computed it, so that the sequence can be continued.
    pub(super) fn restore_pending(&mut self) {
        if self.pending.is_empty() {
            self.session.truncate(self.tokens.len().saturating_sub(1));
            self.pending.extend_from_slice(&self.tokens[self.session.len()..]);
        }
    }

    /// Computes all tokens again.
    pub(super) fn restart(&mut self) {
        self.session.truncate(0);
        self.pending.clone_from(&self.tokens);
    }

    /// Checks that there is something to compute.
    pub(super) fn check_continues(&self) -> Result<()> {
        if self.has_ended {
            let expected = "one that continues: push tokens, or set other ends";
            return Err(Error::argument("sequence", "a sequence that has ended", expected));
        }
        let refuse = |name, is_set| match is_set {
            true => Err(Error::argument(name, "one with num_beams", "none: a beam search does not use it")),
            false => Ok(()),
        };
        refuse("constraint", self.searches() && self.sampler.constraint().is_some())?;
        refuse("logits_processor", self.searches() && self.processor.is_some())
    }
}

/// Computes the pending tokens of every sequence in one batch and samples one token for each, which is then pending.
///
/// A sequence's tokens are bit-identical to those it gets alone.
///
/// # Errors
/// Those of [`Model::forward`], with all sequences as they were before; [`Error::CacheOverflow`], and [`Error::BadLogits`]
/// when nothing can be sampled; [`Error::InvalidArgument`] for a sequence that has ended, has no pending tokens, or has a beam
/// search.
pub fn step(
    model: &Model,
    sequences: &mut [&mut Sequence],
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Sampled>> {
    sequences.iter().try_for_each(|sequence| sequence.check_continues())?;
    if sequences.iter().any(|sequence| sequence.searches()) {
        return Err(Error::argument("sequence", "one with a beam search", "one that samples: a Scheduler searches"));
    }
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
