//! AWQ (Lin et al. 2023, arXiv 2306.00978): columns with large inputs are scaled up before rounding, so that their relative
//! error is smaller, and the norm before the layer divides by the same factors. Then the range of each group is clipped where
//! that reduces the error of the output.
//!
//! The paper measures candidates on a sample of inputs; here the second moments give the same loss exactly. Only norms absorb
//! factors: a layer whose input comes from elsewhere, such as the output of attention, is clipped but not scaled.

use super::rtn;
use crate::quantize::compute::Compute;
use crate::quantize::format::{BLOCK, GroupedFormat, rounded};
use crate::quantize::layer::{LayerProblem, Solution};

/// Rows per task.
const TASK_ROWS: usize = 8;
/// Exponents of the magnitudes to try, evenly spaced from 0 to 1.
const EXPONENTS: usize = 20;
/// Ranges to try per group, each narrower than the one before by this share of the full range.
const CLIPS: usize = 12;
const CLIP_STEP: f32 = 0.04;

/// The column factors `(columns)` for layers that read the same input, all positive.
///
/// All `problems` have the same moments. Without calibration, and if no candidate is better, all factors are 1.
pub(in crate::quantize) fn factors(
    problems: &[LayerProblem<'_>],
    grouped: &GroupedFormat,
    compute: &Compute<'_>,
) -> Vec<f32> {
    let Some(first) = problems.first() else { return Vec::new() };
    let ones = vec![1.0; first.columns];
    if first.hessian.is_empty() || first.magnitude.is_empty() {
        return ones;
    }
    let mut best = (f64::INFINITY, ones);
    for step in 0..EXPONENTS {
        let factors = candidate(first.magnitude, step as f32 / EXPONENTS as f32);
        let loss: f64 = problems.iter().map(|problem| scaled_loss(problem, grouped, &factors, compute)).sum();
        if loss < best.0 {
            best = (loss, factors);
        }
    }
    best.1
}

/// `magnitude` to the power of `exponent`, scaled so that the largest and the smallest factor are equally far from 1.
fn candidate(magnitude: &[f32], exponent: f32) -> Vec<f32> {
    let mut factors: Vec<f32> = magnitude.iter().map(|x| x.max(1e-4).powf(exponent)).collect();
    let (least, most) = factors.iter().fold((f32::INFINITY, 0.0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let middle = (least * most).sqrt();
    factors.iter_mut().for_each(|factor| *factor = (*factor / middle).max(1e-4));
    factors
}

/// The squared output error of rounding the scaled layer to nearest.
fn scaled_loss(problem: &LayerProblem<'_>, grouped: &GroupedFormat, factors: &[f32], compute: &Compute<'_>) -> f64 {
    let columns = problem.columns;
    let scaled = scale_columns(problem.weights, factors);
    let plain = LayerProblem { weights: &scaled, hessian: &[], magnitude: &[], ..*problem };
    let mut missing = rtn::solve(&plain, grouped, false, compute).decode(grouped, columns);
    for (row, weights) in missing.chunks_mut(columns).zip(problem.weights.chunks(columns)) {
        for ((missing, weight), factor) in row.iter_mut().zip(weights).zip(factors) {
            *missing = weight - *missing / factor;
        }
    }
    let mut gradient = vec![0.0; missing.len()];
    compute.product(&missing, problem.hessian, columns, &mut gradient);
    missing.iter().zip(&gradient).map(|(d, g)| f64::from(*d) * f64::from(*g)).sum()
}

/// The weights `(rows, columns)` with column `i` multiplied by `factors[i]`.
pub(in crate::quantize) fn scale_columns(weights: &[f32], factors: &[f32]) -> Vec<f32> {
    weights.chunks(factors.len()).flat_map(|row| row.iter().zip(factors).map(|(w, factor)| w * factor)).collect()
}

/// The moments `(columns, columns)` and `(columns)` of the inputs when input `i` is divided by `factors[i]`.
pub(in crate::quantize) fn scale_moments(problem: &LayerProblem<'_>, factors: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = problem.hessian.chunks(problem.columns).zip(factors);
    let hessian = rows.flat_map(|(row, own)| row.iter().zip(factors).map(move |(h, other)| h / (own * other)));
    let magnitude = problem.magnitude.iter().zip(factors).map(|(x, factor)| x / factor);
    (hessian.collect(), magnitude.collect())
}

/// Rounds a layer to nearest, with the range of each group clipped to minimize the error of the group's own share of the
/// output. Without calibration this is [`rtn::solve`].
pub(in crate::quantize) fn solve(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    compute: &Compute<'_>,
) -> Solution {
    let mut solution = rtn::solve(problem, grouped, false, compute);
    if problem.hessian.is_empty() {
        return solution;
    }
    let (columns, groups) = (problem.columns, grouped.groups(problem.columns));
    let mut mins = solution.mins.chunks_mut(groups);
    let mut rows: Vec<_> = solution
        .codes
        .chunks_mut(columns)
        .zip(solution.scales.chunks_mut(groups))
        .map(|(codes, scales)| (codes, scales, mins.next().unwrap_or_default()))
        .collect();
    compute.for_each_chunk(&mut rows, TASK_ROWS, |task, rows| {
        for (i, (codes, scales, mins)) in rows.iter_mut().enumerate() {
            let weights = &problem.weights[(task * TASK_ROWS + i) * columns..][..columns];
            for group in 0..groups {
                let own = group * grouped.group..(group + 1) * grouped.group;
                let min = mins.get_mut(group);
                clip(problem, grouped, own.start, &weights[own.clone()], &mut codes[own], &mut scales[group], min);
            }
        }
    });
    solution
}

/// Finds the range and the codes of the group whose first column is `start`.
fn clip(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    start: usize,
    weights: &[f32],
    codes: &mut [u8],
    scale: &mut f32,
    mut min: Option<&mut f32>,
) {
    let (full, lowest) = (*scale, min.as_deref().copied().unwrap_or(0.0));
    let (low, high) = grouped.format.range();
    let mut missing = vec![0.0; weights.len()];
    let mut least = f32::INFINITY;
    for step in 0..CLIPS {
        let narrower = CLIP_STEP * step as f32;
        let tried = rounded(full * (1.0 - narrower));
        // With a minimum both ends move towards the middle.
        let tried_min = if min.is_some() { rounded(lowest + full * (high - low) * narrower / 2.0) } else { 0.0 };
        for (missing, weight) in missing.iter_mut().zip(weights) {
            *missing = weight - grouped.format.value(grouped.format.code(*weight, tried, tried_min), tried, tried_min);
        }
        let loss = own_loss(problem, start, &missing);
        if loss < least {
            least = loss;
            *scale = tried;
            min.iter_mut().for_each(|min| **min = tried_min);
        }
    }
    let min = min.map_or(0.0, |min| *min);
    codes.iter_mut().zip(weights).for_each(|(code, weight)| *code = grouped.format.code(*weight, *scale, min));
}

/// `d H d^T` over the columns that begin at `start`.
fn own_loss(problem: &LayerProblem<'_>, start: usize, d: &[f32]) -> f32 {
    let product = |i: usize| {
        let row = &problem.hessian[(start + i) * problem.columns + start..][..d.len()];
        // One sum per lane lets the compiler vectorize.
        let blocks = row.as_chunks::<BLOCK>().0.iter().zip(d.as_chunks::<BLOCK>().0);
        let mut sums = [0.0f32; BLOCK];
        for (h, d) in blocks {
            (0..BLOCK).for_each(|lane| sums[lane] += h[lane] * d[lane]);
        }
        sums.iter().sum::<f32>()
    };
    d.iter().enumerate().map(|(i, d)| d * product(i)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::format::Format;
    use crate::quantize::layer::error;
    use crate::quantize::recipes::fixtures::*;

    #[test]
    fn large_inputs_get_large_factors_and_reduce_the_error() {
        with_layer(2, |problem, compute| {
            let grouped = GroupedFormat { format: Format::Q4_0, group: 64 };
            let found = factors(&[*problem], &grouped, compute);
            // Input 11 is twenty times as large as the others.
            let most = found.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            assert_eq!(most, 11);
            let ones = vec![1.0; COLUMNS];
            let loss = |factors: &[f32]| scaled_loss(problem, &grouped, factors, compute);
            assert!(loss(&found) < 0.7 * loss(&ones), "{} and {}", loss(&found), loss(&ones));
        });
    }

    #[test]
    fn scaled_weights_on_scaled_inputs_give_the_same_outputs() {
        with_layer(1, |problem, _| {
            let factors: Vec<f32> = bell(COLUMNS, 4).iter().map(|x| x.exp()).collect();
            let other = bell(problem.weights.len(), 12);
            let (weights, scaled_other) = (scale_columns(problem.weights, &factors), scale_columns(&other, &factors));
            let (hessian, magnitude) = scale_moments(problem, &factors);
            let scaled = LayerProblem::new(&weights, ROWS, COLUMNS, &hessian, &magnitude).unwrap();
            let (before, after) = (error(problem, &other), error(&scaled, &scaled_other));
            assert!((before / after - 1.0).abs() < 1e-3, "{before} and {after}");
        });
    }

    #[test]
    fn clipping_reduces_the_error_in_every_format() {
        with_layer(2, |problem, compute| {
            for grouped in four_bit_formats(&[64, COLUMNS]) {
                let full = error_of(problem, &grouped, &rtn::solve(problem, &grouped, false, compute));
                let clipped = error_of(problem, &grouped, &solve(problem, &grouped, compute));
                assert!(clipped < full, "{grouped:?}: {clipped}, in full range {full}");
            }
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let grouped = GroupedFormat { format: Format::Q4_1, group: 64 };
        assert_threads_change_nothing(|problem, compute| {
            (factors(&[*problem], &grouped, compute), solve(problem, &grouped, compute))
        });
    }
}
