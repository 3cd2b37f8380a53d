//! SignRound (Cheng et al. 2023, arXiv 2309.05516): rounding offsets and scales are learned by steps of equal length against
//! the sign of the gradient.
//!
//! The paper's loss is the output error of a block of layers on a random sample. Here it is the output error of one linear
//! layer, `tr((W - Q) H (W - Q)^T)` with the gradient `-2 (W - Q) H`, which the second moments give exactly. Nothing is drawn at
//! random, and each row keeps the best rounding it has seen.

use super::rtn;
use crate::quantize::compute::Compute;
use crate::quantize::format::{GroupedFormat, rounded};
use crate::quantize::layer::{LayerProblem, Solution};

/// Rows per task.
const TASK_ROWS: usize = 8;
/// The length of a scale's step relative to an offset's: all weights of a group move with their scale.
const SCALE_STEP: f32 = 0.3;
/// The range of a scale's factor.
const STRETCH: (f32, f32) = (0.5, 1.5);

/// Options of [`Recipe::Signround`](super::Recipe::Signround).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct SignroundOptions {
    /// Number of steps. Their length falls linearly from 1 / `steps` to 0, so that an offset moves by half a code in total.
    pub steps: usize,
    /// Whether the best initial scales are searched; otherwise they fit the largest weight of each group.
    pub search: bool,
}

impl Default for SignroundOptions {
    fn default() -> Self {
        SignroundOptions { steps: 100, search: true }
    }
}

setters!(SignroundOptions { with_steps(steps: usize), with_search(search: bool) });

/// Rounds a layer so that its output changes least. Without calibration this is [`rtn::solve`].
pub(in crate::quantize) fn solve(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    options: &SignroundOptions,
    compute: &Compute<'_>,
) -> Solution {
    let mut best = rtn::solve(problem, grouped, options.search, compute);
    if problem.hessian.is_empty() {
        return best;
    }
    let (rows, columns, groups) = (problem.rows, problem.columns, grouped.groups(problem.columns));
    let start = best.clone();
    let mut offsets = vec![0.0; rows * columns];
    let mut stretches = vec![1.0; rows * groups];
    let mut shifts = vec![0.0; rows * groups];
    let mut least = vec![f32::INFINITY; rows];
    let mut now = best.clone();
    let mut missing = vec![0.0; rows * columns];
    let mut gradient = vec![0.0; rows * columns];
    for step in 0..=options.steps {
        for ((missing, weight), value) in missing.iter_mut().zip(problem.weights).zip(now.decode(grouped, columns)) {
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
                row.learn(grouped, rate);
                row.round(grouped);
            }
        });
    }
    best
}

/// Codes, scales and minimums of a row.
type Rounded<'a> = (&'a mut [u8], &'a mut [f32], &'a mut [f32]);

/// The state of a row.
struct Row<'a> {
    /// `(columns)`
    weights: &'a [f32],
    /// `(columns)`: the weights minus those of `now`.
    missing: &'a [f32],
    /// `(columns)`: `missing H`, half of the negative gradient.
    gradient: &'a [f32],
    /// Initial scales and minimums.
    first: (&'a [f32], &'a [f32]),
    now: Rounded<'a>,
    best: Rounded<'a>,
    /// `(columns)`: added before rounding, in units of the distance between levels.
    offsets: &'a mut [f32],
    /// `(groups)`: factors of the scales.
    stretches: &'a mut [f32],
    /// `(groups)`: added to the minimums, in units of the initial scales.
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

    /// Takes one step of length `rate`. Rounding counts as the identity in the gradient (the straight-through estimator).
    fn learn(&mut self, grouped: &GroupedFormat, rate: f32) {
        let (low, high) = grouped.format.range();
        let unit = grouped.format.spacing();
        for group in 0..self.now.1.len() {
            let own = group * grouped.group..(group + 1) * grouped.group;
            let (scale, min) = (self.now.1[group], self.now.2.get(group).copied().unwrap_or(0.0));
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            let (mut along_scale, mut along_min) = (0.0, 0.0);
            for column in own {
                let (gradient, place) = (self.gradient[column], (self.weights[column] - min) * inverse);
                let level = grouped.format.level(self.now.0[column]);
                let aimed = place + self.offsets[column] * unit;
                // Within the range of the format the scale changes the rounding error, beyond it the clipped value.
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

    /// Rounds with the learned offsets and scales.
    fn round(&mut self, grouped: &GroupedFormat) {
        let unit = grouped.format.spacing();
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
            for column in group * grouped.group..(group + 1) * grouped.group {
                let aimed = self.weights[column] + self.offsets[column] * unit * scale;
                self.now.0[column] = grouped.format.code(aimed, scale, min);
            }
        }
    }
}

/// -1, 0 or 1; `signum` never returns 0.
fn sign(x: f32) -> f32 {
    f32::from(i8::from(x > 0.0) - i8::from(x < 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::format::Format;
    use crate::quantize::recipes::fixtures::*;

    #[test]
    fn the_error_is_far_below_rounding_in_every_format() {
        let options = SignroundOptions::default();
        assert_beats(2, 0.6, rtn::solve, |problem, grouped, compute| solve(problem, grouped, &options, compute));
    }

    #[test]
    fn without_steps_it_is_rounding_to_nearest() {
        with_layer(1, |problem, compute| {
            let grouped = GroupedFormat { format: Format::Q4_1, group: 32 };
            let options = SignroundOptions { steps: 0, ..SignroundOptions::default() };
            let rounded = rtn::solve(problem, &grouped, true, compute);
            assert_eq!(solve(problem, &grouped, &options, compute), rounded);
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let grouped = GroupedFormat { format: Format::Iq4Nl, group: 64 };
        let options = SignroundOptions { steps: 10, ..SignroundOptions::default() };
        assert_threads_change_nothing(|problem, compute| solve(problem, &grouped, &options, compute));
    }
}
