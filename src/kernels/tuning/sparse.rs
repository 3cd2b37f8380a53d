//! Whether products of one row are faster without the zeros of their weights, measured on this machine.
//!
//! Fewer bytes are read, but more is computed. Which of them limits the speed depends on the instruction set, the memory, and the number of
//! cores that share it. Products of many rows gain nothing, and must not lose.

use std::sync::PoisonError;

use super::record::{MARGIN, Record, fastest};
use super::{BYTES, HEIGHTS, KNOWN, Place, measure};
use crate::kernels::operations::Kernel;
use crate::kernels::scalar;
use crate::quant::packed::{CacheLine, Code, Layout, PANEL, Packed};
use crate::threads::Scope;

/// Columns of the matrix that is measured.
const COLUMNS: usize = 4096;
/// Rows: as many bytes as for other products of one row.
const ROWS: usize = 2 * BYTES[0] / COLUMNS / PANEL * PANEL;

/// Whether `kernel` multiplies a matrix of a model with this many bytes of weights by one row faster, and by more rows not more slowly, if half of
/// its codes are zero and not stored. Measured once, unless `NYBBLE_TUNING` is `off`: then it is not assumed.
pub(crate) fn is_sparse_faster(kernel: &'static Kernel, scope: &Scope<'_>, threads: usize, bytes: usize) -> bool {
    let wish = std::env::var("NYBBLE_TUNING").unwrap_or_default();
    if wish == "off" || kernel.name() == scalar::kernel().name() {
        return false;
    }
    let mut known = KNOWN.get().lock().unwrap_or_else(PoisonError::into_inner);
    let record = known.get_or_insert_with(|| if wish == "retune" { Record::new() } else { Record::read() });
    let place = Place::of_model(bytes);
    let names = ["dense", "sparse"];
    let mut both: Option<(Packed, Packed)> = None;
    let mut is_new = false;
    let mut speeds = vec![];
    for (rows, bytes) in HEIGHTS.into_iter().zip([place.bytes(threads), BYTES[1], BYTES[2]]) {
        let layout = format!("int4, half of them zero ({})", kernel.name());
        let layout = if rows == 1 { place.name(layout) } else { layout };
        let known = record.speeds(&layout, rows, threads, &names);
        let found = match known {
            Some(gops) => gops,
            None => {
                if both.is_none() {
                    both = matrices(scope);
                }
                let Some((dense, sparse)) = &both else { return false };
                let gops = [dense, sparse].map(|matrix| measure(scope, &[kernel], &[matrix], rows, bytes, place)[0]);
                record.add(layout, rows, threads, &names, &gops);
                is_new = true;
                gops.to_vec()
            }
        };
        speeds.push(found);
    }
    if is_new {
        record.write();
    }
    pays(&speeds)
}

/// Whether products without zeros are faster with the first number of rows and not slower with the others. Speeds are those with and
/// without.
fn pays(speeds: &[Vec<f64>]) -> bool {
    let is_faster = |speeds: &Vec<f64>| fastest(speeds) == 1;
    let is_slower = |speeds: &Vec<f64>| speeds[0] > MARGIN * speeds[1];
    speeds.first().is_some_and(is_faster) && !speeds.iter().skip(1).any(is_slower)
}

/// A matrix of random codes with its zeros, half of the codes, and without. `None` if there is no memory.
fn matrices(scope: &Scope<'_>) -> Option<(Packed, Packed)> {
    let layout = Layout { code: Code::Int4, group: 32, min: false };
    let mut dense = Packed::try_zeroed(ROWS, COLUMNS, layout, 1.0).ok()?;
    scope.for_each_chunk(&mut dense.panels_mut(), 1, |index, panel| {
        let mut state = index as u64;
        for word in panel.iter_mut().flat_map(|panel| bytemuck::cast_slice_mut::<CacheLine, u64>(panel.codes)) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // A bit for each code, spread to its four bits.
            let zeros = (state.rotate_right(16) & 0x1111_1111_1111_1111) * 15;
            *word = state & !zeros | 0x8888_8888_8888_8888 & zeros;
        }
        panel.iter_mut().for_each(|panel| panel.scales.fill([half::f16::ONE; PANEL]));
    });
    let sparse = dense.try_sparse(scope).ok()??;
    Some((dense, sparse))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::ThreadPool;

    #[test]
    fn one_row_must_gain_and_more_rows_must_not_lose() {
        let pays = |speeds: [[f64; 2]; 3]| pays(&speeds.map(|speeds| speeds.to_vec()));
        assert!(pays([[100.0, 120.0], [300.0, 299.0], [400.0, 410.0]]));
        assert!(!pays([[100.0, 101.0], [300.0, 300.0], [400.0, 400.0]]), "a gain within the noise");
        assert!(!pays([[100.0, 120.0], [300.0, 250.0], [400.0, 400.0]]), "slower batches");
        assert!(!pays([[100.0, 120.0], [300.0, 300.0], [400.0, 350.0]]), "slower prompts");
    }

    #[test]
    fn half_of_the_codes_that_are_measured_are_zero() {
        let pool = ThreadPool::new(2).unwrap();
        let (dense, sparse) = pool.run(matrices).unwrap();
        let ratio = sparse.bytes() as f64 / dense.bytes() as f64;
        assert!((0.74..0.79).contains(&ratio), "{ratio}");
        assert_eq!(dense.bytes(), ROWS * COLUMNS * 9 / 16);
    }
}
