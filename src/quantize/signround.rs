//! SignRound (Cheng et al. 2023, arXiv 2309.05516): whether a weight is rounded up or down, and how far the scales reach, is
//! learned by steps of equal length against the sign of the loss's slope.
//!
//! The paper's loss is the output of a whole block of layers. Here it is that of one linear layer, which its inputs' moments
//! give exactly: `tr((W - Q) H (W - Q)^T)`, with the slope `-2 (W - Q) H`. So there is nothing to draw and no noise; a row
//! keeps the best that it has met.

use super::compute::Compute;
use super::problem::{Format, Problem, Solution, rounded};
use super::rtn;

/// Rows that one thread takes together.
const TASK_ROWS: usize = 8;
/// How much shorter a step of a scale is than one of an offset: all weights of a group move with their scale.
const SCALE_STEP: f32 = 0.3;
/// The least and the largest factor of a scale.
const STRETCH: (f32, f32) = (0.5, 1.5);

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Steps that are made. The first moves an offset by 1 / `steps`, the last hardly at all: half a code all together.
    pub steps: usize,
    /// Whether the scales to begin with are searched, or reach just as far as each group's largest weight.
    pub search: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { steps: 100, search: true }
    }
}

/// Rounds a layer so that its output changes least. Without known inputs this is [`rtn::solve`].
pub fn solve(problem: &Problem<'_>, format: &Format, options: &Options, compute: &Compute<'_>) -> Solution {
    let mut best = rtn::solve(problem, format, options.search, compute);
    if problem.hessian.is_empty() {
        return best;
    }
    let (rows, columns, groups) = (problem.rows, problem.columns, format.groups(problem.columns));
    let start = best.clone();
    let mut offsets = vec![0.0; rows * columns];
    let mut stretches = vec![1.0; rows * groups];
    let mut shifts = vec![0.0; rows * groups];
    let mut least = vec![f32::INFINITY; rows];
    let mut now = best.clone();
    let mut missing = vec![0.0; rows * columns];
    let mut gradient = vec![0.0; rows * columns];
    for step in 0..=options.steps {
        for ((missing, weight), value) in missing.iter_mut().zip(problem.weights).zip(now.decode(format, columns)) {
            *missing = weight - value;
        }
        compute.product(&missing, problem.hessian, columns, &mut gradient);
        let steps = options.steps.max(1) as f32;
        let rate = (1.0 - step as f32 / steps) / steps;
        let mut best_mins = best.mins.chunks_mut(groups);
        let mut mins = now.mins.chunks_mut(groups);
        let mut rows: Vec<Row<'_>> = (0..rows)
            .zip(now.codes.chunks_mut(columns).zip(now.scales.chunks_mut(groups)))
            .zip(best.codes.chunks_mut(columns).zip(best.scales.chunks_mut(groups)))
            .zip(offsets.chunks_mut(columns).zip(stretches.chunks_mut(groups).zip(shifts.chunks_mut(groups))))
            .zip(&mut least)
            .map(|((((index, now), best), (offsets, (stretches, shifts))), least)| Row {
                weights: &problem.weights[index * columns..][..columns],
                missing: &missing[index * columns..][..columns],
                gradient: &gradient[index * columns..][..columns],
                first: (&start.scales[index * groups..][..groups], start.mins.get(index * groups..).unwrap_or(&[])),
                now: (now.0, now.1, mins.next().unwrap_or_default()),
                best: (best.0, best.1, best_mins.next().unwrap_or_default()),
                offsets,
                stretches,
                shifts,
                least,
            })
            .collect();
        compute.for_each_chunk(&mut rows, TASK_ROWS, |_, rows| {
            for row in rows {
                row.keep_if_best();
                row.learn(format, rate);
                row.round(format);
            }
        });
    }
    best
}

/// Codes, scales and minima of a row.
type Rounded<'a> = (&'a mut [u8], &'a mut [f32], &'a mut [f32]);

/// What is known of a row.
struct Row<'a> {
    /// `(columns)`
    weights: &'a [f32],
    /// `(columns)`: what `now` lacks.
    missing: &'a [f32],
    /// `(columns)`: `missing H`, half of what the loss falls by when a weight grows.
    gradient: &'a [f32],
    /// Scales and minima at the beginning.
    first: (&'a [f32], &'a [f32]),
    now: Rounded<'a>,
    best: Rounded<'a>,
    /// `(columns)`: what is added before rounding, in steps of the grid.
    offsets: &'a mut [f32],
    /// `(groups)`: factors of the scales.
    stretches: &'a mut [f32],
    /// `(groups)`: what is added to the minima, in units of the scales at the beginning.
    shifts: &'a mut [f32],
    /// The loss of `best`.
    least: &'a mut f32,
}

impl Row<'_> {
    fn keep_if_best(&mut self) {
        let loss = self.missing.iter().zip(self.gradient).map(|(d, g)| d * g).sum::<f32>();
        if loss < *self.least {
            *self.least = loss;
            self.best.0.copy_from_slice(self.now.0);
            self.best.1.copy_from_slice(self.now.1);
            self.best.2.copy_from_slice(self.now.2);
        }
    }

    /// One step of length `rate`. Rounding counts as if it had the slope 1 (the straight-through estimate).
    fn learn(&mut self, format: &Format, rate: f32) {
        let (low, high) = format.grid.range();
        let unit = format.grid.spacing();
        for group in 0..self.now.1.len() {
            let own = group * format.group..(group + 1) * format.group;
            let (scale, min) = (self.now.1[group], self.now.2.get(group).copied().unwrap_or(0.0));
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            let (mut along_scale, mut along_min) = (0.0, 0.0);
            for column in own {
                let (gradient, place) = (self.gradient[column], (self.weights[column] - min) * inverse);
                let level = format.grid.level(self.now.0[column]);
                let aimed = place + self.offsets[column] * unit;
                // Inside of the grid the scale changes what is lost by rounding, beyond its ends the value itself.
                let is_inside = aimed > low - unit / 2.0 && aimed < high + unit / 2.0;
                along_scale += gradient * if is_inside { level - place } else { level };
                along_min += if is_inside { 0.0 } else { gradient };
                let offset = &mut self.offsets[column];
                *offset = (*offset + rate * sign(gradient * scale)).clamp(-0.5, 0.5);
            }
            let stretch = &mut self.stretches[group];
            *stretch = (*stretch + SCALE_STEP * rate * sign(along_scale * scale)).clamp(STRETCH.0, STRETCH.1);
            self.shifts[group] += SCALE_STEP * rate * (high - low) * sign(along_min * scale);
        }
    }

    /// Rounds with what has been learned.
    fn round(&mut self, format: &Format) {
        let unit = format.grid.spacing();
        for group in 0..self.now.1.len() {
            let first = self.first.0[group];
            let scale = rounded(first * self.stretches[group]);
            self.now.1[group] = scale;
            let min = match (self.now.2.get_mut(group), self.first.1.get(group)) {
                (Some(min), Some(at_first)) => {
                    *min = rounded(at_first + first * self.shifts[group]);
                    *min
                }
                _ => 0.0,
            };
            for column in group * format.group..(group + 1) * format.group {
                let aimed = self.weights[column] + self.offsets[column] * unit * scale;
                self.now.0[column] = format.grid.code(aimed, scale, min);
            }
        }
    }
}

/// -1, 0 or 1, where `signum` has no 0.
fn sign(x: f32) -> f32 {
    f32::from(i8::from(x > 0.0) - i8::from(x < 0.0))
}

#[cfg(test)]
mod tests {
    use super::super::gptq::tests::{COLUMNS, layer, with_threads};
    use super::super::problem::{Grid, error};
    use super::*;

    #[test]
    fn it_loses_far_less_of_the_output_than_rounding_in_every_format() {
        with_threads(2, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            for grid in [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl] {
                for group in [32, 64, COLUMNS] {
                    let format = Format { grid, group };
                    let rounded = rtn::solve(&problem, &format, true, compute).decode(&format, COLUMNS);
                    let learned = solve(&problem, &format, &Options::default(), compute).decode(&format, COLUMNS);
                    let (own, rounded) = (error(&problem, &learned), error(&problem, &rounded));
                    assert!(own < 0.6 * rounded, "{format:?}: {own}, by rounding {rounded}");
                }
            }
        });
    }

    #[test]
    fn no_step_at_all_leaves_what_rounding_gives() {
        with_threads(1, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            let format = Format { grid: Grid::Q4_1, group: 32 };
            let options = Options { steps: 0, ..Options::default() };
            assert_eq!(solve(&problem, &format, &options, compute), rtn::solve(&problem, &format, true, compute));
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let of = |threads| {
            with_threads(threads, |compute| {
                let (weights, hessian) = layer(compute);
                let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
                let options = Options { steps: 10, ..Options::default() };
                solve(&problem, &Format { grid: Grid::Iq4Nl, group: 64 }, &options, compute)
            })
        };
        assert_eq!(of(1), of(3));
    }
}
