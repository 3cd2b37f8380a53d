//! Allocation of a limited number of bytes to tensors.
//!
//! The loss of each tensor in each format is given, and losses add up. The allocation follows the lower convex hull of each
//! tensor's choices, steepest step first (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of
//! quantizers").

/// The size and loss of a tensor in one format.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// Size in bytes.
    pub(super) bytes: u64,
    /// Loss of the model, in a unit that all tensors share.
    pub(super) loss: f64,
}

/// The index of one choice per tensor, with at most `budget` bytes and the least loss in total. `None` if even the smallest
/// choices are too large, or if a tensor has none.
pub(super) fn allocate(tensors: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let hulls = tensors.iter().map(|choices| hull(choices)).collect::<Option<Vec<_>>>()?;
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let size = |tensor: usize, choice: usize| tensors[tensor][choice].bytes;
    let smallest = chosen.iter().enumerate().map(|(tensor, choice)| size(tensor, *choice)).sum::<u64>();
    let mut left = budget.checked_sub(smallest)?;
    // (decrease of the loss per byte, tensor, step on its hull)
    let mut steps = Vec::new();
    for (tensor, hull) in hulls.iter().enumerate() {
        for (step, pair) in hull.windows(2).enumerate() {
            let (from, to) = (tensors[tensor][pair[0]], tensors[tensor][pair[1]]);
            steps.push(((from.loss - to.loss) / (to.bytes - from.bytes) as f64, tensor, step));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, tensor, step) in steps {
        let (from, to) = (hulls[tensor][step], hulls[tensor][step + 1]);
        let more = size(tensor, to) - size(tensor, from);
        // A tensor that skipped a step, because too few bytes were left, takes no later one.
        if chosen[tensor] == from && more <= left {
            chosen[tensor] = to;
            left -= more;
        }
    }
    Some(chosen)
}

/// The choices on the lower convex hull, smallest first: each has less loss than the one before, with a falling gain per byte.
/// `None` without choices.
fn hull(choices: &[Choice]) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|a, b| choices[*a].bytes.cmp(&choices[*b].bytes).then(choices[*a].loss.total_cmp(&choices[*b].loss)));
    let gain = |from: usize, to: usize| {
        (choices[from].loss - choices[to].loss) / (choices[to].bytes - choices[from].bytes) as f64
    };
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        if hull.last().is_some_and(|last| {
            choices[next].bytes == choices[*last].bytes || choices[next].loss >= choices[*last].loss
        }) {
            continue;
        }
        while let [.., before, last] = hull[..]
            && gain(last, next) >= gain(before, last)
        {
            hull.pop();
        }
        hull.push(next);
    }
    (!hull.is_empty()).then_some(hull)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(pairs: &[(u64, f64)]) -> Vec<Choice> {
        pairs.iter().map(|(bytes, loss)| Choice { bytes: *bytes, loss: *loss }).collect()
    }

    #[test]
    fn bytes_go_where_they_reduce_the_loss_most() {
        let small_and_sensitive = choices(&[(10, 8.0), (20, 1.0)]);
        let large_and_sensitive = choices(&[(100, 9.0), (200, 1.0)]);
        let indifferent = choices(&[(10, 0.2), (20, 0.1)]);
        let tensors = [large_and_sensitive, small_and_sensitive, indifferent];
        assert_eq!(allocate(&tensors, 119), None);
        assert_eq!(allocate(&tensors, 120), Some(vec![0, 0, 0]));
        assert_eq!(allocate(&tensors, 130), Some(vec![0, 1, 0]));
        assert_eq!(allocate(&tensors, 140), Some(vec![0, 1, 1]), "the rest goes to a tensor that it fits");
        assert_eq!(allocate(&tensors, 230), Some(vec![1, 1, 0]));
        assert_eq!(allocate(&tensors, 240), Some(vec![1, 1, 1]));
    }

    #[test]
    fn choices_above_the_hull_are_never_taken() {
        // 30 bytes lose more than 20, and 40 are above the line from 20 to 50.
        let tensor = choices(&[(50, 1.0), (10, 10.0), (20, 5.0), (30, 6.0), (40, 4.0)]);
        assert_eq!(hull(&tensor), Some(vec![1, 2, 0]));
        assert_eq!(allocate(&[tensor], 45), Some(vec![2]));
        assert_eq!(allocate(&[Vec::new()], 45), None);
        assert_eq!(allocate(&[], 0), Some(Vec::new()));
    }

    #[test]
    fn for_few_tensors_it_is_close_to_the_best_allocation() {
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24)
        };
        for _ in 0..50 {
            let tensors: Vec<_> = (0..6)
                .map(|_| {
                    let loss = 0.1 + uniform();
                    choices(&[(45, loss), (55, loss / 4.0), (85, loss / 256.0)])
                })
                .collect();
            let budget = 6 * 45 + (uniform() * 200.0) as u64;
            let total = |chosen: &[usize]| -> (u64, f64) {
                let own = chosen.iter().zip(&tensors).map(|(choice, tensor)| tensor[*choice]);
                own.fold((0, 0.0), |(bytes, loss), choice| (bytes + choice.bytes, loss + choice.loss))
            };
            let found = total(&allocate(&tensors, budget).unwrap());
            assert!(found.0 <= budget);
            let all = (0..3usize.pow(6)).map(|i| total(&[0, 1, 2, 3, 4, 5].map(|at| i / 3usize.pow(at) % 3)));
            let best = all.filter(|(bytes, _)| *bytes <= budget).map(|(_, loss)| loss).fold(f64::INFINITY, f64::min);
            // The last step may not fit, so at most one tensor's gain is missed.
            assert!(found.1 <= best + 1.1, "{} and {best}", found.1);
            if budget >= 6 * 55 {
                assert!(found.1 < 0.5 * total(&[0; 6]).1);
            }
        }
    }
}
