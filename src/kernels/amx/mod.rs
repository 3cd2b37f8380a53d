//! AMX with INT8: products of many rows by tiles of 8 rows of activations and 16 rows of weights, the rest by AVX-512.
//!
//! No CPU with AMX has run it yet, so it is taken only where it is asked for by name.
#![allow(unsafe_code, reason = "the tiles' instructions, and the entry into functions with target features")]

mod product;
#[cfg(test)]
mod tests;
mod tiles;

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use half::f16;

use self::tiles::Tiles;
use super::activations::{Activations, MAX_TILE_ROWS, RowMut};
use super::avx512::Avx512;
use super::delegate::delegated_methods;
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::Activation;
use super::{Kernel, PAGE};
use crate::quant::packed::{BLOCK, CacheLine, Packed};
use crate::threads::Columns;

/// Rows from which on a product goes to the tiles: fewer are bound by the weights, whatever multiplies them.
const MANY: usize = 32;

/// Proof that the CPU has AMX-TILE and AMX-INT8 and that this process may use them, and all that AVX-512 needs.
#[derive(Debug)]
pub(super) struct Amx {
    avx512: &'static Avx512,
}

impl Amx {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        static WITNESS: OnceLock<Option<Amx>> = OnceLock::new();
        let detect = || Avx512::detect().filter(|_| tiles::are_usable()).map(|avx512| Amx { avx512 });
        WITNESS.get_or_init(detect).as_ref()
    }
}

impl Kernel for Amx {
    fn name(&self) -> &'static str {
        "amx"
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        if x.rows() < MANY {
            self.avx512.product(w, panels, x, out);
        } else if w.layout().group < BLOCK {
            // SAFETY: the thread has no other tiles, as they live no longer than this call, which makes no others.
            let tiles = unsafe { Tiles::<2>::new(self) };
            product::product(self.avx512, &tiles, w, panels, x, out);
        } else {
            // SAFETY: as above.
            let tiles = unsafe { Tiles::<1>::new(self) };
            product::product(self.avx512, &tiles, w, panels, x, out);
        }
    }

    fn peak_int8(&self, rounds: usize) -> (u64, i32) {
        // SAFETY: the thread has no tiles, as they live no longer than the calls of `product`.
        unsafe { tiles::peak(self, rounds) }
    }

    delegated_methods!(avx512);
}

/// What multiplies integers: the tiles, in tests also plain Rust.
trait Dots: fmt::Debug {
    /// Parts of a block that are multiplied one by one, as each has scales of its own: 1 or 2.
    const PARTS: usize;

    /// The integer dot products of part `part` of a block.
    ///
    /// `x` are the codes of the activations `(MAX_TILE_ROWS, BLOCK)`, `w` the unsigned codes of a panel's block: line `j` holds
    /// columns `4 j .. 4 j + 4` of the 16 rows. `out` is `(MAX_TILE_ROWS, 16)`, numbers of 32 bits.
    fn dots(
        &self,
        x: &[[i8; BLOCK]; MAX_TILE_ROWS],
        w: &[CacheLine; BLOCK / 4],
        part: usize,
        out: &mut [CacheLine; MAX_TILE_ROWS],
    );
}
