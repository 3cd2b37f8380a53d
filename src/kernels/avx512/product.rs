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
//! addition there, so 8 of 11 cycles at most do what is counted as the CPU's INT8 rate; all else has to stay off those
//! ports. Sums live in memory while dot products fill the registers. A batch of one tile unpacks codes as it goes. With
//! more tiles, the codes and scales of `P` panels and some blocks are unpacked into the first-level cache once for all.

use std::arch::x86_64::*;
use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use super::{load, load_f16, load_f32, load_lanes, load_table, prefetch, store, store_line};
use crate::kernels::activations::{Activations, TALLEST, Tile};
use crate::quant::packed::{BLOCK, Code, Line, PANEL, Packed};
use crate::threads::Columns;

const INT4: u8 = 0;
const TABLE4: u8 = 1;
const INT8: u8 = 2;
/// 4-bit codes and table values that were unpacked to bytes.
const INT4_BYTES: u8 = 3;
const BYTES: u8 = 4;

/// Panels that a broadcast activation is multiplied with.
const PAIR: usize = 2;
/// Blocks between a line's prefetch and its use when there is one tile, so that memory and not the product sets the pace.
const AHEAD: usize = 12;
/// Blocks that are unpacked together at most: 16 KiB of codes for two panels. A multiple of those of a group.
const CHUNK: usize = 16;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    let layout = w.layout();
    match (layout.code, layout.group, layout.min) {
        (Code::Int4, 16, false) => rows::<INT4, INT4_BYTES, 16, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 16, true) => rows::<INT4, INT4_BYTES, 16, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 32, false) => rows::<INT4, INT4_BYTES, 32, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 32, true) => rows::<INT4, INT4_BYTES, 32, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 64, false) => rows::<INT4, INT4_BYTES, 64, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, 64, true) => rows::<INT4, INT4_BYTES, 64, true>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, false) => rows::<INT4, INT4_BYTES, 128, false>(w, panels, x, out, &[0; 16]),
        (Code::Int4, _, true) => rows::<INT4, INT4_BYTES, 128, true>(w, panels, x, out, &[0; 16]),
        (Code::Table4(table), 16, false) => rows::<TABLE4, BYTES, 16, false>(w, panels, x, out, &table),
        (Code::Table4(table), 16, true) => rows::<TABLE4, BYTES, 16, true>(w, panels, x, out, &table),
        (Code::Table4(table), _, false) => rows::<TABLE4, BYTES, 32, false>(w, panels, x, out, &table),
        (Code::Table4(table), _, true) => rows::<TABLE4, BYTES, 32, true>(w, panels, x, out, &table),
        (Code::Int8, 16, false) => rows::<INT8, BYTES, 16, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, 16, true) => rows::<INT8, BYTES, 16, true>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, false) => rows::<INT8, BYTES, 32, false>(w, panels, x, out, &[0; 16]),
        (Code::Int8, _, true) => rows::<INT8, BYTES, 32, true>(w, panels, x, out, &[0; 16]),
        (Code::F32 | Code::F16 | Code::BF16, ..) => unreachable!("float layouts go to product_float"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const CODE: u8, const UNPACKED: u8, const GROUP: usize, const MIN: bool>(
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
    table: &[i8; 16],
) {
    // Table values are stored 128 too high, as 8-bit codes are, to be unsigned.
    let table = _mm512_xor_si512(_mm512_broadcast_i32x4(load_table(table)), _mm512_set1_epi8(-128));
    if x.rows() > TALLEST {
        return tiles::<CODE, UNPACKED, GROUP, MIN>(w, panels, x, out, table);
    }
    match Activations::height(x.rows()) {
        8 => one_tile::<CODE, GROUP, MIN, PAIR, 8>(w, panels, x, out, table),
        4 => one_tile::<CODE, GROUP, MIN, PAIR, 4>(w, panels, x, out, table),
        2 => one_tile::<CODE, GROUP, MIN, PAIR, 2>(w, panels, x, out, table),
        _ if x.rows() == 1 => one_tile::<CODE, GROUP, MIN, 1, 1>(w, panels, x, out, table),
        _ => {}
    }
}

/// `P` panels as [`strip`] reads them, from the first block of a tile on that it is asked for.
struct Weights<'a, N, const P: usize> {
    /// Lines of the blocks, 4 where they are packed, else 8, and maybe of what comes after.
    codes: [&'a [Line]; P],
    /// Of the groups, 16 F16 or F32.
    scales: [&'a [N]; P],
    mins: [&'a [N]; P],
}

/// The indices of `P` panels from `index` on. Beyond the end of the range the last one is repeated.
#[inline]
fn indices<const P: usize>(index: usize, panels: &Range<usize>) -> [usize; P] {
    std::array::from_fn(|p| (index + p).min(panels.end - 1))
}

/// A batch of at most [`TALLEST`] rows: one pass over the weights, unpacked in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn one_tile<const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize, const R: usize>(
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
    table: __m512i,
) {
    let (tile, blocks) = (x.tile::<R>(0), 0..x.blocks());
    for index in panels.clone().step_by(P) {
        let indices = indices::<P>(index, &panels);
        let weights = Weights {
            codes: indices.map(|index| w.codes_from(index)),
            scales: indices.map(|index| w.panel(index).scales),
            mins: indices.map(|index| w.panel(index).mins),
        };
        let mut acc = [[_mm512_setzero_ps(); P]; R];
        strip::<_, CODE, GROUP, MIN, P, R>(&weights, &tile, blocks.clone(), table, &mut acc);
        let count = P.min(panels.end - index);
        save(&acc, count, w.gain(), 0..x.rows(), index - panels.start, out);
    }
}

/// Codes, scales and minimums of two panels, unpacked to bytes and F32.
struct Unpacked {
    codes: [[Line; 8 * CHUNK]; PAIR],
    scales: [[[f32; PANEL]; 2 * CHUNK]; PAIR],
    mins: [[[f32; PANEL]; 2 * CHUNK]; PAIR],
}

/// Many rows: a chunk of blocks of all rows, which stays in the second-level cache, times every pair of panels. The sums
/// wait in `out` from one chunk to the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tiles<const CODE: u8, const UNPACKED: u8, const GROUP: usize, const MIN: bool>(
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
    table: __m512i,
) {
    let mut unpacked = Unpacked {
        codes: [[Line([0; 64]); 8 * CHUNK]; PAIR],
        scales: [[[0.0; PANEL]; 2 * CHUNK]; PAIR],
        mins: [[[0.0; PANEL]; 2 * CHUNK]; PAIR],
    };
    let gain = w.gain();
    for first in (0..x.blocks()).step_by(CHUNK) {
        let blocks = first..x.blocks().min(first + CHUNK);
        let groups = first * BLOCK / GROUP..(blocks.end * BLOCK).div_ceil(GROUP);
        let gain = if blocks.end == x.blocks() { gain } else { 1.0 };
        for index in panels.clone().step_by(PAIR) {
            let parts = indices::<PAIR>(index, &panels).map(|index| w.panel(index));
            for (p, panel) in parts.iter().enumerate() {
                if CODE != INT8 {
                    let packed = panel.codes[4 * blocks.start..4 * blocks.end].as_chunks::<4>().0;
                    unpack::<CODE>(packed, table, unpacked.codes[p].as_chunks_mut::<8>().0);
                }
                widen(&panel.scales[groups.clone()], &mut unpacked.scales[p]);
                if MIN {
                    widen(&panel.mins[groups.clone()], &mut unpacked.mins[p]);
                }
            }
            let weights = Weights {
                codes: std::array::from_fn(|p| match CODE {
                    INT8 => &parts[p].codes[8 * blocks.start..8 * blocks.end],
                    _ => &unpacked.codes[p][..],
                }),
                scales: std::array::from_fn(|p| &unpacked.scales[p][..]),
                mins: std::array::from_fn(|p| &unpacked.mins[p][..]),
            };
            let (count, p) = (PAIR.min(panels.end - index), index - panels.start);
            let mut row = 0;
            while row < x.rows() {
                row += match Activations::height(x.rows() - row) {
                    8 => step::<UNPACKED, GROUP, MIN, 8>(&weights, count, x, row, blocks.clone(), gain, p, out),
                    4 => step::<UNPACKED, GROUP, MIN, 4>(&weights, count, x, row, blocks.clone(), gain, p, out),
                    2 => step::<UNPACKED, GROUP, MIN, 2>(&weights, count, x, row, blocks.clone(), gain, p, out),
                    _ => step::<UNPACKED, GROUP, MIN, 1>(&weights, count, x, row, blocks.clone(), gain, p, out),
                };
            }
        }
    }
}

/// Adds the products of a tile and a chunk of two panels to the sums of the blocks before. Returns `R`.
#[allow(clippy::too_many_arguments, reason = "what a tile and two panels are made of")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn step<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize>(
    weights: &Weights<'_, [f32; PANEL], PAIR>,
    count: usize,
    x: &Activations,
    row: usize,
    blocks: Range<usize>,
    gain: f32,
    p: usize,
    out: &mut Columns<'_>,
) -> usize {
    let rows = row..x.rows().min(row + R);
    let mut acc = [[_mm512_setzero_ps(); PAIR]; R];
    if blocks.start > 0 {
        for (acc, row) in acc.iter_mut().zip(rows.clone()) {
            let out = out.row_mut(row);
            for (i, acc) in acc.iter_mut().enumerate().take(count) {
                *acc = load_lanes(&out[(p + i) * PANEL..]);
            }
        }
    }
    strip::<_, CODE, GROUP, MIN, PAIR, R>(weights, &x.tile::<R>(row), blocks, _mm512_setzero_si512(), &mut acc);
    save(&acc, count, gain, rows, p, out);
    R
}

/// Writes the sums of `rows` and the first `count` panels, times `gain`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn save<const P: usize, const R: usize>(
    acc: &[[__m512; P]; R],
    count: usize,
    gain: f32,
    rows: Range<usize>,
    p: usize,
    out: &mut Columns<'_>,
) {
    for (acc, row) in acc.iter().zip(rows) {
        let out = out.row_mut(row);
        for (i, acc) in acc.iter().enumerate().take(count) {
            store(_mm512_mul_ps(*acc, _mm512_set1_ps(gain)), &mut out[(p + i) * PANEL..]);
        }
    }
}

/// Adds the products of `blocks` of a tile of `R` rows with `P` panels to `acc`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn strip<N: Pod, const CODE: u8, const GROUP: usize, const MIN: bool, const P: usize, const R: usize>(
    w: &Weights<'_, N, P>,
    x: &Tile<'_, R>,
    blocks: Range<usize>,
    table: __m512i,
    acc: &mut [[__m512; P]; R],
) {
    // All cut to the same length once, so that the loops below need no bounds checks.
    let n = blocks.len();
    let (codes, scales) = (&x.codes[blocks.clone()][..n], &x.scales[blocks.clone()][..n]);
    let (zeros, sums) = (&x.zeros[blocks.clone()][..n], &x.sums[blocks.clone()][..n]);
    let (half_zeros, half_sums) = (&x.half_zeros[blocks.clone()][..n], &x.half_sums[blocks][..n]);
    if GROUP <= BLOCK {
        let halves = BLOCK / GROUP;
        for b in 0..n {
            ask::<_, CODE, P>(w, b);
            for half in 0..halves {
                let zeros = if halves == 1 { &zeros[b] } else { &half_zeros[b][half] };
                let dots = dots::<_, CODE, MIN, P, R>(w, b, half, halves, &codes[b], zeros, table);
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
        for first in (0..n).step_by(GROUP / BLOCK) {
            let run = first..n.min(first + GROUP / BLOCK);
            let mut part = [[_mm512_setzero_ps(); P]; R];
            for b in run.clone() {
                ask::<_, CODE, P>(w, b);
                let dots = dots::<_, CODE, MIN, P, R>(w, b, 0, 1, &codes[b], &zeros[b], table);
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

/// The dot products of a block, or of half a block where it has two `halves`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn dots<N, const CODE: u8, const MIN: bool, const P: usize, const R: usize>(
    w: &Weights<'_, N, P>,
    b: usize,
    half: usize,
    halves: usize,
    codes: &[[i32; 8]; R],
    zeros: &[i32; R],
    table: __m512i,
) -> [[__m512i; P]; R] {
    let mut dots = [[_mm512_setzero_si512(); P]; R];
    let four_bits = CODE == INT4 || CODE == INT4_BYTES;
    if !four_bits || !MIN {
        for r in 0..R {
            let zero = _mm512_set1_epi32(zeros[r]);
            // 8-bit codes and table values are stored 128 too high, 16 times the zero point of 4-bit codes.
            dots[r] = [if four_bits { zero } else { _mm512_slli_epi32::<4>(zero) }; P];
        }
    }
    let quads = 8 / halves;
    for pair in half * quads / 2..(half + 1) * quads / 2 {
        let mut pairs = [[_mm512_setzero_si512(); P]; 2];
        for p in 0..P {
            [pairs[0][p], pairs[1][p]] = if CODE == INT4 || CODE == TABLE4 {
                nibbles::<CODE>(load(&w.codes[p][4 * b..][..4][pair]), table)
            } else {
                let lines = &w.codes[p][8 * b..][..8];
                [load(&lines[2 * pair]), load(&lines[2 * pair + 1])]
            };
        }
        for (i, w) in pairs.into_iter().enumerate() {
            for r in 0..R {
                let x = _mm512_set1_epi32(codes[r][2 * pair + i]);
                for p in 0..P {
                    dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], w[p], x);
                }
            }
        }
    }
    dots
}

/// Asks for the lines of packed codes that come [`AHEAD`] blocks after block `b`.
#[inline]
fn ask<N, const CODE: u8, const P: usize>(w: &Weights<'_, N, P>, b: usize) {
    let lines = match CODE {
        INT4 | TABLE4 => 4,
        INT8 => 8,
        _ => return,
    };
    for codes in w.codes {
        codes.iter().skip((b + AHEAD) * lines).take(lines).for_each(prefetch);
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

/// Low and high nibbles, or the table's values for them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn nibbles<const CODE: u8>(line: __m512i, table: __m512i) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(15);
    let [low, high] = [_mm512_and_si512(line, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibble)];
    match CODE {
        TABLE4 => [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)],
        _ => [low, high],
    }
}

/// The weights of blocks as unsigned bytes: line `j` holds columns `4 j .. 4 j + 4` of the 16 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn unpack<const CODE: u8>(packed: &[[Line; 4]], table: __m512i, out: &mut [[Line; 8]]) {
    for (lines, out) in packed.iter().zip(out) {
        for i in 0..4 {
            let [low, high] = nibbles::<CODE>(load(&lines[i]), table);
            store_line(low, &mut out[2 * i]);
            store_line(high, &mut out[2 * i + 1]);
        }
    }
}

/// Scales or minimums as F32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn widen(numbers: &[[f16; PANEL]], out: &mut [[f32; PANEL]]) {
    for (numbers, out) in numbers.iter().zip(out) {
        store(load_f16(numbers), out);
    }
}
