//! AWQ (Lin et al. 2023, arXiv 2306.00978): columns whose inputs are large are scaled up before rounding, so that they lose
//! less of themselves, and the norm before the layer divides by the same factors; then each group's range is clipped where
//! that loses less of the output.
//!
//! The paper measures candidates by running a sample of inputs. Here their moments give the same loss exactly. Factors are
//! folded into norms only; layers that read what no norm made, such as an attention's output, are clipped and no more.

use super::compute::Compute;
use super::problem::{BLOCK, Format, Problem, Solution, rounded};
use super::rtn;

/// Rows that one thread takes together.
const TASK_ROWS: usize = 8;
/// Exponents of the inputs' magnitudes that are tried, from 0 to 1.
const EXPONENTS: usize = 20;
/// Candidates of a group's range, each this much of the full range narrower than the one before.
const CLIPS: usize = 12;
const CLIP_STEP: f32 = 0.04;

/// Factors of the columns of layers that read the same input `(columns)`, all positive.
///
/// All `problems` have the same moments. Without known inputs, and where no candidate is better, all factors are 1.
pub fn factors(problems: &[Problem<'_>], format: &Format, compute: &Compute<'_>) -> Vec<f32> {
    let Some(first) = problems.first() else { return Vec::new() };
    let ones = vec![1.0; first.columns];
    if first.hessian.is_empty() || first.magnitude.is_empty() {
        return ones;
    }
    let mut best = (f64::INFINITY, ones);
    for step in 0..EXPONENTS {
        let factors = candidate(first.magnitude, step as f32 / EXPONENTS as f32);
        let loss: f64 = problems.iter().map(|problem| scaled_loss(problem, format, &factors, compute)).sum();
        if loss < best.0 {
            best = (loss, factors);
        }
    }
    best.1
}

/// Powers of the magnitudes, their largest and smallest equally far from 1.
fn candidate(magnitude: &[f32], exponent: f32) -> Vec<f32> {
    let mut factors: Vec<f32> = magnitude.iter().map(|x| x.max(1e-4).powf(exponent)).collect();
    let (least, most) = factors.iter().fold((f32::INFINITY, 0.0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let middle = (least * most).sqrt();
    factors.iter_mut().for_each(|factor| *factor = (*factor / middle).max(1e-4));
    factors
}

/// What plain rounding of the scaled layer loses of its output.
fn scaled_loss(problem: &Problem<'_>, format: &Format, factors: &[f32], compute: &Compute<'_>) -> f64 {
    let columns = problem.columns;
    let scaled = scale_columns(problem.weights, factors);
    let plain = Problem { weights: &scaled, hessian: &[], magnitude: &[], ..*problem };
    let mut missing = rtn::solve(&plain, format, false, compute).decode(format, columns);
    for (row, weights) in missing.chunks_mut(columns).zip(problem.weights.chunks(columns)) {
        for ((missing, weight), factor) in row.iter_mut().zip(weights).zip(factors) {
            *missing = weight - *missing / factor;
        }
    }
    let mut gradient = vec![0.0; missing.len()];
    compute.product(&missing, problem.hessian, columns, &mut gradient);
    missing.iter().zip(&gradient).map(|(d, g)| f64::from(*d) * f64::from(*g)).sum()
}

/// Weights `(rows, columns)` with column `i` times `factors[i]`.
pub fn scale_columns(weights: &[f32], factors: &[f32]) -> Vec<f32> {
    weights.chunks(factors.len()).flat_map(|row| row.iter().zip(factors).map(|(w, factor)| w * factor)).collect()
}

/// The moments of inputs of which number `i` is divided by `factors[i]`: `(columns, columns)` and `(columns)`.
pub fn scale_moments(problem: &Problem<'_>, factors: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rows = problem.hessian.chunks(problem.columns).zip(factors);
    let hessian = rows.flat_map(|(row, own)| row.iter().zip(factors).map(move |(h, other)| h / (own * other)));
    let magnitude = problem.magnitude.iter().zip(factors).map(|(x, factor)| x / factor);
    (hessian.collect(), magnitude.collect())
}

/// Rounds a layer to nearest with the range of each group clipped where its share of the output loses least by that: the
/// group's own moments are what counts. Without known inputs this is [`rtn::solve`].
pub fn solve(problem: &Problem<'_>, format: &Format, compute: &Compute<'_>) -> Solution {
    let mut solution = rtn::solve(problem, format, false, compute);
    if problem.hessian.is_empty() {
        return solution;
    }
    let (columns, groups) = (problem.columns, format.groups(problem.columns));
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
                let own = group * format.group..(group + 1) * format.group;
                let min = mins.get_mut(group);
                clip(problem, format, own.start, &weights[own.clone()], &mut codes[own], &mut scales[group], min);
            }
        }
    });
    solution
}

/// Finds the range of one group, whose columns begin at `start`, and its codes.
fn clip(
    problem: &Problem<'_>,
    format: &Format,
    start: usize,
    weights: &[f32],
    codes: &mut [u8],
    scale: &mut f32,
    mut min: Option<&mut f32>,
) {
    let (full, lowest) = (*scale, min.as_deref().copied().unwrap_or(0.0));
    let (low, high) = format.grid.range();
    let mut missing = vec![0.0; weights.len()];
    let mut least = f32::INFINITY;
    for step in 0..CLIPS {
        let narrower = CLIP_STEP * step as f32;
        let tried = rounded(full * (1.0 - narrower));
        // With a minimum, both ends come nearer to the middle.
        let tried_min = if min.is_some() { rounded(lowest + full * (high - low) * narrower / 2.0) } else { 0.0 };
        for (missing, weight) in missing.iter_mut().zip(weights) {
            *missing = weight - format.grid.value(format.grid.code(*weight, tried, tried_min), tried, tried_min);
        }
        let loss = own_loss(problem, start, &missing);
        if loss < least {
            least = loss;
            *scale = tried;
            min.iter_mut().for_each(|min| **min = tried_min);
        }
    }
    let min = min.map_or(0.0, |min| *min);
    codes.iter_mut().zip(weights).for_each(|(code, weight)| *code = format.grid.code(*weight, *scale, min));
}

/// `d H d^T` of the columns from `start` on alone.
fn own_loss(problem: &Problem<'_>, start: usize, d: &[f32]) -> f32 {
    let product = |i: usize| {
        let row = &problem.hessian[(start + i) * problem.columns + start..][..d.len()];
        // Sums of blocks, so that compilers may take many numbers at once.
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
    use super::super::gptq::tests::{COLUMNS, layer, with_threads};
    use super::super::problem::{Grid, error};
    use super::super::rtn::tests::bell;
    use super::*;

    /// The mean magnitudes that bell-shaped inputs with these moments have, up to a factor.
    fn magnitude(hessian: &[f32]) -> Vec<f32> {
        hessian.iter().step_by(COLUMNS + 1).map(|square| square.sqrt()).collect()
    }

    #[test]
    fn large_inputs_get_large_factors_and_lose_less() {
        with_threads(2, |compute| {
            let (weights, hessian) = layer(compute);
            let magnitude = magnitude(&hessian);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &magnitude).unwrap();
            let format = Format { grid: Grid::Q4_0, group: 64 };
            let found = factors(&[problem], &format, compute);
            // Input 11 is twenty times as large as the others.
            let most = found.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            assert_eq!(most, 11);
            let ones = vec![1.0; COLUMNS];
            let loss = |factors: &[f32]| scaled_loss(&problem, &format, factors, compute);
            assert!(loss(&found) < 0.7 * loss(&ones), "{} and {}", loss(&found), loss(&ones));
        });
    }

    #[test]
    fn scaled_weights_on_scaled_inputs_give_the_same_outputs() {
        with_threads(1, |compute| {
            let (weights, hessian) = layer(compute);
            let magnitude = magnitude(&hessian);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &magnitude).unwrap();
            let factors: Vec<f32> = bell(COLUMNS, 4).iter().map(|x| x.exp()).collect();
            let other = bell(weights.len(), 12);
            let (scaled, scaled_other) = (scale_columns(&weights, &factors), scale_columns(&other, &factors));
            let (hessian, magnitude) = scale_moments(&problem, &factors);
            let scaled = Problem::new(&scaled, 40, COLUMNS, &hessian, &magnitude).unwrap();
            let (before, after) = (error(&problem, &other), error(&scaled, &scaled_other));
            assert!((before / after - 1.0).abs() < 1e-3, "{before} and {after}");
        });
    }

    #[test]
    fn clipping_loses_less_than_the_full_range_in_every_format() {
        with_threads(2, |compute| {
            let (weights, hessian) = layer(compute);
            let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &[]).unwrap();
            for grid in [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl] {
                for group in [64, COLUMNS] {
                    let format = Format { grid, group };
                    let full = rtn::solve(&problem, &format, false, compute).decode(&format, COLUMNS);
                    let clipped = solve(&problem, &format, compute).decode(&format, COLUMNS);
                    let (clipped, full) = (error(&problem, &clipped), error(&problem, &full));
                    assert!(clipped < full, "{format:?}: {clipped}, in full range {full}");
                }
            }
        });
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let of = |threads| {
            with_threads(threads, |compute| {
                let (weights, hessian) = layer(compute);
                let magnitude = magnitude(&hessian);
                let problem = Problem::new(&weights, 40, COLUMNS, &hessian, &magnitude).unwrap();
                let format = Format { grid: Grid::Q4_1, group: 64 };
                (factors(&[problem], &format, compute), solve(&problem, &format, compute))
            })
        };
        assert_eq!(of(1), of(3));
    }
}
