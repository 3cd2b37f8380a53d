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

/// Implements [`Vector`] with x86's intrinsics for registers of one width, and those that load and store integers of half and
/// a quarter of it.
macro_rules! x86_vector {
    (
        $set:ident: $registers:literal registers $register:ident of $lanes:ident;
        floats: $set1:ident, $load:ident, $store:ident, $mul:ident, $mul_add:ident, $as_floats:ident;
        halves: $load_half:ident, $store_half:ident, $from_f16:ident, $to_f16:ident;
        integers: $integers:ident, $from_u16:ident, $shift_left:ident, $set1_integers:ident, $load_integers:ident, $to_floats:ident;
        dots: $unsigned:literal, $add_dots:ident;
        $(also { $($other:item)* })?
    ) => {
        $crate::kernels::generic::vector::vector! {
            $set: $registers registers $register of $lanes;
            splat(x) = $set1(x);
            load load(x: f32) = $load(x.as_ptr());
            load load_f16(x: f16) = $from_f16($load_half(x.as_ptr().cast()));
            // The upper halves of F32.
            load load_bf16(x: bf16) = $as_floats($shift_left::<16>($from_u16($load_half(x.as_ptr().cast()))));
            store store(x, out: f32) = $store(out.as_mut_ptr(), x);
            store store_f16(x, out: f16) = $store_half(out.as_mut_ptr().cast(), $to_f16::<_MM_FROUND_TO_NEAREST_INT>(x));
            compute mul(a, b) = $mul(a, b);
            compute mul_add(a, b, c) = $mul_add(a, b, c);
            integers $integers, unsigned: $unsigned;
            splat_integers(x) = $set1_integers(x);
            load_bytes(x) = $load_integers(x.as_ptr().cast());
            to_floats(x) = $to_floats(x);
            add_dots(sums, a, b) = $add_dots(sums, a, b);
            also {
                #[inline(always)]
                fn prefetch<T>(self, x: &T) {
                    $crate::kernels::avx2::prefetch(x);
                }

                $($($other)*)?
            }
        }
    };
}
pub(in crate::kernels) use x86_vector;

x86_vector! {
    Avx2: 16 registers __m256 of LANES;
    floats: _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_mul_ps, _mm256_fmadd_ps, _mm256_castsi256_ps;
    halves: _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph;
    integers: __m256i, _mm256_cvtepu16_epi32, _mm256_slli_epi32, _mm256_set1_epi32, _mm256_loadu_si256, _mm256_cvtepi32_ps;
    dots: false, add_dots;
}

/// Adds to each lane the products of its four bytes of `a` with those of `b`, which are at least -127.
#[inline]
#[target_feature(enable = "avx2")]
fn add_dots(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // Two products are at most 2 * 128 * 127, which 16 bits hold.
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
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

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store(x: __m256, out: &mut [f32; LANES]) {
    // SAFETY: the reference is to 32 writable bytes, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}
