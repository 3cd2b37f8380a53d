//! The scalar kernel, which defines the results of all others: plain loops, no intrinsics. Runs on every CPU.

use super::activations::Tile;
use super::generic::int8;
use super::generic::product::{ByTile, by_tile};
use super::generic::sparse::by_chunk;
use super::kv::INT8_GROUP;
use super::operations::types::*;
use super::operations::{Kernel, Table, operations, plain};
use crate::quant::packed::{BLOCK, Code, LONGEST_RUN, Layout, PANEL, Panel, sparse};

/// The scalar kernel.
#[allow(unsafe_code, reason = "the promise that this CPU has the instruction set of the table")]
pub(super) fn kernel() -> &'static Kernel {
    const TABLE: Table = operations!(plain { "scalar" });
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") {
        // SAFETY: this CPU has the instruction.
        static WITH_FMA: Kernel = unsafe { Kernel::new(fma::with_instruction(TABLE)) };
        return &WITH_FMA;
    }
    // SAFETY: the functions of this file need no instruction set.
    static SCALAR: Kernel = unsafe { Kernel::new(TABLE) };
    &SCALAR
}

/// The same functions with the CPU's instruction for fused multiply-adds, where these take most of the time. As calls of the C
/// library's function, which rounds alike, they take ten times as long.
#[cfg(target_arch = "x86_64")]
mod fma {
    use super::*;

    pub(super) const fn with_instruction(table: Table) -> Table {
        Table { product_float, scores, weighted_sum, ..table }
    }

    #[target_feature(enable = "fma")]
    fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
        super::product_float(w, panels, x, stride, out);
    }

    #[target_feature(enable = "fma")]
    fn scores(inputs: ScoreInputs<'_>, scores: &mut [f32], stride: usize) {
        super::scores(inputs, scores, stride);
    }

    #[target_feature(enable = "fma")]
    fn weighted_sum(inputs: WeightedValues<'_>, out: &mut [f32]) {
        super::weighted_sum(inputs, out);
    }
}

fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
    by_tile(x, 0..x.rows(), &mut Panels { w, panels, x, out });
}

/// All panels times a tile of rows.
struct Panels<'a, 'c> {
    w: &'a Packed,
    panels: Range<usize>,
    x: &'a Activations,
    out: &'a mut Columns<'c>,
}

impl ByTile for Panels<'_, '_> {
    fn tile<const R: usize>(&mut self, row: usize) {
        for (p, index) in self.panels.clone().enumerate() {
            if self.w.is_sparse() {
                by_chunk(self.w, index, sparse::expand, |panel, blocks| self.blocks::<R>(row, p, &panel, blocks));
            } else {
                self.blocks::<R>(row, p, &self.w.panel(index), 0..self.x.blocks());
            }
        }
    }
}

impl Panels<'_, '_> {
    /// The blocks of a panel times a tile. The sums of the blocks before wait in the output.
    fn blocks<const R: usize>(&mut self, row: usize, p: usize, panel: &Panel<'_>, blocks: Range<usize>) {
        let (w, rows) = (self.w, R.min(self.x.rows() - row));
        let x = self.x.tile::<R>(row).blocks(blocks.clone());
        let layout = match w.layout() {
            Layout { code: Code::SparseInt4, group, min } => Layout { code: Code::Int4, group, min },
            layout => layout,
        };
        let output_scale = if blocks.end == self.x.blocks() { w.output_scale() } else { 1.0 };
        let width = self.out.row_mut(row).len();
        for (lane, column) in (p * PANEL..width.min((p + 1) * PANEL)).enumerate() {
            let mut sums = [0.0; R];
            let sums = &mut sums[..rows];
            if blocks.start > 0 {
                sums.iter_mut().enumerate().for_each(|(r, sum)| *sum = self.out.row_mut(row + r)[column]);
            }
            for group in 0..panel.scales.len() {
                let weights = Group { layout, panel, group, lane };
                if layout.group <= BLOCK {
                    weights.add_narrow(&x, sums);
                } else {
                    weights.add_wide(&x, sums);
                }
            }
            for (r, sum) in sums.iter().enumerate() {
                self.out.row_mut(row + r)[column] = sum * output_scale;
            }
        }
    }
}

/// A group of weights of one row of a panel.
struct Group<'a> {
    layout: Layout,
    panel: &'a Panel<'a>,
    group: usize,
    /// The row in the panel.
    lane: usize,
}

impl Group<'_> {
    /// The codes at `columns`, at most a block, and zeros after them. Decoded once for all rows of a tile.
    fn codes(&self, columns: Range<usize>) -> [i32; BLOCK] {
        let mut codes = [0; BLOCK];
        for (code, column) in codes.iter_mut().zip(columns) {
            *code = self.panel.integer(self.layout.code, self.lane, column);
        }
        codes
    }

    fn scale(&self) -> f32 {
        self.panel.scales[self.group][self.lane].to_f32()
    }

    fn min(&self) -> f32 {
        self.panel.mins[self.group][self.lane].to_f32()
    }

    /// Adds a group that is a block or half a block.
    fn add_narrow<const R: usize>(&self, x: &Tile<'_, R>, sums: &mut [f32]) {
        let (group, halves) = (self.layout.group, BLOCK / self.layout.group);
        let (block, half) = (self.group / halves, self.group % halves);
        let (zeros, sums_of_x) = match halves {
            1 => (&x.zeros[block], &x.sums[block]),
            _ => (&x.half_zeros[block][half], &x.half_sums[block][half]),
        };
        let codes = self.codes(self.group * group..(self.group + 1) * group);
        for (r, sum) in sums.iter_mut().enumerate() {
            let dot = dot(&codes, &x.codes_of(r, block)[half * group..]) + self.zero(zeros[r]);
            *sum = (dot as f32).mul_add(self.scale() * x.scales[block][r], *sum);
            if self.layout.min {
                *sum = self.min().mul_add(sums_of_x[r], *sum);
            }
        }
    }

    /// Adds a group of several blocks: in runs of [`LONGEST_RUN`] columns, first the blocks of a run, each times the activations' scale,
    /// then their sum times the weights' scale.
    fn add_wide<const R: usize>(&self, x: &Tile<'_, R>, sums: &mut [f32]) {
        let of_group = self.layout.group / BLOCK;
        let blocks = self.group * of_group..((self.group + 1) * of_group).min(x.codes.len());
        for first in blocks.clone().step_by(LONGEST_RUN / BLOCK) {
            let run = first..blocks.end.min(first + LONGEST_RUN / BLOCK);
            let mut parts = [0.0f32; R];
            for block in run.clone() {
                let codes = self.codes(block * BLOCK..(block + 1) * BLOCK);
                for (r, part) in parts[..sums.len()].iter_mut().enumerate() {
                    let dot = dot(&codes, x.codes_of(r, block)) + self.zero(x.zeros[block][r]);
                    *part = (dot as f32).mul_add(x.scales[block][r], *part);
                }
            }
            for (r, (part, sum)) in parts.iter().zip(sums.iter_mut()).enumerate() {
                *sum = part.mul_add(self.scale(), *sum);
                if self.layout.min {
                    *sum = run.clone().fold(*sum, |sum, block| self.min().mul_add(x.sums[block][r], sum));
                }
            }
        }
    }

    /// What the zero point of the codes adds to a dot product, from `of_int4`, which 4-bit codes need.
    fn zero(&self, of_int4: i32) -> i32 {
        match self.layout.code.zero() {
            Some(zero) if !self.layout.min => of_int4 / 8 * zero,
            _ => 0,
        }
    }
}

/// The dot product, over as many numbers as the shorter one has.
fn dot(weights: &[i32], x: &[i8]) -> i32 {
    weights.iter().zip(x).map(|(weight, x)| weight * i32::from(*x)).sum()
}

#[inline(always)]
fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
    let code = w.layout().code;
    for (p, index) in panels.enumerate() {
        let panel = w.panel(index);
        for row in 0..out.rows() {
            let x = &x[row * stride..][..w.columns()];
            let out = &mut out.row_mut(row)[p * PANEL..];
            for (lane, out) in out.iter_mut().take(PANEL).enumerate() {
                let mut acc = 0.0f32;
                for (column, x) in x.iter().enumerate() {
                    acc = panel.float(code, lane, column).mul_add(*x, acc);
                }
                *out = acc * w.output_scale();
            }
        }
    }
}

#[inline(always)]
fn scores(inputs: ScoreInputs<'_>, scores: &mut [f32], stride: usize) {
    let ScoreInputs { queries, head_dim, keys, scale } = inputs;
    for (i, query) in queries.chunks_exact(head_dim).enumerate() {
        let scores = &mut scores[i * stride..][..PAGE];
        for (position, score) in scores.iter_mut().enumerate() {
            let mut acc = 0.0f32;
            for (d, q) in query.iter().enumerate() {
                let key = keys.get((position / PANEL * head_dim + d) * PANEL + position % PANEL);
                acc = key.mul_add(*q, acc);
            }
            *score = acc * scale;
        }
    }
}

#[inline(always)]
fn weighted_sum(inputs: WeightedValues<'_>, out: &mut [f32]) {
    let WeightedValues { weights, stride, ranges, values, width } = inputs;
    for (i, (out, range)) in out.chunks_exact_mut(width).zip(ranges).enumerate() {
        for position in range.clone() {
            let weight = weights[i * stride + position];
            for (column, out) in out.iter_mut().enumerate() {
                *out = values.get(position * width + column).mul_add(weight, *out);
            }
        }
    }
}

/// Panels in a page.
const PANELS: usize = PAGE / PANEL;

/// Four codes for each of 16 lanes in a line: `(16, 4)`.
fn pack_keys(keys: &[i8], head_dim: usize, out: &mut [CacheLine]) {
    for (i, line) in out.iter_mut().enumerate() {
        for (j, byte) in line.0.iter_mut().enumerate() {
            let (panel, d, lane) = (i % PANELS, i / PANELS * 4 + j % 4, j / 4);
            *byte = if d < head_dim { keys[(panel * head_dim + d) * PANEL + lane].max(-127) as u8 } else { 0 };
        }
    }
}

/// As [`pack_keys`], with a line of zeros after each panel.
fn pack_values(values: &[i8], width: usize, out: &mut [CacheLine]) {
    for (panel, lines) in out.chunks_exact_mut(PAGE / 4 + 1).enumerate() {
        for (i, line) in lines.iter_mut().enumerate() {
            for (j, byte) in line.0.iter_mut().enumerate() {
                let (position, lane) = (j % 4 * PANEL + i, j / 4);
                *byte = values
                    .get(position * width + panel * PANEL + lane)
                    .filter(|_| i < PANEL)
                    .map_or(0, |code| (*code).max(-127) as u8);
            }
        }
    }
}

fn quantize_weights(inputs: Int8Weights<'_>, codes: &mut [u8], factors: &mut [f32]) {
    int8::quantize_weights(inputs, codes, factors, 0);
}

fn scores_int8(inputs: Int8ScoreInputs<'_>, scores: &mut [f32], stride: usize) {
    let Int8ScoreInputs { queries, keys, scales } = inputs;
    let groups = queries.head_dim.div_ceil(INT8_GROUP);
    for i in 0..queries.scales.len() / groups {
        let query = |d: usize| i32::from(queries.codes[d / 4 * queries.stride + i][d % 4]);
        let scores = &mut scores[i * stride..][..PAGE];
        for (position, score) in scores.iter_mut().enumerate() {
            let (panel, lane) = (position / PANEL, position % PANEL);
            for g in 0..groups {
                let numbers = g * INT8_GROUP..((g + 1) * INT8_GROUP).min(queries.head_dim);
                let key = |d: usize| i32::from(keys[d / 4 * PANELS + panel].0[lane * 4 + d % 4] as i8);
                let dot = numbers.map(|d| query(d) * key(d)).sum::<i32>() as f32 * queries.scales[i * groups + g];
                let scale = scales[g * PAGE + position];
                *score = if g == 0 { dot * scale } else { dot.mul_add(scale, *score) };
            }
        }
    }
}

fn weighted_sum_int8(inputs: Int8WeightedValues<'_>, out: &mut [f32]) {
    let Int8WeightedValues { weights, scales, values, width } = inputs;
    let n = scales.len() / width.div_ceil(INT8_GROUP);
    for (i, out) in out.chunks_exact_mut(width).enumerate() {
        for (column, out) in out.iter_mut().enumerate() {
            let at = column / INT8_GROUP * n + i;
            let lines = &values[column / PANEL * (PANEL + 1)..][..PANEL];
            let products = weights[at * PAGE..][..PAGE]
                .iter()
                .enumerate()
                .map(|(j, weight)| i32::from(*weight) * i32::from(lines[j / 4].0[column % PANEL * 4 + j % 4] as i8));
            *out = (products.sum::<i32>() as f32).mul_add(scales[at], *out);
        }
    }
}

fn widen(numbers: KvSlice<'_>, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = numbers.get(i);
    }
}

fn to_f16(x: &[f32], out: &mut [f16]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(*x);
    }
}

fn peak_int8(rounds: usize) -> (u64, i32) {
    let mut dots = [1i32; 64];
    for round in 0..rounds {
        for (i, dot) in dots.iter_mut().enumerate() {
            *dot = dot.wrapping_add(i32::from(i as i8) * i32::from(round as i8));
        }
    }
    (rounds as u64 * 64 * 2, dots.iter().fold(0, |sum, x| sum.wrapping_add(*x)))
}
