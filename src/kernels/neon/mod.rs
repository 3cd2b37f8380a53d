//! NEON with dot product: a panel of 16 output rows is four registers, its quarters, over the same bytes.
#![allow(unsafe_code, reason = "intrinsics that load and store, and the entry into functions with target features")]

mod attention;
mod float;
mod product;

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::hint::black_box;
use std::ops::Range;

use half::f16;

use super::activations::{Activations, RowMut};
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::{self, Activation, portable_methods};
use super::{Kernel, PAGE};
use crate::quant::packed::{CacheLine, PANEL, Packed};
use crate::threads::Columns;

/// Proof that the CPU has NEON and the dot products of bytes (FEAT_DotProd, part of every Armv8.4 CPU).
#[derive(Debug)]
pub(super) struct Neon(());

static WITNESS: Neon = Neon(());

impl Neon {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        let found = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
        found.then_some(&WITNESS)
    }
}

impl Kernel for Neon {
    fn name(&self) -> &'static str {
        "neon"
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        // SAFETY: `self` exists, so `detect` has found every feature that `product` enables.
        unsafe { product::product(w, panels, x, out) }
    }

    fn product_float(&self, w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
        // SAFETY: as in `product`.
        unsafe { float::product_float(w, panels, x, stride, out) }
    }

    fn scores(
        &self,
        queries: &[f32],
        head_dim: usize,
        keys: KvSlice<'_>,
        scales: &[f32; PAGE],
        scores: &mut [f32],
        stride: usize,
    ) {
        // SAFETY: as in `product`.
        unsafe { attention::scores(queries, head_dim, keys, scales, scores, stride) }
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        ranges: &[Range<usize>],
        values: KvSlice<'_>,
        width: usize,
        out: &mut [f32],
    ) {
        // SAFETY: as in `product`.
        unsafe { attention::weighted_sum(weights, stride, ranges, values, width, out) }
    }

    fn widen(&self, numbers: KvSlice<'_>, out: &mut [f32]) {
        // SAFETY: as in `product`.
        unsafe { attention::widen(numbers, out) }
    }

    fn to_f16(&self, x: &[f32], out: &mut [f16]) {
        // SAFETY: as in `product`.
        unsafe { to_f16(x, out) }
    }

    fn peak_int8(&self, rounds: usize) -> (u64, i32) {
        // SAFETY: as in `product`.
        unsafe { peak_int8(rounds) }
    }

    portable_methods!("neon,dotprod");
}

/// Lanes of a register: a quarter of a panel.
const LANES: usize = 4;
/// Registers that make a panel.
const QUARTERS: usize = PANEL / LANES;
/// Something of each row of a panel.
type Four<T> = [[T; LANES]; QUARTERS];

#[target_feature(enable = "neon,dotprod")]
fn to_f16(x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in x.iter().zip(out) {
        store_f16(vcvt_f16_f32(load_f32(x)), out);
    }
    portable::to_f16(x_tail, out_tail);
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

/// Adds to each lane the products of its four bytes of `w` with the four bytes of lane `J` of `x`.
///
/// What the intrinsic `vdotq_laneq_s32` does, which stable Rust does not have yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const J: usize>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction touches nothing but these registers, and the CPU has it: it is one of the function's features.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            lane = const J,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Quarter `quarter` of a line: four bytes of each of four rows.
#[inline]
#[target_feature(enable = "neon")]
fn load(line: &CacheLine, quarter: usize) -> uint8x16_t {
    // SAFETY: a chunk is 16 readable bytes, and the load needs no alignment.
    unsafe { vld1q_u8(line.0.as_chunks::<16>().0[quarter].as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { vld1q_s8(x.as_ptr()) }
}

/// Four codes as floats.
#[inline]
#[target_feature(enable = "neon")]
fn load_i8x4(x: &[i8; LANES]) -> float32x4_t {
    let codes = vcreate_s8(u64::from(u32::from_ne_bytes(x.map(|x| x as u8))));
    vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f16(x: &[f16; LANES]) -> float32x4_t {
    // SAFETY: the reference is to 8 readable bytes, and the load needs no alignment.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(x.as_ptr().cast()) }))
}

/// The upper halves of F32.
#[inline]
#[target_feature(enable = "neon")]
fn load_bf16(x: &[u16; LANES]) -> float32x4_t {
    // SAFETY: the reference is to 8 readable bytes, and the load needs no alignment.
    vreinterpretq_f32_u32(vshll_n_u16::<16>(unsafe { vld1_u16(x.as_ptr()) }))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(x: &[f32; LANES]) -> float32x4_t {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { vld1q_f32(x.as_ptr()) }
}

/// Stores a quarter of a panel. The last panel of a matrix may have fewer than 16 rows: `out` has only those.
#[inline]
#[target_feature(enable = "neon")]
fn store_quarter(x: float32x4_t, quarter: usize, out: &mut [f32]) {
    let first = (quarter * LANES).min(out.len());
    let out = &mut out[first..];
    match out.first_chunk_mut() {
        Some(out) => store(x, out),
        None => {
            let mut lanes = [0.0; LANES];
            store(x, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(x: float32x4_t, out: &mut [f32; LANES]) {
    // SAFETY: the reference is to 16 writable bytes, and the store needs no alignment.
    unsafe { vst1q_f32(out.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f16(x: float16x4_t, out: &mut [f16; LANES]) {
    // SAFETY: the reference is to 8 writable bytes, and the store needs no alignment.
    unsafe { vst1_u16(out.as_mut_ptr().cast(), vreinterpret_u16_f16(x)) }
}
