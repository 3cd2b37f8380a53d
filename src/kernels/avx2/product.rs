//! The integer product.
//!
//! `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs of products in 16 bits, where it saturates. With codes
//! from 0 to 15, the 8 pairs of a whole block cannot saturate: 2 * 15 * 127 * 8 = 30480. So codes of up to 4 bits are widened to 32
//! bits once per group, codes of 5 bits after 4 pairs (31496) and of 6 bits after 2 (32004). 8-bit codes and table values are signed and
//! multiplied as |w| times sign(w) x: a pair is at most 2 * 128 * 127 = 32512 and is widened at once. An [`Adder`] with `vpdpbusd` adds in
//! 32 bits from the start.
//!
//! The end of a group is a chain of dependent conversions, and with it in the loop over products the CPU waits for it. So
//! the dot products of a few groups go to memory first (the first-level cache), and their scales are applied together. In
//! pseudo-code, for `S` activation rows and a side of a panel:
//!
//! ```text
//! for every CHUNK blocks:
//!     for each block of 32 columns:
//!         w[0..8] = unpacked codes of 2 to 8 lines    (8 registers: 8 rows x 4 weights each, used for all S rows)
//!         for each of S rows:
//!             pairs[block] = sum of vpmaddubsw(w[j], x[j]) for j in 0..8         (codes times activations, broadcast)
//!             dot[block] = sum of vpmaddwd(vpmaddubsw(|w[j]|, sign(w[j]) x[j]), 1)       (signed weights)
//!     for each block, for each of S rows:
//!         dot = zero point + vpmaddwd(pairs[block], 1)                (codes of up to 4 bits)
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::sparse::expand;
use super::unpack::register;
use super::vector::{Avx2, Both, SIDES, load_f16, load_table, prefetch};
use crate::kernels::activations::{Activations, Tile};
use crate::kernels::generic::product::{
    ByPanel, INT2, INT3, INT4, INT5, INT6, OnePanel, Product, block_lines, by_layout, is_unsigned, lines_of_block,
    zero_point,
};
use crate::quant::packed::sparse::{Int4Block, SparseBlocks};
use crate::quant::packed::{CacheLine, Packed};
use crate::threads::Columns;

/// Blocks whose dot products are computed before their scales are applied: enough to hide the latency of conversions, and
/// few enough for the first-level cache.
const CHUNK: usize = 4;
/// Blocks between a line's prefetch and its use, so that memory and not the product sets the pace.
const AHEAD: usize = 12;

/// How products are added up: the step in which instruction sets with registers of 256 bits differ.
///
/// A value proves that the CPU has the instructions. The methods are not functions with target features, because those of
/// one set could not be inlined into those of another.
pub(in crate::kernels) trait Adder: Copy + Into<Avx2> {
    /// Whether 8-bit codes and table values are multiplied as they are stored, unsigned and 128 too high.
    const UNSIGNED: bool;

    /// Adds the products of half a block of 8 rows: `(8, 4)` weights in each of `w` times the same 4 activations of `x` in every lane.
    fn add<const CODE: u8>(self, sum: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i;

    /// The dot products in 32 bits.
    fn total<const CODE: u8>(self, sum: __m256i) -> __m256i;
}

impl Adder for Avx2 {
    const UNSIGNED: bool = false;

    #[inline(always)]
    fn add<const CODE: u8>(self, sum: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // SAFETY: `self` exists, so the CPU has every feature that `add_dots` enables.
        unsafe { add_dots::<CODE>(sum, w, x) }
    }

    #[inline(always)]
    fn total<const CODE: u8>(self, sum: __m256i) -> __m256i {
        // SAFETY: as in `add`.
        if stays_in_16_bits(CODE) { unsafe { add_pairs(sum) } } else { sum }
    }
}

/// The integer product with `adder`.
#[inline(always)]
pub(in crate::kernels) fn with_adder<A: Adder>(
    adder: A,
    w: &Packed,
    panels: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
) {
    by_layout(w.layout(), Product { set: adder, w, panels, x, out });
}

impl<A: Adder> ByPanel for A {
    #[inline(always)]
    fn tile<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize>(
        panel: &mut OnePanel<'_, '_, '_, A, CODE, GROUP, MIN>,
        row: usize,
    ) {
        // SAFETY: the adder exists, so the CPU has every feature that `strips` enables.
        unsafe { if R < 4 { panel.strips::<R, SIDES>(row) } else { panel.strips::<R, 1>(row) } }
    }

    #[inline(always)]
    fn expand(self, blocks: SparseBlocks<'_>, out: &mut [Int4Block]) {
        // SAFETY: the adder exists, so the CPU has every feature that `expand` enables.
        unsafe { expand(blocks, out) }
    }
}

impl<A: Adder, const CODE: u8, const GROUP: usize, const MIN: bool> OnePanel<'_, '_, '_, A, CODE, GROUP, MIN> {
    /// The rows of a tile times the panel, `T` sides at a time.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn strips<const R: usize, const T: usize>(&mut self, row: usize) {
        self.by_strips::<Avx2, R, R, T>(self.product.set.into(), row, |panel, x, [_, side], prefetched, sums| {
            panel.strip::<R, T>(x, side, prefetched, sums)
        });
    }

    /// Adds to `acc` the rows of a tile times `T` sides of the panel, from `side` on. Prefetches the lines of `prefetched` ahead of their
    /// use.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn strip<const R: usize, const T: usize>(
        &self,
        x: &Tile<'_, R>,
        side: usize,
        prefetched: &[CacheLine],
        mut acc: [[__m256; T]; R],
    ) -> [[__m256; T]; R] {
        let (panel, blocks) = (&self.panel, x.codes.len());
        let table = _mm256_xor_si256(load_table(&self.table), _mm256_set1_epi8(if A::UNSIGNED { -128 } else { 0 }));
        assert!(side + T <= SIDES);
        let x = x.blocks(0..blocks);
        let groups = Self::groups(blocks);
        let scales: &[Both<f16>] = &bytemuck::cast_slice(panel.scales)[..groups];
        let mins: &[Both<f16>] = if MIN { &bytemuck::cast_slice(panel.mins)[..groups] } else { scales };
        // The sums of the blocks of a group.
        let mut parts = [[_mm256_setzero_ps(); T]; R];
        let mut dots = [[[[_mm256_setzero_si256(); R]; T]; 2]; CHUNK];
        let lines = lines_of_block(CODE);
        for first in (0..blocks).step_by(CHUNK) {
            let chunk = first..blocks.min(first + CHUNK);
            for (b, dots) in chunk.clone().zip(&mut dots) {
                for i in 0..lines {
                    if let Some(line) = prefetched.get((b + AHEAD) * lines + i) {
                        prefetch(line);
                    }
                }
                self.dots(&x.codes[b], b, side, table, dots);
            }
            for (b, dots) in chunk.zip(&dots) {
                for half in 0..Self::HALVES {
                    let group = Self::group_of(b, half);
                    for t in 0..T {
                        let (scale, min) = (load_f16(&scales[group][side + t]), load_f16(&mins[group][side + t]));
                        for r in 0..R {
                            let dot = self.dot(dots[half][t][r], &x, [b, half, r]);
                            let x_scale = _mm256_set1_ps(x.scales[b][r]);
                            if Self::RUN == 1 {
                                acc[r][t] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, x_scale), acc[r][t]);
                                if MIN {
                                    let whole = Self::HALVES == 1;
                                    let sum = if whole { x.sums[b][r] } else { x.half_sums[b][half][r] };
                                    acc[r][t] = _mm256_fmadd_ps(min, _mm256_set1_ps(sum), acc[r][t]);
                                }
                                continue;
                            }
                            parts[r][t] = _mm256_fmadd_ps(dot, x_scale, parts[r][t]);
                            if (b + 1).is_multiple_of(Self::RUN) || b + 1 == blocks {
                                acc[r][t] = _mm256_fmadd_ps(parts[r][t], scale, acc[r][t]);
                                parts[r][t] = _mm256_setzero_ps();
                                if MIN {
                                    for sums in &x.sums[b / Self::RUN * Self::RUN..=b] {
                                        acc[r][t] = _mm256_fmadd_ps(min, _mm256_set1_ps(sums[r]), acc[r][t]);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        acc
    }

    /// The sums of a block's products, or of each half if it has two groups, as [`Adder::total`] takes them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dots<const R: usize, const T: usize>(
        &self,
        codes: &[[i32; 8]; R],
        b: usize,
        side: usize,
        table: __m256i,
        dots: &mut [[[__m256i; R]; T]; 2],
    ) {
        let adder = self.product.set;
        let lines = block_lines::<CODE>(self.panel.codes, b);
        let part = |half: usize, t| {
            let mut w = [_mm256_setzero_si256(); 4];
            for j in 0..4 {
                w[j] = register::<CODE>(lines, 4 * half + j, side + t, A::UNSIGNED, table);
            }
            w
        };
        let add = |sum, w: [__m256i; 4], codes: &[i32]| {
            let mut x = [_mm256_setzero_si256(); 4];
            for j in 0..4 {
                x[j] = _mm256_set1_epi32(codes[j]);
            }
            adder.add::<CODE>(sum, w, x)
        };
        for t in 0..T {
            // Signed weights take twice as many registers, so theirs are unpacked by halves.
            if Self::HALVES == 1 && (is_unsigned(CODE) || A::UNSIGNED) {
                let w = [part(0, t), part(1, t)];
                for r in 0..R {
                    let sum = add(_mm256_setzero_si256(), w[0], &codes[r][..4]);
                    dots[0][t][r] = add(sum, w[1], &codes[r][4..]);
                }
                continue;
            }
            let w = part(0, t);
            for r in 0..R {
                dots[0][t][r] = add(_mm256_setzero_si256(), w, &codes[r][..4]);
            }
            let w = part(1, t);
            let of = Self::HALVES - 1;
            for r in 0..R {
                let sum = if of == 0 { dots[0][t][r] } else { _mm256_setzero_si256() };
                dots[of][t][r] = add(sum, w, &codes[r][4..]);
            }
        }
    }

    /// The dot product of a row with a group of block `b`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot<const R: usize>(&self, sum: __m256i, x: &Tile<'_, R>, [b, half, r]: [usize; 3]) -> __m256 {
        let mut dot = self.product.set.total::<CODE>(sum);
        let is_too_high = if is_unsigned(CODE) { !MIN } else { A::UNSIGNED };
        if is_too_high {
            let zero = if Self::HALVES == 1 { x.zeros[b][r] } else { x.half_zeros[b][half][r] };
            dot = _mm256_add_epi32(dot, _mm256_set1_epi32(zero_point(CODE, zero)));
        }
        _mm256_cvtepi32_ps(dot)
    }
}

/// Whether the products of a whole block are added up in 16 bits.
const fn stays_in_16_bits(code: u8) -> bool {
    matches!(code, INT2 | INT3 | INT4)
}

/// Adds the pairs of sums in 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pairs(sum: __m256i) -> __m256i {
    _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
}

/// Adds the products of half a block: in 16 bits for codes of up to 4 bits, else whole dot products in 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_dots<const CODE: u8>(sum: __m256i, w: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
    let pairs = |j: usize| match is_unsigned(CODE) {
        true => _mm256_maddubs_epi16(w[j], x[j]),
        false => _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(x[j], w[j])),
    };
    let two = |a, b| _mm256_add_epi16(a, b);
    let whole = |sum, pairs| _mm256_add_epi32(sum, add_pairs(pairs));
    match CODE {
        INT5 => whole(sum, two(two(pairs(0), pairs(1)), two(pairs(2), pairs(3)))),
        INT6 => whole(whole(sum, two(pairs(0), pairs(1))), two(pairs(2), pairs(3))),
        _ if stays_in_16_bits(CODE) => two(two(two(two(sum, pairs(0)), pairs(1)), pairs(2)), pairs(3)),
        _ => whole(whole(whole(whole(sum, pairs(0)), pairs(1)), pairs(2)), pairs(3)),
    }
}
