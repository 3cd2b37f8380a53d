//! The tokens that are still in the running.

use std::cmp::Ordering;

use super::exp;

/// A token that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    /// Finite.
    logit: f32,
    /// By which a step sorts, smallest first.
    rank: f32,
    /// In proportion to the probability; 1 for the likeliest candidate. Valid after `weigh`.
    weight: f32,
}

impl Candidate {
    /// Among equals the lower id goes first. There is no NaN.
    fn order(&self, other: &Self) -> Ordering {
        self.rank.partial_cmp(&other.rank).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// The tokens that are still in the running, ordered by id between the steps, so that sums have one order. A vocabulary has
/// hundreds of thousands of tokens, so no step sorts many more of them than it keeps, and the memory is used again.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates(Vec<Candidate>);

impl Candidates {
    /// Starts over with the `count` largest of the logits, leaving out those of minus infinity. `count` is not 0.
    pub(super) fn keep_largest(&mut self, logits: &[f32], count: usize) {
        let kept = &mut self.0;
        kept.clear();
        let room = count.saturating_mul(2).max(256);
        // What is not above the floor is not among the largest: `count` tokens that are as large and come first are kept.
        let mut floor = f32::NEG_INFINITY;
        for (block, start) in logits.chunks(32).zip((0..).step_by(32)) {
            let largest = block.iter().fold(f32::NEG_INFINITY, |max, &logit| if logit > max { logit } else { max });
            if largest <= floor {
                continue;
            }
            for (&logit, id) in block.iter().zip(start..) {
                if logit > floor {
                    kept.push(Candidate { id, logit, rank: -logit, weight: 0.0 });
                }
            }
            if kept.len() >= room {
                kept.select_nth_unstable_by(count - 1, Candidate::order);
                kept.truncate(count);
                floor = kept[count - 1].logit;
            }
        }
        if count < kept.len() {
            kept.select_nth_unstable_by(count - 1, Candidate::order);
            kept.truncate(count);
        }
        self.order_by_id();
    }

    /// Ids and logits by rank, after `keep_largest` and before anything else.
    pub(super) fn sorted(&mut self) -> impl Iterator<Item = (u32, f32)> {
        self.0.sort_unstable_by(Candidate::order);
        self.0.iter().map(|candidate| (candidate.id, candidate.logit))
    }

    /// The fewest whose surprise is nearest to the mean one and that together reach the probability `p`.
    pub(super) fn keep_typical(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let total = self.weigh(1.0);
        let largest = self.largest();
        // Surprise is ln(total) - (logit - largest). The logarithm is in the mean too and cancels out.
        let height = |candidate: &Candidate| (candidate.logit - largest).max(f32::MIN);
        let mean = self.0.iter().map(|c| f64::from(c.weight) * f64::from(height(c))).sum::<f64>() / total;
        for candidate in &mut self.0 {
            candidate.rank = (f64::from(height(candidate)) - mean).abs() as f32;
        }
        self.keep_mass(f64::from(p) * total);
    }

    /// The fewest of the likeliest that together reach the probability `p`.
    pub(super) fn keep_top(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        let total = self.weigh(1.0);
        for candidate in &mut self.0 {
            candidate.rank = -candidate.logit;
        }
        self.keep_mass(f64::from(p) * total);
    }

    /// Those with at least `p` times the probability of the likeliest.
    pub(super) fn keep_likely(&mut self, p: f32) {
        if p <= 0.0 {
            return;
        }
        self.weigh(1.0);
        self.0.retain(|candidate| candidate.weight >= p); // The likeliest has weight 1.
    }

    /// The token on which `share`, in [0, 1), of the probability falls when the candidates are laid out by id. `None` only
    /// if there are none.
    pub(super) fn draw(&mut self, temperature: f32, share: f64) -> Option<u32> {
        let target = share * self.weigh(temperature);
        let mut sum = 0.0;
        let mut last = None;
        for candidate in &self.0 {
            sum += f64::from(candidate.weight);
            if sum > target {
                return Some(candidate.id);
            }
            if candidate.weight > 0.0 {
                last = Some(candidate.id);
            }
        }
        last // A target rounded up to the very end.
    }

    fn largest(&self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |max, candidate| max.max(candidate.logit))
    }

    fn order_by_id(&mut self) {
        self.0.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// Sets the weights and returns their sum.
    fn weigh(&mut self, temperature: f32) -> f64 {
        let largest = self.largest();
        let mut total = 0.0;
        for candidate in &mut self.0 {
            candidate.weight = exp((candidate.logit - largest) / temperature);
            total += f64::from(candidate.weight);
        }
        total
    }

    /// The fewest, by rank, whose weights reach `mass`; at least one.
    fn keep_mass(&mut self, mass: f64) {
        let kept = &mut self.0;
        let (mut sum, mut sorted, mut end) = (0.0, 0, 64);
        while sorted < kept.len() {
            // Usually a few are enough: the rest is only parted from them, not sorted.
            end = kept.len().min(end);
            let rest = &mut kept[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable_by(end - sorted, Candidate::order);
            }
            rest[..end - sorted].sort_unstable_by(Candidate::order);
            for at in sorted..end {
                sum += f64::from(kept[at].weight);
                if sum >= mass {
                    kept.truncate(at + 1);
                    return self.order_by_id();
                }
            }
            (sorted, end) = (end, end.saturating_mul(8));
        }
        self.order_by_id();
    }
}
