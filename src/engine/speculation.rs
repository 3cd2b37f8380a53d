//! Guessing tokens ahead, so that one step confirms several.
//!
//! A guess is fed with the token that is due; what the sequence itself samples after each of them decides how many were
//! right, and the rest is forgotten. So the text is, bit for bit, the one that comes without. Guesses come from the text
//! itself ("prompt lookup": what followed the last time that these tokens stood here) or from a smaller model (Leviathan,
//! Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, with the sampler's own
//! random number in the place of their correction, which keeps the text that of the seed). Of a text that is held to a form,
//! what leaves no choice is guessed first, such as the keys of a JSON object: there, too, the model decides how to spell it.

use crate::error::{Error, Result};

/// Tokens that are guessed at a time.
pub(super) const MOST: usize = 8;
/// Rows of a step that may be guesses, over all sequences.
pub(super) const MOST_ROWS: usize = 48;
/// With [`Speculation::Auto`], sequences and guesses together: more rows no longer come for little.
pub(super) const FEW_ROWS: usize = 12;
/// Tokens that must agree with an earlier place for what followed there to be a guess: the most first, down to the fewest.
const AGREEING: [usize; 2] = [3, 2];
/// So far back it is looked for such a place.
const WINDOW: usize = 1 << 14;
/// With [`Speculation::Auto`], guessing pauses when a smaller share is right, for so many steps, then it gets another chance.
const WORTH: f32 = 0.2;
const PAUSE: u32 = 32;

/// Whether tokens are guessed ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    #[default]
    Off,
    /// Always.
    On,
    /// While enough guesses turn out right, and few sequences run.
    Auto,
}

impl Speculation {
    /// The choice called `off`, `on` or `auto`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<Speculation> {
        Ok(match name {
            "off" => Speculation::Off,
            "on" => Speculation::On,
            "auto" => Speculation::Auto,
            _ => return Err(Error::argument("speculation", format_args!("{name:?}"), "off, on or auto")),
        })
    }
}

/// Appends to `guesses` what followed the last time that the end of `tokens` stood in them: `count` tokens, or none. Where that
/// reaches the end, it goes on with the guesses, as a text that repeats itself does.
pub(super) fn look_up(tokens: &[u32], count: usize, guesses: &mut Vec<u32>) {
    let tokens = &tokens[tokens.len().saturating_sub(WINDOW)..];
    for agreeing in AGREEING {
        let Some(end) = tokens.len().checked_sub(agreeing) else { continue };
        let (before, last) = (&tokens[..tokens.len().saturating_sub(1)], &tokens[end..]);
        if let Some(at) = before.windows(agreeing).rposition(|window| window == last) {
            guesses.extend(tokens[at + agreeing..].iter().cycle().take(count));
            return;
        }
    }
}

/// How well guesses for one sequence have done.
#[derive(Debug, Clone)]
pub(super) struct Acceptance {
    /// The share of late that was right.
    rate: f32,
    /// Steps without guesses that are left.
    pause: u32,
}

impl Default for Acceptance {
    fn default() -> Acceptance {
        Acceptance { rate: 1.0, pause: 0 }
    }
}

impl Acceptance {
    /// How many tokens to guess at this step.
    pub(super) fn guesses(&mut self, speculation: Speculation) -> usize {
        match speculation {
            Speculation::Off => 0,
            Speculation::On => MOST,
            Speculation::Auto if self.pause > 0 => {
                self.pause -= 1;
                0
            }
            Speculation::Auto => ((self.rate * MOST as f32).ceil() as usize).clamp(1, MOST),
        }
    }

    /// Notes how many of the guesses were right.
    pub(super) fn observe(&mut self, guessed: usize, right: usize) {
        self.rate += 0.25 * (right as f32 / guessed.max(1) as f32 - self.rate);
        if self.rate < WORTH {
            (self.rate, self.pause) = (2.0 * WORTH, PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_last_time_is_the_guess() {
        let guesses = |tokens: &[u32], count| {
            let mut guesses = Vec::new();
            look_up(tokens, count, &mut guesses);
            guesses
        };
        assert_eq!(guesses(&[1, 2, 3, 4, 5, 1, 2, 3], 3), [4, 5, 1]);
        assert_eq!(guesses(&[1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3], 2), [5, 6], "the last of several places");
        assert_eq!(guesses(&[9, 2, 3, 4, 5, 1, 2, 3], 2), [4, 5], "two tokens agree where no three do");
        assert_eq!(guesses(&[1, 2, 1, 2, 1], 4), [2, 1, 2, 1], "a text that repeats itself goes on");
        for nothing in [&[1, 2, 3, 4, 5][..], &[1, 2], &[1], &[]] {
            assert_eq!(guesses(nothing, 4), [0u32; 0], "{nothing:?}");
        }
    }

    #[test]
    fn guessing_pauses_when_it_is_mostly_wrong_and_comes_back() {
        let mut acceptance = Acceptance::default();
        assert_eq!(acceptance.guesses(Speculation::Auto), MOST);
        let mut steps = 0;
        while acceptance.pause == 0 {
            let guessed = acceptance.guesses(Speculation::Auto);
            acceptance.observe(guessed, 0);
            steps += 1;
        }
        assert!(steps < 10);
        for _ in 0..PAUSE {
            assert_eq!(acceptance.guesses(Speculation::Auto), 0);
        }
        assert!(acceptance.guesses(Speculation::Auto) > 0);
        assert_eq!(acceptance.guesses(Speculation::On), MOST);
        assert_eq!(acceptance.guesses(Speculation::Off), 0);
    }

    #[test]
    fn guesses_grow_with_what_is_right() {
        let mut acceptance = Acceptance { rate: 0.3, pause: 0 };
        let before = acceptance.guesses(Speculation::Auto);
        acceptance.observe(before, before);
        assert!(acceptance.guesses(Speculation::Auto) > before);
    }
}
