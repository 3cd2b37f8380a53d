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
    type Register = float32x4_t;
    type Panel = [float32x4_t; QUARTERS];

    const PARTS: usize = QUARTERS;
    const CAPACITY: usize = 32 / QUARTERS;

    #[inline(always)]
    fn zeros(self) -> Self::Panel {
        [self.splat(0.0); QUARTERS]
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: `self` exists, so the CPU has every feature that the intrinsic needs.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; PANEL], part: usize) -> float32x4_t {
        let x = &x.as_chunks::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 16 readable bytes.
        unsafe { vld1q_f32(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; PANEL], part: usize) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { load_f16(&x.as_chunks().0[part]) }
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; PANEL], part: usize) -> float32x4_t {
        let x = &x.as_chunks::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 8 readable bytes, the upper halves of F32.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; PANEL], part: usize) -> float32x4_t {
        let codes = u32::from_le_bytes(x.as_chunks::<LANES>().0[part].map(|x| x as u8));
        // SAFETY: as in `splat`.
        unsafe { vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(u64::from(codes)))))) }
    }

    #[inline(always)]
    fn store(self, x: float32x4_t, out: &mut [f32; PANEL], part: usize) {
        // SAFETY: as in `splat`.
        unsafe { store(x, &mut out.as_chunks_mut().0[part]) }
    }

    #[inline(always)]
    fn store_f16(self, x: float32x4_t, out: &mut [f16; PANEL], part: usize) {
        let out = &mut out.as_chunks_mut::<LANES>().0[part];
        // SAFETY: as in `splat`. The reference is to 8 writable bytes.
        unsafe { vst1_u16(out.as_mut_ptr().cast(), vreinterpret_u16_f16(vcvt_f16_f32(x))) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as in `splat`.
        unsafe { vfmaq_f32(c, a, b) }
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
