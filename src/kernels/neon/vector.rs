//! NEON's registers: a [`Vector`] for generic code, loads and stores for the integer product.

use std::arch::aarch64::*;

use half::{bf16, f16};

use crate::kernels::generic::vector::Vector;
use crate::quant::packed::{CacheLine, PANEL};

/// Lanes of a register: a quarter of a panel.
const LANES: usize = 4;
/// Registers that make a panel.
pub(super) const QUARTERS: usize = PANEL / LANES;
/// A value for each row of a panel.
pub(super) type Four<T> = [[T; LANES]; QUARTERS];

/// Proof that the CPU has NEON and the dot products of bytes (FEAT_DotProd, part of every Armv8.4 CPU).
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    /// # Safety
    ///
    /// The CPU must have NEON and its dot products of bytes.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Neon(())
    }
}

impl Vector for Neon {
    type F32s = [float32x4_t; QUARTERS];

    const CAPACITY: usize = 32 / QUARTERS;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32s {
        // SAFETY: `self` exists, so the CPU has every feature that the intrinsic needs.
        unsafe { [vdupq_n_f32(x); QUARTERS] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; PANEL]) -> Self::F32s {
        // SAFETY: as in `splat`. `x` has 16 bytes behind each address.
        let load = |first| unsafe { vld1q_f32(x.as_ptr().add(first)) };
        [load(0), load(4), load(8), load(12)]
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; PANEL]) -> Self::F32s {
        // SAFETY: as in `splat`. `x` has 8 bytes behind each address.
        let load = |first| unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().add(first).cast()))) };
        [load(0), load(4), load(8), load(12)]
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; PANEL]) -> Self::F32s {
        // SAFETY: as in `load_f16`. The bits are the upper halves of F32.
        let load = |first| unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(first).cast()))) };
        [load(0), load(4), load(8), load(12)]
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; PANEL]) -> Self::F32s {
        // SAFETY: as in `splat`. The reference is to 16 readable bytes.
        unsafe {
            let codes = vld1q_s8(x.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn store(self, x: Self::F32s, out: &mut [f32; PANEL]) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: as in `splat`. `out` has 16 bytes behind each of the four addresses.
            unsafe { vst1q_f32(out.as_mut_ptr().add(i * LANES), x) }
        }
    }

    #[inline(always)]
    fn store_f16(self, x: Self::F32s, out: &mut [f16; PANEL]) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: as in `splat`. `out` has 8 bytes behind each of the four addresses.
            unsafe { vst1_u16(out.as_mut_ptr().add(i * LANES).cast(), vreinterpret_u16_f16(vcvt_f16_f32(x))) }
        }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s {
        // SAFETY: as in `splat`.
        let mul = |i: usize| unsafe { vmulq_f32(a[i], b[i]) };
        [mul(0), mul(1), mul(2), mul(3)]
    }

    #[inline(always)]
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s {
        // SAFETY: as in `splat`.
        let mul_add = |i: usize| unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        [mul_add(0), mul_add(1), mul_add(2), mul_add(3)]
    }
}

/// Quarter `quarter` of a line: four bytes of each of four rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load(line: &CacheLine, quarter: usize) -> uint8x16_t {
    // SAFETY: a chunk is 16 readable bytes, and the load needs no alignment.
    unsafe { vld1q_u8(line.0.as_chunks::<16>().0[quarter].as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_i8(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: the reference is to 16 readable bytes, and the load needs no alignment.
    unsafe { vld1q_s8(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_f16(x: &[f16; LANES]) -> float32x4_t {
    // SAFETY: the reference is to 8 readable bytes, and the load needs no alignment.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(x.as_ptr().cast()) }))
}

/// Stores a quarter of a panel. The last panel of a matrix may have fewer than 16 rows: `out` has only those.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store_quarter(x: float32x4_t, quarter: usize, out: &mut [f32]) {
    let first = (quarter * LANES).min(out.len());
    let mut lanes = [0.0; LANES];
    // SAFETY: `lanes` is 16 writable bytes, and the store needs no alignment.
    unsafe { vst1q_f32(lanes.as_mut_ptr(), x) };
    let out = &mut out[first..];
    let count = out.len().min(LANES);
    out[..count].copy_from_slice(&lanes[..count]);
}
