//! Options of a sampler.

use crate::{Error, Result};

/// How to sample tokens. The module [`sampler`](super) describes the order in which options apply.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SamplingOptions {
    /// Randomness: 0 always takes the most likely token, 1 samples the model's own distribution. At least 0.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens. 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens that together reach this probability. In (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the highest probability. In [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Keep the most typical tokens that together reach this probability. In (0, 1]; 1 keeps all.
    pub typical_p: f32,
    /// Keep tokens with a logit at most this many standard deviations below the largest. At least 0; 0 keeps all.
    pub top_n_sigma: f32,
    /// Probability with which XTC removes the most likely tokens. In [0, 1]; 0 turns it off.
    pub xtc_probability: f32,
    /// Probability from which on XTC counts a token as likely. In [0, 1]; over 0.5 changes nothing.
    pub xtc_threshold: f32,
    /// How far the entropy of the remaining tokens changes the temperature, up and down. At least 0; 0 leaves it as it is.
    pub dynatemp_range: f32,
    /// The power of the entropy in the dynamic temperature. At least 0.
    pub dynatemp_exponent: f32,
    /// 2 keeps the surprise of the tokens near `mirostat_tau`, instead of all other filters; 0 turns it off. Basu et al.,
    /// "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", arXiv:2007.14966; version 1 is not supported.
    pub mirostat: u32,
    /// The surprise that Mirostat aims for, in bits. At least 0.
    pub mirostat_tau: f32,
    /// How fast Mirostat's limit of the surprise follows its error. At least 0.
    pub mirostat_eta: f32,
    /// Size of the DRY penalties for tokens that would continue a repetition. Over `n` tokens, it is
    /// `dry_multiplier * dry_base^(n - dry_allowed_length)`. At least 0; 0 turns them off. By p-e-w,
    /// <https://github.com/oobabooga/text-generation-webui/pull/5677>; details as in llama.cpp.
    pub dry_multiplier: f32,
    /// How fast DRY penalties grow with the length of the repetition. At least 1.
    pub dry_base: f32,
    /// Length of a repetition, in tokens, from which on DRY penalizes its next token.
    pub dry_allowed_length: u32,
    /// Number of latest tokens, prompt included, in which DRY finds repetitions. 0: all.
    pub dry_window: u32,
    /// Token sequences that end a repetition for DRY: what is before the last of them does not count. None is empty. The token of a
    /// sequence of one is not penalized itself.
    pub dry_sequence_breakers: Vec<Vec<u32>>,
    /// Divides the positive logits of tokens in the history and multiplies the negative ones. Over 0; 1 changes
    /// nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the history.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the history, once per occurrence.
    pub frequency_penalty: f32,
    /// Number of latest tokens, prompt included, in the history that the penalties use. 0: all.
    pub penalty_window: u32,
    /// Added to the logits of single tokens. Minus infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Number of tokens to sample before those that end a completion may be sampled. They may come earlier where a constraint
    /// allows nothing else.
    pub min_tokens: u32,
    /// Never sample the tokens that end a completion, unless a constraint allows nothing else.
    pub ignore_eos: bool,
    /// Search for the most likely continuation with this many beams instead of sampling, as Hugging Face transformers do. 1
    /// samples; at most 256. Temperature, filters and the seed have no effect on a search.
    pub num_beams: u32,
    /// A continuation of `n` tokens has the score `log-probability / n^length_penalty`. Over 0 favors long continuations, below 0
    /// short ones; -50 to 50.
    pub length_penalty: f32,
    /// When a beam search ends.
    pub early_stopping: EarlyStopping,
    /// Seed of the random numbers. `None` takes a new one each time.
    pub seed: Option<u64>,
    /// Report the log-probability of the chosen token and of this many of the most likely ones. `None` reports none and
    /// saves a pass over the vocabulary.
    pub logprobs: Option<u32>,
}

impl Default for SamplingOptions {
    /// The defaults of llama.cpp: temperature 0.8, `top_k` 40, `top_p` 0.95, `min_p` 0.05.
    fn default() -> Self {
        SamplingOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_window: 0,
            dry_sequence_breakers: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 64,
            logit_bias: Vec::new(),
            min_tokens: 0,
            ignore_eos: false,
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Heuristic,
            seed: None,
            logprobs: None,
        }
    }
}

setters!(SamplingOptions {
    with_temperature(temperature: f32),
    with_top_k(top_k: u32),
    with_top_p(top_p: f32),
    with_min_p(min_p: f32),
    with_typical_p(typical_p: f32),
    with_top_n_sigma(top_n_sigma: f32),
    with_xtc_probability(xtc_probability: f32),
    with_xtc_threshold(xtc_threshold: f32),
    with_dynatemp_range(dynatemp_range: f32),
    with_dynatemp_exponent(dynatemp_exponent: f32),
    with_mirostat(mirostat: u32),
    with_mirostat_tau(mirostat_tau: f32),
    with_mirostat_eta(mirostat_eta: f32),
    with_dry_multiplier(dry_multiplier: f32),
    with_dry_base(dry_base: f32),
    with_dry_allowed_length(dry_allowed_length: u32),
    with_dry_window(dry_window: u32),
    with_dry_sequence_breakers(dry_sequence_breakers: impl Into<Vec<Vec<u32>>>),
    with_repetition_penalty(repetition_penalty: f32),
    with_presence_penalty(presence_penalty: f32),
    with_frequency_penalty(frequency_penalty: f32),
    with_penalty_window(penalty_window: u32),
    with_logit_bias(logit_bias: impl Into<Vec<(u32, f32)>>),
    with_min_tokens(min_tokens: u32),
    with_ignore_eos(ignore_eos: bool),
    with_num_beams(num_beams: u32),
    with_length_penalty(length_penalty: f32),
    with_early_stopping(early_stopping: EarlyStopping),
    with_seed(seed: impl Into<Option<u64>>),
    with_logprobs(logprobs: impl Into<Option<u32>>),
});

impl SamplingOptions {
    /// Options that always take the most likely token.
    pub fn greedy() -> Self {
        SamplingOptions { temperature: 0.0, ..SamplingOptions::default() }
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] with the name of the first option that is out of its range or not a number.
    pub fn validate(&self) -> Result<()> {
        // Comparisons with NaN are false, so every condition here rejects NaN.
        let check = |name, value: f32, fits: bool, expected| match fits {
            true => Ok(()),
            false => Err(Error::argument(name, value, expected)),
        };
        let finite = f32::is_finite;
        check("temperature", self.temperature, finite(self.temperature) && self.temperature >= 0.0, "0 or more")?;
        for (name, p) in [("top_p", self.top_p), ("typical_p", self.typical_p)] {
            check(name, p, p > 0.0 && p <= 1.0, "more than 0 and at most 1")?;
        }
        let shares =
            [("min_p", self.min_p), ("xtc_probability", self.xtc_probability), ("xtc_threshold", self.xtc_threshold)];
        for (name, share) in shares {
            check(name, share, (0.0..=1.0).contains(&share), "from 0 to 1")?;
        }
        let sizes = [
            ("top_n_sigma", self.top_n_sigma),
            ("dynatemp_range", self.dynatemp_range),
            ("dynatemp_exponent", self.dynatemp_exponent),
            ("mirostat_tau", self.mirostat_tau),
            ("mirostat_eta", self.mirostat_eta),
            ("dry_multiplier", self.dry_multiplier),
        ];
        for (name, size) in sizes {
            check(name, size, finite(size) && size >= 0.0, "a finite number, 0 or more")?;
        }
        if ![0, 2].contains(&self.mirostat) {
            return Err(Error::argument("mirostat", self.mirostat, "0 or 2"));
        }
        check("dry_base", self.dry_base, finite(self.dry_base) && self.dry_base >= 1.0, "1 or more")?;
        if self.dry_sequence_breakers.iter().any(Vec::is_empty) {
            return Err(Error::argument("dry_sequence_breakers", "one without tokens", "at least one token in each"));
        }
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
        self.check_beams()
    }

    /// Checks the beam search, and that no option is set which it does not follow.
    fn check_beams(&self) -> Result<()> {
        if !(1..=MAX_BEAMS).contains(&self.num_beams) {
            return Err(Error::argument("num_beams", self.num_beams, format_args!("from 1 to {MAX_BEAMS}")));
        }
        if !(-50.0..=50.0).contains(&self.length_penalty) {
            return Err(Error::argument("length_penalty", self.length_penalty, "from -50 to 50"));
        }
        if self.num_beams == 1 {
            return Ok(());
        }
        let refuse = |name, is_set| match is_set {
            true => Err(Error::argument(name, "a value with num_beams", "none: a beam search does not use it")),
            false => Ok(()),
        };
        refuse("repetition_penalty", self.repetition_penalty != 1.0)?;
        refuse("presence_penalty", self.presence_penalty != 0.0)?;
        refuse("frequency_penalty", self.frequency_penalty != 0.0)?;
        refuse("dry_multiplier", self.dry_multiplier > 0.0)?;
        refuse("mirostat", self.mirostat > 0)?;
        refuse("logprobs", self.logprobs.is_some_and(|count| count > 0))
    }

    pub(super) fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Largest number of beams of a search.
const MAX_BEAMS: u32 = 256;

/// When a beam search ends, once it has as many ended continuations as beams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EarlyStopping {
    /// When the best open one would not enter if it ended now: `false` in transformers.
    #[default]
    Heuristic,
    /// At once: `true` in transformers.
    Always,
    /// When no open one can enter any more: `"never"` in transformers.
    Never,
}
