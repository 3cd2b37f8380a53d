//! Codes as bytes, for this set's products.

use std::arch::aarch64::*;

use super::vector::{Neon, load};
use crate::kernels::generic::product::INT8;
use crate::kernels::generic::unpack::{byte_vector, codes};
use crate::quant::packed::CacheLine;

byte_vector! {
    Neon of uint8x16_t:
    load_bytes(line: &CacheLine, part: usize) = load(line, part);
    // A shift to the right, if the number is negative.
    shift(x: uint8x16_t, by: i32) = vshlq_u8(x, vdupq_n_s8(by as i8));
    mask(x: uint8x16_t, mask: u8) = vandq_u8(x, vdupq_n_u8(mask));
    or(a: uint8x16_t, b: uint8x16_t) = vorrq_u8(a, b);
    look_up(table: uint8x16_t, indices: uint8x16_t) = vqtbl1q_u8(table, indices);
}

/// Register `j` of 8 of a quarter of a block: columns `4 j .. 4 j + 4` of 4 rows, signed.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn register<const CODE: u8>(lines: &[CacheLine], j: usize, quarter: usize, table: int8x16_t) -> int8x16_t {
    // SAFETY: the function runs only on CPUs with its features.
    let set = unsafe { Neon::new() };
    let codes = codes::<_, CODE>(set, lines, j, quarter, vreinterpretq_u8_s8(table));
    // 8-bit codes are stored 128 too high.
    vreinterpretq_s8_u8(if CODE == INT8 { veorq_u8(codes, vdupq_n_u8(128)) } else { codes })
}
