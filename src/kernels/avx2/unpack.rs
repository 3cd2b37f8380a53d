//! Codes as bytes: the step in which layouts differ.

use std::arch::x86_64::*;

use super::vector::load;
use crate::kernels::generic::product::{INT2, INT3, INT5, INT6, INT8, TABLE4};
use crate::quant::packed::CacheLine;

/// `x` shifted by `by` bits, to the left if it is positive. Bits cross from one byte of a pair into the other.
///
/// `by` is a constant where this is inlined.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shifted(x: __m256i, by: i32) -> __m256i {
    match by {
        -6 => _mm256_srli_epi16::<6>(x),
        -5 => _mm256_srli_epi16::<5>(x),
        -4 => _mm256_srli_epi16::<4>(x),
        -3 => _mm256_srli_epi16::<3>(x),
        -2 => _mm256_srli_epi16::<2>(x),
        -1 => _mm256_srli_epi16::<1>(x),
        1 => _mm256_slli_epi16::<1>(x),
        2 => _mm256_slli_epi16::<2>(x),
        3 => _mm256_slli_epi16::<3>(x),
        4 => _mm256_slli_epi16::<4>(x),
        _ => x,
    }
}

/// Register `j` of 8 of a side of a block: columns `4 j .. 4 j + 4` of 8 rows.
///
/// 8-bit codes and table values are signed, or with `unsigned` 128 too high. The values of `table` already are the one or the other. `j`
/// is a constant where this is inlined.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn register<const CODE: u8>(
    lines: &[CacheLine],
    j: usize,
    side: usize,
    unsigned: bool,
    table: __m256i,
) -> __m256i {
    match CODE {
        INT8 => _mm256_xor_si256(load(&lines[j], side), _mm256_set1_epi8(if unsigned { 0 } else { -128 })),
        INT2 => plane::<2>(lines, j, side, 0),
        INT3 => _mm256_or_si256(plane::<2>(lines, j, side, 0), plane::<1>(&lines[2..], j, side, 2)),
        INT5 => _mm256_or_si256(plane::<4>(lines, j, side, 0), plane::<1>(&lines[4..], j, side, 4)),
        INT6 => _mm256_or_si256(plane::<4>(lines, j, side, 0), plane::<2>(&lines[4..], j, side, 4)),
        TABLE4 => _mm256_shuffle_epi8(table, plane::<4>(lines, j, side, 0)),
        _ => plane::<4>(lines, j, side, 0),
    }
}

/// What register `j` takes from a plane of `BITS` bits, as bits `to ..` of the bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn plane<const BITS: usize>(lines: &[CacheLine], j: usize, side: usize, to: i32) -> __m256i {
    let in_line = 8 / BITS;
    let from = (BITS * (j % in_line)) as i32;
    _mm256_and_si256(shifted(load(&lines[j / in_line], side), to - from), _mm256_set1_epi8(((1 << BITS) - 1) << to))
}
