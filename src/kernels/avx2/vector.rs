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
    type Register = __m256;
    type Panel = [__m256; SIDES];

    const PARTS: usize = SIDES;
    const CAPACITY: usize = 16 / SIDES;

    #[inline(always)]
    fn zeros(self) -> Self::Panel {
        [self.splat(0.0); SIDES]
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` exists, so the CPU has every feature that the intrinsic needs.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; PANEL], part: usize) -> __m256 {
        let x = &x.as_chunks::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 32 readable bytes, and the load needs no alignment.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; PANEL], part: usize) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { load_f16(&x.as_chunks().0[part]) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; PANEL], part: usize) -> __m256 {
        let x = &x.as_chunks::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 16 readable bytes, the upper halves of F32; the load needs no alignment.
        unsafe {
            let bits = _mm_loadu_si128(x.as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; PANEL], part: usize) -> __m256 {
        let x = &x.as_chunks::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 8 readable bytes, and the load needs no alignment.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn store(self, x: __m256, out: &mut [f32; PANEL], part: usize) {
        // SAFETY: as in `splat`.
        unsafe { store(x, &mut out.as_chunks_mut().0[part]) }
    }

    #[inline(always)]
    fn store_f16(self, x: __m256, out: &mut [f16; PANEL], part: usize) {
        let out = &mut out.as_chunks_mut::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 16 writable bytes, and the store needs no alignment.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as in `splat`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
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
