//! From logits to the next token.
//!
//! The steps, in the order of llama.cpp's sampler chain:
//!
//! 0. Tokens that a [constraint](super::constraint) forbids get minus infinity.
//! 1. `logit_bias` is added to the logits.
//! 2. The penalties act on the tokens of the history: repetition divides a positive logit and multiplies a negative
//!    one, presence subtracts once, frequency subtracts once per occurrence.
//! 3. `temperature` 0 ends here with the largest logit. Otherwise the tokens are thinned out, each step seeing the
//!    probabilities (softmax) of what the one before has left, and never removing the last token:
//!    `top_k` keeps the k largest;
//!    `typical_p` keeps the tokens whose surprise (negative log-probability) is nearest to the mean surprise, the
//!    fewest that together reach the probability p (Meister et al., "Locally Typical Sampling", arXiv:2202.00666);
//!    `top_p` keeps the likeliest, the fewest that together reach p (Holtzman et al., "The Curious Case of Neural Text
//!    Degeneration", arXiv:1904.09751);
//!    `min_p` keeps those with at least p times the probability of the likeliest (Nguyen et al., "Turning Up the Heat:
//!    Min-p Sampling", arXiv:2407.01082).
//! 4. What is left is divided by `temperature`, and one number from the generator decides.
//!
//! Wherever tokens tie, the lower id goes first.
//!
//! **Same seed, same text**, on every machine and in every version: the generator and `exp` are written out here,
//! probabilities are summed as integers, and every token that is not greedy takes exactly one number.

mod candidates;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use super::constraint::Allowed;
use crate::{Error, Result};
use candidates::Candidates;

pub use candidates::MAX_VOCAB_SIZE;

/// How the next token is chosen. The module's text tells what each option does and in which order.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Spread of the choice: 0 always takes the likeliest token, 1 samples as trained. At least 0.
    pub temperature: f32,
    /// Keep only so many of the likeliest tokens. 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this probability. In (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest one. In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Keep the most typical tokens that together reach this probability. In (0, 1]; 1 keeps all.
    pub typical_p: f32,
    /// Divides the positive logits of tokens in the history and multiplies the negative ones. Over 0; 1 changes
    /// nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the history.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the history, as many times as they occur there.
    pub frequency_penalty: f32,
    /// How many of the last tokens, of prompt and text alike, are the history that the penalties look at. 0: all.
    pub penalty_window: u32,
    /// Added to the logits of single tokens. Minus infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Where the random numbers start. `None` starts somewhere else each time.
    pub seed: Option<u64>,
    /// With how many of the likeliest tokens to report log-probabilities; `Some(0)` reports that of the chosen one
    /// alone. `None` saves the work, which goes over the whole vocabulary.
    pub logprobs: Option<u32>,
}

impl Default for SamplingOptions {
    /// llama.cpp's: temperature 0.8, the 40 likeliest tokens, 0.95 of the probability, at least 0.05 of the likeliest.
    fn default() -> Self {
        SamplingOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

impl SamplingOptions {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        SamplingOptions { temperature: 0.0, ..SamplingOptions::default() }
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] with the name of the first option that is out of its range or not a number.
    pub fn validate(&self) -> Result<()> {
        // Comparisons with NaN are false, so every condition below refuses it.
        let check = |name, value: f32, fits: bool, expected| match fits {
            true => Ok(()),
            false => Err(Error::argument(name, value, expected)),
        };
        let finite = f32::is_finite;
        check("temperature", self.temperature, finite(self.temperature) && self.temperature >= 0.0, "0 or more")?;
        for (name, p) in [("top_p", self.top_p), ("typical_p", self.typical_p)] {
            check(name, p, p > 0.0 && p <= 1.0, "more than 0 and at most 1")?;
        }
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        let repetition = self.repetition_penalty;
        check("repetition_penalty", repetition, finite(repetition) && repetition > 0.0, "more than 0")?;
        check("presence_penalty", self.presence_penalty, finite(self.presence_penalty), "a finite number")?;
        check("frequency_penalty", self.frequency_penalty, finite(self.frequency_penalty), "a finite number")?;
        for (token, bias) in &self.logit_bias {
            if bias.is_nan() || *bias == f32::INFINITY {
                let found = format!("{bias} for token {token}");
                return Err(Error::argument("logit_bias", found, "a finite number or minus infinity"));
            }
        }
        Ok(())
    }

    fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// A sampled token. Log-probabilities are of the model's own distribution: the softmax of the logits as they came,
/// before bias, penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token's id.
    pub token: u32,
    /// The token's log-probability (natural logarithm), if `logprobs` asked for it.
    pub logprob: Option<f32>,
    /// The ids and log-probabilities of the likeliest tokens, likeliest first; as many as `logprobs` asked for, if
    /// there are so many that are possible at all.
    pub top: Vec<(u32, f32)>,
}

/// The choice of the next token for one sequence, with what it has to remember.
///
/// ```
/// use nybble::engine::sampler::{Sampler, SamplingOptions};
///
/// let options = SamplingOptions { logit_bias: vec![(2, f32::NEG_INFINITY)], ..SamplingOptions::greedy() };
/// let mut sampler = Sampler::new(options, 4)?;
/// let mut logits = [0.5, 1.5, 9.0, 1.5];
/// assert_eq!(sampler.sample(&mut logits)?.token, 1);
/// # Ok::<(), nybble::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    vocab_size: usize,
    random: SplitMix64,
    history: History,
    /// Logits that bias and penalties have changed, as they were, in the order of the changes.
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
        // A hasher's keys come from the system's entropy.
        let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let history = History::new(options.penalty_window as usize);
        let (changed, candidates) = (Vec::new(), Candidates::default());
        Ok(Sampler { options, vocab_size, random: SplitMix64(seed), history, changed, candidates })
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Adds a token to the history: first those of the prompt, then every one that was sampled and taken.
    pub fn accept(&mut self, token: u32) {
        if self.options.penalizes() {
            self.history.push(token);
        }
    }

    /// Chooses a token by its logits `(vocab_size)`. They serve as working space and are as before afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::BadLogits`] when a logit is NaN or plus infinity, or when all are minus infinity, be it from the start
    /// or because `logit_bias` forbids the others. [`Error::InvalidArgument`] when there are not `vocab_size` of them.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled> {
        self.sample_among(logits, None)
    }

    /// As [`sample`](Sampler::sample), among the tokens `allowed` only: the logits of others are minus infinity
    /// afterwards. Log-probabilities are still those among all tokens.
    ///
    /// # Errors
    ///
    /// Those of [`sample`](Sampler::sample).
    pub fn sample_among(&mut self, logits: &mut [f32], allowed: Option<&Allowed>) -> Result<Sampled> {
        if logits.len() != self.vocab_size {
            return Err(Error::argument("logits", logits.len(), format!("{} of them", self.vocab_size)));
        }
        let largest = largest(logits)?;
        let normalizer = self.options.logprobs.map(|_| log_sum_exp(logits, largest));
        let logprob = |logit: f32| Some((f64::from(logit) - normalizer?) as f32);
        let mut top = Vec::new();
        if let Some(count @ 1..) = self.options.logprobs {
            self.candidates.keep_largest(logits, count as usize);
            top.extend(self.candidates.sorted().filter_map(|(id, logit)| Some((id, logprob(logit)?))));
        }
        if let Some(allowed) = allowed {
            allowed.apply(logits);
        }
        self.adjust(logits);
        let chosen = self.choose(logits);
        // Backwards, since a logit may have been changed twice.
        while let Some((id, logit)) = self.changed.pop() {
            logits[id as usize] = logit;
        }
        let token = chosen?;
        Ok(Sampled { token, logprob: logprob(logits[token as usize]), top })
    }

    /// Steps 1 and 2: bias and penalties.
    fn adjust(&mut self, logits: &mut [f32]) {
        let changed = &mut self.changed;
        let mut change = |id: u32, new: &dyn Fn(f32) -> f32| {
            if let Some(logit) = logits.get_mut(id as usize) {
                changed.push((id, *logit));
                // Towards plus infinity it stops at the largest number, so that the differences below stay numbers.
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
    }

    /// Steps 3 and 4, on logits without NaN and plus infinity.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let options = &self.options;
        if options.temperature == 0.0 {
            let largest = largest(logits)?;
            let first = logits.iter().position(|logit| *logit == largest);
            return first.map(|id| id as u32).ok_or(Error::BadLogits);
        }
        let top_k = if options.top_k == 0 { logits.len() } else { options.top_k as usize };
        let candidates = &mut self.candidates;
        candidates.keep_largest(logits, top_k);
        candidates.keep_typical(options.typical_p);
        candidates.keep_top(options.top_p);
        candidates.keep_likely(options.min_p);
        candidates.draw(options.temperature, |total| self.random.below(total)).ok_or(Error::BadLogits)
    }
}

/// Loops over whole vocabularies go by so many logits at a time, each with a place of its own to sum up in, so that the
/// compiler uses vectors.
const LANES: usize = 16;

/// The largest logit. `BadLogits` when one is NaN or plus infinity or all are minus infinity.
fn largest(logits: &[f32]) -> Result<f32> {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let (rows, rest) = logits.as_chunks::<LANES>();
    let mut look = |lane: usize, logit: f32| {
        bad[lane] |= logit.is_nan() | (logit == f32::INFINITY);
        largest[lane] = if logit > largest[lane] { logit } else { largest[lane] };
    };
    rows.iter().for_each(|row| row.iter().enumerate().for_each(|(lane, logit)| look(lane, *logit)));
    rest.iter().for_each(|logit| look(0, *logit));
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if bad.contains(&true) || largest == f32::NEG_INFINITY { Err(Error::BadLogits) } else { Ok(largest) }
}

/// The logarithm of the sum of `exp` of all logits, of which `largest` is the largest.
fn log_sum_exp(logits: &[f32], largest: f32) -> f64 {
    let mut sum = 0.0;
    // In F32 only so many at a time that little is rounded off.
    for block in logits.chunks(4096) {
        let mut lanes = [0.0_f32; LANES];
        let (rows, rest) = block.as_chunks::<LANES>();
        for row in rows {
            for (lane, logit) in lanes.iter_mut().zip(row) {
                *lane += exp(logit - largest);
            }
        }
        sum += lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>();
        sum += rest.iter().map(|logit| f64::from(exp(logit - largest))).sum::<f64>();
    }
    sum.ln() + f64::from(largest)
}

/// `exp(x)` for `x <= 0`, within 2 units in the last place; 0 below -87.
///
/// Cephes' `expf`: `x = n ln 2 + r` with ln 2 in two parts, a polynomial in `r`, and `n` put into the exponent. Without
/// fused multiply-adds, so that plain builds turn it into vectors and all builds get the same bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { (p * (r * r) + r + 1.0) * power }
}

/// The tokens that the penalties look at, and how often each is among them.
#[derive(Debug, Clone)]
struct History {
    /// 0: all.
    window: usize,
    /// The last `window` tokens, oldest first. Empty when all are counted, since then none is ever dropped.
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

    /// A number below `end`, which is not 0: each as likely as the others but for one part in `2^64 / end`.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_numbers() {
        let mut random = SplitMix64(1_234_567);
        let numbers = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([random.next(), random.next(), random.next()], numbers);
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = 0.0_f32;
        while x > -87.0 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON), "exp({x}) = {exact}, not {ours}");
            x -= 0.000_37 + x.abs() * 1e-6;
        }
        assert_eq!([exp(0.0), exp(-0.0), exp(-87.1), exp(f32::MIN), exp(f32::NEG_INFINITY)], [1.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn only_the_window_is_remembered() {
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
