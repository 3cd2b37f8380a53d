//! The integer product in pseudo-code, for `S` activation rows and `T` quarters of a panel:
//!
//! ```text
//! for each half of a block of 32 columns:
//!     w[0..4] = codes of 1 to 4 lines, signed        (4 registers a quarter: 4 rows x 4 weights each, used for all S rows)
//!     for each of S rows:
//!         x = 16 codes of the activations             (1 register, a lane for each w)
//!         dot += sdot(w[j], x.lane[j]) for j in 0..4  (from the zero point on: -8 * sum of the activation's codes)
//!     at the end of a block, or of this half if it has a scale of its own:
//!         acc = fma(dot, weight scales * activation scale, acc)
//! ```

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use half::f16;

use super::sparse::expand;
use super::unpack::register;
use super::vector::{Four, Neon, QUARTERS, load_f16, load_i8};
use crate::kernels::activations::{Activations, Tile};
use crate::kernels::generic::product::{ByPanel, OnePanel, Product, block_lines, by_layout, is_unsigned, zero_point};
use crate::quant::packed::sparse::{Int4Block, SparseBlocks};
use crate::quant::packed::{BLOCK, Packed};
use crate::threads::Columns;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    // SAFETY: the function runs only on CPUs with its features.
    let set = unsafe { Neon::new() };
    by_layout(w.layout(), Product { set, w, panels, x, out });
}

impl ByPanel for Neon {
    #[inline(always)]
    fn tile<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize>(
        panel: &mut OnePanel<'_, '_, '_, Neon, CODE, GROUP, MIN>,
        row: usize,
    ) {
        // SAFETY: a `Neon` exists, so the CPU has every feature that `strips` enables.
        unsafe {
            match R {
                4.. => panel.strips::<R, 4, 2>(row),
                2.. => panel.strips::<R, 2, QUARTERS>(row),
                _ => panel.strips::<R, 1, QUARTERS>(row),
            }
        }
    }

    #[inline(always)]
    fn expand(self, blocks: SparseBlocks<'_>, out: &mut [Int4Block]) {
        // SAFETY: a `Neon` exists, so the CPU has every feature that `expand` enables.
        unsafe { expand(blocks, out) }
    }
}

impl<const CODE: u8, const GROUP: usize, const MIN: bool> OnePanel<'_, '_, '_, Neon, CODE, GROUP, MIN> {
    #[target_feature(enable = "neon,dotprod")]
    fn strips<const R: usize, const S: usize, const T: usize>(&mut self, row: usize) {
        self.by_strips(self.product.set, row, |panel, x, at, _, sums| panel.strip::<R, S, T>(x, at, sums));
    }

    /// Adds to `acc` the products of `S` rows of a tile, from `first` on, with `T` quarters of the panel, from `quarter` on.
    #[target_feature(enable = "neon,dotprod")]
    fn strip<const R: usize, const S: usize, const T: usize>(
        &self,
        x: &Tile<'_, R>,
        [first, quarter]: [usize; 2],
        mut acc: [[float32x4_t; T]; S],
    ) -> [[float32x4_t; T]; S] {
        assert!(first + S <= R && quarter + T <= QUARTERS);
        let (blocks, table) = (x.codes.len(), load_i8(&self.table));
        let (halves, run) = (Self::HALVES, Self::RUN);
        let Tile { codes, scales: x_scales, zeros, sums, half_zeros, half_sums } = x.blocks(0..blocks);
        let codes: &[[[[i8; BLOCK / 2]; 2]; R]] = &bytemuck::cast_slice(codes)[..blocks];
        let groups = Self::groups(blocks);
        let scales: &[Four<f16>] = &bytemuck::cast_slice(self.panel.scales)[..groups];
        let mins: &[Four<f16>] = if MIN { &bytemuck::cast_slice(self.panel.mins)[..scales.len()] } else { scales };
        // The sums of the blocks of a group.
        let mut parts = [[vdupq_n_f32(0.0); T]; S];
        for b in 0..blocks {
            for part in 0..halves {
                let group = Self::group_of(b, part);
                for t in 0..T {
                    let mut dots = [vdupq_n_s32(0); S];
                    if is_unsigned(CODE) && !MIN {
                        for r in 0..S {
                            let zero = if halves == 1 { zeros[b][first + r] } else { half_zeros[b][part][first + r] };
                            dots[r] = vdupq_n_s32(zero_point(CODE, zero));
                        }
                    }
                    for half in part..part + 2 / halves {
                        let lines = block_lines::<CODE>(self.panel.codes, b);
                        let mut w = [vdupq_n_s8(0); 4];
                        for j in 0..4 {
                            w[j] = register::<CODE>(lines, 4 * half + j, quarter + t, table);
                        }
                        for r in 0..S {
                            let x = load_i8(&codes[b][first + r][half]);
                            let sum = dot::<1>(dot::<0>(dots[r], w[0], x), w[1], x);
                            dots[r] = dot::<3>(dot::<2>(sum, w[2], x), w[3], x);
                        }
                    }
                    let (scale, min) = (load_f16(&scales[group][quarter + t]), load_f16(&mins[group][quarter + t]));
                    for r in 0..S {
                        let (dot, x_scale) = (vcvtq_f32_s32(dots[r]), x_scales[b][first + r]);
                        if run == 1 {
                            acc[r][t] = vfmaq_f32(acc[r][t], dot, vmulq_n_f32(scale, x_scale));
                            if MIN {
                                let sum = if halves == 1 { sums[b][first + r] } else { half_sums[b][part][first + r] };
                                acc[r][t] = vfmaq_n_f32(acc[r][t], min, sum);
                            }
                            continue;
                        }
                        parts[r][t] = vfmaq_n_f32(parts[r][t], dot, x_scale);
                        if (b + 1).is_multiple_of(run) || b + 1 == blocks {
                            acc[r][t] = vfmaq_f32(acc[r][t], parts[r][t], scale);
                            parts[r][t] = vdupq_n_f32(0.0);
                            if MIN {
                                for sums in &sums[b / run * run..=b] {
                                    acc[r][t] = vfmaq_n_f32(acc[r][t], min, sums[first + r]);
                                }
                            }
                        }
                    }
                }
            }
        }
        acc
    }
}

/// Adds to each lane the products of its four bytes of `w` with the four bytes of lane `J` of `x`.
///
/// Equivalent to the intrinsic `vdotq_laneq_s32`, which stable Rust does not have yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn dot<const J: usize>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction touches only these registers, and the CPU has it: it is one of the function's features.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x, lane = const J,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
