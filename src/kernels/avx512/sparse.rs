//! Sparse codes: `vpexpandb` (VBMI2) puts the stored codes of a word into the bytes of a register that its mask selects. In pseudo-code, for
//! one row:
//!
//! ```text
//! for each block of 32 columns:
//!     for each word j of the mask:
//!         bytes = 32 bytes of codes, a nibble in each of 64 bytes
//!         w = vpexpandb(bytes, mask[j]), 8 in the other bytes
//!         codes += half of the bits of mask[j]
//!         dot = vpdpbusd(dot, w, codes of the activations)
//! ```
//!
//! An expansion takes two cycles of the port that has it, and widening and loading the mask one each. So a block takes 36 cycles where
//! dense codes take 13. A core at 2.8 GHz then reads 17 GB/s, still more than it gets from memory.

use std::arch::x86_64::*;

use super::unpack::unpack;
use super::vector::{AHEAD, Avx512, load_f16, store, store_line};
use crate::kernels::activations::Tile;
use crate::kernels::avx2::{self, prefetch};
use crate::kernels::generic::product::{ByTile, INT4, Product, by_tile, run_of};
use crate::quant::packed::sparse::{CHUNK, Int4Block, Mask, SparseBlocks, WORDS, code_bytes};
use crate::quant::packed::{BLOCK, CacheLine, PANEL};

/// Bytes of codes between a prefetch and the use: a block takes about 120.
const AHEAD_BYTES: usize = 3072;

/// Proof that the CPU has `vpexpandb`, in addition to AVX-512's other instructions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expander(Avx512);

impl Expander {
    /// The proof, if this CPU and its operating system support the instructions.
    pub(super) fn new(set: Avx512) -> Option<Expander> {
        let is_available = is_x86_feature_detected!("avx512vbmi2") && is_x86_feature_detected!("popcnt");
        is_available.then_some(Expander(set))
    }
}

/// The register of a word, and the codes after its own.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi2,popcnt,avx2,fma,f16c")]
fn register(word: u64, codes: &[u8]) -> (__m512i, &[u8]) {
    // What follows the codes is at least as long.
    let Some(bytes) = codes.first_chunk::<32>() else { return (_mm512_setzero_si512(), codes) };
    // SAFETY: the reference is to 32 readable bytes, and the load needs no alignment.
    let wide = _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) });
    // 0x00hl becomes 0x0h0l.
    let stored = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16::<4>(wide)), _mm512_set1_epi8(15));
    (_mm512_mask_expand_epi8(_mm512_set1_epi8(8), word, stored), &codes[code_bytes(word)..])
}

/// Expands blocks to unsigned bytes: line `j` holds columns `4 j .. 4 j + 4` of the 16 rows.
pub(in crate::kernels) fn expand(set: Avx512, blocks: SparseBlocks<'_>, out: &mut [[CacheLine; 8]]) {
    match Expander::new(set) {
        // SAFETY: an `Expander` exists, so the CPU has every feature that the function enables.
        Some(Expander(_)) => unsafe { expand_words(blocks, out) },
        // SAFETY: an `Avx512` exists, so the CPU has every feature that the function enables.
        None => unsafe { expand_by_shuffles(blocks, out) },
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi2,popcnt,avx2,fma,f16c")]
fn expand_words(blocks: SparseBlocks<'_>, out: &mut [[CacheLine; 8]]) {
    let SparseBlocks { masks, mut codes } = blocks;
    for (mask, out) in masks.iter().zip(out) {
        for (word, out) in mask.iter().zip(out) {
            let (register, rest) = register(*word, codes);
            store_line(register, out);
            codes = rest;
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn expand_by_shuffles(blocks: SparseBlocks<'_>, out: &mut [[CacheLine; 8]]) {
    let mut lines: [Int4Block; CHUNK] = [[CacheLine([0; 64]); 4]; CHUNK];
    let SparseBlocks { masks, codes } = blocks;
    // All blocks are expanded at once, as only the codes of the first can be found.
    let lines = &mut lines[..out.len()];
    avx2::expand(SparseBlocks { masks, codes }, lines);
    unpack::<INT4, false>(lines.as_flattened(), _mm512_setzero_si512(), out);
}

/// The product of a sparse matrix with one tile of rows, at most.
#[inline(always)]
pub(super) fn few_rows<const GROUP: usize>(_: Expander, product: Product<'_, '_, Avx512>) {
    let x = product.x;
    by_tile(x, 0..x.rows(), &mut Panels::<GROUP> { product });
}

/// All panels times a tile.
struct Panels<'a, 'c, const GROUP: usize> {
    product: Product<'a, 'c, Avx512>,
}

impl<const GROUP: usize> ByTile for Panels<'_, '_, GROUP> {
    #[inline(always)]
    fn tile<const R: usize>(&mut self, row: usize) {
        // SAFETY: only `few_rows` makes panels. It has an `Expander`, so the CPU has every feature that the function enables.
        unsafe { self.one_tile::<R>(row) }
    }
}

impl<const GROUP: usize> Panels<'_, '_, GROUP> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi2,popcnt,avx2,fma,f16c")]
    fn one_tile<const R: usize>(&mut self, row: usize) {
        let Product { w, panels, x, out, .. } = &mut self.product;
        let (blocks, rows) = (w.blocks(), row..x.rows().min(row + R));
        let x = x.tile::<R>(row).blocks(0..blocks);
        let output_scale = _mm512_set1_ps(w.output_scale());
        for (p, index) in panels.clone().enumerate() {
            let SparseBlocks { masks, mut codes } = w.sparse_blocks(index, 0);
            let scales = w.panel(index).scales;
            let mut acc = [_mm512_setzero_ps(); R];
            // The sums of the blocks of a group.
            let mut part = [_mm512_setzero_ps(); R];
            for b in 0..blocks {
                let dots;
                (dots, codes) = block::<GROUP, R>(masks, b, codes, &x);
                if GROUP == BLOCK {
                    let scale = load_f16(&scales[b]);
                    for r in 0..R {
                        acc[r] = _mm512_fmadd_ps(dots[r], _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[b][r])), acc[r]);
                    }
                    continue;
                }
                for r in 0..R {
                    part[r] = _mm512_fmadd_ps(dots[r], _mm512_set1_ps(x.scales[b][r]), part[r]);
                }
                if (b + 1).is_multiple_of(run_of(GROUP)) || b + 1 == blocks {
                    let scale = load_f16(&scales[b / run_of(GROUP)]);
                    for r in 0..R {
                        acc[r] = _mm512_fmadd_ps(part[r], scale, acc[r]);
                        part[r] = _mm512_setzero_ps();
                    }
                }
            }
            for (acc, row) in acc.iter().zip(rows.clone()) {
                store(_mm512_mul_ps(*acc, output_scale), &mut out.row_mut(row)[p * PANEL..]);
            }
        }
    }
}

/// The dot products of block `b` with the rows of a tile, and the codes after its own.
///
/// With `GROUP`, each caller has its own copy, which the compiler puts into the loop over blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi2,popcnt,avx2,fma,f16c")]
fn block<'a, const GROUP: usize, const R: usize>(
    masks: &[Mask],
    b: usize,
    mut codes: &'a [u8],
    x: &Tile<'_, R>,
) -> ([__m512; R], &'a [u8]) {
    if let Some(mask) = masks.get(b + AHEAD) {
        prefetch(mask);
    }
    for ahead in [AHEAD_BYTES, AHEAD_BYTES + 64, AHEAD_BYTES + 128] {
        if let Some(byte) = codes.get(ahead) {
            prefetch(byte);
        }
    }
    // Two sums, so that a dot product of one row does not wait for all before it.
    let mut dots = [[_mm512_setzero_si512(); R]; 2];
    for r in 0..R {
        dots[0][r] = _mm512_set1_epi32(x.zeros[b][r]);
    }
    let (mask, x) = (&masks[b], &x.codes[b]);
    for j in 0..WORDS {
        let weights;
        (weights, codes) = register(mask[j], codes);
        let sum = if R == 1 { j % 2 } else { 0 };
        for r in 0..R {
            dots[sum][r] = _mm512_dpbusd_epi32(dots[sum][r], weights, _mm512_set1_epi32(x[r][j]));
        }
    }
    let mut sums = [_mm512_setzero_ps(); R];
    for r in 0..R {
        sums[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(dots[0][r], dots[1][r]));
    }
    (sums, codes)
}
