//! AVX-VNNI: AVX2's product with one instruction in place of two or three, and otherwise AVX2.
//!
//! Client CPUs of Intel have it since Alder Lake, where they have no AVX-512.
#![allow(unsafe_code, reason = "the instruction itself, and the entry into functions with target features")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;
use std::sync::OnceLock;

use half::f16;

use super::activations::{Activations, RowMut};
use super::avx2::{Adder, Avx2, checksum, product};
use super::delegate::delegated_methods;
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::Activation;
use super::{Kernel, PAGE};
use crate::quant::packed::Packed;
use crate::threads::Columns;

/// Proof that the CPU has AVX-VNNI, and all that AVX2's functions need.
#[derive(Debug)]
pub(super) struct AvxVnni {
    avx2: &'static Avx2,
}

impl AvxVnni {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        static WITNESS: OnceLock<Option<AvxVnni>> = OnceLock::new();
        let detect = || Avx2::detect().filter(|_| is_x86_feature_detected!("avxvnni")).map(|avx2| AvxVnni { avx2 });
        WITNESS.get_or_init(detect).as_ref()
    }
}

impl Kernel for AvxVnni {
    fn name(&self) -> &'static str {
        "avxvnni"
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        // SAFETY: `self` has the witness of AVX2, which has found every feature that `product` enables.
        unsafe { product(self, w, panels, x, out) }
    }

    fn peak_int8(&self, rounds: usize) -> (u64, i32) {
        // SAFETY: as in `product`.
        unsafe { peak_int8(self, rounds) }
    }

    delegated_methods!(avx2);
}

impl Adder for &AvxVnni {
    const UNSIGNED: bool = true;

    #[inline(always)]
    fn add<const CODE: u8>(self, sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: `self` has the witness of AVX2.
        unsafe { add_dot(self, sum, w, x) }
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
fn add_dot(_: &AvxVnni, mut sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the instruction touches nothing but these registers, and the witness says that the CPU has it.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sum}, {w}, {x}",
            sum = inout(ymm_reg) sum,
            w = in(ymm_reg) w,
            x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

#[target_feature(enable = "avx2,fma,f16c")]
fn peak_int8(witness: &AvxVnni, rounds: usize) -> (u64, i32) {
    // 12 independent sums hide the instruction's latency.
    let mut sums = [_mm256_setzero_si256(); 12];
    let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = add_dot(witness, *sum, a, b);
        }
    }
    (rounds as u64 * 12 * 32 * 2, checksum(&sums))
}
