//! Pruning: which weights of a layer become zero.
//!
//! A weight counts as much as it changes the output: its square times the mean square of its input (Wanda, Sun et al. 2023,
//! arXiv 2306.11695). In each row, or of each 4 columns, those that count least are pruned. Recipes that compensate for errors choose anew
//! before they round a group, by the weights as they are then and by what later columns cannot compensate (SparseGPT, Frantar and Alistarh
//! 2023, arXiv 2301.00774).

use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::{LayerProblem, Solution};

/// The weights of a layer that are pruned, `(rows, columns)`. Empty if none are.
pub(in crate::quantize) fn pruned(problem: &LayerProblem<'_>) -> Vec<bool> {
    let Some(sparsity) = problem.sparsity else { return Vec::new() };
    let importance = problem.importance();
    let mut pruned = vec![false; problem.weights.len()];
    let rows = problem.weights.chunks(problem.columns).zip(pruned.chunks_mut(problem.columns));
    for (weights, pruned) in rows {
        let costs: Vec<f32> = weights.iter().zip(&importance).map(|(weight, x)| weight * weight * x).collect();
        sparsity.mark(&costs, pruned);
    }
    pruned
}

/// The weights of a layer without those that are pruned.
pub(super) fn without(weights: &[f32], pruned: &[bool]) -> Vec<f32> {
    weights.iter().zip(pruned).map(|(weight, pruned)| if *pruned { 0.0 } else { *weight }).collect()
}

/// Sets the codes of weights that are pruned to that of zero.
pub(super) fn clear(solution: &mut Solution, grouped: &GroupedFormat, pruned: &[bool]) {
    let zero = grouped.format.code(0.0, 0.0, 0.0);
    solution.codes.iter_mut().zip(pruned).filter(|(_, pruned)| **pruned).for_each(|(code, _)| *code = zero);
}

/// Whether a format has a code for zero.
pub(in crate::quantize) fn holds_zeros(format: Format) -> bool {
    !format.has_min() && format.level(format.nearest(0.0)) == 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::sparsity::Sparsity;

    #[test]
    fn the_cheapest_weights_of_each_row_are_pruned() {
        let weights = [1.0, -4.0, 2.0, 3.0, 0.5, 0.1, -0.2, 9.0];
        // Inputs so large that the least weights cost most.
        let squares = [1.0, 1.0, 1.0, 1.0, 100.0, 100.0, 1000.0, 0.02];
        let problem = LayerProblem::new(&weights, 1, 8, &[], &[]).unwrap();
        let problem = |pattern| LayerProblem {
            squares: &squares,
            sparsity: Some(Sparsity::new(0.5, pattern).unwrap()),
            ..problem
        };
        let at = |pruned: Vec<bool>| (0..8).filter(|i| pruned[*i]).collect::<Vec<_>>();
        assert_eq!(at(pruned(&problem("unstructured"))), [0, 2, 5, 7]);
        assert_eq!(at(pruned(&problem("2:4"))), [0, 2, 5, 7]);
        let even = LayerProblem { squares: &[], ..problem("unstructured") };
        assert_eq!(at(pruned(&even)), [0, 4, 5, 6]);
    }

    #[test]
    fn only_formats_with_a_zero_can_be_sparse() {
        let held: Vec<Format> = Format::ALL.into_iter().filter(|format| holds_zeros(*format)).collect();
        assert_eq!(held, [Format::Q2_0, Format::Q4_0, Format::Q5_0, Format::Q8_0]);
    }
}
