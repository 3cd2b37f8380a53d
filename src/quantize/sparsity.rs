//! How many weights are pruned, and in which pattern.

use crate::error::{Error, Result};

/// Columns of a group of [`Pattern::TwoOfFour`], in which two weights stay.
const FOUR: usize = 4;

/// Which weights may be pruned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pattern {
    /// Any weights of a row.
    Unstructured,
    /// Two of every four adjacent weights of a row.
    TwoOfFour,
}

/// How many weights of linear layers become zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sparsity {
    share: f32,
    pattern: Pattern,
}

impl Sparsity {
    /// `share` of the weights of each row, by the pattern called `unstructured` or `2:4`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a share outside of 0 to 0.95, other names, and 2:4 with another share than a half.
    pub fn new(share: f32, pattern: &str) -> Result<Sparsity> {
        let pattern = match pattern {
            "unstructured" => Pattern::Unstructured,
            "2:4" => Pattern::TwoOfFour,
            _ => return Err(Error::argument("sparsity_pattern", format_args!("{pattern:?}"), "unstructured or 2:4")),
        };
        if !(share > 0.0 && share <= 0.95) {
            return Err(Error::argument("sparsity", share, "a share above 0 and up to 0.95"));
        }
        if pattern == Pattern::TwoOfFour && share != 0.5 {
            return Err(Error::argument("sparsity", share, "0.5 with the pattern 2:4"));
        }
        Ok(Sparsity { share, pattern })
    }

    /// Marks the weights to prune of a row. `costs` are the costs of pruning each; the cheapest are pruned, of equal ones the first.
    pub(super) fn mark(&self, costs: &[f32], pruned: &mut [bool]) {
        match self.pattern {
            Pattern::Unstructured => {
                mark_cheapest(costs, (self.share * costs.len() as f32).round() as usize, pruned);
            }
            Pattern::TwoOfFour => {
                for (costs, pruned) in costs.chunks(FOUR).zip(pruned.chunks_mut(FOUR)) {
                    mark_cheapest(costs, costs.len() / 2, pruned);
                }
            }
        }
    }

    /// Marks other weights of a group in place of those that are marked, as many, by other costs.
    pub(super) fn mark_again(&self, costs: &[f32], pruned: &mut [bool]) {
        match self.pattern {
            Pattern::Unstructured => {
                let count = pruned.iter().filter(|pruned| **pruned).count();
                mark_cheapest(costs, count, pruned);
            }
            Pattern::TwoOfFour => self.mark(costs, pruned),
        }
    }
}

fn mark_cheapest(costs: &[f32], count: usize, pruned: &mut [bool]) {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|a, b| costs[*a].total_cmp(&costs[*b]));
    pruned.fill(false);
    order[..count].iter().for_each(|at| pruned[*at] = true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_shares_and_patterns_are_refused() {
        for (share, pattern, expected) in [
            (0.0, "unstructured", "sparsity: found 0, expected a share above 0 and up to 0.95"),
            (f32::NAN, "unstructured", "sparsity: found NaN, expected a share above 0 and up to 0.95"),
            (0.96, "unstructured", "sparsity: found 0.96, expected a share above 0 and up to 0.95"),
            (0.6, "2:4", "sparsity: found 0.6, expected 0.5 with the pattern 2:4"),
            (0.5, "4:8", "sparsity_pattern: found \"4:8\", expected unstructured or 2:4"),
        ] {
            assert_eq!(Sparsity::new(share, pattern).unwrap_err().to_string(), expected);
        }
    }
}
