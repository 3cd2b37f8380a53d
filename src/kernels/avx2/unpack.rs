//! Codes as bytes: the step in which layouts differ.

use std::arch::x86_64::*;

use super::vector::load;
use crate::kernels::generic::product::{INT2, INT3, INT5, INT6, INT8, TABLE4};
use crate::kernels::generic::sparse::PLACES;
use crate::quant::packed::CacheLine;
use crate::quant::packed::sparse::{Int4Block, SparseBlocks};

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

/// The bits that are set in each byte. Not every CPU with AVX2 need have an instruction for it.
static COUNTS: [u8; 256] = {
    let mut counts = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        counts[byte] = (byte as u8).count_ones() as u8;
        byte += 1;
    }
    counts
};

/// [Expands](crate::quant::packed::sparse::expand) blocks of sparse codes: the stored codes of a word become bytes. A shuffle takes 8
/// at a time to their places.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) fn expand(blocks: SparseBlocks<'_>, out: &mut [Int4Block]) {
    let SparseBlocks { masks, mut codes } = blocks;
    for (mask, out) in masks.iter().zip(out) {
        for (line, words) in out.iter_mut().zip(mask.as_chunks::<2>().0) {
            for (word, shift) in words.iter().zip([0, 4]) {
                // What follows the codes is at least as long.
                let Some(bytes) = codes.first_chunk() else { return };
                let stored = nibbles(bytes);
                let mut at = 0;
                for (out, mask) in line.0.as_chunks_mut::<8>().0.iter_mut().zip(word.to_le_bytes()) {
                    let (places, count) = (PLACES[usize::from(mask)], COUNTS[usize::from(mask)]);
                    let codes = stored[at..].first_chunk().map_or(0, |codes| u64::from_le_bytes(*codes));
                    let placed = _mm_shuffle_epi8(_mm_cvtsi64_si128(codes as i64), _mm_cvtsi64_si128(places as i64));
                    // The places of zeros become 8.
                    let placed = _mm_cvtsi128_si64(placed) as u64 | places >> 4 & 0x0808_0808_0808_0808;
                    let before = if shift == 0 { 0 } else { u64::from_le_bytes(*out) };
                    *out = (before | placed << shift).to_le_bytes();
                    at += usize::from(count);
                }
                codes = &codes[at.div_ceil(2)..];
            }
        }
    }
}

/// The nibbles of 32 bytes, low ones first, and the end of a load of 8 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(bytes: &[u8; 32]) -> [u8; 72] {
    let mut out = [0; 72];
    let low = _mm256_set1_epi8(15);
    // SAFETY: the reference is to 32 readable bytes, and 64 bytes are written to 72.
    unsafe {
        let bytes = _mm256_loadu_si256(bytes.as_ptr().cast());
        let (even, odd) = (_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low));
        let (a, b) = (_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd));
        let out = out.as_mut_ptr().cast::<__m256i>();
        _mm256_storeu_si256(out, _mm256_permute2x128_si256::<0x20>(a, b));
        _mm256_storeu_si256(out.add(1), _mm256_permute2x128_si256::<0x31>(a, b));
    }
    out
}
