//! Sampling: from logits to the next token.
//!
//! The steps follow the order of llama.cpp's sampler chain:
//!
//! 0. Rows of the output matrix that have no token ([`Sampler::exclude`]) get minus infinity, and so do the tokens that a
//!    constraint forbids.
//! 1. `logit_bias` is added to the logits.
//! 2. The penalties change the logits of tokens in the history: repetition divides a positive logit and multiplies a
//!    negative one, presence subtracts once, frequency subtracts once per occurrence. DRY subtracts from the logits of tokens
//!    that would continue a repetition ([`SamplingOptions::dry_multiplier`]). Before `min_tokens` tokens, and always with
//!    `ignore_eos`, those that end a completion get minus infinity, unless nothing else is left.
//! 3. With `temperature` 0 the largest logit wins. Otherwise, without Mirostat, these filters follow. Each uses the probabilities
//!    (softmax) of the tokens that are left and keeps at least one:
//!    - `top_n_sigma` keeps tokens with a logit at most n standard deviations, of all logits, below the largest (Tang et al.,
//!      "Top-nσ: Not All Logits Are You Need", arXiv:2411.07641).
//!    - `top_k` keeps the k most likely tokens.
//!    - `typical_p` keeps the tokens with a surprise (negative log-probability) nearest to the mean surprise, the fewest
//!      that together reach probability p (Meister et al., "Locally Typical Sampling", arXiv:2202.00666).
//!    - `top_p` keeps the most likely tokens, the fewest that together reach p (Holtzman et al., "The Curious Case of Neural
//!      Text Degeneration", arXiv:1904.09751).
//!    - `min_p` keeps tokens with at least p times the highest probability (Nguyen et al., "Turning Up the Heat: Min-p
//!      Sampling", arXiv:2407.01082).
//!    - XTC removes, with `xtc_probability`, all tokens with at least probability `xtc_threshold` except the least likely of them
//!      (p-e-w, <https://github.com/oobabooga/text-generation-webui/pull/6335>).
//! 4. The remaining logits are divided by `temperature`, and one random number chooses a token. With a `dynatemp_range`, the
//!    temperature is between `temperature - dynatemp_range` and `temperature + dynatemp_range`: the lower end where one token
//!    is certain, the upper where all that remain are equally likely (kalomaze,
//!    <https://github.com/ggml-org/llama.cpp/pull/4972>). Mirostat keeps the tokens whose surprise is below a limit, which
//!    follows its error after each token ([`SamplingOptions::mirostat`]).
//!
//! In every tie the lower id goes first.
//!
//! **The same seed gives the same tokens** on every machine and in every version: the random number generator, `exp` and `ln`
//! are implemented here, probabilities are summed as integers, and every token that is not greedy consumes exactly one
//! number, or two with XTC.

mod candidates;
mod dry;
mod math;
mod options;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use super::constraint::Allowed;
use crate::{Error, Result};
use candidates::Candidates;
use dry::Repetitions;
use math::{deviation, largest, log_sum_exp, power};

pub use candidates::MAX_VOCAB_SIZE;
pub use options::{EarlyStopping, SamplingOptions};

/// A sampled token. Log-probabilities are those of the model's own distribution: the softmax of the logits before bias,
/// penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sampled {
    /// The token's id.
    pub token: u32,
    /// The token's log-probability (natural logarithm), if `logprobs` asked for it.
    pub logprob: Option<f32>,
    /// The ids and log-probabilities of the most likely tokens, most likely first: `logprobs` of them, or fewer if the model
    /// rules out the others.
    pub top: Vec<(u32, f32)>,
    /// The score of the continuation that the token belongs to, if a beam search found it.
    pub beam_score: Option<f64>,
}

/// Changes logits before they are sampled.
pub(super) type Process<'a> = &'a mut dyn FnMut(&mut [f32]) -> Result<()>;

/// Chooses the next token of one sequence. It keeps the history for the penalties and the state of the random numbers.
///
/// ```
/// use nybble::engine::sampler::{Sampler, SamplingOptions};
///
/// let options = SamplingOptions::greedy().with_logit_bias([(2, f32::NEG_INFINITY)]);
/// let mut sampler = Sampler::new(options, 4)?;
/// let mut logits = [0.5, 1.5, 9.0, 1.5];
/// assert_eq!(sampler.sample(&mut logits)?.token, 1);
/// # Ok::<(), nybble::Error>(())
/// ```
#[derive(Debug, Clone)]
#[doc(hidden)]
pub struct Sampler {
    options: SamplingOptions,
    vocab_size: usize,
    /// Ids that are never sampled.
    excluded: Arc<[Range<u32>]>,
    /// Ids that end a completion, and the number of tokens to sample before they may be sampled.
    ends: Arc<[u32]>,
    held: u32,
    /// Ids that end a completion, where they are never sampled.
    ignored: Arc<[u32]>,
    random: SplitMix64,
    history: History,
    repetitions: Option<Repetitions>,
    /// The largest surprise that Mirostat allows, in bits.
    most_surprise: f64,
    /// The original values of logits that bias and penalties changed, in the order of the changes.
    changed: Vec<(u32, f32)>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler with an empty history.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when an option is out of its range, `logit_bias` names a token that is not in the
    /// vocabulary, or `vocab_size` is 0 or over [`MAX_VOCAB_SIZE`].
    pub fn new(options: SamplingOptions, vocab_size: usize) -> Result<Self> {
        options.validate()?;
        if !(1..=MAX_VOCAB_SIZE).contains(&vocab_size) {
            return Err(Error::argument("vocab_size", vocab_size, format!("from 1 to {MAX_VOCAB_SIZE}")));
        }
        if let Some((token, _)) = options.logit_bias.iter().find(|(token, _)| *token as usize >= vocab_size) {
            let expected = format!("tokens below {vocab_size}, the size of the vocabulary");
            return Err(Error::argument("logit_bias", format!("token {token}"), expected));
        }
        // The keys of a hasher come from the system's random numbers.
        let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let history = History::new(options.penalty_window as usize);
        let (changed, candidates) = (Vec::new(), Candidates::default());
        let (random, held) = (SplitMix64(seed), options.min_tokens);
        let (excluded, ends, ignored) = (Arc::default(), Arc::default(), Arc::default());
        let repetitions = Repetitions::new(&options);
        let most_surprise = 2.0 * f64::from(options.mirostat_tau);
        Ok(Sampler {
            options,
            vocab_size,
            excluded,
            ends,
            held,
            ignored,
            random,
            history,
            repetitions,
            most_surprise,
            changed,
            candidates,
        })
    }

    /// Never samples ids in these ranges: rows of the output matrix without a token in the vocabulary, which some models have
    /// so that the matrix has a round size. They have no share of the log-probabilities either.
    pub fn exclude(&mut self, ids: impl Into<Arc<[Range<u32>]>>) {
        self.excluded = ids.into();
    }

    /// Sets the tokens that end a completion, which `min_tokens` concerns.
    pub fn set_ends(&mut self, ends: impl Into<Arc<[u32]>>) {
        self.ends = ends.into();
    }

    /// Sets the tokens that end a completion and are never sampled, unless nothing else is allowed.
    pub fn ignore(&mut self, ends: impl Into<Arc<[u32]>>) {
        self.ignored = ends.into();
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Adds a token to the history: first those of the prompt, then every sampled token.
    pub fn accept(&mut self, token: u32) {
        if self.options.penalizes() {
            self.history.push(token);
        }
        if let Some(repetitions) = &mut self.repetitions {
            repetitions.push(token);
        }
    }

    /// Samples a token from logits `(vocab_size)`. It changes them temporarily and restores them; those of excluded ids are
    /// minus infinity afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::BadLogits`] when a logit is NaN or plus infinity, or when all are minus infinity, with `logit_bias` applied.
    /// [`Error::InvalidArgument`] when the number of logits is not `vocab_size`.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        self.sample_allowed(logits, None, None)
    }

    /// Samples like [`sample`](Sampler::sample), but only tokens in `allowed`. The logits of other tokens are minus infinity
    /// afterwards. Log-probabilities still count all tokens.
    ///
    /// # Errors
    ///
    /// Those of [`sample`](Sampler::sample).
    #[cfg(feature = "grammar")]
    pub fn sample_among(&mut self, logits: &mut [f32], allowed: Option<&Allowed>) -> Result<Sampled> {
        self.sample_allowed(logits, allowed, None)
    }

    /// Samples among all tokens, or only those in `allowed`, after `process` has changed the logits. What it changes stays
    /// changed.
    pub(super) fn sample_allowed(
        &mut self,
        logits: &mut [f32],
        allowed: Option<&Allowed>,
        process: Option<Process<'_>>,
    ) -> Result<Sampled> {
        if logits.len() != self.vocab_size {
            return Err(Error::argument("logits", logits.len(), format!("{} of them", self.vocab_size)));
        }
        self.mask_excluded(logits);
        let largest = largest(logits)?;
        let normalizer = self.options.logprobs.map(|_| log_sum_exp(logits, largest));
        let logprob = |logit: f32| Some((f64::from(logit) - normalizer?) as f32);
        let mut top = Vec::new();
        if let Some(count @ 1..) = self.options.logprobs {
            self.candidates.keep_largest(logits, count as usize);
            top.extend(self.candidates.sorted().filter_map(|(id, logit)| Some((id, logprob(logit)?))));
        }
        // Log-probabilities are those before it.
        let mut before = None;
        let was_processed = process.is_some();
        if let Some(process) = process {
            before = normalizer.map(|_| logits.to_vec());
            process(logits)?;
            self.mask_excluded(logits);
        }
        if let Some(allowed) = allowed {
            allowed.apply(logits);
        }
        self.adjust(logits);
        self.hold_ends(logits);
        let chosen = self.choose(logits);
        // In reverse order: a logit may have been changed twice.
        while let Some((id, logit)) = self.changed.pop() {
            logits[id as usize] = logit;
        }
        let token = match chosen {
            Err(Error::BadLogits) if was_processed => {
                let found = "a processor that leaves no token which the constraint and logit_bias allow";
                return Err(Error::argument("logits_processor", found, "at least one such token"));
            }
            chosen => chosen?,
        };
        self.held = self.held.saturating_sub(1);
        let logit = before.as_deref().unwrap_or(logits)[token as usize];
        Ok(Sampled { token, logprob: logprob(logit), top, beam_score: None })
    }

    /// The `count` best tokens for the next step of a beam after `sampled` tokens, best first: each with its log-probability after
    /// bias, by which beams compete, and before it.
    pub(super) fn best(&mut self, logits: &mut [f32], count: usize, sampled: usize) -> Result<Vec<(u32, f64, f32)>> {
        self.mask_excluded(logits);
        let largest = largest(logits)?;
        let normalizer = log_sum_exp(logits, largest);
        self.held = self.options.min_tokens.saturating_sub(u32::try_from(sampled).unwrap_or(u32::MAX));
        self.adjust(logits);
        self.hold_ends(logits);
        self.candidates.keep_largest(logits, count);
        let changed = std::mem::take(&mut self.changed);
        let before = |id, logit| changed.iter().find(|(other, _)| *other == id).map_or(logit, |(_, before)| *before);
        let logprob = |logit| f64::from(logit) - normalizer;
        let best = self.candidates.sorted();
        Ok(best.map(|(id, logit)| (id, logprob(logit), logprob(before(id, logit)) as f32)).collect())
    }

    /// Step 0: rows of the output matrix without a token.
    fn mask_excluded(&self, logits: &mut [f32]) {
        for ids in self.excluded.iter() {
            let end = logits.len().min(ids.end as usize);
            logits[end.min(ids.start as usize)..end].fill(f32::NEG_INFINITY);
        }
    }

    /// Steps 1 and 2: bias and penalties.
    fn adjust(&mut self, logits: &mut [f32]) {
        let changed = &mut self.changed;
        let mut change = |id: u32, new: &dyn Fn(f32) -> f32| {
            if let Some(logit) = logits.get_mut(id as usize) {
                changed.push((id, *logit));
                // Capped at the largest finite number, so that differences of logits stay finite.
                *logit = new(*logit).min(f32::MAX);
            }
        };
        for (id, bias) in &self.options.logit_bias {
            change(*id, &|logit| logit + bias);
        }
        let SamplingOptions { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for (id, count) in &self.history.counts {
            change(*id, &|logit| {
                let logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
                let penalty = presence_penalty + *count as f32 * frequency_penalty;
                logit.min(f32::MAX) - penalty.clamp(f32::MIN, f32::MAX)
            });
        }
        if let Some(repetitions) = &mut self.repetitions {
            repetitions.penalties().iter().for_each(|(id, penalty)| change(*id, &|logit| logit - penalty));
        }
    }

    /// The end of step 2: no token that ends the completion, unless there is no other.
    fn hold_ends(&mut self, logits: &mut [f32]) {
        let held: &[u32] = if self.held > 0 { &self.ends } else { &[] };
        if held.is_empty() && self.ignored.is_empty() {
            return;
        }
        let before = self.changed.len();
        for id in held.iter().chain(self.ignored.iter()) {
            if let Some(logit) = logits.get_mut(*id as usize) {
                self.changed.push((*id, *logit));
                *logit = f32::NEG_INFINITY;
            }
        }
        if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            for (id, logit) in self.changed.drain(before..).rev() {
                logits[id as usize] = logit;
            }
        }
    }

    /// Steps 3 and 4, on logits without NaN and plus infinity.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let options = &self.options;
        if options.temperature == 0.0 {
            let largest = largest(logits)?;
            let first = logits.iter().position(|logit| *logit == largest);
            return first.map(|id| id as u32).ok_or(Error::BadLogits);
        }
        let candidates = &mut self.candidates;
        if options.mirostat > 0 {
            candidates.keep_largest(logits, logits.len());
            candidates.keep_expected(self.most_surprise, options.temperature);
            let (token, surprise) =
                candidates.draw(options.temperature, |total| self.random.below(total)).ok_or(Error::BadLogits)?;
            self.most_surprise -= f64::from(options.mirostat_eta) * (surprise - f64::from(options.mirostat_tau));
            return Ok(token);
        }
        let top_k = if options.top_k == 0 { logits.len() } else { options.top_k as usize };
        candidates.keep_largest(logits, top_k);
        if options.top_n_sigma > 0.0 {
            let largest = largest(logits)?;
            candidates.keep_from(f64::from(largest) - f64::from(options.top_n_sigma) * deviation(logits));
        }
        candidates.keep_typical(options.typical_p);
        candidates.keep_top(options.top_p);
        candidates.keep_likely(options.min_p);
        if options.xtc_probability > 0.0 && self.random.fraction() < f64::from(options.xtc_probability) {
            candidates.drop_top(options.xtc_threshold);
        }
        let temperature = match options.dynatemp_range {
            0.0 => options.temperature,
            range => {
                let lowest = (options.temperature - range).max(0.0);
                let share = power(candidates.evenness(), options.dynatemp_exponent);
                // Not 0, by which nothing can be divided.
                (lowest + (options.temperature + range - lowest) * share).max(LOWEST_TEMPERATURE)
            }
        };
        let drawn = candidates.draw(temperature, |total| self.random.below(total));
        drawn.map(|(token, _)| token).ok_or(Error::BadLogits)
    }
}

/// The lowest dynamic temperature.
const LOWEST_TEMPERATURE: f32 = 1e-6;

/// The tokens that the penalties use, and the count of each.
#[derive(Debug, Clone)]
struct History {
    /// 0: all.
    window: usize,
    /// The last `window` tokens, oldest first. Empty with window 0, which never drops a token.
    recent: VecDeque<u32>,
    counts: HashMap<u32, u32>,
}

impl History {
    fn new(window: usize) -> Self {
        History { window, recent: VecDeque::new(), counts: HashMap::new() }
    }

    fn push(&mut self, token: u32) {
        let count = self.counts.entry(token).or_default();
        *count = count.saturating_add(1);
        if self.window == 0 {
            return;
        }
        self.recent.push_back(token);
        if self.recent.len() > self.window
            && let Some(oldest) = self.recent.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
    }
}

/// SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with the constants
/// of <https://prng.di.unimi.it/splitmix64.c>.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A random number in [0, 1).
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A random number below `end`, which is not 0. Uniform up to one part in `2^64 / end`.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_matches_the_published_numbers() {
        let mut random = SplitMix64(1_234_567);
        let numbers = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next(), random.next(), random.next()], numbers);
    }

    #[test]
    fn the_history_holds_only_the_window() {
        let mut history = History::new(3);
        for token in [7, 7, 8, 9, 7, 9] {
            history.push(token);
        }
        assert_eq!(history.counts, HashMap::from([(9, 2), (7, 1)]));
        assert_eq!(history.recent, [9, 7, 9]);
        let mut all = History::new(0);
        for token in [7, 7, 8, 9, 7, 9] {
            all.push(token);
        }
        assert_eq!(all.counts, HashMap::from([(7, 3), (8, 1), (9, 2)]));
    }
}
