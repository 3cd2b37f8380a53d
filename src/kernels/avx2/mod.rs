//! AVX2 with FMA and F16C: a panel of 16 output rows is two registers, its sides, over the same bytes.
#![allow(unsafe_code, reason = "intrinsics that load and store, and the entry into functions with target features")]

mod attention;
mod float;
mod product;

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;

use half::f16;

pub(super) use product::{Adder, product};

use super::activations::{Activations, RowMut};
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::{self, Activation, portable_methods};
use super::{Kernel, PAGE};
use crate::quant::packed::{CacheLine, PANEL, Packed};
use crate::threads::Columns;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug)]
pub(super) struct Avx2(());

static WITNESS: Avx2 = Avx2(());

impl Avx2 {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(&WITNESS)
    }
}

impl Kernel for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        // SAFETY: `self` exists, so `detect` has found every feature that `product` enables.
        unsafe { product(self, w, panels, x, out) }
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

    portable_methods!("avx2,fma,f16c");
}

/// Lanes of a register: half a panel.
const LANES: usize = 8;
/// Registers that make a panel.
const SIDES: usize = PANEL / LANES;
/// Something of each row of a panel.
type Both<T> = [[T; LANES]; SIDES];

#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in x.iter().zip(out) {
        store_f16(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(x)), out);
    }
    portable::to_f16(x_tail, out_tail);
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
    store(_mm256_castsi256_ps(total), &mut lanes);
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(lane.to_bits() as i32))
}

/// Asks for the cache line in which `x` begins, as it will be needed soon.
#[inline]
pub(super) fn prefetch<T>(x: &T) {
    // SAFETY: a prefetch of a valid address; it reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) }
}

/// Side `side` of a line.
#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &CacheLine, side: usize) -> __m256i {
    // SAFETY: a chunk is 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(line.0.as_chunks::<32>().0[side].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_table(table: &[i8; 16]) -> __m256i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_f16(x: &[f16; LANES]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// The upper halves of F32.
#[inline]
#[target_feature(enable = "avx2")]
fn load_bf16(x: &[u16; LANES]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    let bits = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i8(x: &[i8; LANES]) -> __m256 {
    // SAFETY: the reference is to 8 readable bytes, and the load needs no alignment.
    let codes = unsafe { _mm_loadl_epi64(x.as_ptr().cast()) };
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(x: &[f32; LANES]) -> __m256 {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Stores a side of a panel. The last panel of a matrix may have fewer than 16 rows: `out` has only those.
#[inline]
#[target_feature(enable = "avx2")]
fn store_side(x: __m256, side: usize, out: &mut [f32]) {
    let first = (side * LANES).min(out.len());
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
#[target_feature(enable = "avx2")]
fn store(x: __m256, out: &mut [f32; LANES]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_f16(x: __m128i, out: &mut [f16; LANES]) {
    // SAFETY: the reference is to 16 writable bytes, and the store needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), x) }
}
