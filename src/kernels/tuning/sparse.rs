//! Whether products of one row are faster without the zeros of their weights, measured on this machine.
//!
//! Fewer bytes are read, but more is computed. Which of them limits the speed depends on the instruction set, the memory, and the number of
//! cores that share it.

use std::sync::PoisonError;

use super::record::{Record, fastest};
use super::{BYTES, KNOWN, Place, measure};
use crate::kernels::operations::Kernel;
use crate::kernels::scalar;
use crate::quant::packed::{CacheLine, Code, Layout, PANEL, Packed};
use crate::threads::Scope;

/// Columns of the matrix that is measured.
const COLUMNS: usize = 4096;
/// Rows: as many bytes as for other products of one row.
const ROWS: usize = 2 * BYTES[0] / COLUMNS / PANEL * PANEL;

/// Whether `kernel` multiplies a matrix of a model with this many bytes of weights faster if half of its codes are zero and not stored. Measured
/// once, unless `NYBBLE_TUNING` is `off`: then it is not assumed.
pub(crate) fn is_sparse_faster(kernel: &'static Kernel, scope: &Scope<'_>, threads: usize, bytes: usize) -> bool {
    let wish = std::env::var("NYBBLE_TUNING").unwrap_or_default();
    if wish == "off" || kernel.name() == scalar::kernel().name() {
        return false;
    }
    let mut known = KNOWN.get().lock().unwrap_or_else(PoisonError::into_inner);
    let record = known.get_or_insert_with(|| if wish == "retune" { Record::new() } else { Record::read() });
    let place = Place::of_model(bytes);
    let layout = place.name(format!("int4, half of them zero ({})", kernel.name()));
    let names = ["dense", "sparse"];
    let speeds = record.speeds(&layout, 1, threads, &names).or_else(|| {
        let (dense, sparse) = matrices(scope)?;
        let gops =
            [&dense, &sparse].map(|matrix| measure(scope, &[kernel], &[matrix], 1, place.bytes(threads), place)[0]);
        record.add(layout, 1, threads, &names, &gops);
        record.write();
        Some(gops.to_vec())
    });
    speeds.is_some_and(|gops| fastest(&gops) == 1)
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
    fn half_of_the_codes_that_are_measured_are_zero() {
        let pool = ThreadPool::new(2).unwrap();
        let (dense, sparse) = pool.run(matrices).unwrap();
        let ratio = sparse.bytes() as f64 / dense.bytes() as f64;
        assert!((0.74..0.79).contains(&ratio), "{ratio}");
        assert_eq!(dense.bytes(), ROWS * COLUMNS * 9 / 16);
    }
}
