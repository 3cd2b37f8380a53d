//! The integer product by tiles, in pseudo-code:
//!
//! ```text
//! for each panel:
//!     unpack all its codes to unsigned bytes             (once for all rows)
//!     for each tile of 8 rows of activations:
//!         for each block of 32 columns, or half a block if it has a scale of its own:
//!             dots (8, 16) = codes (8, 32) * weights (16, 32)^T           (tdpbsud)
//!             as in AVX-512: acc = fma(dot + zero point, weight scales * activation scale, acc)
//! ```

use std::arch::x86_64::*;
use std::fmt;
use std::ops::Range;

use crate::kernels::activations::{Activations, MAX_TILE_ROWS, Tile};
use crate::kernels::avx512::{Avx512, becomes_int4, expand, load, load_f16, load_f32, load_table, store, unpack};
use crate::kernels::generic::product::{ByLayout, ByTile, by_layout, by_tile, lines_of_block, run_of};
use crate::quant::packed::{BLOCK, CacheLine, Code, Layout, PANEL, Packed, Panel, sparse};
use crate::threads::Columns;

/// The codes of a block of activations.
pub(super) type XCodes = [[i8; BLOCK]; MAX_TILE_ROWS];
/// The unsigned codes of a block of a panel: line `j` holds columns `4 j .. 4 j + 4` of the 16 rows.
pub(super) type WCodes = [CacheLine; BLOCK / 4];
/// Dot products of 32 bits `(MAX_TILE_ROWS, PANEL)`.
pub(super) type Sums = [CacheLine; MAX_TILE_ROWS];

/// Multiplies integers: with the tiles, or in tests with plain Rust.
pub(super) trait Dots: fmt::Debug {
    /// Parts of a block that are multiplied one by one, because each has its own scale: 1 or 2.
    const PARTS: usize;

    /// Computes the integer dot products of part `part` of a block.
    fn dots(&self, x: &XCodes, w: &WCodes, part: usize, out: &mut Sums);
}

/// Blocks that are unpacked together: 16 KiB, half a first-level cache. A multiple of the blocks of any group, and of those whose sparse
/// codes can be found.
const CHUNK: usize = 2 * sparse::CHUNK;

/// The integer product with `dots`.
pub(super) fn with_dots<D: Dots>(
    set: Avx512,
    dots: &D,
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
) {
    // SAFETY: an `Avx512` exists, so the CPU has every feature that `chunks` enables.
    unsafe { chunks(set, dots, w, panels, x, out) }
}

/// A chunk of blocks of all rows, which stays in the second-level cache, times every panel. The sums wait in `out` from
/// one chunk to the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn chunks<D: Dots>(set: Avx512, dots: &D, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    let mut unpacked = [[CacheLine([0; 64]); BLOCK / 4]; CHUNK];
    for first in (0..x.blocks()).step_by(CHUNK) {
        let blocks = first..x.blocks().min(first + CHUNK);
        for (p, index) in panels.clone().enumerate() {
            let panel = w.panel(index);
            let codes = if w.is_sparse() {
                let unpacked = &mut unpacked[..blocks.len()];
                for (i, out) in unpacked.chunks_mut(sparse::CHUNK).enumerate() {
                    expand(set, w.sparse_blocks(index, first / sparse::CHUNK + i), out);
                }
                unpacked
            } else {
                bytes(w.layout(), &panel, blocks.clone(), &mut unpacked)
            };
            let mut chunk = Chunk { dots, w, panel, codes, blocks: blocks.clone(), x, p, out };
            by_tile(x, 0..x.rows(), &mut chunk);
        }
    }
}

/// The codes of some blocks as unsigned bytes: 8-bit codes in place, others copied to `unpacked`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn bytes<'a>(
    layout: Layout,
    panel: &Panel<'a>,
    blocks: Range<usize>,
    unpacked: &'a mut [WCodes; CHUNK],
) -> &'a [WCodes] {
    if layout.code == Code::Int8 {
        return &panel.codes.as_chunks().0[blocks];
    }
    by_layout(layout, Unpack { panel, blocks: blocks.clone(), unpacked });
    &unpacked[..blocks.len()]
}

/// Copies the codes of some blocks.
struct Unpack<'a, 'b> {
    panel: &'a Panel<'b>,
    blocks: Range<usize>,
    unpacked: &'a mut [WCodes; CHUNK],
}

impl ByLayout for Unpack<'_, '_> {
    #[inline(always)]
    fn run<const CODE: u8, const GROUP: usize, const MIN: bool>(self, table: &[i8; 16]) {
        let lines = lines_of_block(CODE) * self.blocks.start..lines_of_block(CODE) * self.blocks.end;
        // SAFETY: only `bytes` unpacks, which has the features that the functions enable.
        unsafe {
            // Table values are stored 128 too high, as 8-bit codes are, to be unsigned.
            let table = _mm512_xor_si512(_mm512_broadcast_i32x4(load_table(table)), _mm512_set1_epi8(-128));
            unpack::<CODE, MIN>(&self.panel.codes[lines], table, self.unpacked);
        }
    }
}

/// Whether [`bytes`] returns unsigned 4-bit codes, rather than 8-bit codes.
struct BecomesInt4<'a>(&'a mut bool);

impl ByLayout for BecomesInt4<'_> {
    fn run<const CODE: u8, const GROUP: usize, const MIN: bool>(self, _: &[i8; 16]) {
        *self.0 = becomes_int4(CODE, MIN);
    }
}

/// A chunk of a panel times all tiles.
struct Chunk<'a, 'c, D> {
    dots: &'a D,
    w: &'a Packed,
    panel: Panel<'a>,
    /// Unsigned bytes of the chunk's blocks.
    codes: &'a [WCodes],
    blocks: Range<usize>,
    x: &'a Activations,
    /// The panel's place in `out`.
    p: usize,
    out: &'a mut Columns<'c>,
}

impl<D: Dots> ByTile for Chunk<'_, '_, D> {
    #[inline(always)]
    fn tile<const R: usize>(&mut self, row: usize) {
        // SAFETY: only `chunks` makes a chunk, which has the features that `one_tile` enables.
        unsafe { self.one_tile::<R>(row) }
    }
}

impl<D: Dots> Chunk<'_, '_, D> {
    /// Adds the products of the tile of `R` rows at `row` to the sums of the blocks before.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn one_tile<const R: usize>(&mut self, row: usize) {
        let rows = row..self.x.rows().min(row + R);
        let mut acc = [_mm512_setzero_ps(); R];
        if self.blocks.start > 0 {
            for (acc, row) in acc.iter_mut().zip(rows.clone()) {
                let sums = &self.out.row_mut(row)[self.p * PANEL..];
                let mut lanes = [0.0; PANEL];
                let count = PANEL.min(sums.len());
                lanes[..count].copy_from_slice(&sums[..count]);
                *acc = load_f32(&lanes);
            }
        }
        self.add(&self.x.tile::<R>(row), &mut acc);
        let output_scale = if self.blocks.end == self.x.blocks() { self.w.output_scale() } else { 1.0 };
        for (acc, row) in acc.iter().zip(rows) {
            store(_mm512_mul_ps(*acc, _mm512_set1_ps(output_scale)), &mut self.out.row_mut(row)[self.p * PANEL..]);
        }
    }

    /// Adds the products of a tile of `R` rows to `acc`, in the order that
    /// [`Kernel::product`](crate::kernels::Kernel::product) defines.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn add<const R: usize>(&self, x: &Tile<'_, R>, acc: &mut [__m512; R]) {
        let layout = self.w.layout();
        // Blocks that are summed before they are multiplied with their scale.
        let run = run_of(layout.group);
        let mut is_int4 = false;
        by_layout(layout, BecomesInt4(&mut is_int4));
        let mut parts = [_mm512_setzero_ps(); R];
        let mut codes = [[0; BLOCK]; MAX_TILE_ROWS];
        let mut sums = [CacheLine([0; 64]); MAX_TILE_ROWS];
        for (w, b) in self.codes.iter().zip(self.blocks.clone()) {
            // The tile of the last rows may have fewer rows than are multiplied. The other dot products are not used.
            codes[..R].copy_from_slice(bytemuck::cast_slice(&x.codes[b]));
            for part in 0..D::PARTS {
                self.dots.dots(&codes, w, part, &mut sums);
                let group = if D::PARTS == 1 { b * BLOCK / layout.group } else { b * D::PARTS + part };
                let scale = load_f16(&self.panel.scales[group]);
                for r in 0..R {
                    let mut dot = load(&sums[r]);
                    if !is_int4 || !layout.min {
                        let zero =
                            _mm512_set1_epi32(if D::PARTS == 1 { x.zeros[b][r] } else { x.half_zeros[b][part][r] });
                        // 8-bit codes and table values are stored 128 too high, 16 times the zero point of 4-bit codes.
                        dot = _mm512_add_epi32(dot, if is_int4 { zero } else { _mm512_slli_epi32::<4>(zero) });
                    }
                    let (dot, x_scale) = (_mm512_cvtepi32_ps(dot), _mm512_set1_ps(x.scales[b][r]));
                    if run == 1 {
                        acc[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, x_scale), acc[r]);
                    } else {
                        parts[r] = _mm512_fmadd_ps(dot, x_scale, parts[r]);
                    }
                }
                let last = (b + 1).is_multiple_of(run) || b + 1 == x.codes.len();
                if run > 1 && last {
                    for r in 0..R {
                        acc[r] = _mm512_fmadd_ps(parts[r], scale, acc[r]);
                        parts[r] = _mm512_setzero_ps();
                    }
                }
                if layout.min && last {
                    let min = load_f16(&self.panel.mins[group]);
                    for b in b / run * run..=b {
                        for r in 0..R {
                            let sum = if D::PARTS == 1 { x.sums[b][r] } else { x.half_sums[b][part][r] };
                            acc[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), acc[r]);
                        }
                    }
                }
            }
        }
    }
}
