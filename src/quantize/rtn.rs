//! Round to nearest, with a search for the scale that loses least.
//!
//! The search weighs the squared error of each column with the mean square of its input, where inputs are known: what
//! llama.cpp calls an importance matrix.

use super::compute::Compute;
use super::problem::{Format, Grid, Problem, Solution, rounded};

/// Rows that one thread takes together.
const TASK_ROWS: usize = 16;
/// Times that scale and codes are fitted to each other after the search.
const REFINEMENTS: usize = 3;

/// Rounds a layer to the nearest codes. Without `search` scales reach just as far as each group's largest weight.
pub fn solve(problem: &Problem<'_>, format: &Format, search: bool, compute: &Compute<'_>) -> Solution {
    let (columns, group) = (problem.columns, format.group);
    let importance = problem.importance();
    let mut solution = Solution::zeroed(format, problem.rows, columns);
    let Solution { codes, scales, mins } = &mut solution;
    let mut groups: Vec<_> = codes.chunks_mut(group).zip(scales).collect();
    let per_task = TASK_ROWS * format.groups(columns);
    let mut found_mins = vec![0.0; groups.len()];
    let mut tasks: Vec<_> = groups.chunks_mut(per_task).zip(found_mins.chunks_mut(per_task)).collect();
    compute.for_each_chunk(&mut tasks, 1, |task, chunk| {
        for (groups, mins) in chunk {
            for (i, ((codes, scale), min)) in groups.iter_mut().zip(mins.iter_mut()).enumerate() {
                let at = (task * per_task + i) * group;
                let weights = &problem.weights[at..][..group];
                let of = at % columns;
                let own = &importance[of..][..group];
                let own = if problem.hessian.is_empty() { &by_size(weights) } else { own };
                (**scale, *min) = fit(format.grid, weights, own, search);
                for (code, weight) in codes.iter_mut().zip(weights) {
                    *code = format.grid.code(*weight, **scale, *min);
                }
            }
        }
    });
    if format.grid.has_min() {
        *mins = found_mins;
    }
    solution
}

/// What errors in a group count where nothing is known of the inputs: more for large weights, as in llama.cpp. The plain
/// squared error cuts them off too readily; on a small trained model it keeps no more than rounding without a search does.
fn by_size(weights: &[f32]) -> Vec<f32> {
    let mean = weights.iter().map(|weight| weight * weight).sum::<f32>() / weights.len() as f32;
    weights.iter().map(|weight| (mean + weight * weight).sqrt()).collect()
}

/// Scale and minimum, as F16 holds them, for `values` of one group whose squared errors count as `importance` says.
pub(super) fn fit(grid: Grid, values: &[f32], importance: &[f32], search: bool) -> (f32, f32) {
    if grid.has_min() {
        fit_with_min(grid, values, importance, search)
    } else {
        (fit_scale(grid, values, importance, search), 0.0)
    }
}

/// The level nearest to `x` on a grid without minimum, by operations that compilers do on many numbers at once.
#[inline(always)]
fn snap(grid: Grid, x: f32) -> f32 {
    /// Adding it leaves no bits for a fraction.
    const WHOLE: f32 = 12_582_912.0;
    match grid {
        Grid::Iq4Nl => grid.level(grid.nearest(x)),
        _ => {
            let (low, high) = grid.range();
            (x.max(low).min(high) + WHOLE) - WHOLE
        }
    }
}

fn fit_scale(grid: Grid, values: &[f32], importance: &[f32], search: bool) -> f32 {
    let extreme = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let low = grid.range().0;
    if extreme == 0.0 {
        return 0.0;
    }
    let plain = rounded(extreme / low);
    if !search {
        return plain;
    }
    // The sums of a scale's codes: (value * level, level^2).
    let sums = |inverse: f32| {
        let (mut with_value, mut squares) = ([0.0f32; 8], [0.0f32; 8]);
        for (values, importance) in values.as_chunks::<8>().0.iter().zip(importance.as_chunks::<8>().0) {
            for i in 0..8 {
                let level = snap(grid, values[i] * inverse);
                let weighted = importance[i] * level;
                with_value[i] += weighted * values[i];
                squares[i] += weighted * level;
            }
        }
        (with_value.iter().sum::<f32>(), squares.iter().sum::<f32>())
    };
    // With the best scale for its codes, `with_value / squares`, a candidate saves this much of the error.
    let saved = |(with_value, squares): (f32, f32)| if squares > 0.0 { with_value * with_value / squares } else { 0.0 };
    // The largest weight lies at the end of the grid, before it, or beyond it, on either side.
    let steps: &[f32] = if grid == Grid::Q8_0 { &[1.0] } else { &REACHES };
    let candidates = steps.iter().flat_map(|reach| [low * reach, -low * reach]);
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
    // All values may be too small for F16, or importance too small for F32.
    if scale.is_finite() && scale != 0.0 { scale } else { plain }
}

/// How far the largest weight lies out, in units of the end of the grid.
const REACHES: [f32; 14] = [0.76, 0.82, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12, 1.18, 1.24, 1.3, 1.4, 1.5];

/// How much of the range is cut off at an end.
const CUTS: [f32; 6] = [-0.03, 0.0, 0.03, 0.07, 0.12, 0.18];

fn fit_with_min(grid: Grid, values: &[f32], importance: &[f32], search: bool) -> (f32, f32) {
    let low = values.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let high = values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let top = grid.range().1;
    let plain = (rounded((high - low) / top), rounded(low));
    if !search || high <= low {
        return plain;
    }
    let total: f32 = importance.iter().sum();
    let mean = values.iter().zip(importance).map(|(v, w)| v * w).sum::<f32>() / total;
    // Around the mean value the sums stay accurate.
    let try_out = |scale: f32, min: f32| {
        let (inverse, mut sums) = (1.0 / scale, [[0.0f32; 8]; 3]);
        for (values, importance) in values.as_chunks::<8>().0.iter().zip(importance.as_chunks::<8>().0) {
            for i in 0..8 {
                let level = snap(grid, (values[i] - min) * inverse);
                let weighted = importance[i] * level;
                sums[0][i] += weighted;
                sums[1][i] += weighted * level;
                sums[2][i] += weighted * (values[i] - mean);
            }
        }
        let [levels, squares, with_value] = sums.map(|sum| sum.iter().sum::<f32>());
        let variance = squares - levels * levels / total;
        let scale = if variance > 0.0 { with_value / variance } else { 0.0 };
        // What the line through the codes saves of the error, its scale, its minimum.
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
pub(super) mod tests {
    use super::*;
    use crate::quant::block::BlockType;
    use crate::quantize::problem::error;
    use crate::threads::ThreadPool;

    /// Numbers of a bell-shaped distribution, the same each time.
    pub(in crate::quantize) fn bell(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| uniform()).sum()).collect()
    }

    const GRIDS: [Grid; 5] = [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl, Grid::Q5_0, Grid::Q8_0];

    fn solved(problem: &Problem<'_>, format: &Format, search: bool, threads: usize) -> Solution {
        let pool = ThreadPool::new(threads).unwrap();
        solve(problem, format, search, &Compute::new(&pool, crate::kernels::best()))
    }

    #[test]
    fn without_search_it_rounds_as_the_block_types_do() {
        let weights = bell(8 * 128, 1);
        let problem = Problem::new(&weights, 8, 128, &[], &[]).unwrap();
        for grid in [Grid::Q4_0, Grid::Q4_1] {
            let format = Format { grid, group: 32 };
            let own = error(&problem, &solved(&problem, &format, false, 1).decode(&format, 128));
            let (mut bytes, mut decoded) = (Vec::new(), vec![0.0; weights.len()]);
            grid.block_type().encode(&weights, &mut bytes).unwrap();
            grid.block_type().decode(&bytes, &mut decoded).unwrap();
            let theirs = error(&problem, &decoded);
            assert!((own / theirs - 1.0).abs() < 1e-2, "{grid:?}: {own} and {theirs}");
        }
        assert_eq!(Grid::of(BlockType::Q4_0), Some(Grid::Q4_0));
    }

    #[test]
    fn the_search_loses_less_in_every_format() {
        let weights = bell(16 * 384, 2);
        let problem = Problem::new(&weights, 16, 384, &[], &[]).unwrap();
        for grid in GRIDS {
            for group in [32, 64, 128, 384] {
                let format = Format { grid, group };
                let of = |search| error(&problem, &solved(&problem, &format, search, 1).decode(&format, 384));
                let (plain, searched) = (of(false), of(true));
                let least = match grid {
                    Grid::Q8_0 => 1.0,
                    Grid::Q5_0 => 0.97,
                    _ => 0.93,
                };
                assert!(searched < least * plain, "{format:?}: {searched}, without {plain}");
            }
        }
    }

    #[test]
    fn errors_go_where_inputs_are_small() {
        let weights = bell(16 * 64, 3);
        let mut hessian = vec![0.0; 64 * 64];
        (0..64).for_each(|i| hessian[i * 65] = if i % 8 == 0 { 100.0 } else { 1.0 });
        let problem = Problem::new(&weights, 16, 64, &hessian, &[]).unwrap();
        let blind = Problem { hessian: &[], ..problem };
        for grid in [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl] {
            let format = Format { grid, group: 32 };
            let of = |asked: &Problem<'_>| error(&problem, &solved(asked, &format, true, 1).decode(&format, 64));
            assert!(of(&problem) < 0.7 * of(&blind), "{grid:?}: {} and {}", of(&problem), of(&blind));
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let weights = bell(50 * 64, 4);
        let problem = Problem::new(&weights, 50, 64, &[], &[]).unwrap();
        let format = Format { grid: Grid::Q4_1, group: 64 };
        assert_eq!(solved(&problem, &format, true, 1), solved(&problem, &format, true, 3));
    }

    #[test]
    fn extreme_groups_stay_finite_and_close() {
        for grid in GRIDS {
            let format = Format { grid, group: 32 };
            for weights in [[0.0; 32], [3.5; 32], [-1e-30; 32], [1e-7; 32], [6e4; 32]] {
                let problem = Problem::new(&weights, 1, 32, &[], &[]).unwrap();
                let decoded = solved(&problem, &format, true, 1).decode(&format, 32);
                let close = weights.iter().zip(&decoded).all(|(w, q)| (w - q).abs() <= 0.02 * w.abs() + 1e-7);
                assert!(close, "{grid:?}: {weights:?} as {decoded:?}");
            }
        }
    }
}
