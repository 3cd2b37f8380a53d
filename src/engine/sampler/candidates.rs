//! The tokens that the filters have kept so far.

use std::f64::consts::LOG2_E;

use super::math::{LANES, exp, ln};

/// The mass of the most likely token. Rounding of other masses is negligible, and the sum over a vocabulary fits into 64
/// bits.
const UNIT: f32 = (1_u64 << 40) as f32;

/// Largest size of a vocabulary in tokens. (The largest ones known have about 2^18.)
#[doc(hidden)]
pub const MAX_VOCAB_SIZE: usize = 1 << 23;

/// A token that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// The sort key, smallest first: a rank in the high half and the id in the low half, so that the lower id wins a tie.
    key: u64,
    /// Finite.
    logit: f32,
    /// Proportional to the probability, and 1 for the most likely candidate. Set by `weigh`.
    weight: f32,
}

impl Candidate {
    fn new(id: u32, logit: f32) -> Self {
        Candidate { key: u64::from(id), logit, weight: 0.0 }.with_rank(-logit)
    }

    /// A copy with another `rank`, which is not NaN.
    fn with_rank(self, rank: f32) -> Self {
        // Floats compare like their bits as integers, with negative ones inverted. Adding 0 turns -0 into 0.
        let bits = (rank + 0.0).to_bits();
        let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        Candidate { key: u64::from(ordered) << 32 | u64::from(self.id()), ..self }
    }

    fn id(&self) -> u32 {
        self.key as u32
    }

    /// The difference to the largest logit.
    fn height(&self, largest: f32) -> f64 {
        f64::from(self.logit - largest).max(-1e30)
    }

    /// The weight as an integer, in units of 1 / [`UNIT`].
    fn mass(&self) -> u64 {
        (self.weight * UNIT) as i64 as u64
    }
}

/// The tokens that the filters have kept so far, in any order. A vocabulary has hundreds of thousands of tokens, so no
/// filter sorts them all, and the memory is reused for the next token.
///
/// Masses are integers: their sum does not depend on the order, which the selection of the standard library leaves open.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates(Vec<Candidate>);

impl Candidates {
    /// Resets to the `count` largest logits, without those of minus infinity. `count` is not 0.
    pub(super) fn keep_largest(&mut self, logits: &[f32], count: usize) {
        let kept = &mut self.0;
        kept.clear();
        let capacity = count.saturating_mul(2).max(256);
        // A logit that is not above the floor is not among the largest: `count` earlier ones are at least as large.
        let mut floor = f32::NEG_INFINITY;
        for (block, start) in logits.chunks(32).zip((0..).step_by(32)) {
            let largest = block.iter().fold(f32::NEG_INFINITY, |max, &logit| if logit > max { logit } else { max });
            if largest <= floor {
                continue;
            }
            for (&logit, id) in block.iter().zip(start..) {
                if logit > floor {
                    kept.push(Candidate::new(id, logit));
                }
            }
            if kept.len() >= capacity {
                kept.select_nth_unstable_by_key(count - 1, |candidate| candidate.key);
                kept.truncate(count);
                floor = kept[count - 1].logit;
            }
        }
        if count < kept.len() {
            kept.select_nth_unstable_by_key(count - 1, |candidate| candidate.key);
            kept.truncate(count);
        }
    }

    /// Ids and logits by rank. Valid directly after `keep_largest`.
    pub(super) fn sorted(&mut self) -> impl Iterator<Item = (u32, f32)> {
        self.0.sort_unstable_by_key(|candidate| candidate.key);
        self.0.iter().map(|candidate| (candidate.id(), candidate.logit))
    }

    /// Keeps the candidates with a surprise nearest to the mean, the fewest that together reach probability `p`.
    pub(super) fn keep_typical(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let total = self.weigh(1.0);
        let largest = self.largest();
        // Surprise is ln(total) - (logit - largest). The mean contains the same logarithm, so it cancels out.
        let mean = self.mean_height(total as f64);
        for candidate in &mut self.0 {
            *candidate = candidate.with_rank((candidate.height(largest) - mean).abs() as f32);
        }
        self.keep_mass(p, total);
    }

    /// Keeps the most likely candidates, the fewest that together reach probability `p`.
    pub(super) fn keep_top(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let total = self.weigh(1.0);
        for candidate in &mut self.0 {
            *candidate = candidate.with_rank(-candidate.logit);
        }
        self.keep_mass(p, total);
    }

    /// Keeps candidates with at least `p` times the highest probability.
    pub(super) fn keep_likely(&mut self, p: f32) {
        if p <= 0.0 {
            return;
        }
        self.weigh(1.0);
        self.0.retain(|candidate| candidate.weight >= p);
    }

    /// Keeps the candidates with at least this logit.
    pub(super) fn keep_from(&mut self, logit: f64) {
        self.0.retain(|candidate| f64::from(candidate.logit) >= logit);
    }

    /// Drops all candidates with at least probability `threshold` but the least likely of them.
    pub(super) fn drop_top(&mut self, threshold: f32) {
        let least = (f64::from(threshold) * self.weigh(1.0) as f64) as u64;
        let likely = |candidate: &Candidate| candidate.mass() >= least;
        let last = self.0.iter().filter(|candidate| likely(candidate));
        let last = last.max_by_key(|candidate| candidate.with_rank(-candidate.logit).key).map(Candidate::id);
        self.0.retain(|candidate| !likely(candidate) || Some(candidate.id()) == last);
    }

    /// How even the probabilities are, from 0 to 1: their entropy divided by its largest value.
    pub(super) fn evenness(&mut self) -> f64 {
        let count = self.0.len();
        if count < 2 {
            return 0.0;
        }
        let total = self.weigh(1.0) as f64;
        let entropy = ln(total / f64::from(UNIT)) - self.mean_height(total);
        (entropy / ln(count as f64)).clamp(0.0, 1.0)
    }

    /// Keeps the candidates with a surprise of at most `most` bits at this temperature, at least the most likely one.
    pub(super) fn keep_expected(&mut self, most: f64, temperature: f32) {
        let total = self.weigh(temperature) as f64;
        let largest = self.largest();
        let total_bits = ln(total) * LOG2_E;
        self.0.retain(|candidate| {
            candidate.logit == largest
                || candidate.mass() > 0 && total_bits - ln(candidate.mass() as f64) * LOG2_E <= most
        });
    }

    /// Draws a token: the candidates form intervals in order of their ids, each as wide as its mass, and `number(total)`,
    /// a number below the sum of the masses, falls into one of them. Returns the token and its surprise in bits. `None` if there
    /// are no candidates.
    pub(super) fn draw(&mut self, temperature: f32, number: impl FnOnce(u64) -> u64) -> Option<(u32, f64)> {
        self.0.sort_unstable_by_key(Candidate::id);
        let total = self.weigh(temperature);
        let mut left = match total {
            0 => return None,
            total => number(total),
        };
        let drawn = self.0.iter().find(|candidate| {
            let hit = left < candidate.mass();
            left = left.saturating_sub(candidate.mass());
            hit
        });
        drawn.map(|candidate| (candidate.id(), ln(total as f64 / candidate.mass() as f64) * LOG2_E))
    }

    /// The mean difference to the largest logit, weighted by probabilities. `total` is the sum of the masses at temperature 1.
    fn mean_height(&self, total: f64) -> f64 {
        let largest = self.largest();
        // Each term is at most UNIT / e, so that the sum fits. Rounding each term makes the sum independent of the order.
        let moment: i64 = self.0.iter().map(|c| (f64::from(c.weight * UNIT) * c.height(largest)) as i64).sum();
        moment as f64 / total
    }

    fn largest(&self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |max, candidate| max.max(candidate.logit))
    }

    /// Sets the weights and returns the sum of the masses.
    fn weigh(&mut self, temperature: f32) -> u64 {
        let largest = self.largest();
        let mut total = 0;
        for row in self.0.chunks_mut(LANES) {
            let mut weights = [0.0; LANES];
            for (weight, candidate) in weights.iter_mut().zip(&*row) {
                *weight = (candidate.logit - largest) / temperature;
            }
            for weight in &mut weights {
                *weight = exp(*weight);
            }
            for (weight, candidate) in weights.iter().zip(row) {
                candidate.weight = *weight;
                total += candidate.mass();
            }
        }
        total
    }

    /// Keeps the fewest candidates, by rank, with masses that reach the share `p` of `total`; at least one.
    fn keep_mass(&mut self, p: f32, total: u64) {
        let mass = (f64::from(p) * total as f64) as u64;
        // The last candidate to keep is in `low..high`, and those before `low` have the mass `sum`. It is usually near the
        // beginning, so the search starts there.
        let kept = &mut self.0;
        let (mut low, mut high, mut sum) = (0, kept.len(), 0);
        while high - low > 32 {
            let middle = low + ((high - low) / 2).min(64.max(7 * low));
            kept[low..high].select_nth_unstable_by_key(middle - low, |candidate| candidate.key);
            let part: u64 = kept[low..middle].iter().map(Candidate::mass).sum();
            if sum + part >= mass {
                high = middle;
            } else {
                (low, sum) = (middle, sum + part);
            }
        }
        kept[low..high].sort_unstable_by_key(|candidate| candidate.key);
        let last = kept[low..high].iter().position(|candidate| {
            sum += candidate.mass();
            sum >= mass
        });
        kept.truncate(last.map_or(high, |last| low + last + 1));
    }
}
