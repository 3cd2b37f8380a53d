//! Coordinate descent on a quantized layer: each code and each scale moves to its best value while all others stay, until
//! nothing moves (as in CDQuant, Nair and Suggala 2024, arXiv 2406.17542, and of LDLQ's successors).
//!
//! In GPTQ a column never sees the errors of columns rounded after it. Here it does, and every step lowers
//! `tr((W - Q) H (W - Q)^T)`, so the solution of a recipe can only improve.

use crate::quantize::compute::Compute;
use crate::quantize::format::{GroupedFormat, rounded};
use crate::quantize::layer::{LayerProblem, Solution};

/// Rows per task.
const TASK_ROWS: usize = 8;

/// Improves `solution` in place. Codes and scales are visited up to `passes` times; a row that no longer changes ends earlier.
/// `damping` is added to the mean squares of the inputs, in units of their mean. Codes of weights that are `pruned` stay: `(rows, columns)`, or
/// empty. Without calibration nothing happens.
///
/// # Panics
/// If the solution has another format or size than the problem.
pub(in crate::quantize) fn refine(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    passes: usize,
    damping: f32,
    pruned: &[bool],
    solution: &mut Solution,
    compute: &Compute<'_>,
) {
    let (columns, groups) = (problem.columns, grouped.groups(problem.columns));
    if problem.hessian.is_empty() || passes == 0 {
        return;
    }
    assert_eq!(solution.codes.len(), problem.weights.len(), "codes of a layer");
    assert_eq!(solution.scales.len() * columns, problem.weights.len() * groups, "scales of a layer");
    let damped = Damped::new(problem, damping);
    let missing: Vec<f32> = problem.weights.iter().zip(solution.decode(grouped, columns)).map(|(w, q)| w - q).collect();
    let mut gradient = vec![0.0; missing.len()];
    compute.product(&missing, problem.hessian, columns, &mut gradient);
    gradient.iter_mut().zip(&missing).for_each(|(g, d)| *g += damped.extra * d);

    let mut mins = solution.mins.chunks_mut(groups);
    let mut pruned = pruned.chunks(columns);
    let mut rows: Vec<Row<'_>> = solution
        .codes
        .chunks_mut(columns)
        .zip(solution.scales.chunks_mut(groups))
        .zip(gradient.chunks_mut(columns))
        .map(|((codes, scales), gradient)| Row {
            codes,
            scales,
            mins: mins.next().unwrap_or_default(),
            gradient,
            pruned: pruned.next().unwrap_or_default(),
        })
        .collect();
    compute.for_each_chunk(&mut rows, TASK_ROWS, |_, rows| {
        for row in rows {
            for _ in 0..passes {
                let scales = row.fit_scales(grouped, &damped);
                let codes = row.fit_codes(grouped, &damped);
                if !scales && !codes {
                    break;
                }
            }
        }
    });
}

/// The moments of the inputs, damped on the diagonal.
struct Damped<'a> {
    hessian: &'a [f32],
    columns: usize,
    extra: f32,
}

impl<'a> Damped<'a> {
    fn new(problem: &LayerProblem<'a>, damping: f32) -> Self {
        let columns = problem.columns;
        let mean = problem.hessian.iter().step_by(columns + 1).sum::<f32>() / columns as f32;
        Damped { hessian: problem.hessian, columns, extra: if mean > 0.0 { damping * mean } else { 1.0 } }
    }

    fn row(&self, column: usize) -> &'a [f32] {
        &self.hessian[column * self.columns..][..self.columns]
    }

    fn diagonal(&self, column: usize) -> f32 {
        self.hessian[column * (self.columns + 1)] + self.extra
    }

    /// `a H b^T` of vectors that are 0 outside of the columns that begin at `start`.
    fn between(&self, start: usize, a: &[f32], b: &[f32]) -> f32 {
        let product = |column: usize| {
            let row = &self.row(start + column)[start..][..b.len()];
            row.iter().zip(b).map(|(h, b)| h * b).sum::<f32>() + self.extra * b[column]
        };
        a.iter().enumerate().map(|(i, a)| a * product(i)).sum()
    }
}

/// A row of the layer.
struct Row<'a> {
    /// `(columns)`
    codes: &'a mut [u8],
    /// `(groups)`
    scales: &'a mut [f32],
    /// `(groups)` or empty
    mins: &'a mut [f32],
    /// `(columns)`: `(w - q) H`, half of the negative gradient.
    gradient: &'a mut [f32],
    /// `(columns)` or empty
    pruned: &'a [bool],
}

impl Row<'_> {
    /// Updates the gradient after the weight of `column` has grown by `step`.
    fn moved(&mut self, column: usize, step: f32, damped: &Damped<'_>) {
        self.gradient.iter_mut().zip(damped.row(column)).for_each(|(g, h)| *g -= step * h);
        self.gradient[column] -= step * damped.extra;
    }

    /// Moves each code to the level nearest to its best value. Returns whether any moved.
    fn fit_codes(&mut self, grouped: &GroupedFormat, damped: &Damped<'_>) -> bool {
        let mut any = false;
        for column in 0..self.codes.len() {
            if self.pruned.get(column) == Some(&true) {
                continue;
            }
            let group = column / grouped.group;
            let (scale, min) = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            let (code, diagonal, gradient) = (self.codes[column], damped.diagonal(column), self.gradient[column]);
            let value = grouped.format.value(code, scale, min);
            let better = grouped.format.code(value + gradient / diagonal, scale, min);
            let step = grouped.format.value(better, scale, min) - value;
            // Rounding errors of the sums must not move a code back and forth between two equally good levels.
            if better != code && step * (2.0 * gradient - step * diagonal) > 0.0 {
                self.codes[column] = better;
                self.moved(column, step, damped);
                any = true;
            }
        }
        any
    }

    /// Moves each group's scale and minimum to the best values for its codes. Returns whether any moved.
    fn fit_scales(&mut self, grouped: &GroupedFormat, damped: &Damped<'_>) -> bool {
        let mut any = false;
        let ones = vec![1.0; grouped.group];
        let mut levels = vec![0.0; grouped.group];
        for group in 0..self.scales.len() {
            let start = group * grouped.group;
            let own = start..start + grouped.group;
            levels
                .iter_mut()
                .zip(&self.codes[own.clone()])
                .for_each(|(level, code)| *level = grouped.format.level(*code));
            let parabola = Parabola::new(grouped, damped, start, &levels, &ones, &self.gradient[own]);
            let found = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            let (scale, min) = parabola.top();
            let better = (rounded(found.0 + scale), rounded(found.1 + min));
            let (scale, min) = (better.0 - found.0, better.1 - found.1);
            // Rounding to F16 may overshoot. With a scale of 0 no code could ever move again.
            if better == found || better.0 == 0.0 || parabola.gain(scale, min) <= 0.0 {
                continue;
            }
            self.scales[group] = better.0;
            if let Some(min) = self.mins.get_mut(group) {
                *min = better.1;
            }
            for (i, level) in levels.iter().enumerate() {
                self.moved(start + i, scale * level + min, damped);
            }
            any = true;
        }
        any
    }
}

/// The decrease of the loss as a quadratic function of the change of a group's scale and minimum.
struct Parabola {
    /// Half of the slopes along scale and minimum.
    slopes: (f32, f32),
    /// The curvatures along scale and minimum.
    curves: (f32, f32),
    /// The mixed curvature.
    both: f32,
}

impl Parabola {
    fn new(
        grouped: &GroupedFormat,
        damped: &Damped<'_>,
        start: usize,
        levels: &[f32],
        ones: &[f32],
        gradient: &[f32],
    ) -> Parabola {
        let rise = gradient.iter().zip(levels).map(|(g, level)| g * level).sum::<f32>();
        let curve = damped.between(start, levels, levels);
        if !grouped.format.has_min() {
            return Parabola { slopes: (rise, 0.0), curves: (curve, 0.0), both: 0.0 };
        }
        let (flat, both) = (damped.between(start, ones, ones), damped.between(start, ones, levels));
        Parabola { slopes: (rise, gradient.iter().sum()), curves: (curve, flat), both }
    }

    fn gain(&self, scale: f32, min: f32) -> f32 {
        let along = |step: f32, slope: f32, curve: f32| step * (2.0 * slope - step * curve);
        along(scale, self.slopes.0, self.curves.0) + along(min, self.slopes.1, self.curves.1)
            - 2.0 * scale * min * self.both
    }

    /// The changes of scale and minimum with the largest decrease.
    fn top(&self) -> (f32, f32) {
        let ((rise, lift), (curve, flat), both) = (self.slopes, self.curves, self.both);
        let alone = |slope: f32, curve: f32| if curve > 0.0 { slope / curve } else { 0.0 };
        let determinant = curve * flat - both * both;
        if flat == 0.0 {
            (alone(rise, curve), 0.0)
        } else if determinant > 1e-4 * curve * flat {
            ((rise * flat - lift * both) / determinant, (lift * curve - rise * both) / determinant)
        } else {
            // If all codes are equal the scale is undetermined.
            (0.0, alone(lift, flat))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::format::{Format, tests::codes};
    use crate::quantize::recipes::fixtures::*;
    use crate::quantize::recipes::rtn;

    #[test]
    fn every_pass_lowers_the_loss_in_every_format() {
        with_layer(2, |problem, compute| {
            for format in Format::ALL {
                for group in [32, 64, COLUMNS].into_iter().filter(|group| group % format.block() == 0) {
                    let grouped = GroupedFormat { format, group };
                    let mut solution = rtn::solve(problem, &grouped, false, compute);
                    let first = error_of(problem, &grouped, &solution);
                    let mut last = first;
                    for _ in 0..3 {
                        refine(problem, &grouped, 1, 0.0, &[], &mut solution, compute);
                        let now = error_of(problem, &grouped, &solution);
                        assert!(now <= last * (1.0 + 1e-5), "{grouped:?}: from {last} to {now}");
                        last = now;
                    }
                    assert!(last < 0.5 * first, "{grouped:?}: from {first} to {last}");
                }
            }
        });
    }

    #[test]
    fn codes_one_level_away_from_the_weights_find_them() {
        // Independent inputs: every code has a best value of its own, and the scale is right already.
        let mut hessian = vec![0.0; 64 * 64];
        (0..64).for_each(|i| hessian[i * 65] = 1.0 + (i % 5) as f32);
        for format in Format::ALL {
            let grouped = GroupedFormat { format, group: format.block() };
            let mut right = Solution::zeroed(&grouped, 3, 64);
            // Not the last code, so that each can be one level higher.
            let few = codes(format).len().min(16) - 1;
            right.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 7 % few) as u8);
            right.scales.fill(0.5);
            right.mins.fill(-2.25);
            let weights = right.decode(&grouped, 64);
            let problem = LayerProblem::new(&weights, 3, 64, &hessian, &[]).unwrap();
            let mut found = right.clone();
            // Only every fourth, so that moving the scale first is not worth it.
            found.codes.iter_mut().step_by(4).for_each(|code| *code += 1);
            with_threads(1, |compute| refine(&problem, &grouped, 4, 0.003, &[], &mut found, compute));
            assert_eq!(found.decode(&grouped, 64), weights, "{format:?}");
        }
    }

    #[test]
    fn the_best_scale_for_the_codes_is_found() {
        let (weights, mut hessian) = (bell(32, 3), vec![0.0; 32 * 32]);
        (0..32).for_each(|i| hessian[i * 33] = 1.0);
        let problem = LayerProblem::new(&weights, 1, 32, &hessian, &[]).unwrap();
        for format in [Format::Q4_0, Format::Q4_1] {
            let grouped = GroupedFormat { format, group: 32 };
            let mut solution = with_threads(1, |compute| rtn::solve(&problem, &grouped, false, compute));
            with_threads(1, |compute| {
                refine(&problem, &grouped, 50, 0.0, &[], &mut solution, compute);
            });
            let loss = |solution: &Solution| error_of(&problem, &grouped, solution);
            for (scale, min) in [(1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)] {
                let mut other = solution.clone();
                other.scales[0] = rounded(other.scales[0] * scale);
                other.mins.iter_mut().for_each(|m| *m = rounded(*m * min));
                assert!(loss(&solution) <= loss(&other), "{format:?} with {scale}, {min}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let grouped = GroupedFormat { format: Format::Q4_1, group: 32 };
        assert_threads_change_nothing(|problem, compute| {
            let mut solution = rtn::solve(problem, &grouped, true, compute);
            refine(problem, &grouped, 4, 0.003, &[], &mut solution, compute);
            solution
        });
    }
}
