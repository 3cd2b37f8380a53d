//! AVX-512 (F, BW, VL, VNNI): one panel of 16 output rows is one register.
#![allow(unsafe_code, reason = "intrinsics that load and store, and functions with target features")]

mod product;
mod sparse;
mod unpack;
mod vector;

use std::arch::x86_64::*;

use self::product::product;
pub(super) use sparse::expand;
pub(super) use unpack::{becomes_int4, unpack};
pub(super) use vector::{Avx512, load, load_f16, load_f32, load_table, store};

use super::avx2;
use super::operations::{Kernel, Table, compile, operations};

/// The kernel, if this CPU and its operating system support the instructions.
pub(super) fn kernel() -> Option<&'static Kernel> {
    // SAFETY: the reference leaves this function only if the CPU has every feature of the table.
    static KERNEL: Kernel = unsafe { Kernel::new(TABLE) };
    is_available().then_some(&KERNEL)
}

/// Whether this CPU and its operating system support AVX-512 F, BW, VL and VNNI, and what AVX2's functions need.
pub(super) fn is_available() -> bool {
    avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

pub(super) const TABLE: Table =
    operations!(compile { "avx512", "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c", Avx512 });

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn peak_int8(rounds: usize) -> (u64, i32) {
    // 16 independent sums hide the instruction's latency.
    let mut sums = [_mm512_setzero_si512(); 16];
    let (a, b) = (_mm512_set1_epi8(3), _mm512_set1_epi8(-5));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    let total = sums.into_iter().fold(_mm512_setzero_si512(), |total, sum| _mm512_add_epi32(total, sum));
    (rounds as u64 * 16 * 64 * 2, _mm512_reduce_add_epi32(total))
}
