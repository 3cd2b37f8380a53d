//! AMX with INT8: products of many rows by tiles of 8 rows of activations and 16 rows of weights, the rest by AVX-512.
//!
//! Its results were compared on an emulated CPU; its speed was never measured. So it is chosen by measurement, or by name.
#![allow(unsafe_code, reason = "the tiles' instructions, and functions with target features")]

mod product;
#[cfg(test)]
mod tests;
mod tiles;

use self::product::with_dots;
use self::tiles::{Amx, Tiles};
use super::avx512::{self, Avx512};
use super::operations::types::*;
use super::operations::{Kernel, Table};
use crate::quant::packed::BLOCK;

/// Rows from which a product uses the tiles. Fewer rows are bound by reading the weights.
const MANY: usize = 32;

/// The kernel, if this CPU supports the instructions and its operating system lets this process use them.
pub(super) fn kernel() -> Option<&'static Kernel> {
    // SAFETY: the reference leaves this function only if the CPU has AMX, which this process may use, and every feature of
    // AVX-512's table.
    static KERNEL: Kernel = unsafe { Kernel::new(Table { name: "amx", product, peak_int8, ..avx512::TABLE }) };
    is_available().then_some(&KERNEL)
}

/// Whether the CPU has AMX-TILE, AMX-INT8 and all that AVX-512 needs, and this process may use them.
fn is_available() -> bool {
    avx512::is_available() && tiles::are_usable()
}

/// # Safety
///
/// [`is_available`] must be true.
unsafe fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    // SAFETY: the caller's promise. The thread has no other tiles: they are dropped before this function returns, and it
    // makes only one configuration.
    unsafe {
        let (amx, avx512) = (Amx::new(), Avx512::new());
        if x.rows() < MANY {
            (avx512::TABLE.product)(w, panels, x, out);
        } else if w.layout().group < BLOCK {
            with_dots(avx512, &Tiles::<2>::new(amx), w, panels, x, out);
        } else {
            with_dots(avx512, &Tiles::<1>::new(amx), w, panels, x, out);
        }
    }
}

/// # Safety
///
/// [`is_available`] must be true.
unsafe fn peak_int8(rounds: usize) -> (u64, i32) {
    // SAFETY: the caller's promise. The thread has no tiles, which exist only while `product` runs.
    unsafe { tiles::peak(Amx::new(), rounds) }
}
