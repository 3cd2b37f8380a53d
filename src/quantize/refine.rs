//! Coordinate descent on a layer that is on its grid already: each code and each scale is moved to where the layer's output
//! is best while all others stay, until nothing moves (in the manner of CDQuant, Nair and Suggala 2024, arXiv 2406.17542, and
//! of LDLQ's successors).
//!
//! GPTQ looks ahead only: a column never hears of those rounded after it. This looks both ways, and every step lowers
//! `tr((W - Q) H (W - Q)^T)`, so what a recipe found can only become better.

use super::compute::Compute;
use super::problem::{Format, Problem, Solution, rounded};

/// Rows that one thread takes together.
const TASK_ROWS: usize = 8;

/// Improves `solution`, whose format is `format`, in place: all codes and scales are visited `passes` times at most, and a row
/// that no longer changes ends earlier. `damping` is added to the mean squares of the inputs, in units of their mean. Without
/// known inputs nothing is done.
///
/// # Panics
/// When the solution is of another format or size than the problem.
pub fn refine(
    problem: &Problem<'_>,
    format: &Format,
    passes: usize,
    damping: f32,
    solution: &mut Solution,
    compute: &Compute<'_>,
) {
    let (columns, groups) = (problem.columns, format.groups(problem.columns));
    if problem.hessian.is_empty() || passes == 0 {
        return;
    }
    assert_eq!(solution.codes.len(), problem.weights.len(), "codes of a layer");
    assert_eq!(solution.scales.len() * columns, problem.weights.len() * groups, "scales of a layer");
    let damped = Damped::new(problem, damping);
    let missing: Vec<f32> = problem.weights.iter().zip(solution.decode(format, columns)).map(|(w, q)| w - q).collect();
    let mut gradient = vec![0.0; missing.len()];
    compute.product(&missing, problem.hessian, columns, &mut gradient);
    gradient.iter_mut().zip(&missing).for_each(|(g, d)| *g += damped.extra * d);

    let mut mins = solution.mins.chunks_mut(groups);
    let mut rows: Vec<Row<'_>> = solution
        .codes
        .chunks_mut(columns)
        .zip(solution.scales.chunks_mut(groups))
        .zip(gradient.chunks_mut(columns))
        .map(|((codes, scales), gradient)| Row { codes, scales, mins: mins.next().unwrap_or_default(), gradient })
        .collect();
    compute.for_each_chunk(&mut rows, TASK_ROWS, |_, rows| {
        for row in rows {
            for _ in 0..passes {
                let scales = row.fit_scales(format, &damped);
                let codes = row.fit_codes(format, &damped);
                if !scales && !codes {
                    break;
                }
            }
        }
    });
}

/// The moments of the inputs with something added to the diagonal.
struct Damped<'a> {
    hessian: &'a [f32],
    columns: usize,
    extra: f32,
}

impl<'a> Damped<'a> {
    fn new(problem: &Problem<'a>, damping: f32) -> Self {
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

    /// `a H b^T` of vectors that are 0 outside of the columns from `start` on.
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
    /// `(columns)`: `(w - q) H`, half of what the loss falls by when a weight grows.
    gradient: &'a mut [f32],
}

impl Row<'_> {
    /// Says that the weight of `column` has grown by `step`.
    fn moved(&mut self, column: usize, step: f32, damped: &Damped<'_>) {
        self.gradient.iter_mut().zip(damped.row(column)).for_each(|(g, h)| *g -= step * h);
        self.gradient[column] -= step * damped.extra;
    }

    /// Moves each code to the level nearest to the best value. Whether any moved.
    fn fit_codes(&mut self, format: &Format, damped: &Damped<'_>) -> bool {
        let mut any = false;
        for column in 0..self.codes.len() {
            let group = column / format.group;
            let (scale, min) = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            let (code, diagonal, gradient) = (self.codes[column], damped.diagonal(column), self.gradient[column]);
            let value = format.grid.value(code, scale, min);
            let better = format.grid.code(value + gradient / diagonal, scale, min);
            let step = format.grid.value(better, scale, min) - value;
            // Rounding of the sums must not send a code back and forth between two levels that are equally good.
            if better != code && step * (2.0 * gradient - step * diagonal) > 0.0 {
                self.codes[column] = better;
                self.moved(column, step, damped);
                any = true;
            }
        }
        any
    }

    /// Moves each group's scale and minimum to the best for its codes. Whether any moved.
    fn fit_scales(&mut self, format: &Format, damped: &Damped<'_>) -> bool {
        let mut any = false;
        let ones = vec![1.0; format.group];
        let mut levels = vec![0.0; format.group];
        for group in 0..self.scales.len() {
            let start = group * format.group;
            let own = start..start + format.group;
            levels.iter_mut().zip(&self.codes[own.clone()]).for_each(|(level, code)| *level = format.grid.level(*code));
            let parabola = Parabola::new(format, damped, start, &levels, &ones, &self.gradient[own]);
            let found = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            let (scale, min) = parabola.top();
            let better = (rounded(found.0 + scale), rounded(found.1 + min));
            let (scale, min) = (better.0 - found.0, better.1 - found.1);
            // Rounding to F16 may lead past the top and down again. Without scale no code could ever move.
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

/// What the loss falls by when a group's scale and minimum grow: a quadratic function of both.
struct Parabola {
    /// Half of the slopes along scale and minimum.
    slopes: (f32, f32),
    /// The curvatures, and what couples the two.
    curves: (f32, f32),
    both: f32,
}

impl Parabola {
    fn new(
        format: &Format,
        damped: &Damped<'_>,
        start: usize,
        levels: &[f32],
        ones: &[f32],
        gradient: &[f32],
    ) -> Parabola {
        let rise = gradient.iter().zip(levels).map(|(g, level)| g * level).sum::<f32>();
        let curve = damped.between(start, levels, levels);
        if !format.grid.has_min() {
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

    /// The steps of scale and minimum that gain most.
    fn top(&self) -> (f32, f32) {
        let ((rise, lift), (curve, flat), both) = (self.slopes, self.curves, self.both);
        let alone = |slope: f32, curve: f32| if curve > 0.0 { slope / curve } else { 0.0 };
        let determinant = curve * flat - both * both;
        if flat == 0.0 {
            (alone(rise, curve), 0.0)
        } else if determinant > 1e-4 * curve * flat {
            ((rise * flat - lift * both) / determinant, (lift * curve - rise * both) / determinant)
        } else {
            // Codes that are all the same leave the scale undetermined.
            (0.0, alone(lift, flat))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gptq;
    use super::super::gptq::tests::{COLUMNS, layer, with_threads};
    use super::super::problem::{Grid, error};
    use super::super::rtn::{self, tests::bell};
    use super::*;

    const GRIDS: [Grid; 5] = [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl, Grid::Q5_0, Grid::Q8_0];

    #[test]
    fn every_pass_lowers_the_loss_on_every_grid() {
        with_threads(2, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            for grid in GRIDS {
                for group in [32, 64, COLUMNS] {
                    let format = Format { grid, group };
                    let mut solution = rtn::solve(&problem, &format, false, compute);
                    let first = error(&problem, &solution.decode(&format, COLUMNS));
                    let mut last = first;
                    for _ in 0..3 {
                        refine(&problem, &format, 1, 0.0, &mut solution, compute);
                        let now = error(&problem, &solution.decode(&format, COLUMNS));
                        assert!(now <= last * (1.0 + 1e-5), "{format:?}: from {last} to {now}");
                        last = now;
                    }
                    assert!(last < 0.5 * first, "{format:?}: from {first} to {last}");
                }
            }
        });
    }

    #[test]
    fn what_gptq_found_becomes_better_still() {
        with_threads(2, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            for grid in [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl] {
                let format = Format { grid, group: 32 };
                let options = gptq::Options { passes: 0, ..gptq::Options::default() };
                let mut solution = gptq::solve(&problem, &format, &options, compute);
                let before = error(&problem, &solution.decode(&format, COLUMNS));
                refine(&problem, &format, 4, 0.003, &mut solution, compute);
                let after = error(&problem, &solution.decode(&format, COLUMNS));
                assert!(after < 0.95 * before, "{grid:?}: from {before} to {after}");
            }
        });
    }

    #[test]
    fn codes_that_stand_next_to_the_weights_find_them() {
        // Inputs that do not depend on each other: every code has its own best, and the scale is the right one already.
        let mut hessian = vec![0.0; 64 * 64];
        (0..64).for_each(|i| hessian[i * 65] = 1.0 + (i % 5) as f32);
        for grid in GRIDS {
            let format = Format { grid, group: 32 };
            let mut right = Solution::zeroed(&format, 3, 64);
            right.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 7 % 15) as u8);
            right.scales.fill(0.5);
            right.mins.fill(-2.25);
            let weights = right.decode(&format, 64);
            let problem = Problem::new(&weights, 3, 64, &hessian, &[]).unwrap();
            let mut found = right.clone();
            // Every fourth, so that the scale is not worth changing first.
            found.codes.iter_mut().step_by(4).for_each(|code| *code += 1);
            with_threads(1, |compute| refine(&problem, &format, 4, 0.003, &mut found, compute));
            assert_eq!(found.decode(&format, 64), weights, "{grid:?}");
        }
    }

    #[test]
    fn the_best_scale_for_the_codes_is_found() {
        let (weights, mut hessian) = (bell(32, 3), vec![0.0; 32 * 32]);
        (0..32).for_each(|i| hessian[i * 33] = 1.0);
        let problem = Problem::new(&weights, 1, 32, &hessian, &[]).unwrap();
        for grid in [Grid::Q4_0, Grid::Q4_1] {
            let format = Format { grid, group: 32 };
            let mut solution = with_threads(1, |compute| rtn::solve(&problem, &format, false, compute));
            with_threads(1, |compute| {
                refine(&problem, &format, 50, 0.0, &mut solution, compute);
            });
            let loss = |solution: &Solution| error(&problem, &solution.decode(&format, 32));
            for (scale, min) in [(1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)] {
                let mut other = solution.clone();
                other.scales[0] = rounded(other.scales[0] * scale);
                other.mins.iter_mut().for_each(|m| *m = rounded(*m * min));
                assert!(loss(&solution) <= loss(&other), "{grid:?} with {scale}, {min}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let of = |threads| {
            with_threads(threads, |compute| {
                let (weights, hessian) = layer(compute);
                let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
                let format = Format { grid: Grid::Q4_1, group: 32 };
                let mut solution = rtn::solve(&problem, &format, true, compute);
                refine(&problem, &format, 4, 0.003, &mut solution, compute);
                solution
            })
        };
        assert_eq!(of(1), of(3));
    }
}
