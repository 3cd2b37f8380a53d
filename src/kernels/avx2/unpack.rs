//! Codes as bytes, for this set's products.

use std::arch::x86_64::*;

use super::vector::{Avx2, load};
use crate::kernels::generic::product::INT8;
use crate::kernels::generic::unpack::codes;
use crate::quant::packed::CacheLine;

/// Implements [`ByteVector`](crate::kernels::generic::unpack::ByteVector) with x86's intrinsics for registers of one width.
macro_rules! x86_bytes {
    (
        $set:ident of $bytes:ident: |$line:ident, $part:ident| $load:expr;
        $set1:ident, $and:ident, $or:ident, $shift_left:ident, $shift_right:ident, $shuffle:ident
    ) => {
        $crate::kernels::generic::unpack::byte_vector! {
            $set of $bytes:
            load_bytes($line: &CacheLine, $part: usize) = $load;
            // A constant number of bits becomes part of the instruction.
            shift(x: $bytes, by: i32) = match _mm_cvtsi32_si128(by.abs()) {
                bits if by < 0 => $shift_right(x, bits),
                bits => $shift_left(x, bits),
            };
            mask(x: $bytes, mask: u8) = $and(x, $set1(mask as i8));
            or(a: $bytes, b: $bytes) = $or(a, b);
            look_up(table: $bytes, indices: $bytes) = $shuffle(table, indices);
        }
    };
}
pub(in crate::kernels) use x86_bytes;

x86_bytes! {
    Avx2 of __m256i: |line, side| load(line, side);
    _mm256_set1_epi8, _mm256_and_si256, _mm256_or_si256, _mm256_sll_epi16, _mm256_srl_epi16, _mm256_shuffle_epi8
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
    // SAFETY: the function runs only on CPUs with its features.
    let codes = codes::<_, CODE>(unsafe { Avx2::new() }, lines, j, side, table);
    match CODE {
        INT8 => _mm256_xor_si256(codes, _mm256_set1_epi8(if unsigned { 0 } else { -128 })),
        _ => codes,
    }
}
