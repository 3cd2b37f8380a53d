//! Codes as bytes: the step in which layouts differ.

use std::arch::aarch64::*;

use super::vector::load;
use crate::kernels::generic::product::{INT2, INT3, INT5, INT6, INT8, TABLE4};
use crate::quant::packed::CacheLine;

/// Register `j` of 8 of a quarter of a block: columns `4 j .. 4 j + 4` of 4 rows, signed.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn register<const CODE: u8>(lines: &[CacheLine], j: usize, quarter: usize, table: int8x16_t) -> int8x16_t {
    let codes = match CODE {
        // Stored 128 too high.
        INT8 => veorq_u8(load(&lines[j], quarter), vdupq_n_u8(128)),
        INT2 => plane::<2>(lines, j, quarter, 0),
        INT3 => vorrq_u8(plane::<2>(lines, j, quarter, 0), plane::<1>(&lines[2..], j, quarter, 2)),
        INT5 => vorrq_u8(plane::<4>(lines, j, quarter, 0), plane::<1>(&lines[4..], j, quarter, 4)),
        INT6 => vorrq_u8(plane::<4>(lines, j, quarter, 0), plane::<2>(&lines[4..], j, quarter, 4)),
        _ => plane::<4>(lines, j, quarter, 0),
    };
    if CODE == TABLE4 { vqtbl1q_s8(table, codes) } else { vreinterpretq_s8_u8(codes) }
}

/// What register `j` takes from a plane of `BITS` bits, as bits `to ..` of the bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn plane<const BITS: usize>(lines: &[CacheLine], j: usize, quarter: usize, to: i8) -> uint8x16_t {
    let in_line = 8 / BITS;
    let from = (BITS * (j % in_line)) as i8;
    // A shift to the right, if the number is negative.
    let line = vshlq_u8(load(&lines[j / in_line], quarter), vdupq_n_s8(to - from));
    vandq_u8(line, vdupq_n_u8(((1 << BITS) - 1) << to))
}
