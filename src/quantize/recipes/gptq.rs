//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and the columns that are not rounded
//! yet compensate for the error, as far as the second moments of the inputs allow.
//!
//! Columns with the largest inputs go first (the paper's activation order), but group by group, and column by column within
//! each group. A group's scale is fitted after all columns before it have passed on their errors, and groups stay contiguous
//! in the file.

use std::ops::Range;

use super::prune;
use super::{refine, rtn};
use crate::quantize::compute::{Compute, inverse_factor};
use crate::quantize::format::GroupedFormat;
use crate::quantize::layer::{LayerProblem, Solution};
use crate::quantize::sparsity::Sparsity;

/// Columns whose errors are passed on to later columns together.
const BLOCK: usize = 128;
/// Rows per task.
const TASK_ROWS: usize = 16;

/// Options of [`Recipe::Gptq`](super::Recipe::Gptq).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct GptqOptions {
    /// Added to the mean squares of the inputs, in units of their mean: the moments of few tokens are uncertain.
    pub damping: f32,
    /// Whether columns with large inputs are rounded first.
    pub order: bool,
    /// Whether the best scale of each group is searched; otherwise the scale fits the largest weight.
    pub search: bool,
    /// Passes of refinement over codes and scales afterwards.
    pub passes: usize,
}

impl Default for GptqOptions {
    fn default() -> Self {
        GptqOptions { damping: 0.003, order: true, search: true, passes: 4 }
    }
}

setters!(GptqOptions {
    with_damping(damping: f32),
    with_order(order: bool),
    with_search(search: bool),
    with_passes(passes: usize),
});

/// Rounds a layer so that its output changes least. Without calibration this is [`rtn::solve`].
pub(in crate::quantize) fn solve(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    options: &GptqOptions,
    compute: &Compute<'_>,
) -> Solution {
    if problem.hessian.is_empty() {
        return rtn::solve(problem, grouped, options.search, compute);
    }
    let (rows, columns, group) = (problem.rows, problem.columns, grouped.group);
    let importance = problem.importance();
    let order = if options.order { order(&importance, group) } else { (0..columns).collect() };
    let upper = inverse_factor(problem.hessian, &order, options.damping, compute);
    // The cost of an error after later columns have compensated for it: less than the mean square of the input, and least for
    // inputs that correlate with others.
    let importance: Vec<f32> = upper.iter().step_by(columns + 1).map(|u| 1.0 / (u * u)).collect();

    let mut state = Rows {
        weights: vec![0.0; rows * columns],
        errors: Vec::new(),
        codes: vec![0; rows * columns],
        scales: vec![(0.0, 0.0); rows * grouped.groups(columns)],
        pruned: prune::pruned(problem).chunks(columns).flat_map(|row| order.iter().map(|at| row[*at])).collect(),
    };
    for (to, from) in state.weights.chunks_mut(columns).zip(problem.weights.chunks(columns)) {
        to.iter_mut().zip(&order).for_each(|(to, column)| *to = from[*column]);
    }
    let mut start = 0;
    while start < columns {
        // Several whole groups, or a part of one.
        let end = if group < BLOCK { start + BLOCK / group * group } else { start + BLOCK.min(group - start % group) };
        let end = end.min(columns);
        let (upper, importance, order, sparsity) = (&*upper, &*importance, &*order, problem.sparsity);
        let block = Block { start, end, upper, importance, order, columns, grouped, search: options.search, sparsity };
        block.round(&mut state, compute);
        block.pass_on(&mut state, compute);
        start = end;
    }
    let mut pruned = vec![false; state.pruned.len()];
    for (to, from) in pruned.chunks_mut(columns).zip(state.pruned.chunks(columns)) {
        from.iter().zip(&order).for_each(|(from, column)| to[*column] = *from);
    }
    let mut solution = state.finish(grouped, &order);
    refine::refine(problem, grouped, options.passes, options.damping, &pruned, &mut solution, compute);
    solution
}

/// The order of rounding: groups by falling importance, and columns within each group likewise.
fn order(importance: &[f32], group: usize) -> Vec<usize> {
    let mut groups: Vec<(f32, Vec<usize>)> = Vec::new();
    for start in (0..importance.len()).step_by(group) {
        let mut members: Vec<usize> = (start..start + group).collect();
        members.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
        groups.push((importance[start..start + group].iter().sum(), members));
    }
    groups.sort_by(|a, b| b.0.total_cmp(&a.0));
    groups.into_iter().flat_map(|(_, members)| members).collect()
}

/// The state of all rows, with columns in the order of rounding.
struct Rows {
    /// `(rows, columns)`: weights, to which errors of earlier columns have been passed on.
    weights: Vec<f32>,
    /// `(rows, columns of the block)`
    errors: Vec<f32>,
    /// `(rows, columns)`
    codes: Vec<u8>,
    /// `(rows, groups)`: scale and minimum.
    scales: Vec<(f32, f32)>,
    /// `(rows, columns)`: the weights that become zero. Empty if none do.
    pruned: Vec<bool>,
}

/// A row of [`Rows`].
struct Row<'a> {
    weights: &'a mut [f32],
    errors: &'a mut [f32],
    codes: &'a mut [u8],
    scales: &'a mut [(f32, f32)],
    pruned: &'a mut [bool],
}

/// Columns that are rounded before their errors are passed on.
struct Block<'a> {
    start: usize,
    end: usize,
    /// `(columns, columns)`: the upper triangular factor of the inverse moments.
    upper: &'a [f32],
    importance: &'a [f32],
    /// The column of the file that each column is.
    order: &'a [usize],
    columns: usize,
    grouped: &'a GroupedFormat,
    search: bool,
    sparsity: Option<Sparsity>,
}

impl Block<'_> {
    fn round(&self, state: &mut Rows, compute: &Compute<'_>) {
        let (width, columns, groups) = (self.end - self.start, self.columns, self.grouped.groups(self.columns));
        state.errors.clear();
        state.errors.resize(state.weights.len() / columns * width, 0.0);
        let mut pruned = state.pruned.chunks_mut(columns);
        let mut tasks: Vec<_> = state
            .weights
            .chunks_mut(columns)
            .zip(state.errors.chunks_mut(width))
            .zip(state.codes.chunks_mut(columns).zip(state.scales.chunks_mut(groups)))
            .map(|((weights, errors), (codes, scales))| Row {
                weights,
                errors,
                codes,
                scales,
                pruned: pruned.next().unwrap_or_default(),
            })
            .collect();
        compute.for_each_chunk(&mut tasks, TASK_ROWS, |_, rows| {
            rows.iter_mut().for_each(|row| self.round_row(row));
        });
    }

    fn round_row(&self, row: &mut Row<'_>) {
        let Row { weights, errors, codes, scales, pruned } = row;
        let GroupedFormat { format, group } = *self.grouped;
        for column in self.start..self.end {
            if column % group == 0 {
                let own = column..column + group;
                let importance = &self.importance[own.clone()];
                scales[column / group] = match self.sparsity {
                    Some(sparsity) => {
                        self.prune_group(sparsity, own.clone(), weights, pruned);
                        let kept = prune::without(&weights[own.clone()], &pruned[own]);
                        rtn::fit(format, &kept, importance, self.search)
                    }
                    None => rtn::fit(format, &weights[own], importance, self.search),
                };
            }
            let (scale, min) = scales[column / group];
            let is_pruned = pruned.get(column) == Some(&true);
            let code = format.code(if is_pruned { 0.0 } else { weights[column] }, scale, min);
            codes[column] = code;
            let upper = &self.upper[column * self.columns..][..self.columns];
            let error = (weights[column] - format.value(code, scale, min)) / upper[column];
            errors[column - self.start] = error;
            let later = column + 1..self.end;
            weights[later.clone()].iter_mut().zip(&upper[later]).for_each(|(weight, u)| *weight -= error * u);
        }
    }

    /// Chooses anew which weights of a group are pruned, the same number as before.
    fn prune_group(&self, sparsity: Sparsity, own: Range<usize>, weights: &[f32], pruned: &mut [bool]) {
        // Patterns are of the file's columns.
        let columns = &self.order[own.clone()];
        let first = columns.iter().copied().min().unwrap_or(0);
        let (mut costs, mut marks) = (vec![0.0; columns.len()], vec![false; columns.len()]);
        for (at, column) in own.clone().zip(columns) {
            costs[column - first] = weights[at] * weights[at] * self.importance[at];
            marks[column - first] = pruned[at];
        }
        sparsity.mark_again(&costs, &mut marks);
        own.zip(columns).for_each(|(at, column)| pruned[at] = marks[column - first]);
    }

    /// `weights[.., end..] -= errors * upper[start..end, end..]`
    fn pass_on(&self, state: &mut Rows, compute: &Compute<'_>) {
        let (width, rest, columns) = (self.end - self.start, self.columns - self.end, self.columns);
        if rest == 0 {
            return;
        }
        let upper =
            compute.pack_transposed(rest, width, |k| &self.upper[(self.start + k) * columns + self.end..][..rest]);
        compute.for_each_product(&state.errors, &upper, &mut state.weights, columns, |product, weights| {
            weights[self.end..].iter_mut().zip(product).for_each(|(weight, x)| *weight -= x);
        });
    }
}

impl Rows {
    /// The solution, with columns in the order of the file.
    fn finish(self, grouped: &GroupedFormat, order: &[usize]) -> Solution {
        let (columns, group) = (order.len(), grouped.group);
        let mut solution = Solution::zeroed(grouped, self.weights.len() / columns, columns);
        for (to, from) in solution.codes.chunks_mut(columns).zip(self.codes.chunks(columns)) {
            from.iter().zip(order).for_each(|(code, column)| to[*column] = *code);
        }
        let groups = grouped.groups(columns);
        for (row, from) in self.scales.chunks(groups).enumerate() {
            for ((scale, min), members) in from.iter().zip(order.chunks(group)) {
                let at = row * groups + members[0] / group;
                solution.scales[at] = *scale;
                if let Some(to) = solution.mins.get_mut(at) {
                    *to = *min;
                }
            }
        }
        solution
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::format::Format;
    use crate::quantize::recipes::fixtures::*;

    #[test]
    fn the_error_is_far_below_rounding_in_every_format() {
        for order in [false, true] {
            let options = GptqOptions { order, ..GptqOptions::default() };
            assert_beats(1, 0.5, rtn::solve, |problem, grouped, compute| solve(problem, grouped, &options, compute));
        }
    }

    #[test]
    fn refinement_reduces_the_error_further() {
        with_layer(2, |problem, compute| {
            for grouped in four_bit_formats(&[32]) {
                let options = GptqOptions { passes: 0, ..GptqOptions::default() };
                let mut solution = solve(problem, &grouped, &options, compute);
                let before = error_of(problem, &grouped, &solution);
                refine::refine(problem, &grouped, 4, 0.003, &[], &mut solution, compute);
                let after = error_of(problem, &grouped, &solution);
                assert!(after < 0.95 * before, "{grouped:?}: from {before} to {after}");
            }
        });
    }

    #[test]
    fn independent_inputs_leave_nothing_to_compensate() {
        with_threads(1, |compute| {
            let weights = bell(9 * 64, 9);
            let mut hessian = vec![0.0; 64 * 64];
            (0..64).for_each(|i| hessian[i * 65] = 1.0 + i as f32);
            let problem = LayerProblem::new(&weights, 9, 64, &hessian, &[]).unwrap();
            let grouped = GroupedFormat { format: Format::Q4_0, group: 32 };
            let solution = solve(&problem, &grouped, &GptqOptions::default(), compute);
            let rounded = rtn::solve(&problem, &grouped, true, compute);
            let same = solution.codes.iter().zip(&rounded.codes).filter(|(a, b)| a == b).count();
            // The search sums in another order, so that a few codes may differ.
            assert!(same >= 9 * 64 - 6, "{same} of {}", 9 * 64);
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let grouped = GroupedFormat { format: Format::Iq4Nl, group: 32 };
        assert_threads_change_nothing(|problem, compute| solve(problem, &grouped, &GptqOptions::default(), compute));
    }

    #[test]
    fn inputs_that_are_always_zero_leave_weights_near_the_old_ones() {
        with_threads(1, |compute| {
            let weights = bell(4 * 64, 10);
            let hessian = vec![0.0; 64 * 64];
            let problem = LayerProblem::new(&weights, 4, 64, &hessian, &[]).unwrap();
            let grouped = GroupedFormat { format: Format::Q4_0, group: 32 };
            let decoded = solve(&problem, &grouped, &GptqOptions::default(), compute).decode(&grouped, 64);
            assert!(weights.iter().zip(&decoded).all(|(w, q)| (w - q).abs() < 0.4), "{decoded:?}");
        });
    }
}
