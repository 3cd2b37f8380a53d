//! DRY: penalties for tokens that would continue a repetition.

use std::collections::HashMap;
use std::sync::Arc;

use super::options::SamplingOptions;

/// The history of a sequence, and the tokens that would continue a repetition in it.
#[derive(Debug, Clone)]
pub(super) struct Repetitions {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    window: usize,
    /// Token sequences that end a repetition: what follows their first tokens.
    breakers: Arc<HashMap<u32, Vec<Box<[u32]>>>>,
    /// All tokens of the history, oldest first.
    tokens: Vec<u32>,
    /// Lengths of repetitions. Kept for its memory.
    lengths: Vec<usize>,
    /// Tokens with their penalties, by id.
    penalties: Vec<(u32, f32)>,
}

impl Repetitions {
    /// An empty history; `None` where the options have no such penalties.
    pub(super) fn new(options: &SamplingOptions) -> Option<Repetitions> {
        (options.dry_multiplier > 0.0).then(|| Repetitions {
            multiplier: options.dry_multiplier,
            base: options.dry_base,
            allowed_length: options.dry_allowed_length as usize,
            window: if options.dry_window == 0 { usize::MAX } else { options.dry_window as usize },
            breakers: Arc::new(by_first(&options.dry_sequence_breakers)),
            tokens: Vec::new(),
            lengths: Vec::new(),
            penalties: Vec::new(),
        })
    }

    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    /// The tokens that would continue a repetition, with what to subtract from their logits.
    pub(super) fn penalties(&mut self) -> &[(u32, f32)] {
        self.penalties.clear();
        let recent = &self.tokens[self.tokens.len().saturating_sub(self.window)..];
        let longest = unbroken(recent, &self.breakers);
        let allowed = self.allowed_length;
        if longest < allowed {
            return &self.penalties;
        }
        suffixes(recent, &mut self.lengths);
        let mut lengths: HashMap<u32, usize> = HashMap::new();
        // The suffix of `length` tokens occurs `back` tokens earlier, too, and there `next` follows it.
        for (back, length) in self.lengths.iter().enumerate().skip(1) {
            let length = (*length).min(longest);
            if length >= allowed {
                let next = recent[recent.len() - back];
                let known = lengths.entry(next).or_default();
                *known = length.max(*known);
            }
        }
        let is_breaker =
            |token| self.breakers.get(&token).is_some_and(|tails| tails.iter().any(|tail| tail.is_empty()));
        let (multiplier, base) = (self.multiplier, self.base);
        let penalty = |length: usize| (multiplier * power(base, length - allowed)).min(f32::MAX);
        let penalized = lengths.into_iter().filter(|(token, _)| !is_breaker(*token));
        self.penalties.extend(penalized.map(|(token, length)| (token, penalty(length))));
        self.penalties.sort_unstable_by_key(|(token, _)| *token);
        &self.penalties
    }
}

/// Sequences by their first tokens. A vocabulary may have thousands of tokens that begin one.
fn by_first(breakers: &[Vec<u32>]) -> HashMap<u32, Vec<Box<[u32]>>> {
    let mut found: HashMap<u32, Vec<Box<[u32]>>> = HashMap::new();
    for (first, tail) in breakers.iter().filter_map(|breaker| breaker.split_first()) {
        found.entry(*first).or_default().push(tail.into());
    }
    found
}

/// The number of tokens after the last sequence that breaks repetitions; all of them if there is none.
fn unbroken(recent: &[u32], breakers: &HashMap<u32, Vec<Box<[u32]>>>) -> usize {
    // Of sequences that start at one token, the longest counts.
    let broken_at = |start: usize| {
        let tails = breakers.get(&recent[start])?.iter().filter(|tail| recent[start + 1..].starts_with(tail));
        tails.map(|tail| start + 1 + tail.len()).max()
    };
    let end = (0..recent.len()).rev().find_map(broken_at);
    recent.len() - end.unwrap_or(0)
}

/// Sets `lengths[back]` to the number of last tokens that also occur `back` tokens earlier, for every `back` below their number.
///
/// The Z-algorithm (Gusfield, "Algorithms on Strings, Trees, and Sequences", 1997), from the end.
fn suffixes(tokens: &[u32], lengths: &mut Vec<usize>) {
    let count = tokens.len();
    let from_end = |index: usize| tokens[count - 1 - index];
    lengths.clear();
    lengths.resize(count, 0);
    let (mut left, mut right) = (0, 0);
    for back in 1..count {
        let mut length = if back < right { lengths[back - left].min(right - back) } else { 0 };
        while back + length < count && from_end(length) == from_end(back + length) {
            length += 1;
        }
        lengths[back] = length;
        if back + length > right {
            (left, right) = (back, back + length);
        }
    }
}

/// `base^exponent` for `base >= 1`, the same on every machine. Infinite where it is too large.
fn power(base: f32, exponent: usize) -> f32 {
    let (mut result, mut square, mut left) = (1.0_f64, f64::from(base), exponent);
    while left > 0 {
        if left & 1 == 1 {
            result *= square;
        }
        (square, left) = (square * square, left >> 1);
    }
    result as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubling() -> SamplingOptions {
        SamplingOptions::default().with_dry_multiplier(1.0).with_dry_base(2.0)
    }

    fn penalties(options: SamplingOptions, tokens: &[u32]) -> Vec<(u32, f32)> {
        let mut repetitions = Repetitions::new(&options).unwrap();
        tokens.iter().for_each(|token| repetitions.push(*token));
        repetitions.penalties().to_vec()
    }

    #[test]
    fn the_penalty_grows_with_the_repetition() {
        let dry = doubling();
        assert_eq!(penalties(dry.clone(), &[1, 2, 3, 4, 1, 2]), [(3, 1.0)]);
        assert_eq!(penalties(dry.clone(), &[1, 2, 3, 4, 1, 2, 3]), [(4, 2.0)]);
        assert_eq!(penalties(dry.clone(), &[1, 2, 3, 4, 1]), []);
        // The longest repetition counts where a token would continue several.
        assert_eq!(penalties(dry.clone(), &[9, 1, 2, 3, 1, 2, 3, 9, 1, 2]), [(3, 2.0)]);
        assert_eq!(penalties(dry.with_dry_window(4), &[1, 2, 3, 4, 1, 2]), []);
    }

    #[test]
    fn breakers_end_repetitions() {
        let dry = doubling();
        let tokens = [1, 2, 7, 8, 3, 4, 5, 1, 2, 7, 8, 3, 4];
        assert_eq!(penalties(dry.clone(), &tokens), [(5, 16.0)]);
        assert_eq!(penalties(dry.clone().with_dry_sequence_breakers([vec![7]]), &tokens), [(5, 2.0)]);
        assert_eq!(penalties(dry.clone().with_dry_sequence_breakers([vec![7], vec![7, 8]]), &tokens), [(5, 1.0)]);
        assert_eq!(penalties(dry.clone().with_dry_sequence_breakers([vec![4]]), &tokens), []);
        // A breaker is not penalized itself.
        assert_eq!(penalties(dry.with_dry_sequence_breakers([vec![5]]), &tokens), []);
    }

    #[test]
    fn long_repetitions_have_finite_penalties() {
        let found = penalties(doubling().with_dry_allowed_length(0), &[6; 5000]);
        assert_eq!(found, [(6, f32::MAX)]);
    }

    #[test]
    fn lengths_are_those_of_a_naive_search() {
        let mut state = 1_u32;
        let mut lengths = Vec::new();
        for count in 0..60 {
            let tokens: Vec<u32> = (0..count)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                    state >> 16 & 1
                })
                .collect();
            suffixes(&tokens, &mut lengths);
            for back in 1..tokens.len() {
                let earlier = tokens[..tokens.len() - back].iter().rev();
                let naive = tokens.iter().rev().zip(earlier).take_while(|(a, b)| a == b).count();
                assert_eq!(lengths[back], naive, "{tokens:?} {back} tokens earlier");
            }
        }
    }
}
