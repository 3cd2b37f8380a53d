//! Rounding to nearest, with a search for the best scale.
//!
//! With calibration the search weights the squared error of each column by the mean square of its input, which llama.cpp calls
//! an importance matrix.

use crate::quantize::compute::Compute;
use crate::quantize::format::{Format, GroupedFormat, rounded};
use crate::quantize::layer::{LayerProblem, Solution};

/// Rows per task.
const TASK_ROWS: usize = 16;
/// Rounds of fitting scale and codes to each other after the search.
const REFINEMENTS: usize = 3;

/// Rounds a layer to the nearest codes. Without `search` the scale of a group fits its largest weight.
pub(in crate::quantize) fn solve(
    problem: &LayerProblem<'_>,
    grouped: &GroupedFormat,
    search: bool,
    compute: &Compute<'_>,
) -> Solution {
    let (columns, group) = (problem.columns, grouped.group);
    let importance = problem.importance();
    let mut solution = Solution::zeroed(grouped, problem.rows, columns);
    let Solution { codes, scales, mins } = &mut solution;
    let mut groups: Vec<_> = codes.chunks_mut(group).zip(scales).collect();
    let per_task = TASK_ROWS * grouped.groups(columns);
    let mut found_mins = vec![0.0; groups.len()];
    let mut tasks: Vec<_> = groups.chunks_mut(per_task).zip(found_mins.chunks_mut(per_task)).collect();
    compute.for_each_chunk(&mut tasks, 1, |task, chunk| {
        for (groups, mins) in chunk {
            for (i, ((codes, scale), min)) in groups.iter_mut().zip(mins.iter_mut()).enumerate() {
                let at = (task * per_task + i) * group;
                let weights = &problem.weights[at..][..group];
                let of = at % columns;
                let own = &importance[of..][..group];
                let own = if problem.is_blind() { &by_size(weights) } else { own };
                (**scale, *min) = fit(grouped.format, weights, own, search);
                for (code, weight) in codes.iter_mut().zip(weights) {
                    *code = grouped.format.code(*weight, **scale, *min);
                }
            }
        }
    });
    if grouped.format.has_min() {
        *mins = found_mins;
    }
    solution
}

/// The importance of each weight of a group without calibration: more for large weights, as in llama.cpp. The plain squared
/// error clips them too readily; on a small trained model it was no better than rounding without search.
fn by_size(weights: &[f32]) -> Vec<f32> {
    let mean = weights.iter().map(|weight| weight * weight).sum::<f32>() / weights.len() as f32;
    weights.iter().map(|weight| (mean + weight * weight).sqrt()).collect()
}

/// Scale and minimum, rounded to F16, for the `values` of one group. `importance` weights their squared errors.
pub(super) fn fit(format: Format, values: &[f32], importance: &[f32], search: bool) -> (f32, f32) {
    if format.has_min() {
        fit_with_min(format, values, importance, search)
    } else {
        (fit_scale(format, values, importance, search), 0.0)
    }
}

/// The level nearest to `x`, by operations that the compiler vectorizes.
#[inline(always)]
fn snap(format: Format, x: f32) -> f32 {
    /// Adding it to a number leaves no bits for a fraction.
    const WHOLE: f32 = 12_582_912.0;
    match format {
        Format::Iq4Nl => format.level(format.nearest(x)),
        _ => {
            let (low, high) = format.range();
            (x.max(low).min(high) + WHOLE) - WHOLE
        }
    }
}

fn fit_scale(format: Format, values: &[f32], importance: &[f32], search: bool) -> f32 {
    let extreme = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let (low, high) = format.range();
    if extreme == 0.0 {
        return 0.0;
    }
    let plain = rounded(extreme / low);
    if !search {
        return plain;
    }
    // The weighted sums over the codes of a scale: (value * level, level^2).
    let sums = |inverse: f32| {
        let (mut with_value, mut squares) = ([0.0f32; 8], [0.0f32; 8]);
        for (values, importance) in values.as_chunks::<8>().0.iter().zip(importance.as_chunks::<8>().0) {
            for i in 0..8 {
                let level = snap(format, values[i] * inverse);
                let weighted = importance[i] * level;
                with_value[i] += weighted * values[i];
                squares[i] += weighted * level;
            }
        }
        (with_value.iter().sum::<f32>(), squares.iter().sum::<f32>())
    };
    // The decrease of the error with the best scale for these codes, `with_value / squares`.
    let saved = |(with_value, squares): (f32, f32)| if squares > 0.0 { with_value * with_value / squares } else { 0.0 };
    // Candidates put the largest weight at an end of the range, before it, or beyond it.
    let steps: &[f32] = if format == Format::Q8_0 { &[1.0] } else { &REACHES };
    // The other end is as far from zero in all formats but those of 2 bits.
    let other = if high > -1.5 * low { high } else { -low };
    let candidates = steps.iter().flat_map(|reach| [low * reach, other * reach]);
    let (mut best, mut most) = ((0.0, 0.0), 0.0);
    for candidate in candidates {
        let sums = sums(candidate / extreme);
        let saved = saved(sums);
        if saved > most {
            (best, most) = (sums, saved);
        }
    }
    for _ in 0..REFINEMENTS {
        let sums = sums(best.1 / best.0);
        let saved = saved(sums);
        if saved <= most {
            break;
        }
        (best, most) = (sums, saved);
    }
    let scale = rounded(best.0 / best.1);
    // The scale may underflow F16, and the sums may underflow F32.
    if scale.is_finite() && scale != 0.0 { scale } else { plain }
}

/// Candidates for the position of the largest weight, in units of the lowest level.
const REACHES: [f32; 14] = [0.76, 0.82, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12, 1.18, 1.24, 1.3, 1.4, 1.5];

/// Candidates for the share of the range that is cut off at an end.
const CUTS: [f32; 6] = [-0.03, 0.0, 0.03, 0.07, 0.12, 0.18];

fn fit_with_min(format: Format, values: &[f32], importance: &[f32], search: bool) -> (f32, f32) {
    let low = values.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let high = values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let top = format.range().1;
    let plain = (rounded((high - low) / top), rounded(low));
    if !search || high <= low {
        return plain;
    }
    let total: f32 = importance.iter().sum();
    let mean = values.iter().zip(importance).map(|(v, w)| v * w).sum::<f32>() / total;
    // Subtracting the mean keeps the sums accurate.
    let try_out = |scale: f32, min: f32| {
        let (inverse, mut sums) = (1.0 / scale, [[0.0f32; 8]; 3]);
        for (values, importance) in values.as_chunks::<8>().0.iter().zip(importance.as_chunks::<8>().0) {
            for i in 0..8 {
                let level = snap(format, (values[i] - min) * inverse);
                let weighted = importance[i] * level;
                sums[0][i] += weighted;
                sums[1][i] += weighted * level;
                sums[2][i] += weighted * (values[i] - mean);
            }
        }
        let [levels, squares, with_value] = sums.map(|sum| sum.iter().sum::<f32>());
        let variance = squares - levels * levels / total;
        let scale = if variance > 0.0 { with_value / variance } else { 0.0 };
        // The decrease of the error with the regression line through the codes, its scale and its minimum.
        (scale * with_value, scale, mean - scale * levels / total)
    };
    let range = high - low;
    let mut best = (0.0, 0.0, 0.0);
    for below in CUTS {
        for above in CUTS {
            let found = try_out(range * (1.0 - below - above) / top, low + range * below);
            if found.0 > best.0 {
                best = found;
            }
        }
    }
    for _ in 0..REFINEMENTS {
        let found = if best.1 > 0.0 { try_out(best.1, best.2) } else { break };
        if found.0 <= best.0 {
            break;
        }
        best = found;
    }
    let (scale, min) = (rounded(best.1), rounded(best.2));
    if scale > 0.0 && min.is_finite() { (scale, min) } else { plain }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::block::BlockType;
    use crate::quantize::layer::error;
    use crate::quantize::recipes::fixtures::bell;
    use crate::threads::ThreadPool;

    fn solved(problem: &LayerProblem<'_>, grouped: &GroupedFormat, search: bool, threads: usize) -> Solution {
        let pool = ThreadPool::new(threads).unwrap();
        solve(problem, grouped, search, &Compute::new(&pool, crate::kernels::choose(None).unwrap()))
    }

    #[test]
    fn without_search_it_rounds_like_the_block_types() {
        let weights = bell(8 * 128, 1);
        let problem = LayerProblem::new(&weights, 8, 128, &[], &[]).unwrap();
        for format in [Format::Q4_0, Format::Q4_1] {
            let grouped = GroupedFormat { format, group: 32 };
            let own = error(&problem, &solved(&problem, &grouped, false, 1).decode(&grouped, 128));
            let (mut bytes, mut decoded) = (Vec::new(), vec![0.0; weights.len()]);
            format.block_type().encode(&weights, &mut bytes).unwrap();
            format.block_type().decode(&bytes, &mut decoded).unwrap();
            let theirs = error(&problem, &decoded);
            assert!((own / theirs - 1.0).abs() < 1e-2, "{format:?}: {own} and {theirs}");
        }
        assert_eq!(Format::of(BlockType::Q4_0), Some(Format::Q4_0));
    }

    #[test]
    fn the_search_reduces_the_error_in_every_format() {
        let weights = bell(16 * 384, 2);
        let problem = LayerProblem::new(&weights, 16, 384, &[], &[]).unwrap();
        for format in Format::ALL {
            for group in [32, 64, 128, 384].into_iter().filter(|group| group % format.block() == 0) {
                let grouped = GroupedFormat { format, group };
                let of = |search| error(&problem, &solved(&problem, &grouped, search, 1).decode(&grouped, 384));
                let (plain, searched) = (of(false), of(true));
                let least = match format {
                    Format::Q8_0 => 1.0,
                    Format::Q5_0 => 0.97,
                    _ => 0.93,
                };
                assert!(searched < least * plain, "{grouped:?}: {searched}, without {plain}");
            }
        }
    }

    #[test]
    fn errors_move_to_columns_with_small_inputs() {
        let weights = bell(16 * 64, 3);
        let mut hessian = vec![0.0; 64 * 64];
        (0..64).for_each(|i| hessian[i * 65] = if i % 8 == 0 { 100.0 } else { 1.0 });
        let problem = LayerProblem::new(&weights, 16, 64, &hessian, &[]).unwrap();
        let blind = LayerProblem { hessian: &[], ..problem };
        for format in [Format::Q4_0, Format::Q4_1, Format::Iq4Nl] {
            let grouped = GroupedFormat { format, group: 32 };
            let of = |asked: &LayerProblem<'_>| error(&problem, &solved(asked, &grouped, true, 1).decode(&grouped, 64));
            assert!(of(&problem) < 0.7 * of(&blind), "{format:?}: {} and {}", of(&problem), of(&blind));
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let weights = bell(50 * 64, 4);
        let problem = LayerProblem::new(&weights, 50, 64, &[], &[]).unwrap();
        let grouped = GroupedFormat { format: Format::Q4_1, group: 64 };
        assert_eq!(solved(&problem, &grouped, true, 1), solved(&problem, &grouped, true, 3));
    }

    #[test]
    fn extreme_groups_stay_finite_and_close() {
        for format in Format::ALL {
            let grouped = GroupedFormat { format, group: 32 };
            for weights in [[0.0; 32], [3.5; 32], [-1e-30; 32], [1e-7; 32], [6e4; 32]] {
                let problem = LayerProblem::new(&weights, 1, 32, &[], &[]).unwrap();
                let decoded = solved(&problem, &grouped, true, 1).decode(&grouped, 32);
                let close = weights.iter().zip(&decoded).all(|(w, q)| (w - q).abs() <= 0.02 * w.abs() + 1e-7);
                assert!(close, "{format:?}: {weights:?} as {decoded:?}");
            }
        }
    }
}
