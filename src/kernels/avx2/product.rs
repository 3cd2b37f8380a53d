//! The integer product.
//!
//! `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs of products in 16 bits, where it saturates. With codes
//! from 0 to 15, the 8 pairs of a whole block cannot saturate: 2 * 15 * 127 * 8 = 30480. So 4-bit codes are widened to 32
//! bits once per group. 8-bit codes and table values are signed and multiplied as |w| times sign(w) x: a pair is at most
//! 2 * 128 * 127 = 32512 and is widened at once. [`Avx2`] adds in this way; an [`Adder`] with `vpdpbusd` adds in 32 bits
//! from the start.
//!
//! The end of a group is a chain of dependent conversions, and with it in the loop over products the CPU waits for it. So
//! the dot products of a few groups go to memory first (the first-level cache), and their scales are applied together. In
//! pseudo-code, for `S` activation rows and a side of a panel:
//!
//! ```text
//! for every CHUNK blocks:
//!     for each block of 32 columns:
//!         w[0..8] = unpacked codes of 4 or 8 lines    (8 registers: 8 rows x 4 weights each, used for all S rows)
//!         for each of S rows:
//!             pairs[block] = sum of vpmaddubsw(w[j], x[j]) for j in 0..8         (4-bit codes times activations, broadcast)
//!             dot[block] = sum of vpmaddwd(vpmaddubsw(|w[j]|, sign(w[j]) x[j]), 1)       (signed weights)
//!     for each block, for each of S rows:
//!         dot = zero point + vpmaddwd(pairs[block], 1)                (4-bit codes)
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::vector::{Avx2, Both, SIDES, load, load_f16, load_table, prefetch};
use crate::kernels::activations::{Activations, Tile};
use crate::kernels::generic::product::{ByPanel, INT4, INT8, OnePanel, Product, TABLE4, by_layout, half_block};
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

    /// Adds the products of 4 columns of 8 rows: `(8, 4)` weights times the same 4 activations in every lane.
    fn add<const CODE: u8>(self, sum: __m256i, w: __m256i, x: __m256i) -> __m256i;

    /// The dot products in 32 bits.
    fn total<const CODE: u8>(self, sum: __m256i) -> __m256i;
}

impl Adder for Avx2 {
    const UNSIGNED: bool = false;

    #[inline(always)]
    fn add<const CODE: u8>(self, sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: `self` exists, so the CPU has every feature that `add_dot` enables.
        unsafe { add_dot::<CODE>(sum, w, x) }
    }

    #[inline(always)]
    fn total<const CODE: u8>(self, sum: __m256i) -> __m256i {
        // SAFETY: as in `add`.
        if CODE == INT4 { unsafe { add_pairs(sum) } } else { sum }
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
}

impl<A: Adder, const CODE: u8, const GROUP: usize, const MIN: bool> OnePanel<'_, '_, '_, A, CODE, GROUP, MIN> {
    /// The rows of a tile times the panel, `T` sides at a time.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn strips<const R: usize, const T: usize>(&mut self, row: usize) {
        self.by_strips::<Avx2, R, R, T>(self.product.set.into(), row, |panel, x, [_, side], prefetched| {
            panel.strip::<R, T>(x, side, prefetched)
        });
    }

    /// The rows of a tile times `T` sides of the panel, from `side` on. Prefetches the lines of `prefetched` ahead of their
    /// use.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn strip<const R: usize, const T: usize>(
        &self,
        x: &Tile<'_, R>,
        side: usize,
        prefetched: &[CacheLine],
    ) -> [[__m256; T]; R] {
        let (panel, blocks) = (&self.panel, x.codes.len());
        let table = _mm256_xor_si256(load_table(&self.table), _mm256_set1_epi8(if A::UNSIGNED { -128 } else { 0 }));
        assert!(side + T <= SIDES);
        let x = x.blocks(0..blocks);
        let groups = (blocks * Self::HALVES).div_ceil(Self::RUN);
        let scales: &[Both<f16>] = &bytemuck::cast_slice(panel.scales)[..groups];
        let mins: &[Both<f16>] = if MIN { &bytemuck::cast_slice(panel.mins)[..groups] } else { scales };
        let mut acc = [[_mm256_setzero_ps(); T]; R];
        // The sums of the blocks of a group.
        let mut parts = [[_mm256_setzero_ps(); T]; R];
        let mut dots = [[[[_mm256_setzero_si256(); R]; T]; 2]; CHUNK];
        let lines = if CODE == INT8 { 8 } else { 4 };
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
                    let group = b * Self::HALVES / Self::RUN + half;
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
        let part = |half, t| unpack::<A, CODE>(half_block::<CODE>(self.panel.codes, b, half), side + t, table);
        let add = |mut sum, w: [__m256i; 4], codes: &[i32]| {
            for j in 0..4 {
                sum = adder.add::<CODE>(sum, w[j], _mm256_set1_epi32(codes[j]));
            }
            sum
        };
        for t in 0..T {
            // Signed weights take twice as many registers, so theirs are unpacked by halves.
            if Self::HALVES == 1 && (CODE == INT4 || A::UNSIGNED) {
                let w = [part(0, t), part(1, t)];
                for r in 0..R {
                    let sum = add(_mm256_setzero_si256(), w[0], &codes[r][..4]);
                    dots[0][t][r] = add(sum, w[1], &codes[r][4..]);
                }
                continue;
            }
            for half in 0..2 {
                let w = part(half, t);
                let of = if Self::HALVES == 1 { 0 } else { half };
                for r in 0..R {
                    let sum = if half > of { dots[of][t][r] } else { _mm256_setzero_si256() };
                    dots[of][t][r] = add(sum, w, &codes[r][4 * half..][..4]);
                }
            }
        }
    }

    /// The dot product of a row with a group of block `b`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot<const R: usize>(&self, sum: __m256i, x: &Tile<'_, R>, [b, half, r]: [usize; 3]) -> __m256 {
        let mut dot = self.product.set.total::<CODE>(sum);
        let is_too_high = if CODE == INT4 { !MIN } else { A::UNSIGNED };
        if is_too_high {
            let zero = if Self::HALVES == 1 { x.zeros[b][r] } else { x.half_zeros[b][half][r] };
            // 128 is 16 times the zero point of 4-bit codes.
            let zero = if CODE == INT4 { zero } else { 16 * zero };
            dot = _mm256_add_epi32(dot, _mm256_set1_epi32(zero));
        }
        _mm256_cvtepi32_ps(dot)
    }
}

/// Adds the pairs of sums in 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pairs(sum: __m256i) -> __m256i {
    _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
}

/// Adds the products of 4 columns: pairs in 16 bits for [`INT4`], else whole dot products in 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_dot<const CODE: u8>(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    if CODE == INT4 {
        _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x))
    } else {
        // |w| <= 128 and |x| <= 127: a pair is at most 32512 and does not saturate.
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_add_epi32(sum, add_pairs(pairs))
    }
}

/// The weights of half a block: register `j` holds columns `4 j .. 4 j + 4` of 8 rows. They are signed, except
/// for [`INT4`] and adders that take unsigned weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<A: Adder, const CODE: u8>(lines: &[CacheLine], side: usize, table: __m256i) -> [__m256i; 4] {
    if CODE == INT8 {
        let sign = _mm256_set1_epi8(if A::UNSIGNED { 0 } else { -128 });
        let value = |j: usize| _mm256_xor_si256(load(&lines[j], side), sign);
        [value(0), value(1), value(2), value(3)]
    } else {
        let (first, second) = (load(&lines[0], side), load(&lines[1], side));
        let low = |line| _mm256_and_si256(line, _mm256_set1_epi8(15));
        let high = |line| low(_mm256_srli_epi16::<4>(line));
        let w = [low(first), high(first), low(second), high(second)];
        let value = |w| if CODE == TABLE4 { _mm256_shuffle_epi8(table, w) } else { w };
        [value(w[0]), value(w[1]), value(w[2]), value(w[3])]
    }
}
