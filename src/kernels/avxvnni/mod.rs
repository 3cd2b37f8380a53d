//! AVX-VNNI: AVX2 with one instruction in place of two or three in the integer product.
//!
//! Intel's client CPUs have it since Alder Lake, which has no AVX-512.
#![allow(unsafe_code, reason = "the instruction itself, and functions with target features")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

use super::avx2::{self, Adder, Avx2, checksum, with_adder};
use super::operations::types::*;
use super::operations::{Kernel, Table};

/// The kernel, if this CPU and its operating system support the instructions.
pub(super) fn kernel() -> Option<&'static Kernel> {
    // SAFETY: the reference leaves this function only if the CPU has AVX-VNNI and every feature of AVX2's table.
    static KERNEL: Kernel = unsafe { Kernel::new(Table { name: "avxvnni", product, peak_int8, ..avx2::TABLE }) };
    (avx2::is_available() && is_x86_feature_detected!("avxvnni")).then_some(&KERNEL)
}

/// Proof that the CPU has AVX-VNNI and all that AVX2's functions need.
#[derive(Debug, Clone, Copy)]
struct AvxVnni(Avx2);

impl AvxVnni {
    /// # Safety
    ///
    /// The CPU must have AVX-VNNI, AVX2, FMA and F16C.
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        AvxVnni(unsafe { Avx2::new() })
    }
}

/// # Safety
///
/// The CPU must have AVX-VNNI, besides the features that the function enables.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    // SAFETY: the caller's promise, and the function's own features.
    with_adder(unsafe { AvxVnni::new() }, w, panels, x, out);
}

impl From<AvxVnni> for Avx2 {
    #[inline(always)]
    fn from(set: AvxVnni) -> Avx2 {
        set.0
    }
}

impl Adder for AvxVnni {
    const UNSIGNED: bool = true;

    #[inline(always)]
    fn add<const CODE: u8>(self, mut sum: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        for j in 0..4 {
            // SAFETY: `self` has the proof that the CPU has AVX2.
            sum = unsafe { add_dot(self, sum, w[j], x[j]) };
        }
        sum
    }

    #[inline(always)]
    fn total<const CODE: u8>(self, sum: __m256i) -> __m256i {
        sum
    }
}

/// Adds to each lane the products of its four unsigned bytes of `w` with the four signed ones of `x`.
///
/// Not the intrinsic, which can only be inlined into functions with its own target feature, and so not into AVX2's.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_dot(_: AvxVnni, mut sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the instruction touches only these registers, and an `AvxVnni` exists, so the CPU has it.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sum}, {w}, {x}",
            sum = inout(ymm_reg) sum, w = in(ymm_reg) w, x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// # Safety
///
/// The CPU must have AVX-VNNI, besides the features that the function enables.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn peak_int8(rounds: usize) -> (u64, i32) {
    // SAFETY: the caller's promise, and the function's own features.
    let set = unsafe { AvxVnni::new() };
    // 12 independent sums hide the instruction's latency.
    let mut sums = [_mm256_setzero_si256(); 12];
    let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = add_dot(set, *sum, a, b);
        }
    }
    (rounds as u64 * 12 * 32 * 2, checksum(&sums))
}
