//! Which instruction set multiplies matrices of a layout fastest, measured on this machine.
//!
//! No rule holds on all CPUs: one row may be faster with narrow registers, because the CPU lowers its clock for wide ones, and
//! tiles may cost more than they save. All sets return the same bits, so the choice is nobody's concern but the clock's. It
//! is made when a model is loaded, on that model's matrices, and kept in a file in the cache folder.
#![allow(unsafe_code, reason = "a table of functions that only some CPUs can run")]

mod record;
mod sparse;

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

pub use self::record::Choice;
use self::record::{Record, fastest};
pub(crate) use self::sparse::is_sparse_faster;
use super::activations::Activations;
use super::available::available;
use super::operations::{Kernel, Table};
use super::{cache, scalar};
use crate::quant::packed::{Code, Layout, PANEL, Packed};
use crate::threads::{Columns, PerProcess, Scope};

/// Rows of the products that are measured. A product of `n` rows takes the choice for the largest number up to `n`.
const HEIGHTS: [usize; 3] = [1, 8, 64];
/// Bytes of weights that are multiplied with each number of rows in a round.
const BYTES: [usize; 3] = [24 << 20, 8 << 20, 1 << 20];
/// Bytes for one row and each thread where weights are evicted first, which takes longer than reading them.
const EVICTED: usize = 2 << 20;
/// Layouts that take less than this in a model are not measured for it: their share of its time is small.
const LEAST: usize = 1 << 20;
/// Panels that a task multiplies.
const PANELS: usize = 8;
/// Rounds of a measurement. Kernels are compared within a round, and the median counts: other work on the machine slows down single
/// rounds, and the clock changes between them.
const ROUNDS: usize = 9;
/// The names of integer codes.
const CODES: [&str; 8] = ["int4", "table4", "int8", "int2", "int3", "int5", "int6", "sparse int4"];
/// Columns of groups.
const GROUPS: [usize; 5] = [16, 32, 64, 128, 256];
/// Integer layouts: codes, groups, with minimums and without.
const LAYOUTS: usize = CODES.len() * GROUPS.len() * 2;

/// The chosen kernel for each layout and height: its index in [`candidates`]. The first at the beginning.
static CHOICES: [[AtomicU8; HEIGHTS.len()]; LAYOUTS] = [const { [const { AtomicU8::new(0) }; HEIGHTS.len()] }; LAYOUTS];

/// What was measured or read in this process.
static KNOWN: LazyLock<PerProcess<Mutex<Option<Record>>>> = LazyLock::new(PerProcess::default);

/// The kernels to choose from: all that this CPU runs but the scalar one.
pub(super) fn candidates() -> &'static [&'static Kernel] {
    static CANDIDATES: LazyLock<Vec<&'static Kernel>> =
        LazyLock::new(|| available().into_iter().filter(|kernel| kernel.name() != scalar::kernel().name()).collect());
    &CANDIDATES
}

/// The first candidate, whose products are computed by the candidate that was measured to be the fastest. `None` if there is
/// nothing to choose.
pub(super) fn kernel() -> Option<&'static Kernel> {
    static TUNED: LazyLock<Option<Kernel>> = LazyLock::new(|| {
        let [first, _, ..] = candidates() else { return None };
        // SAFETY: candidates are available, so this CPU runs all functions of the first one. The product has no needs of its own.
        Some(unsafe { Kernel::new(Table { product, ..first.table() }) })
    });
    TUNED.as_ref()
}

/// [`Kernel::product`] by the kernel chosen for the layout and the number of rows.
fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    let height = HEIGHTS.iter().rposition(|height| *height <= x.rows()).unwrap_or(0);
    let choice = CHOICES[index_of(w.layout())][height].load(Ordering::Relaxed);
    candidates()[usize::from(choice)].product(w, panels, x, out);
}

/// The index of an integer layout.
fn index_of(layout: Layout) -> usize {
    let code = match layout.code {
        Code::Int4 => 0,
        Code::Table4(_) => 1,
        Code::Int2 => 3,
        Code::Int3 => 4,
        Code::Int5 => 5,
        Code::Int6 => 6,
        Code::SparseInt4 => 7,
        Code::Int8 | Code::F32 | Code::F16 | Code::BF16 => 2,
    };
    let group = GROUPS.iter().position(|group| *group == layout.group).unwrap_or(0);
    (code * GROUPS.len() + group) * 2 + usize::from(layout.min)
}

/// The name of the layout with this index.
fn name_of(index: usize) -> String {
    let (code, group) = (CODES[index / 2 / GROUPS.len()], GROUPS[index / 2 % GROUPS.len()]);
    let min = if index % 2 == 1 { " with minimums" } else { "" };
    format!("{code}, groups of {group}{min}")
}

/// Chooses kernels for the layouts of `matrices`, unless that was done before. `NYBBLE_TUNING` may say `off`, to use
/// the first kernel for everything, or `retune`, to ignore the file of earlier measurements.
pub(crate) fn tune<'a>(kernel: &Kernel, scope: &Scope<'_>, threads: usize, matrices: impl Iterator<Item = &'a Packed>) {
    let wish = std::env::var("NYBBLE_TUNING").unwrap_or_default();
    if wish == "off" || !self::kernel().is_some_and(|tuned| std::ptr::eq(tuned, kernel)) {
        return;
    }
    let mut known = KNOWN.get().lock().unwrap_or_else(PoisonError::into_inner);
    let record = known.get_or_insert_with(|| if wish == "retune" { Record::new() } else { Record::read() });
    let names: Vec<&str> = candidates().iter().map(|kernel| kernel.name()).collect();
    let mut bytes = 0;
    let mut layouts: [Vec<&Packed>; LAYOUTS] = std::array::from_fn(|_| vec![]);
    for matrix in matrices.filter(|matrix| matrix.layout().is_integer()) {
        layouts[index_of(matrix.layout())].push(matrix);
        bytes += matrix.bytes();
    }
    let place = Place::of_model(bytes);
    let mut is_new = false;
    for (index, matrices) in layouts.iter().enumerate() {
        if matrices.iter().map(|matrix| matrix.bytes()).sum::<usize>() < LEAST {
            continue;
        }
        for (height, (rows, bytes)) in HEIGHTS.into_iter().zip(BYTES).enumerate() {
            let (layout, bytes) = match rows {
                1 => (place.name(name_of(index)), place.bytes(threads)),
                _ => (name_of(index), bytes),
            };
            let gops = record.speeds(&layout, rows, threads, &names).unwrap_or_else(|| {
                is_new = true;
                let gops = measure(scope, candidates(), matrices, rows, bytes, place);
                record.add(layout, rows, threads, &names, &gops);
                gops
            });
            CHOICES[index][height].store(fastest(&gops) as u8, Ordering::Relaxed);
        }
    }
    if is_new {
        record.write();
    }
}

/// What was measured on this machine for this version, also by earlier processes if a model is loaded. Empty on a CPU with nothing to
/// choose.
pub fn choices() -> Vec<Choice> {
    let known = KNOWN.get().lock().unwrap_or_else(PoisonError::into_inner);
    known.as_ref().map(Record::choices).unwrap_or_default()
}

/// Where the weights of a model are when a token needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A cache may hold all of them.
    Cache,
    Memory,
}

impl Place {
    /// For a model with this many bytes of weights.
    fn of_model(bytes: usize) -> Place {
        if cache::last_level_bytes().is_some_and(|cache| bytes <= cache) { Place::Cache } else { Place::Memory }
    }

    /// Bytes of weights that are multiplied with one row in a round.
    fn bytes(self, threads: usize) -> usize {
        match self {
            Place::Memory if cache::CAN_EVICT => BYTES[0].min(EVICTED * threads),
            Place::Memory | Place::Cache => BYTES[0],
        }
    }

    /// The name of a measurement of `what`.
    fn name(self, what: String) -> String {
        match self {
            Place::Cache => format!("{what}, in a cache"),
            Place::Memory => what,
        }
    }
}

/// The speed of each kernel: 10^9 operations per second for products of `rows` rows with about `bytes` of the matrices.
fn measure(
    scope: &Scope<'_>,
    kernels: &[&'static Kernel],
    matrices: &[&Packed],
    rows: usize,
    bytes: usize,
    place: Place,
) -> Vec<f64> {
    // Tasks of several panels. For one row, each measurement reads other weights, if there are enough, as a token does.
    let windows = if rows == 1 { ROUNDS * kernels.len() } else { 1 };
    let mut tasks: Vec<(usize, Range<usize>)> = vec![];
    let mut cuts = vec![(0, 0)];
    let (mut taken, mut weights) = (0, 0);
    for (i, matrix) in matrices.iter().enumerate() {
        for first in (0..matrix.panels()).step_by(PANELS) {
            if cuts.len() <= windows {
                let panels = first..matrix.panels().min(first + PANELS);
                taken += matrix.bytes() * panels.len() / matrix.panels();
                weights += panels.len() * PANEL * matrix.columns();
                tasks.push((i, panels));
                if taken >= bytes {
                    cuts.push((tasks.len(), weights));
                    taken = 0;
                }
            }
        }
    }
    if cuts.len() == 1 {
        cuts.push((tasks.len(), weights));
    }
    // Only of the matrices that tasks multiply, which are the first.
    let used = tasks.last().map_or(0, |(last, _)| last + 1);
    let inputs: Vec<Activations> = matrices[..used]
        .iter()
        .map(|matrix| {
            // The time does not depend on the numbers, but they should not be zeros.
            let values: Vec<f32> = (0..rows * matrix.columns()).map(|i| (i * 7919 % 255) as f32 - 127.0).collect();
            let mut input = Activations::default();
            input.quantize(kernels[0], &values, matrix.columns());
            input
        })
        .collect();
    // Seconds per weight, and the checksum of the results.
    let run = |kernel: &Kernel, window: usize| {
        let [(first, before), (last, after)] = [cuts[window], cuts[window + 1]];
        let checksum = AtomicU64::new(0);
        if rows == 1 && place == Place::Memory {
            // A large cache may hold all that is measured, but not the model.
            scope.for_each(last - first, |task| {
                let (matrix, panels) = &tasks[first + task];
                matrices[*matrix].parts_of(panels.clone()).into_iter().for_each(cache::evict);
            });
        }
        let start = Instant::now();
        scope.for_each(last - first, |task| {
            let (matrix, panels) = &tasks[first + task];
            let mut out = [0.0; HEIGHTS[HEIGHTS.len() - 1] * PANELS * PANEL];
            let out = &mut out[..rows * panels.len() * PANEL];
            let mut columns = Columns::whole(out, rows, panels.len() * PANEL);
            kernel.product(matrices[*matrix], panels.clone(), &inputs[*matrix], &mut columns);
            let bits = out.iter().fold(0u64, |sum, x| sum.wrapping_add(u64::from(x.to_bits())));
            checksum.fetch_add(bits, Ordering::Relaxed);
        });
        (start.elapsed().as_secs_f64() / (after - before).max(1) as f64, checksum.into_inner())
    };
    let results: Vec<u64> = kernels.iter().map(|kernel| run(kernel, 0).1).collect();
    let mut seconds = vec![[0.0; ROUNDS]; kernels.len()];
    for round in 0..ROUNDS {
        for turn in 0..kernels.len() {
            let k = (round + turn) % kernels.len();
            let window = (round * kernels.len() + turn) % (cuts.len() - 1);
            seconds[k][round] = run(kernels[k], window).0;
        }
    }
    let first = seconds[0];
    let least = first.iter().copied().fold(f64::INFINITY, f64::min);
    let speed_of_first = 2.0 * rows as f64 / least / 1e9;
    // A kernel with other results than the first is not used, however fast it is.
    let speed = |(seconds, result): (&[f64; ROUNDS], &u64)| {
        let mut ratios: [f64; ROUNDS] = std::array::from_fn(|round| first[round] / seconds[round]);
        ratios.sort_by(f64::total_cmp);
        if *result == results[0] { speed_of_first * ratios[ROUNDS / 2] } else { 0.0 }
    };
    seconds.iter().zip(&results).map(speed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::ThreadPool;

    fn layouts() -> Vec<Layout> {
        let codes =
            [Code::Int2, Code::Int3, Code::Int4, Code::Int5, Code::Int6, Code::Table4([1; 16]), Code::Int8].into_iter();
        let with =
            |code| GROUPS.into_iter().flat_map(move |group| [false, true].map(|min| Layout { code, group, min }));
        codes.flat_map(with).filter(Layout::is_known).collect()
    }

    #[test]
    fn every_layout_has_its_own_choice_and_name() {
        let mut indices: Vec<usize> = layouts().into_iter().map(index_of).collect();
        let names: std::collections::BTreeSet<String> = indices.iter().map(|index| name_of(*index)).collect();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!((indices.len(), names.len()), (layouts().len(), layouts().len()));
        assert!(
            names.contains("int4, groups of 32 with minimums") && names.contains("int8, groups of 16"),
            "{names:?}"
        );
    }

    #[test]
    fn models_that_fit_into_a_cache_are_measured_there() {
        assert_eq!(Place::of_model(1 << 10) == Place::Cache, cache::last_level_bytes().is_some());
        assert_eq!(Place::of_model(usize::MAX), Place::Memory);
        assert_eq!(Place::Cache.name("int4".to_owned()), "int4, in a cache");
        let expected = if cache::CAN_EVICT { [2, 4, 24] } else { [24; 3] };
        assert_eq!([1, 2, 100].map(|threads| Place::Memory.bytes(threads) >> 20), expected);
    }

    #[test]
    fn a_kernel_with_other_results_has_no_speed() {
        fn wrong(_: &Packed, _: Range<usize>, _: &Activations, _: &mut Columns<'_>) {}
        // SAFETY: every CPU runs the scalar kernel, and the product has no needs.
        let wrong = Box::leak(Box::new(unsafe { Kernel::new(Table { product: wrong, ..scalar::kernel().table() }) }));
        let mut matrix = Packed::zeroed(16, 64, Layout { code: Code::Int4, group: 32, min: false }, 1.0);
        matrix.panels_mut().iter_mut().for_each(|panel| panel.scales.fill([half::f16::ONE; PANEL]));
        let pool = ThreadPool::new(1).unwrap();
        let gops =
            pool.run(|scope| measure(scope, &[scalar::kernel(), wrong], &[&matrix], 1, usize::MAX, Place::Cache));
        assert!(gops[0] > 0.0 && gops[1] == 0.0, "{gops:?}");
        assert_eq!(fastest(&gops), 0);
    }

    #[test]
    fn every_kernel_is_measured_on_every_layout_and_height() {
        let kernels = available();
        let pool = ThreadPool::new(2).unwrap();
        for layout in layouts() {
            // More panels than a task takes, a last one that is not whole, and a matrix of another shape.
            let matrices = [Packed::zeroed(150, 70, layout, 1.0), Packed::zeroed(16, 33, layout, 1.0)];
            let matrices: Vec<&Packed> = matrices.iter().collect();
            for rows in HEIGHTS {
                for place in [Place::Cache, Place::Memory] {
                    let gops = pool.run(|scope| measure(scope, &kernels, &matrices, rows, usize::MAX, place));
                    assert_eq!(gops.len(), kernels.len());
                    assert!(gops.iter().all(|gops| gops.is_finite() && *gops > 0.0), "{layout:?}: {gops:?}");
                }
            }
        }
    }
}
