//! Codes as unsigned bytes, for this set's products.

use std::arch::x86_64::*;

use super::vector::{Avx512, load, store_line};
use crate::kernels::avx2::x86_bytes;
use crate::kernels::generic::product::{INT2, INT3, INT5, INT6, INT8, TABLE4, block_lines, lines_of_block};
use crate::kernels::generic::unpack::codes;
use crate::quant::packed::CacheLine;

x86_bytes! {
    Avx512 of __m512i: |line, _part| load(line);
    _mm512_set1_epi8, _mm512_and_si512, _mm512_or_si512, _mm512_sll_epi16, _mm512_srl_epi16, _mm512_shuffle_epi8
}

/// Register `j` of 8 of a block: columns `4 j .. 4 j + 4` of the 16 rows. 8-bit codes and table values are 128 too high.
///
/// `j` is a constant where this is inlined.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn register<const CODE: u8>(lines: &[CacheLine], j: usize, table: __m512i) -> __m512i {
    // SAFETY: the function runs only on CPUs with its features.
    codes::<_, CODE>(unsafe { Avx512::new() }, lines, j, 0, table)
}

/// What 4-bit or 8-bit codes of the same weights are higher by, if codes are unpacked to them.
const fn offset(code: u8, min: bool) -> i8 {
    match code {
        // The zero points 1 and 4 become 8, that of 4-bit codes.
        INT2 if !min => 7,
        INT3 if !min => 4,
        // The zero points 16 and 32 become 128, that of 8-bit codes.
        INT5 if !min => 112,
        INT6 if !min => 96,
        _ => 0,
    }
}

/// The weights of blocks as unsigned bytes: line `j` holds columns `4 j .. 4 j + 4` of the 16 rows.
///
/// Codes become those that [`becomes_int4`] says, so that the products of few layouts are compiled for bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(in crate::kernels) fn unpack<const CODE: u8, const MIN: bool>(
    packed: &[CacheLine],
    table: __m512i,
    out: &mut [[CacheLine; 8]],
) {
    let offset = _mm512_set1_epi8(offset(CODE, MIN));
    for (b, out) in out.iter_mut().enumerate().take(packed.len() / lines_of_block(CODE)) {
        let lines = block_lines::<CODE>(packed, b);
        for (j, out) in out.iter_mut().enumerate() {
            store_line(_mm512_add_epi8(register::<CODE>(lines, j, table), offset), out);
        }
    }
}

/// Whether [`unpack`] returns 4-bit codes in bytes, rather than 8-bit codes. With minimums, both have no zero point in unsigned codes, so
/// that all of them count as 4-bit codes.
pub(in crate::kernels) const fn becomes_int4(code: u8, min: bool) -> bool {
    match code {
        TABLE4 | INT8 => false,
        INT5 | INT6 => min,
        _ => true,
    }
}
