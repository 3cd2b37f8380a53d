//! The integer product in pseudo-code, for a tile of `R` activation rows and `P` panels:
//!
//! ```text
//! for each block of 32 columns:
//!     dots[R][P] = zero points                   (-8 * sum of the activations' codes, broadcast)
//!     for j in 0..8:
//!         w[P] = unsigned weights                (16 rows x 4 weights each)
//!         for each of R rows:
//!             a = codes[j]                       (4 codes, broadcast once for P panels)
//!             dots[P] = vpdpbusd(dots[P], w[P], a)
//!     acc[R][P] = fma(dots[R][P], weight scales * activation scale, acc[R][P])
//! ```
//!
//! All arithmetic on 512 bits shares two ports. A block takes 8 dot products, a conversion, a multiplication and an
//! addition there, so at most 8 of 11 cycles count towards the CPU's INT8 rate, and everything else has to stay off those
//! ports. Some sums wait in memory while dot products fill the registers. With few tiles, codes are unpacked in registers.
//! With many, the codes and scales of two panels and some blocks are unpacked once, into the first-level cache.

use std::arch::x86_64::*;
use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use super::sparse::{self, Expander};
use super::unpack::{becomes_int4, register, unpack};
use super::vector::{AHEAD, Avx512, load_f16, load_f32, load_table, store};
use crate::kernels::activations::{Activations, MAX_TILE_ROWS, Tile};
use crate::kernels::avx2::prefetch;
use crate::kernels::generic::product::{
    ByLayout, ByTile, INT4, INT8, Product, block_lines, by_layout, by_tile, is_unsigned, lines_of_block, run_of,
    zero_point,
};
use crate::quant;
use crate::quant::packed::{BLOCK, CacheLine, PANEL, Packed};
use crate::threads::Columns;

/// Panels that a broadcast activation is multiplied by.
const PAIR: usize = 2;
/// Rows up to which unpacking a panel once for all tiles is not faster.
const FEW: usize = 32;
/// Blocks that are unpacked together at most: 16 KiB of codes for two panels. A multiple of the blocks of any group, and those whose sparse
/// codes can be found.
const CHUNK: usize = quant::packed::sparse::CHUNK;
/// Rows that are multiplied by a chunk at most: 16 KiB of sums.
const SLICE: usize = 128;
/// Bytes of their activations, at most.
const CACHE_BYTES: usize = 5 << 18;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    // SAFETY: the function runs only on CPUs with its features.
    let set = unsafe { Avx512::new() };
    by_layout(w.layout(), Product { set, w, panels, x, out });
}

/// A [`Product`] by AVX-512.
type Product512<'a, 'c> = Product<'a, 'c, Avx512>;

impl ByLayout for Product512<'_, '_> {
    #[inline(always)]
    fn run<const CODE: u8, const GROUP: usize, const MIN: bool>(self, table: &[i8; 16]) {
        // SAFETY: an `Avx512` exists, so the CPU has every feature that the functions enable.
        unsafe {
            // Table values are stored 128 too high, as 8-bit codes are, to be unsigned.
            let table = _mm512_xor_si512(_mm512_broadcast_i32x4(load_table(table)), _mm512_set1_epi8(-128));
            if self.w.is_sparse() {
                return match (self.x.rows(), Expander::new(self.set)) {
                    (0, _) => {}
                    (1..=MAX_TILE_ROWS, Some(expander)) => sparse::few_rows::<GROUP>(expander, self),
                    _ => many::<INT4, INT4, GROUP, false>(self, table),
                };
            }
            match self.x.rows() {
                0 => {}
                1 => few::<CODE, GROUP, MIN, 1>(self, table),
                2..=FEW => few::<CODE, GROUP, MIN, PAIR>(self, table),
                _ if becomes_int4(CODE, MIN) => many::<CODE, INT4, GROUP, MIN>(self, table),
                _ => many::<CODE, INT8, GROUP, MIN>(self, table),
            }
        }
    }
}

/// `P` panels as [`strip`] reads them, from its first block on.
struct Weights<'a, N, const P: usize> {
    /// Lines of the blocks (as packed, or 8 of bytes), possibly followed by other lines.
    codes: [&'a [CacheLine]; P],
    /// 16 F16 or F32 per group.
    scales: [&'a [N]; P],
    mins: [&'a [N]; P],
}

/// The indices of `P` panels from `index` on. Beyond the end of the range, the last one repeats.
#[inline]
fn indices<const P: usize>(index: usize, panels: &Range<usize>) -> [usize; P] {
    std::array::from_fn(|p| (index + p).min(panels.end - 1))
}

/// Few rows: one pass over the weights, unpacked in registers. Further tiles find them in a cache.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn few<const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize>(
    mut product: Product<'_, '_, Avx512>,
    table: __m512i,
) {
    let (w, panels, x) = (product.w, product.panels.clone(), product.x);
    for index in panels.clone().step_by(P) {
        let indices = indices::<P>(index, &panels);
        let of_panels = indices.map(|index| w.panel(index));
        let weights = Weights {
            codes: indices.map(|index| w.codes_from(index)),
            scales: of_panels.map(|panel| panel.scales),
            mins: of_panels.map(|panel| panel.mins),
        };
        let written = index - panels.start..panels.len().min(index - panels.start + P);
        let mut job = Panels::<CODE, GROUP, MIN, P> { product: &mut product, weights, written, table };
        by_tile(x, 0..x.rows(), &mut job);
    }
}

/// `P` panels times all tiles.
struct Panels<'a, 'b, 'c, const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize> {
    product: &'a mut Product<'b, 'c, Avx512>,
    weights: Weights<'b, [f16; PANEL], P>,
    /// The panels that are written, by their place in the output.
    written: Range<usize>,
    table: __m512i,
}

impl<const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize> ByTile
    for Panels<'_, '_, '_, CODE, GROUP, MIN, P>
{
    #[inline(always)]
    fn tile<const R: usize>(&mut self, row: usize) {
        // A single panel is for a single row.
        if P > 1 || R == 1 {
            // SAFETY: `product.set` exists, so the CPU has every feature that `one_tile` enables.
            unsafe { self.one_tile::<R>(row) }
        }
    }
}

impl<const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize> Panels<'_, '_, '_, CODE, GROUP, MIN, P> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn one_tile<const R: usize>(&mut self, row: usize) {
        let Product { w, x, .. } = *self.product;
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        strip::<_, CODE, false, GROUP, MIN, P, R>(
            &self.weights,
            &x.tile::<R>(row),
            0..x.blocks(),
            self.table,
            &mut acc,
        );
        save(&acc, w.output_scale(), row..x.rows().min(row + R), self.written.clone(), self.product.out);
    }
}

/// Codes, scales and minimums of a chunk of two panels, unpacked to bytes and F32.
struct Unpacked {
    codes: [[CacheLine; 8 * CHUNK]; PAIR],
    scales: [[[f32; PANEL]; 2 * CHUNK]; PAIR],
    mins: [[[f32; PANEL]; 2 * CHUNK]; PAIR],
}

/// The sums of a tile and two panels.
type Sums = [[__m512; PAIR]; MAX_TILE_ROWS];

/// Many rows, in slices that stay in the second-level cache: each pair of panels, chunk by chunk, times every tile. The
/// first-level cache holds 16 KiB of unpacked codes, 16 KiB of sums and the current tile. The codes become bytes with the meaning of
/// `UNPACKED`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn many<const CODE: u8, const UNPACKED: u8, const GROUP: usize, const MIN: bool>(
    product: Product<'_, '_, Avx512>,
    table: __m512i,
) {
    let Product { set, w, panels, x, out } = product;
    let mut unpacked = Unpacked {
        codes: [[CacheLine([0; 64]); 8 * CHUNK]; PAIR],
        scales: [[[0.0; PANEL]; 2 * CHUNK]; PAIR],
        mins: [[[0.0; PANEL]; 2 * CHUNK]; PAIR],
    };
    let fitting = (CACHE_BYTES / (x.row_lines() * size_of::<CacheLine>()).max(1)).clamp(MAX_TILE_ROWS, SLICE);
    let slice = x.rows().div_ceil(x.rows().div_ceil(fitting)).next_multiple_of(MAX_TILE_ROWS).min(SLICE);
    let blocks = w.blocks();
    for first in (0..x.rows()).step_by(slice) {
        let rows = first..x.rows().min(first + slice);
        for index in panels.clone().step_by(PAIR) {
            let columns = index - panels.start..panels.len().min(index - panels.start + PAIR);
            let (indices, following) = (indices::<PAIR>(index, &panels), indices::<PAIR>(index + PAIR, &panels));
            let mut sums: [Sums; SLICE / MAX_TILE_ROWS] =
                [[[_mm512_setzero_ps(); PAIR]; MAX_TILE_ROWS]; SLICE / MAX_TILE_ROWS];
            for first in (0..blocks).step_by(CHUNK) {
                let chunk = first..blocks.min(first + CHUNK);
                let next = match chunk.end < blocks {
                    true => indices.map(|index| lines_of(w, index, chunk.end)),
                    false => following.map(|index| lines_of(w, index, 0)),
                };
                fill::<CODE, GROUP, MIN>(set, w, indices, chunk.clone(), table, &mut unpacked);
                let codes = |p: usize| match CODE {
                    INT8 => lines_of(w, indices[p], first),
                    _ => &unpacked.codes[p][..],
                };
                let weights = Weights {
                    codes: std::array::from_fn(codes),
                    scales: std::array::from_fn(|p| &unpacked.scales[p][..]),
                    mins: std::array::from_fn(|p| &unpacked.mins[p][..]),
                };
                let tiles = rows.len().div_ceil(MAX_TILE_ROWS);
                for (t, sums) in sums.iter_mut().enumerate().take(tiles) {
                    // Each tile prefetches its share of the lines that will be unpacked next.
                    for lines in next {
                        lines[lines.len() * t / tiles..lines.len() * (t + 1) / tiles].iter().for_each(prefetch);
                    }
                    // And the lines of the output, if it is about to be written.
                    if chunk.end == blocks {
                        let first = rows.start + t * MAX_TILE_ROWS;
                        for row in first..rows.end.min(first + MAX_TILE_ROWS) {
                            for panel in columns.clone() {
                                prefetch(&out.row_mut(row)[panel * PANEL]);
                            }
                        }
                    }
                    let row = rows.start + t * MAX_TILE_ROWS;
                    match Activations::height(x.rows() - row) {
                        8 => add::<UNPACKED, GROUP, MIN, 8>(&weights, x, row, chunk.clone(), sums),
                        4 => add::<UNPACKED, GROUP, MIN, 4>(&weights, x, row, chunk.clone(), sums),
                        2 => add::<UNPACKED, GROUP, MIN, 2>(&weights, x, row, chunk.clone(), sums),
                        _ => add::<UNPACKED, GROUP, MIN, 1>(&weights, x, row, chunk.clone(), sums),
                    }
                }
            }
            for (sums, first) in sums.iter().zip(rows.clone().step_by(MAX_TILE_ROWS)) {
                save(sums, w.output_scale(), first..rows.end.min(first + MAX_TILE_ROWS), columns.clone(), out);
            }
        }
    }
}

/// The lines of the chunk of panel `index` that starts at block `first`.
fn lines_of(w: &Packed, index: usize, first: usize) -> &[CacheLine] {
    if w.is_sparse() {
        return w.sparse_lines(index, first / CHUNK);
    }
    let lines = w.layout().lines_per_block();
    &w.panel(index).codes[lines * first..lines * w.blocks().min(first + CHUNK)]
}

/// Unpacks a chunk of two panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn fill<const CODE: u8, const GROUP: usize, const MIN: bool>(
    set: Avx512,
    w: &Packed,
    indices: [usize; PAIR],
    blocks: Range<usize>,
    table: __m512i,
    unpacked: &mut Unpacked,
) {
    let groups = blocks.start * BLOCK / GROUP..(blocks.end * BLOCK).div_ceil(GROUP);
    for (p, index) in indices.into_iter().enumerate() {
        let panel = w.panel(index);
        if w.is_sparse() {
            let out = &mut unpacked.codes[p].as_chunks_mut::<8>().0[..blocks.len()];
            sparse::expand(set, w.sparse_blocks(index, blocks.start / CHUNK), out);
        } else if CODE != INT8 {
            let packed = &panel.codes[lines_of_block(CODE) * blocks.start..lines_of_block(CODE) * blocks.end];
            unpack::<CODE, MIN>(packed, table, unpacked.codes[p].as_chunks_mut::<8>().0);
        }
        widen(&panel.scales[groups.clone()], &mut unpacked.scales[p]);
        if MIN {
            widen(&panel.mins[groups.clone()], &mut unpacked.mins[p]);
        }
    }
}

/// Adds the products of the tile of `R` rows at `row` and a chunk of two panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize>(
    weights: &Weights<'_, [f32; PANEL], PAIR>,
    x: &Activations,
    row: usize,
    blocks: Range<usize>,
    sums: &mut Sums,
) {
    if let Some(sums) = sums.first_chunk_mut::<R>() {
        // The compiler knows that nothing else refers to a copy, so it can keep it in registers.
        let mut acc = *sums;
        strip::<_, CODE, true, GROUP, MIN, PAIR, R>(
            weights,
            &x.tile::<R>(row),
            blocks,
            _mm512_setzero_si512(),
            &mut acc,
        );
        *sums = acc;
    }
}

/// Writes the sums of `rows` and `panels`, multiplied by `output_scale`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn save<const P: usize>(
    acc: &[[__m512; P]],
    output_scale: f32,
    rows: Range<usize>,
    panels: Range<usize>,
    out: &mut Columns<'_>,
) {
    for (acc, row) in acc.iter().zip(rows) {
        let out = out.row_mut(row);
        for (acc, panel) in acc.iter().zip(panels.clone()) {
            store(_mm512_mul_ps(*acc, _mm512_set1_ps(output_scale)), &mut out[panel * PANEL..]);
        }
    }
}

/// Prefetches the lines of packed codes [`AHEAD`] blocks after block `b`.
#[inline]
fn prefetch_block<N, const CODE: u8, const P: usize>(w: &Weights<'_, N, P>, b: usize) {
    let lines = lines_of_block(CODE);
    for codes in w.codes {
        if let Some(block) = codes.get((b + AHEAD) * lines..(b + AHEAD + 1) * lines) {
            block.iter().for_each(prefetch);
        }
    }
}

/// Adds the products of `blocks` of a tile of `R` rows with `P` panels to `acc`. The codes are packed, or `BYTES`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip<
    N: Pod,
    const CODE: u8,
    const BYTES: bool,
    const GROUP: usize,
    const MIN: bool,
    const P: usize,
    const R: usize,
>(
    w: &Weights<'_, N, P>,
    x: &Tile<'_, R>,
    blocks: Range<usize>,
    table: __m512i,
    acc: &mut [[__m512; P]; R],
) {
    let n = blocks.len();
    let Tile { codes, scales, zeros, sums, half_zeros, half_sums } = x.blocks(blocks);
    if GROUP <= BLOCK {
        let halves = BLOCK / GROUP;
        for b in 0..n {
            if !BYTES {
                prefetch_block::<_, CODE, P>(w, b);
            }
            for half in 0..halves {
                let zeros = if halves == 1 { &zeros[b] } else { &half_zeros[b][half] };
                // SAFETY: this function has all features of `dots`.
                let dots = unsafe { dots::<_, CODE, BYTES, MIN, P, R>(w, b, half, halves, &codes[b], zeros, table) };
                let scale = numbers(&w.scales, b * halves + half);
                for r in 0..R {
                    for p in 0..P {
                        let scale = _mm512_mul_ps(scale[p], _mm512_set1_ps(scales[b][r]));
                        acc[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][p]), scale, acc[r][p]);
                    }
                }
                if MIN {
                    let sums = if halves == 1 { &sums[b] } else { &half_sums[b][half] };
                    add_mins(numbers(&w.mins, b * halves + half), sums, acc);
                }
            }
        }
    } else {
        for first in (0..n).step_by(run_of(GROUP)) {
            let run = first..n.min(first + run_of(GROUP));
            let mut part = [[_mm512_setzero_ps(); P]; R];
            for b in run.clone() {
                if !BYTES {
                    prefetch_block::<_, CODE, P>(w, b);
                }
                // SAFETY: as above.
                let dots = unsafe { dots::<_, CODE, BYTES, MIN, P, R>(w, b, 0, 1, &codes[b], &zeros[b], table) };
                for r in 0..R {
                    for p in 0..P {
                        let scale = _mm512_set1_ps(scales[b][r]);
                        part[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][p]), scale, part[r][p]);
                    }
                }
            }
            let scale = numbers(&w.scales, first * BLOCK / GROUP);
            for r in 0..R {
                for p in 0..P {
                    acc[r][p] = _mm512_fmadd_ps(part[r][p], scale[p], acc[r][p]);
                }
            }
            if MIN {
                let mins = numbers(&w.mins, first * BLOCK / GROUP);
                run.for_each(|b| add_mins(mins, &sums[b], acc));
            }
        }
    }
}

/// Adds the minimums times the sums of the activations' codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_mins<const P: usize, const R: usize>(mins: [__m512; P], sums: &[f32; R], acc: &mut [[__m512; P]; R]) {
    for r in 0..R {
        for p in 0..P {
            acc[r][p] = _mm512_fmadd_ps(mins[p], _mm512_set1_ps(sums[r]), acc[r][p]);
        }
    }
}

/// The dot products of a block, or of one half if the block has two `halves`. As a function of its own, which it becomes without
/// `always`, it would pass its results, and the sums of the caller, through memory.
///
/// # Safety
///
/// The CPU must have the features of [`strip`].
#[inline(always)]
unsafe fn dots<N, const CODE: u8, const BYTES: bool, const MIN: bool, const P: usize, const R: usize>(
    w: &Weights<'_, N, P>,
    b: usize,
    half: usize,
    halves: usize,
    codes: &[[i32; 8]; R],
    zeros: &[i32; R],
    table: __m512i,
) -> [[__m512i; P]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut dots = [[_mm512_setzero_si512(); P]; R];
        if !is_unsigned(CODE) || !MIN {
            for r in 0..R {
                dots[r] = [_mm512_set1_epi32(zero_point(CODE, zeros[r])); P];
            }
        }
        if halves == 1 || half == 0 {
            add_pair::<_, CODE, BYTES, P, R, 0>(w, b, codes, table, &mut dots);
            add_pair::<_, CODE, BYTES, P, R, 1>(w, b, codes, table, &mut dots);
        }
        if halves == 1 || half == 1 {
            add_pair::<_, CODE, BYTES, P, R, 2>(w, b, codes, table, &mut dots);
            add_pair::<_, CODE, BYTES, P, R, 3>(w, b, codes, table, &mut dots);
        }
        dots
    }
}

/// Adds the dot products of columns `8 * PAIR .. 8 * PAIR + 8` of a block.
///
/// # Safety
///
/// As for [`dots`].
#[inline(always)]
unsafe fn add_pair<N, const CODE: u8, const BYTES: bool, const P: usize, const R: usize, const PAIR_OF_BLOCK: usize>(
    w: &Weights<'_, N, P>,
    b: usize,
    codes: &[[i32; 8]; R],
    table: __m512i,
    dots: &mut [[__m512i; P]; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for j in [2 * PAIR_OF_BLOCK, 2 * PAIR_OF_BLOCK + 1] {
            let mut weights = [_mm512_setzero_si512(); P];
            for p in 0..P {
                weights[p] = match BYTES {
                    true => register::<INT8>(block_lines::<INT8>(w.codes[p], b), j, table),
                    false => register::<CODE>(block_lines::<CODE>(w.codes[p], b), j, table),
                };
            }
            for r in 0..R {
                let x = _mm512_set1_epi32(codes[r][j]);
                for p in 0..P {
                    dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], weights[p], x);
                }
            }
        }
    }
}

/// The numbers of a group of each panel as F32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn numbers<N: Pod, const P: usize>(of: &[&[N]; P], group: usize) -> [__m512; P] {
    let mut numbers = [_mm512_setzero_ps(); P];
    for p in 0..P {
        let own = &of[p][group];
        numbers[p] = if size_of::<N>() == size_of::<[f16; PANEL]>() {
            load_f16(bytemuck::cast_ref(own))
        } else {
            load_f32(bytemuck::cast_ref::<N, [f32; PANEL]>(own))
        };
    }
    numbers
}

/// Scales or minimums as F32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn widen(numbers: &[[f16; PANEL]], out: &mut [[f32; PANEL]]) {
    for (numbers, out) in numbers.iter().zip(out) {
        store(load_f16(numbers), out);
    }
}
