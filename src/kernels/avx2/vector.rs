//! AVX2's registers: a [`Vector`] for generic code, loads and stores for the integer product.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::kernels::generic::vector::Vector;
use crate::quant::packed::{CacheLine, PANEL};

/// Lanes of a register: half a panel.
pub(in crate::kernels) const LANES: usize = 8;
/// Registers that make a panel.
pub(super) const SIDES: usize = PANEL / LANES;
/// A value for each row of a panel.
pub(super) type Both<T> = [[T; LANES]; SIDES];

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The CPU must have AVX2, FMA and F16C.
    #[inline(always)]
    pub(in crate::kernels) unsafe fn new() -> Self {
        Avx2(())
    }
}

impl Vector for Avx2 {
    type F32s = [__m256; SIDES];

    const CAPACITY: usize = 16 / SIDES;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32s {
        // SAFETY: `self` exists, so the CPU has every feature that the intrinsic needs.
        unsafe { [_mm256_set1_ps(x); SIDES] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; PANEL]) -> Self::F32s {
        // SAFETY: as in `splat`. Both addresses are followed by 32 bytes of `x`; the loads need no alignment.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(LANES))] }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; PANEL]) -> Self::F32s {
        let load = |side: usize| {
            // SAFETY: as in `splat`. `side` is 0 or 1, so 16 bytes of `x` follow; the load needs no alignment.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(side * LANES).cast())) }
        };
        [load(0), load(1)]
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; PANEL]) -> Self::F32s {
        let load = |side: usize| {
            // SAFETY: as in `load_f16`. The bits are the upper halves of F32.
            unsafe {
                let bits = _mm_loadu_si128(x.as_ptr().add(side * LANES).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
            }
        };
        [load(0), load(1)]
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; PANEL]) -> Self::F32s {
        let load = |side: usize| {
            // SAFETY: as in `splat`. `side` is 0 or 1, so 8 bytes of `x` follow; the load needs no alignment.
            unsafe {
                let codes = _mm_loadl_epi64(x.as_ptr().add(side * LANES).cast());
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
            }
        };
        [load(0), load(1)]
    }

    #[inline(always)]
    fn store(self, x: Self::F32s, out: &mut [f32; PANEL]) {
        let out = out.as_mut_ptr();
        // SAFETY: as in `splat`. Both addresses are followed by 32 bytes of `out`; the stores need no alignment.
        unsafe {
            _mm256_storeu_ps(out, x[0]);
            _mm256_storeu_ps(out.add(LANES), x[1]);
        }
    }

    #[inline(always)]
    fn store_f16(self, x: Self::F32s, out: &mut [f16; PANEL]) {
        let out = out.as_mut_ptr();
        // SAFETY: as in `splat`. Both addresses are followed by 16 bytes of `out`; the stores need no alignment.
        unsafe {
            _mm_storeu_si128(out.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(out.add(LANES).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
        }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s {
        // SAFETY: as in `splat`.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s {
        // SAFETY: as in `splat`.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &T) {
        prefetch(x);
    }
}

/// Prefetches the cache line in which `x` begins.
#[inline]
pub(in crate::kernels) fn prefetch<T>(x: &T) {
    // SAFETY: a prefetch of a valid address; it reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) }
}

/// Side `side` of a line.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(line: &CacheLine, side: usize) -> __m256i {
    // SAFETY: a chunk is 32 readable bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(line.0.as_chunks::<32>().0[side].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_table(table: &[i8; 16]) -> __m256i {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn load_f16(x: &[f16; LANES]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// Stores a side of a panel. The last panel of a matrix may have fewer than 16 rows: `out` has only those.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_side(x: __m256, side: usize, out: &mut [f32]) {
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
pub(super) fn store(x: __m256, out: &mut [f32; LANES]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}
