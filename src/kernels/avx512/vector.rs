//! AVX-512's registers: a [`Vector`] for generic code, loads and stores for the integer product.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::kernels::avx2::x86_vector;
use crate::kernels::generic::vector::Vector;
use crate::quant::packed::{CacheLine, PANEL};

/// Blocks between the prefetch of a line and its use when there is one tile, so that only memory limits the speed.
pub(super) const AHEAD: usize = 12;

/// Proof that the CPU has AVX-512 F, BW, VL and VNNI, and AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct Avx512(());

impl Avx512 {
    /// # Safety
    ///
    /// The CPU must have AVX-512 F, BW, VL and VNNI, and AVX2, FMA and F16C.
    #[inline(always)]
    pub(in crate::kernels) unsafe fn new() -> Self {
        Avx512(())
    }
}

x86_vector! {
    Avx512: 32 registers __m512 of PANEL;
    floats: _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_mul_ps, _mm512_fmadd_ps, _mm512_castsi512_ps;
    halves: _mm256_loadu_si256, _mm256_storeu_si256, _mm512_cvtph_ps, _mm512_cvtps_ph;
    integers: __m512i, _mm512_cvtepu16_epi32, _mm512_slli_epi32, _mm512_set1_epi32, _mm512_loadu_si512, _mm512_cvtepi32_ps;
    dots: true, _mm512_dpbusd_epi32;
    also {
        #[inline(always)]
        fn store_panel(self, x: Self::Panel, out: &mut [f32]) {
            // SAFETY: as in `splat`.
            unsafe { store(x[0], out) }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn load(line: &CacheLine) -> __m512i {
    // SAFETY: a `CacheLine` is 64 readable bytes, aligned to 64.
    unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn load_table(table: &[i8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { _mm_loadu_si128(table.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn load_f16(x: &[f16; PANEL]) -> __m512 {
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn load_f32(x: &[f32; PANEL]) -> __m512 {
    // SAFETY: the reference is to 64 readable bytes, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Stores the first `out.len()` lanes: the last panel of a matrix may have fewer than 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn store(x: __m512, out: &mut [f32]) {
    let lanes = if out.len() < PANEL { (1u16 << out.len()) - 1 } else { u16::MAX };
    // SAFETY: the mask leaves only lanes inside `out`, and a masked store touches no others.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), lanes, x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store_line(x: __m512i, out: &mut CacheLine) {
    // SAFETY: a `CacheLine` is 64 writable bytes, aligned to 64.
    unsafe { _mm512_store_si512(std::ptr::from_mut(out).cast(), x) }
}
