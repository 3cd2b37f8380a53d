//! NEON's registers: a [`Vector`] for generic code, loads and stores for the integer product.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use crate::kernels::generic::vector::{Vector, vector};
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

/// An instruction from one register to another.
macro_rules! convert {
    ($instruction:literal, $x:expr) => {{
        let out;
        // SAFETY: the instruction touches only these registers and is part of NEON.
        unsafe {
            asm!($instruction, out = lateout(vreg) out, x = in(vreg) $x, options(pure, nomem, nostack, preserves_flags));
        }
        out
    }};
}

vector! {
    Neon: 32 registers float32x4_t of LANES;
    splat(x) = vdupq_n_f32(x);
    load load(x: f32) = vld1q_f32(x.as_ptr());
    load load_f16(x: f16) = load_f16(x);
    // The upper halves of F32.
    load load_bf16(x: bf16) = vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().cast())));
    store store(x, out: f32) = vst1q_f32(out.as_mut_ptr(), x);
    store store_f16(x, out: f16) = vst1_u16(out.as_mut_ptr().cast(), to_f16(x));
    compute mul(a, b) = vmulq_f32(a, b);
    compute mul_add(a, b, c) = vfmaq_f32(c, a, b);
    integers int32x4_t, unsigned: false;
    splat_integers(x) = vdupq_n_s32(x);
    load_bytes(x) = vreinterpretq_s32_u8(vld1q_u8(x.as_ptr()));
    to_floats(x) = vcvtq_f32_s32(x);
    add_dots(sums, a, b) = add_dots(sums, a, b);
}

/// Adds to each lane the products of its four signed bytes of `a` with those of `b`.
///
/// Equivalent to the intrinsic `vdotq_s32`, which stable Rust does not have yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_dots(mut sums: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: the instruction touches only these registers, and the CPU has it: it is one of the function's features.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
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
    let halves = unsafe { vld1_u16(x.as_ptr().cast()) };
    // The intrinsic, `vcvt_f32_f16`, needs Rust 1.94 and a CPU feature that the instruction does not need.
    convert!("fcvtl {out:v}.4s, {x:v}.4h", halves)
}

/// Rounds to nearest even.
#[inline]
#[target_feature(enable = "neon")]
fn to_f16(x: float32x4_t) -> uint16x4_t {
    convert!("fcvtn {out:v}.4h, {x:v}.4s", x)
}
