//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and those that are not yet rounded
//! make up for the error, as far as the moments of the inputs say that they can.
//!
//! Columns whose inputs are largest go first (the paper's activation order), but group by group, and inside of each group
//! column by column: so a group's scale is fitted when all columns before it have left their errors, and groups lie in the
//! file as in any plain block format.

use super::compute::{Compute, factor};
use super::problem::{Format, Problem, Solution};
use super::{refine, rtn};

/// Columns whose errors are passed on to the rest together.
const BLOCK: usize = 128;
/// Rows that one thread takes together.
const TASK_ROWS: usize = 16;

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// What is added to the mean squares of the inputs, in units of their mean: moments of few tokens are uncertain.
    pub damping: f32,
    /// Whether columns with large inputs go first.
    pub order: bool,
    /// Whether each group's scale is searched, or reaches just as far as its largest weight.
    pub search: bool,
    /// Times that codes and scales are fitted to each other afterwards, see [`refine`].
    pub passes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { damping: 0.003, order: true, search: true, passes: 4 }
    }
}

/// Rounds a layer so that its output changes least. Without known inputs this is [`rtn::solve`].
pub fn solve(problem: &Problem<'_>, format: &Format, options: &Options, compute: &Compute<'_>) -> Solution {
    if problem.hessian.is_empty() {
        return rtn::solve(problem, format, options.search, compute);
    }
    let (rows, columns, group) = (problem.rows, problem.columns, format.group);
    let importance = problem.importance();
    let order = if options.order { order(&importance, group) } else { (0..columns).collect() };
    let upper = factor(problem.hessian, &order, options.damping, compute);
    // What an error costs when all columns after it have made up for it as well as they can: less than the mean square of the
    // input, and least where others say the same.
    let importance: Vec<f32> = upper.iter().step_by(columns + 1).map(|u| 1.0 / (u * u)).collect();

    let mut state = Rows {
        weights: vec![0.0; rows * columns],
        errors: Vec::new(),
        codes: vec![0; rows * columns],
        scales: vec![(0.0, 0.0); rows * format.groups(columns)],
    };
    for (to, from) in state.weights.chunks_mut(columns).zip(problem.weights.chunks(columns)) {
        to.iter_mut().zip(&order).for_each(|(to, column)| *to = from[*column]);
    }
    let mut start = 0;
    while start < columns {
        // Whole groups, or a part of one.
        let end = if group < BLOCK { start + BLOCK / group * group } else { start + BLOCK.min(group - start % group) };
        let end = end.min(columns);
        let block =
            Block { start, end, upper: &upper, importance: &importance, columns, format, search: options.search };
        block.round(&mut state, compute);
        block.pass_on(&mut state, compute);
        start = end;
    }
    let mut solution = state.finish(format, &order);
    refine::refine(problem, format, options.passes, options.damping, &mut solution, compute);
    solution
}

/// Columns in the order in which they are rounded: groups, and columns inside of each, by falling importance.
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

/// What is known of all rows, columns in their order of rounding.
struct Rows {
    /// `(rows, columns)`, of which those to come carry the errors of those before them.
    weights: Vec<f32>,
    /// `(rows, columns of the block)`
    errors: Vec<f32>,
    /// `(rows, columns)`
    codes: Vec<u8>,
    /// `(rows, groups)`: scale and minimum.
    scales: Vec<(f32, f32)>,
}

/// Columns that are rounded before the others hear of their errors.
struct Block<'a> {
    start: usize,
    end: usize,
    /// `(columns, columns)`, upper triangle, of the inverse moments.
    upper: &'a [f32],
    importance: &'a [f32],
    columns: usize,
    format: &'a Format,
    search: bool,
}

impl Block<'_> {
    fn round(&self, state: &mut Rows, compute: &Compute<'_>) {
        let (width, columns, groups) = (self.end - self.start, self.columns, self.format.groups(self.columns));
        state.errors.clear();
        state.errors.resize(state.weights.len() / columns * width, 0.0);
        let mut tasks: Vec<_> = state
            .weights
            .chunks_mut(columns)
            .zip(state.errors.chunks_mut(width))
            .zip(state.codes.chunks_mut(columns).zip(state.scales.chunks_mut(groups)))
            .collect();
        compute.for_each_chunk(&mut tasks, TASK_ROWS, |_, rows| {
            for ((weights, errors), (codes, scales)) in rows {
                self.round_row(weights, errors, codes, scales);
            }
        });
    }

    fn round_row(&self, weights: &mut [f32], errors: &mut [f32], codes: &mut [u8], scales: &mut [(f32, f32)]) {
        let Format { grid, group } = *self.format;
        for column in self.start..self.end {
            if column % group == 0 {
                let own = column..column + group;
                scales[column / group] = rtn::fit(grid, &weights[own.clone()], &self.importance[own], self.search);
            }
            let (scale, min) = scales[column / group];
            let code = grid.code(weights[column], scale, min);
            codes[column] = code;
            let upper = &self.upper[column * self.columns..][..self.columns];
            let error = (weights[column] - grid.value(code, scale, min)) / upper[column];
            errors[column - self.start] = error;
            let later = column + 1..self.end;
            weights[later.clone()].iter_mut().zip(&upper[later]).for_each(|(weight, u)| *weight -= error * u);
        }
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
    /// Back to the order of the file.
    fn finish(self, format: &Format, order: &[usize]) -> Solution {
        let (columns, group) = (order.len(), format.group);
        let mut solution = Solution::zeroed(format, self.weights.len() / columns, columns);
        for (to, from) in solution.codes.chunks_mut(columns).zip(self.codes.chunks(columns)) {
            from.iter().zip(order).for_each(|(code, column)| to[*column] = *code);
        }
        let groups = format.groups(columns);
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
pub(super) mod tests {
    use super::super::compute::mirror;
    use super::super::problem::{Grid, error};
    use super::super::rtn::tests::bell;
    use super::*;
    use crate::threads::ThreadPool;

    pub(in crate::quantize) const COLUMNS: usize = 192;

    /// Weights, and moments of inputs that depend on each other and differ in size.
    pub(in crate::quantize) fn layer(compute: &Compute<'_>) -> (Vec<f32>, Vec<f32>) {
        let (independent, mix) = (bell(500 * 24, 5), bell(COLUMNS * 24, 6));
        let mut inputs = vec![0.0; 500 * COLUMNS];
        compute.product(&independent, &mix, 24, &mut inputs);
        let noise = bell(inputs.len(), 7);
        inputs.iter_mut().zip(noise).enumerate().for_each(|(i, (x, noise))| {
            *x = (*x + 0.3 * noise) * if i % COLUMNS == 11 { 20.0 } else { 1.0 };
        });
        let mut hessian = vec![0.0; COLUMNS * COLUMNS];
        compute.add_moments(&inputs, COLUMNS, &mut hessian);
        mirror(&mut hessian, COLUMNS, 1.0 / 500.0);
        (bell(40 * COLUMNS, 8), hessian)
    }

    pub(in crate::quantize) fn with_threads<R>(threads: usize, run: impl FnOnce(&Compute<'_>) -> R) -> R {
        let pool = ThreadPool::new(threads).unwrap();
        run(&Compute::new(&pool, crate::kernels::best()))
    }

    #[test]
    fn it_loses_far_less_of_the_output_than_rounding_in_every_format() {
        with_threads(1, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            for grid in [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl] {
                for group in [32, 64, COLUMNS] {
                    let format = Format { grid, group };
                    let rounded =
                        error(&problem, &rtn::solve(&problem, &format, true, compute).decode(&format, COLUMNS));
                    for order in [false, true] {
                        let options = Options { order, ..Options::default() };
                        let solution = solve(&problem, &format, &options, compute);
                        let own = error(&problem, &solution.decode(&format, COLUMNS));
                        assert!(own < 0.5 * rounded, "{format:?}, {order}: {own}, by rounding {rounded}");
                    }
                }
            }
        });
    }

    #[test]
    fn inputs_that_do_not_depend_on_each_other_leave_nothing_to_make_up_for() {
        with_threads(1, |compute| {
            let weights = bell(9 * 64, 9);
            let mut hessian = vec![0.0; 64 * 64];
            (0..64).for_each(|i| hessian[i * 65] = 1.0 + i as f32);
            let problem = Problem::new(&weights, 9, 64, &hessian, &[]).unwrap();
            let format = Format { grid: Grid::Q4_0, group: 32 };
            let solution = solve(&problem, &format, &Options::default(), compute);
            let rounded = rtn::solve(&problem, &format, true, compute);
            let same = solution.codes.iter().zip(&rounded.codes).filter(|(a, b)| a == b).count();
            // The sums of a scale's search run in another order, so that a few may fall to the other side.
            assert!(same >= 9 * 64 - 6, "{same} of {}", 9 * 64);
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let of = |threads| {
            with_threads(threads, |compute| {
                let (weights, hessian) = layer(compute);
                let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
                solve(&problem, &Format { grid: Grid::Iq4Nl, group: 32 }, &Options::default(), compute)
            })
        };
        assert_eq!(of(1), of(3));
    }

    #[test]
    fn inputs_that_never_occur_leave_finite_weights_near_the_old_ones() {
        with_threads(1, |compute| {
            let weights = bell(4 * 64, 10);
            let hessian = vec![0.0; 64 * 64];
            let problem = Problem::new(&weights, 4, 64, &hessian, &[]).unwrap();
            let format = Format { grid: Grid::Q4_0, group: 32 };
            let decoded = solve(&problem, &format, &Options::default(), compute).decode(&format, 64);
            assert!(weights.iter().zip(&decoded).all(|(w, q)| (w - q).abs() < 0.4), "{decoded:?}");
        });
    }
}
