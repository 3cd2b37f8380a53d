//! NEON with dot product: a panel of 16 output rows is four registers, its quarters, over the same bytes.
#![allow(unsafe_code, reason = "intrinsics that load and store, and functions with target features")]

mod product;
mod sparse;
mod unpack;
mod vector;

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;
use std::hint::black_box;

use self::product::{dot, product};
use self::vector::Neon;
use super::operations::{Kernel, Table, compile, operations};

/// The kernel, if this CPU and its operating system support the instructions.
pub(super) fn kernel() -> Option<&'static Kernel> {
    // SAFETY: the reference leaves this function only if the CPU has every feature of the table.
    static KERNEL: Kernel = unsafe { Kernel::new(operations!(compile { "neon", "neon,dotprod", Neon })) };
    (is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")).then_some(&KERNEL)
}

#[target_feature(enable = "neon,dotprod")]
fn peak_int8(rounds: usize) -> (u64, i32) {
    // 16 independent sums hide the instruction's latency.
    let mut sums = [vdupq_n_s32(0); 16];
    let (a, b) = (vdupq_n_s8(black_box(3)), vdupq_n_s8(black_box(-5)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = dot::<0>(*sum, a, b);
        }
    }
    let total = sums.into_iter().fold(vdupq_n_s32(0), |total, sum| vaddq_s32(total, sum));
    (rounds as u64 * 16 * 16 * 2, vaddvq_s32(total))
}
