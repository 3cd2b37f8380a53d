//! AVX-512 (F, BW, VL, VNNI): one panel of 16 output rows is one register.
#![allow(unsafe_code, reason = "intrinsics that load and store, and the entry into functions with target features")]

mod attention;
mod float;
mod product;

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

pub(super) use product::{INT4, TABLE4, unpack};

use super::activations::{Activations, RowMut};
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::{self, Activation, portable_methods};
use super::{Kernel, PAGE};
use crate::quant::packed::{CacheLine, PANEL, Packed};
use crate::threads::Columns;

/// Proof that the CPU has AVX-512 F, BW, VL and VNNI, and AVX2, FMA and F16C.
#[derive(Debug)]
pub(super) struct Avx512(());

static WITNESS: Avx512 = Avx512(());

impl Avx512 {
    /// The witness, if this CPU and its operating system support the instructions.
    pub(super) fn detect() -> Option<&'static Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(&WITNESS)
    }
}

impl Kernel for Avx512 {
    fn name(&self) -> &'static str {
        "avx512"
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

    portable_methods!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn to_f16(x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<PANEL>();
    let (out, out_tail) = out.as_chunks_mut::<PANEL>();
    for (x, out) in x.iter().zip(out) {
        store_f16(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load_f32(x)), out);
    }
    portable::to_f16(x_tail, out_tail);
}

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

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(line: &CacheLine) -> __m512i {
    // SAFETY: a `CacheLine` is 64 readable bytes, aligned to 64.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_table(table: &[i8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { _mm_loadu_si128(table.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_u16(x: &[u16; PANEL]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_f16(x: &[f16; PANEL]) -> __m512 {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i8(x: &[i8; PANEL]) -> __m512 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    let codes = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_f32(x: &[f32]) -> __m512 {
    let x = &x[..PANEL];
    // SAFETY: the slice is 64 readable bytes, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Stores the lanes that `out` has room for: the last panel of a matrix may have fewer than 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(x: __m512, out: &mut [f32]) {
    let lanes = if out.len() < PANEL { (1u16 << out.len()) - 1 } else { u16::MAX };
    // SAFETY: the mask leaves only lanes inside `out`, and a masked store touches no others.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), lanes, x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_line(x: __m512i, out: &mut CacheLine) {
    // SAFETY: a `CacheLine` is 64 writable bytes, aligned to 64.
    unsafe { _mm512_store_si512(std::ptr::from_mut(out).cast(), x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_f16(x: __m256i, out: &mut [f16; PANEL]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), x) }
}
