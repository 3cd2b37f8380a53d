//! Sparse codes as 4-bit codes.

use std::arch::x86_64::*;

use crate::kernels::generic::sparse::PLACES;
use crate::quant::packed::sparse::{Int4Block, SparseBlocks};

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
