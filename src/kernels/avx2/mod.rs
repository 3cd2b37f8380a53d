//! AVX2 with FMA and F16C: a panel of 16 output rows is two registers, its sides, over the same bytes.
#![allow(unsafe_code, reason = "intrinsics that load and store, and functions with target features")]

mod product;
mod sparse;
mod unpack;
mod vector;

use std::arch::x86_64::*;
use std::hint::black_box;

pub(super) use product::{Adder, with_adder};
pub(super) use sparse::expand;
pub(super) use unpack::x86_bytes;
pub(super) use vector::{Avx2, LANES, prefetch, x86_vector};

use super::operations::types::*;
use super::operations::{Kernel, Table, compile, operations};

/// The kernel, if this CPU and its operating system support the instructions.
pub(super) fn kernel() -> Option<&'static Kernel> {
    // SAFETY: the reference leaves this function only if the CPU has every feature of the table.
    static KERNEL: Kernel = unsafe { Kernel::new(TABLE) };
    is_available().then_some(&KERNEL)
}

/// Whether this CPU and its operating system support AVX2, FMA and F16C.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

pub(super) const TABLE: Table = operations!(compile { "avx2", "avx2,fma,f16c", Avx2 });

#[target_feature(enable = "avx2,fma,f16c")]
fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    // SAFETY: the function runs only on CPUs with its features.
    with_adder(unsafe { Avx2::new() }, w, panels, x, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn peak_int8(rounds: usize) -> (u64, i32) {
    // 12 independent sums hide the latency, and each product depends on its sum, or the compiler would compute it once.
    let mut sums: [__m256i; 12] = std::array::from_fn(|i| _mm256_set1_epi8(black_box(i as i8)));
    let factor = _mm256_set1_epi8(black_box(-5));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, factor));
        }
    }
    (rounds as u64 * 12 * 32 * 2, checksum(&sums))
}

/// The sum of all lanes of all registers, wrapping.
#[target_feature(enable = "avx2")]
pub(super) fn checksum(sums: &[__m256i]) -> i32 {
    let total = sums.iter().fold(_mm256_setzero_si256(), |total, sum| _mm256_add_epi32(total, *sum));
    let mut lanes = [0.0; LANES];
    vector::store(_mm256_castsi256_ps(total), &mut lanes);
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(lane.to_bits() as i32))
}
