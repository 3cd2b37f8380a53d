//! The definition of correct: plain loops, no intrinsics. Runs on every CPU.

use std::ops::Range;

use half::f16;

use super::activations::{Activations, RowMut, Tile};
use super::kv::{KvSlice, Softmax, SoftmaxMut};
use super::portable::{self, Activation};
use super::{Kernel, PAGE};
use crate::quant::packed::{BLOCK, Code, Layout, PANEL, Packed, Panel};
use crate::threads::Columns;

/// The scalar kernel. Needs no witness: there is nothing to detect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

impl Kernel for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn quantize(&self, x: &[f32], out: RowMut<'_>) {
        portable::quantize(x, out);
    }

    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>) {
        let mut row = 0;
        while row < x.rows() {
            row += match Activations::height(x.rows() - row) {
                8 => tile::<8>(w, panels.clone(), x, row, out),
                4 => tile::<4>(w, panels.clone(), x, row, out),
                2 => tile::<2>(w, panels.clone(), x, row, out),
                _ => tile::<1>(w, panels.clone(), x, row, out),
            };
        }
    }

    fn product_float(&self, w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) {
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
                    *out = acc * w.gain();
                }
            }
        }
    }

    fn scores(
        &self,
        queries: &[f32],
        head_dim: usize,
        keys: KvSlice<'_>,
        scales: &[f32; PAGE],
        scores: &mut [f32],
        stride: usize,
    ) {
        for (i, query) in queries.chunks_exact(head_dim).enumerate() {
            let scores = &mut scores[i * stride..][..PAGE];
            for (position, (score, scale)) in scores.iter_mut().zip(scales).enumerate() {
                let mut acc = 0.0f32;
                for (d, q) in query.iter().enumerate() {
                    let key = keys.get((position / PANEL * head_dim + d) * PANEL + position % PANEL);
                    acc = key.mul_add(*q, acc);
                }
                *score = acc * scale;
            }
        }
    }

    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        ranges: &[Range<usize>],
        values: KvSlice<'_>,
        width: usize,
        out: &mut [f32],
    ) {
        for (i, (out, range)) in out.chunks_exact_mut(width).zip(ranges).enumerate() {
            for position in range.clone() {
                let weight = weights[i * stride + position];
                for (column, out) in out.iter_mut().enumerate() {
                    *out = values.get(position * width + column).mul_add(weight, *out);
                }
            }
        }
    }

    fn widen(&self, numbers: KvSlice<'_>, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = numbers.get(i);
        }
    }

    fn exp_segment(&self, scores: &mut [f32]) -> (f32, f32) {
        portable::exp_segment(scores)
    }

    fn join(&self, so_far: SoftmaxMut<'_>, more: Softmax<'_>) {
        portable::join(so_far, more);
    }

    fn multiply(&self, x: &mut [f32], y: &[f32]) {
        portable::multiply(x, y);
    }

    fn add_slope(&self, scores: &mut [f32], slope: f32, distance: f32) {
        portable::add_slope(scores, slope, distance);
    }

    fn to_int8(&self, x: &[f32], codes: &mut [i8]) -> f32 {
        portable::to_int8(x, codes)
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        portable::rms_norm(x, weight, eps, out);
    }

    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        portable::layer_norm(x, weight, bias, eps, out);
    }

    fn add_scaled(&self, x: &mut [f32], y: &[f32], scale: f32) {
        portable::add_scaled(x, y, scale);
    }

    fn activate(&self, activation: Activation, x: &mut [f32]) {
        portable::activate(activation, x);
    }

    fn gate(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        portable::gate(activation, gate, up);
    }

    fn rope(&self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        portable::rope(x, cos, sin);
    }

    fn soft_cap(&self, x: &mut [f32], cap: f32) {
        portable::soft_cap(x, cap);
    }

    fn to_f16(&self, x: &[f32], out: &mut [f16]) {
        portable::to_f16(x, out);
    }

    fn read_sum(&self, data: &[u64]) -> u64 {
        portable::read_sum(data)
    }

    fn peak_int8(&self, rounds: usize) -> (u64, i32) {
        let mut dots = [1i32; 64];
        for round in 0..rounds {
            for (i, dot) in dots.iter_mut().enumerate() {
                *dot = dot.wrapping_add(i32::from(i as i8) * i32::from(round as i8));
            }
        }
        (rounds as u64 * 64 * 2, dots.iter().fold(0, |sum, x| sum.wrapping_add(*x)))
    }
}

/// A tile of `R` rows of activations times the panels. Returns `R`.
fn tile<const R: usize>(w: &Packed, panels: Range<usize>, x: &Activations, row: usize, out: &mut Columns<'_>) -> usize {
    let rows = R.min(x.rows() - row);
    let x = x.tile::<R>(row);
    for (p, index) in panels.enumerate() {
        let panel = w.panel(index);
        for r in 0..rows {
            let out = &mut out.row_mut(row + r)[p * PANEL..];
            for (lane, out) in out.iter_mut().take(PANEL).enumerate() {
                let mut acc = 0.0f32;
                for group in 0..w.groups() {
                    acc = if w.layout().group <= BLOCK {
                        narrow_group(w.layout(), &panel, group, lane, &x, r, acc)
                    } else {
                        wide_group(w.layout(), &panel, group, lane, &x, r, acc)
                    };
                }
                *out = acc * w.gain();
            }
        }
    }
    R
}

/// The codes' dot product over `columns`, without the zero point.
fn dot<const R: usize>(
    layout: Layout,
    panel: &Panel<'_>,
    columns: Range<usize>,
    lane: usize,
    x: &Tile<'_, R>,
    r: usize,
) -> i32 {
    columns.map(|column| panel.integer(layout.code, lane, column) * i32::from(x.code(r, column))).sum()
}

/// Adds a group that is a block or half a block.
fn narrow_group<const R: usize>(
    layout: Layout,
    panel: &Panel<'_>,
    group: usize,
    lane: usize,
    x: &Tile<'_, R>,
    r: usize,
    acc: f32,
) -> f32 {
    let halves = BLOCK / layout.group;
    let (block, half) = (group / halves, group % halves);
    let (zero, sum) = match halves {
        1 => (x.zeros[block][r], x.sums[block][r]),
        _ => (x.half_zeros[block][half][r], x.half_sums[block][half][r]),
    };
    let mut dot = dot(layout, panel, group * layout.group..(group + 1) * layout.group, lane, x, r);
    if layout.code == Code::Int4 && !layout.min {
        dot += zero;
    }
    let acc = (dot as f32).mul_add(panel.scales[group][lane].to_f32() * x.scales[block][r], acc);
    if layout.min { panel.mins[group][lane].to_f32().mul_add(sum, acc) } else { acc }
}

/// Adds a group of several blocks: first its blocks, each times its activations' scale, then that times the weights' scale.
fn wide_group<const R: usize>(
    layout: Layout,
    panel: &Panel<'_>,
    group: usize,
    lane: usize,
    x: &Tile<'_, R>,
    r: usize,
    acc: f32,
) -> f32 {
    let run = layout.group / BLOCK;
    let blocks = group * run..((group + 1) * run).min(x.codes.len());
    let mut part = 0.0f32;
    for block in blocks.clone() {
        let mut dot = dot(layout, panel, block * BLOCK..(block + 1) * BLOCK, lane, x, r);
        if !layout.min {
            dot += x.zeros[block][r];
        }
        part = (dot as f32).mul_add(x.scales[block][r], part);
    }
    let acc = part.mul_add(panel.scales[group][lane].to_f32(), acc);
    if !layout.min {
        return acc;
    }
    blocks.fold(acc, |acc, block| panel.mins[group][lane].to_f32().mul_add(x.sums[block][r], acc))
}
