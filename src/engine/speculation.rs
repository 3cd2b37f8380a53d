//! Speculative decoding: one step checks several draft tokens.
//!
//! A step computes draft tokens after the token that is due. The sequence then samples after each of them: drafts that
//! equal the sampled token are accepted, the others are discarded. The output is therefore bit-identical to the output
//! without speculation. Drafts come from one of these sources:
//!
//! - the sequence itself ("prompt lookup decoding"): the tokens that followed the last time the same n-gram occurred;
//! - a smaller model (Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding",
//!   arXiv:2211.17192). The sampler's own random number replaces the paper's correction, so the output stays that of the
//!   seed;
//! - the model's own head for multi-token prediction, in files that have one (DeepSeek-AI, "DeepSeek-V3 Technical Report",
//!   arXiv:2412.19437);
//! - the constraint of the sequence, where only one continuation is allowed, such as the keys of a JSON object.

use crate::error::{Error, Result};

/// Largest number of draft tokens of one sequence in a step.
pub(super) const MAX_DRAFT: usize = 8;
/// Largest number of tokens that a head drafts for one sequence in a step, unless the options have another.
pub(super) const MAX_HEAD_DRAFT: usize = 4;
/// Largest number of draft tokens of all sequences in a step.
pub(super) const MAX_DRAFT_ROWS: usize = 48;
/// With [`Speculation::Auto`], the largest number of rows in a step, draft tokens included. Further rows are not cheap.
pub(super) const MAX_AUTO_ROWS: usize = 12;
/// Lengths of the n-grams to look up, longest first.
const NGRAMS: [usize; 2] = [3, 2];
/// Number of tokens to search for an n-gram, from the end.
const WINDOW: usize = 1 << 14;
/// With [`Speculation::Auto`], speculation pauses for [`PAUSE`] steps when a smaller share of drafts is accepted.
const MIN_ACCEPTANCE: f32 = 0.2;
const PAUSE: u32 = 32;

/// Whether to use draft tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Speculation {
    /// Never.
    #[default]
    Off,
    /// Always.
    On,
    /// While enough drafts are accepted and few sequences run. Of the model's own head and the sequences themselves, drafts come
    /// from what promises more accepted ones.
    Auto,
    /// Always, from the model's own head for multi-token prediction.
    Mtp,
}

impl Speculation {
    /// The choice called `off`, `on`, `auto` or `mtp`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<Speculation> {
        Ok(match name {
            "off" => Speculation::Off,
            "on" => Speculation::On,
            "auto" => Speculation::Auto,
            "mtp" => Speculation::Mtp,
            _ => return Err(Error::argument("speculation", format_args!("{name:?}"), "off, on, auto or mtp")),
        })
    }
}

/// Returns `count` draft tokens: those that followed the last earlier occurrence of the n-gram at the end of `tokens`, or
/// none without such an occurrence. If `tokens` ends before `count`, the draft repeats from where it began.
pub(super) fn ngram_lookup(tokens: &[u32], count: usize) -> Vec<u32> {
    let tokens = &tokens[tokens.len().saturating_sub(WINDOW)..];
    for length in NGRAMS {
        let Some(start) = tokens.len().checked_sub(length) else { continue };
        let (earlier, ngram) = (&tokens[..tokens.len().saturating_sub(1)], &tokens[start..]);
        if let Some(at) = earlier.windows(length).rposition(|window| window == ngram) {
            return tokens[at + length..].iter().copied().cycle().take(count).collect();
        }
    }
    Vec::new()
}

/// The share of a sequence's draft tokens that was accepted.
#[derive(Debug, Clone)]
pub(super) struct Acceptance {
    /// Moving average.
    rate: f32,
    /// Steps left of a pause.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Acceptance {
        Acceptance { rate: 1.0, pause: 0 }
    }
}

impl Acceptance {
    /// Number of tokens to draft in this step, up to `most`, at least 1.
    pub(super) fn draft_len(&mut self, speculation: Speculation, most: usize) -> usize {
        match speculation {
            Speculation::Off => 0,
            Speculation::On => most,
            Speculation::Auto if self.pause > 0 => {
                self.pause -= 1;
                0
            }
            Speculation::Auto | Speculation::Mtp => ((self.rate * most as f32).ceil() as usize).clamp(1, most),
        }
    }

    /// How many of `count` draft tokens are likely to be accepted.
    pub(super) fn expected(&self, count: usize) -> f32 {
        self.rate * count as f32
    }

    /// Records how many of the drafted tokens were accepted.
    pub(super) fn observe(&mut self, drafted: usize, accepted: usize) {
        self.rate += 0.25 * (accepted as f32 / drafted.max(1) as f32 - self.rate);
        if self.rate < MIN_ACCEPTANCE {
            (self.rate, self.pause) = (2.0 * MIN_ACCEPTANCE, PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_what_followed_the_last_occurrence_of_an_ngram() {
        assert_eq!(ngram_lookup(&[1, 2, 3, 4, 5, 1, 2, 3], 3), [4, 5, 1]);
        assert_eq!(ngram_lookup(&[1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3], 2), [5, 6], "the last of several");
        assert_eq!(ngram_lookup(&[9, 2, 3, 4, 5, 1, 2, 3], 2), [4, 5], "two tokens match where three do not");
        assert_eq!(ngram_lookup(&[1, 2, 1, 2, 1], 4), [2, 1, 2, 1], "a loop continues");
        for nothing in [&[1, 2, 3, 4, 5][..], &[1, 2], &[1], &[]] {
            assert_eq!(ngram_lookup(nothing, 4), [0u32; 0], "{nothing:?}");
        }
    }

    #[test]
    fn speculation_pauses_when_few_drafts_are_accepted_and_resumes() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.draft_len(Speculation::Auto, MAX_DRAFT), MAX_DRAFT);
        let mut steps = 0;
        while acceptance.pause == 0 {
            let drafted = acceptance.draft_len(Speculation::Auto, MAX_DRAFT);
            acceptance.observe(drafted, 0);
            steps += 1;
        }
        assert!(steps < 10);
        for _ in 0..PAUSE {
            assert_eq!(acceptance.draft_len(Speculation::Auto, MAX_DRAFT), 0);
        }
        assert!(acceptance.draft_len(Speculation::Auto, MAX_DRAFT) > 0);
        assert_eq!(acceptance.draft_len(Speculation::On, MAX_DRAFT), MAX_DRAFT);
        assert_eq!(acceptance.draft_len(Speculation::Off, MAX_DRAFT), 0);
    }

    #[test]
    fn drafts_get_longer_as_they_are_accepted() {
        let mut acceptance = Acceptance { rate: 0.3, pause: 0 };
        let before = acceptance.draft_len(Speculation::Auto, MAX_DRAFT);
        acceptance.observe(before, before);
        assert!(acceptance.draft_len(Speculation::Auto, MAX_DRAFT) > before);
    }
}
