//! Sparse codes: what the instruction sets share that expand them to 4-bit codes before they multiply.

use std::ops::Range;

use crate::quant::packed::sparse::{CHUNK, Int4Block, SparseBlocks, chunk_of};
use crate::quant::packed::{CacheLine, Packed, Panel};

/// For each mask of 8 codes: the place of each among those that are stored, or 128 if it is zero.
pub(in crate::kernels) static PLACES: [u64; 256] = {
    let mut places = [0u64; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut i, mut place) = (0, 0);
        while i < 8 {
            let is_stored = mask >> i & 1 == 1;
            places[mask] |= (if is_stored { place } else { 128 }) << (8 * i);
            place += is_stored as u64;
            i += 1;
        }
        mask += 1;
    }
    places
};

/// Expands the chunks of a panel of a sparse matrix one after the other, and gives each to `each` with the blocks that it holds.
#[inline(always)]
pub(in crate::kernels) fn by_chunk<E>(
    w: &Packed,
    index: usize,
    expand: E,
    mut each: impl FnMut(Panel<'_>, Range<usize>),
) where
    E: Fn(SparseBlocks<'_>, &mut [Int4Block]),
{
    let (panel, mut lines) = (w.panel(index), [[CacheLine([0; 64]); 4]; CHUNK]);
    for (chunk, first) in (0..w.blocks()).step_by(CHUNK).enumerate() {
        let blocks = first..w.blocks().min(first + CHUNK);
        let lines = &mut lines[..blocks.len()];
        expand(w.sparse_blocks(index, chunk), lines);
        each(chunk_of(&panel, w.layout(), blocks.clone(), lines.as_flattened()), blocks);
    }
}
