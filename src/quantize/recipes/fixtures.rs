//! Layers for the tests of recipes.

use std::fmt::Debug;

use crate::quantize::compute::{Compute, mirror};
use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::{LayerProblem, Solution, error};
use crate::threads::ThreadPool;

/// Columns of [`layer`].
pub(in crate::quantize) const COLUMNS: usize = 192;
/// Rows of [`layer`].
pub(in crate::quantize) const ROWS: usize = 40;

/// Bell-shaped numbers, the same for the same seed.
pub(in crate::quantize) fn bell(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum()).collect()
}

/// Weights `(ROWS, COLUMNS)`, and the moments of correlated inputs, one of them twenty times as large as the others.
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
    (bell(ROWS * COLUMNS, 8), hessian)
}

/// Runs a function with a pool of that many threads.
pub(in crate::quantize) fn with_threads<R>(threads: usize, run: impl FnOnce(&Compute<'_>) -> R) -> R {
    let pool = ThreadPool::new(threads).unwrap();
    run(&Compute::new(&pool, crate::kernels::choose(None).unwrap()))
}

/// Runs a function with the layer as a problem, on a pool of that many threads.
pub(in crate::quantize) fn with_layer<R>(threads: usize, run: impl FnOnce(&LayerProblem<'_>, &Compute<'_>) -> R) -> R {
    with_threads(threads, |compute| {
        let (weights, hessian) = layer(compute);
        // What bell-shaped inputs with these moments have, up to a factor.
        let magnitude: Vec<f32> = hessian.iter().step_by(COLUMNS + 1).map(|square| square.sqrt()).collect();
        run(&LayerProblem::new(&weights, ROWS, COLUMNS, &hessian, &magnitude).unwrap(), compute)
    })
}

/// The 4-bit formats with each group size.
pub(in crate::quantize) fn four_bit_formats(groups: &[usize]) -> impl Iterator<Item = GroupedFormat> {
    let formats = [Format::Q4_0, Format::Q4_1, Format::Iq4Nl].into_iter();
    formats.flat_map(|format| groups.iter().map(move |group| GroupedFormat { format, group: *group }))
}

/// The relative error of a solution.
pub(in crate::quantize) fn error_of(problem: &LayerProblem<'_>, grouped: &GroupedFormat, solution: &Solution) -> f64 {
    error(problem, &solution.decode(grouped, problem.columns))
}

/// Checks that the error of a recipe is less than `share` of that of another one, `rounding`, in every 4-bit format.
pub(in crate::quantize) fn assert_beats(
    threads: usize,
    share: f64,
    rounding: impl Fn(&LayerProblem<'_>, &GroupedFormat, bool, &Compute<'_>) -> Solution,
    solve: impl Fn(&LayerProblem<'_>, &GroupedFormat, &Compute<'_>) -> Solution,
) {
    with_layer(threads, |problem, compute| {
        for grouped in four_bit_formats(&[32, 64, COLUMNS]) {
            let rounded = error_of(problem, &grouped, &rounding(problem, &grouped, true, compute));
            let own = error_of(problem, &grouped, &solve(problem, &grouped, compute));
            assert!(own < share * rounded, "{grouped:?}: {own}, by rounding {rounded}");
        }
    });
}

/// Checks that a recipe returns the same bits on one thread and on three.
pub(in crate::quantize) fn assert_threads_change_nothing<R: PartialEq + Debug>(
    solve: impl Fn(&LayerProblem<'_>, &Compute<'_>) -> R,
) {
    assert_eq!(with_layer(1, &solve), with_layer(3, &solve));
}
