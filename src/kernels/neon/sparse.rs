//! Sparse codes as 4-bit codes.

use std::arch::aarch64::*;

use crate::kernels::generic::sparse::PLACES;
use crate::quant::packed::sparse::{Int4Block, SparseBlocks, code_bytes};

/// [Expands](crate::quant::packed::sparse::expand) blocks of sparse codes: the stored codes of a word become bytes. A look-up takes 8
/// at a time to their places, and leaves the code of zero in the others.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn expand(blocks: SparseBlocks<'_>, out: &mut [Int4Block]) {
    let SparseBlocks { masks, mut codes } = blocks;
    let (low, zero) = (vdupq_n_u8(15), vdup_n_u8(8));
    for (mask, out) in masks.iter().zip(out) {
        for (line, words) in out.iter_mut().zip(mask.as_chunks::<2>().0) {
            let mut stored = [[0u8; 72]; 2];
            for (stored, word) in stored.iter_mut().zip(words) {
                // What follows the codes is at least as long.
                let Some(bytes) = codes.first_chunk::<32>() else { return };
                for (half, out) in bytes.as_chunks::<16>().0.iter().zip(stored.as_chunks_mut::<32>().0) {
                    // SAFETY: the references are to 16 readable and 32 writable bytes.
                    unsafe {
                        let half = vld1q_u8(half.as_ptr());
                        let (even, odd) = (vandq_u8(half, low), vshrq_n_u8::<4>(half));
                        vst1q_u8(out.as_mut_ptr(), vzip1q_u8(even, odd));
                        vst1q_u8(out[16..].as_mut_ptr(), vzip2q_u8(even, odd));
                    }
                }
                codes = &codes[code_bytes(*word)..];
            }
            let mut at = [0; 2];
            for (i, line) in line.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let mut bytes = [zero; 2];
                for w in 0..2 {
                    let mask = words[w].to_le_bytes()[i];
                    let places = vcreate_u8(PLACES[usize::from(mask)]);
                    let stored = stored[w][at[w]..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                    at[w] += mask.count_ones() as usize;
                    bytes[w] = vtbx1_u8(zero, vcreate_u8(stored), places);
                }
                let both = vorr_u8(bytes[0], vshl_n_u8::<4>(bytes[1]));
                *line = vget_lane_u64::<0>(vreinterpret_u64_u8(both)).to_le_bytes();
            }
        }
    }
}
