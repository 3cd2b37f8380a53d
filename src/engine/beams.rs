//! Beam search: the most likely continuation of a prompt, among those that a number of beams follow.
//!
//! Each step extends every beam by one token and keeps the best of all extensions; those that end a completion leave the search.
//! Order, scores and the end of the search are those of Hugging Face transformers (`GenerationMixin._beam_search`). Beams are forks
//! of one session, so they share the pages of the prompt and of their common continuation.

use crate::engine::sampler::{EarlyStopping, Sampler, SamplingOptions};
use crate::error::Result;
use crate::model::Session;

/// An open continuation.
#[derive(Debug)]
pub(super) struct Beam {
    /// The KV cache of the prompt and of all its tokens but the last.
    pub(super) session: Session,
    continuation: Continuation,
}

impl Beam {
    /// The session to extend and its next token.
    pub(super) fn input(&mut self) -> (&mut Session, &[u32]) {
        (&mut self.session, self.continuation.next.as_slice())
    }
}

/// Tokens after the prompt.
#[derive(Debug, Clone, Default)]
struct Continuation {
    /// The tokens with their log-probabilities.
    tokens: Vec<(u32, f32)>,
    /// The last token.
    next: Vec<u32>,
    /// The sum of the log-probabilities after bias, by which beams compete.
    sum: f64,
}

impl Continuation {
    fn extended(&self, next: Next) -> Continuation {
        let tokens = self.tokens.iter().copied().chain([(next.token, next.logprob)]).collect();
        Continuation { tokens, next: vec![next.token], sum: next.sum }
    }
}

/// A token that extends a beam.
#[derive(Debug, Clone, Copy)]
struct Next {
    /// The number of the beam.
    parent: usize,
    token: u32,
    /// Its log-probability, in the model's own distribution.
    logprob: f32,
    /// The sum of the extended beam.
    sum: f64,
}

/// A search over the continuations of one prompt.
#[derive(Debug)]
pub(super) struct BeamSearch {
    /// Number of beams.
    count: usize,
    length_penalty: f32,
    early_stopping: EarlyStopping,
    /// Tokens that end a completion.
    ends: Vec<u32>,
    /// Largest number of tokens of a continuation.
    limit: usize,
    beams: Vec<Beam>,
    /// Ended continuations with their scores, best first. Never more than beams.
    ended: Vec<(f64, Continuation)>,
}

impl BeamSearch {
    /// A search for continuations of up to `limit` tokens; `None` where the options sample.
    pub(super) fn new(options: &SamplingOptions, ends: &[u32], limit: usize) -> Option<BeamSearch> {
        (options.num_beams > 1).then(|| BeamSearch {
            count: options.num_beams as usize,
            length_penalty: options.length_penalty,
            early_stopping: options.early_stopping,
            ends: ends.to_vec(),
            limit,
            beams: Vec::new(),
            ended: Vec::new(),
        })
    }

    /// The open beams. Empty before [`start`](BeamSearch::start) and after the end.
    pub(super) fn beams(&self) -> &[Beam] {
        &self.beams
    }

    /// The open beams, to be computed.
    pub(super) fn beams_mut(&mut self) -> &mut [Beam] {
        &mut self.beams
    }

    /// Forgets all continuations.
    pub(super) fn reset(&mut self) {
        self.beams.clear();
        self.ended.clear();
    }

    /// Starts after the prompt in `session`, by the logits after its last token. Returns whether the search has ended.
    ///
    /// # Errors
    /// Those of sampling.
    pub(super) fn start(&mut self, session: Session, logits: &mut [f32], sampler: &mut Sampler) -> Result<bool> {
        self.beams = vec![Beam { session, continuation: Continuation::default() }];
        self.advance(logits, sampler)
    }

    /// Extends each beam by a token, by the logits `(beams, vocabulary)` after its last one. Returns whether the search has ended.
    ///
    /// # Errors
    /// Those of sampling.
    pub(super) fn advance(&mut self, logits: &mut [f32], sampler: &mut Sampler) -> Result<bool> {
        let count = self.count;
        // Enough that `count` are left when every other one ends.
        let kept = count * (self.ends.len() + 1).max(2);
        let vocabulary = logits.len() / self.beams.len().max(1);
        let mut found = Vec::new();
        for (parent, (beam, logits)) in self.beams.iter().zip(logits.chunks_mut(vocabulary.max(1))).enumerate() {
            beam.session.check_cache()?;
            let sampled = beam.continuation.tokens.len();
            let best = sampler.best(logits, kept, sampled)?;
            let sum = beam.continuation.sum;
            let next = |(token, biased, logprob)| Next { parent, token, logprob, sum: sum + biased };
            found.extend(best.into_iter().map(next));
        }
        // Stable: of equal ones, the better beam and then the lower id goes first.
        found.sort_by(|a: &Next, b: &Next| b.sum.total_cmp(&a.sum));
        found.truncate(kept);
        let length = self.beams.first().map_or(0, |beam| beam.continuation.tokens.len()) + 1;
        let is_full = self.ended.len() >= count;
        let mut open = Vec::new();
        for (rank, next) in found.into_iter().enumerate() {
            if !self.ends.contains(&next.token) && length < self.limit {
                if open.len() < count {
                    open.push(next);
                }
            } else if rank < count && !(is_full && self.early_stopping == EarlyStopping::Always) {
                let continuation = self.beams[next.parent].continuation.extended(next);
                self.ended.push((self.score(next.sum, length), continuation));
            }
        }
        self.ended.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.ended.truncate(count);
        self.extend(&open);
        let has_ended = self.has_ended(length);
        if has_ended {
            self.beams.clear();
        }
        Ok(has_ended)
    }

    /// The score of the best continuation, and its tokens with their log-probabilities.
    pub(super) fn into_best(self) -> Option<(f64, Vec<(u32, f32)>)> {
        self.ended.into_iter().next().map(|(score, continuation)| (score, continuation.tokens))
    }

    fn score(&self, logprob: f64, length: usize) -> f64 {
        logprob / (length as f64).powf(f64::from(self.length_penalty))
    }

    /// Replaces the beams by extensions of them.
    fn extend(&mut self, open: &[Next]) {
        let mut parents: Vec<_> = std::mem::take(&mut self.beams).into_iter().map(Some).collect();
        for (at, next) in open.iter().enumerate() {
            let is_last = open[at + 1..].iter().all(|other| other.parent != next.parent);
            let Some(beam) = &mut parents[next.parent] else { continue };
            let continuation = beam.continuation.extended(*next);
            let session = beam.session.fork();
            if is_last {
                // Its pages need no copy when they are not shared any more.
                parents[next.parent] = None;
            }
            self.beams.push(Beam { session, continuation });
        }
    }

    /// Whether no open beam can improve the result, by the rule of the options, after continuations of `length` tokens.
    fn has_ended(&self, length: usize) -> bool {
        let Some(best) = self.beams.first() else { return true };
        let is_full = self.ended.len() >= self.count;
        let Some((worst, _)) = self.ended.last().filter(|_| is_full) else { return false };
        let longest = match self.early_stopping {
            EarlyStopping::Always => return true,
            EarlyStopping::Never if self.length_penalty > 0.0 => self.limit,
            EarlyStopping::Never | EarlyStopping::Heuristic => length,
        };
        self.score(best.continuation.sum, longest) <= *worst
    }
}
