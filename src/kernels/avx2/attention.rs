//! Attention over a page of the key/value cache.

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{Both, SIDES, load_f16, load_f32, store, store_side};
use crate::kernels::{PAGE, portable};
use crate::quant::packed::PANEL;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn all_scores(
    queries: &[f32],
    head_dim: usize,
    keys: &[f16],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        // Eight to twelve sums: enough to hide the latency of FMA, few enough to stay in registers.
        i += match n - i {
            6.. => scores_tile::<6, 1>(queries, head_dim, keys, scale, scores, stride),
            3.. => scores_tile::<3, 2>(queries, head_dim, keys, scale, scores, stride),
            2 => scores_tile::<2, 2>(queries, head_dim, keys, scale, scores, stride),
            _ => scores_tile::<1, 4>(queries, head_dim, keys, scale, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, `P` panels of 16 positions at a time. Returns `Q`.
#[target_feature(enable = "avx2,fma,f16c")]
fn scores_tile<const Q: usize, const P: usize>(
    queries: &[f32],
    head_dim: usize,
    keys: &[f16],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[Both<f16>] = bytemuck::cast_slice(keys);
    for first in (0..PAGE / PANEL).step_by(P) {
        let keys: [&[Both<f16>]; P] = portable::rows(&keys[first * head_dim..], head_dim, head_dim);
        let mut acc = [[[_mm256_setzero_ps(); SIDES]; P]; Q];
        for d in 0..head_dim {
            for p in 0..P {
                for side in 0..SIDES {
                    let k = load_f16(&keys[p][d][side]);
                    for q in 0..Q {
                        acc[q][p][side] = _mm256_fmadd_ps(k, _mm256_set1_ps(queries[q][d]), acc[q][p][side]);
                    }
                }
            }
        }
        let scale = _mm256_set1_ps(scale);
        for q in 0..Q {
            let scores = &mut scores[q * stride..][..PAGE];
            for p in 0..P {
                for side in 0..SIDES {
                    store_side(_mm256_mul_ps(acc[q][p][side], scale), side, &mut scores[(first + p) * PANEL..]);
                }
            }
        }
    }
    Q
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn weighted_sum(
    weights: &[f32],
    stride: usize,
    counts: &[usize],
    values: &[f16],
    width: usize,
    out: &mut [f32],
) {
    let n = counts.len();
    let mut i = 0;
    while i < n {
        let (weights, counts, out) = (&weights[i * stride..], &counts[i..], &mut out[i * width..]);
        i += match n - i {
            4.. => sum_queries::<4, 1>(weights, stride, counts, values, width, out),
            3 => sum_queries::<3, 2>(weights, stride, counts, values, width, out),
            2 => sum_queries::<2, 2>(weights, stride, counts, values, width, out),
            _ => sum_queries::<1, 4>(weights, stride, counts, values, width, out),
        };
    }
}

/// `Q` queries: together as far as all of them reach, then each to its own end. Returns `Q`.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_queries<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    counts: &[usize],
    values: &[f16],
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = counts[..Q].iter().copied().min().unwrap_or(0);
    sum_columns::<Q, V>(weights, stride, 0..common, values, width, out);
    for q in 0..Q {
        if counts[q] > common {
            let (weights, out) = (&weights[q * stride..], &mut out[q * width..]);
            sum_columns::<1, 4>(weights, stride, common..counts[q], values, width, out);
        }
    }
    Q
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum_columns<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    while column < width {
        column += if width - column >= V * PANEL {
            sum_tile::<Q, V>(weights, stride, positions.clone(), values, width, column, out)
        } else {
            sum_tile::<Q, 1>(weights, stride, positions.clone(), values, width, column, out)
        };
    }
}

/// `Q` queries and `V` times 16 columns over a range of positions. Returns the columns done.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(&weights[positions.start..], stride, positions.len());
    let mut acc = [[[_mm256_setzero_ps(); SIDES]; V]; Q];
    for q in 0..Q {
        let out: &[Both<f32>] = bytemuck::cast_slice(&out[q * width + column..][..V * PANEL]);
        for v in 0..V {
            acc[q][v] = [load_f32(&out[v][0]), load_f32(&out[v][1])];
        }
    }
    let rows = values[positions.start * width..].chunks_exact(width).take(positions.len());
    for (i, row) in rows.enumerate() {
        let row: &[Both<f16>] = bytemuck::cast_slice(&row[column..][..V * PANEL]);
        for v in 0..V {
            for side in 0..SIDES {
                let value = load_f16(&row[v][side]);
                for q in 0..Q {
                    acc[q][v][side] = _mm256_fmadd_ps(value, _mm256_set1_ps(weights[q][i]), acc[q][v][side]);
                }
            }
        }
    }
    for q in 0..Q {
        let out: &mut [Both<f32>] = bytemuck::cast_slice_mut(&mut out[q * width + column..][..V * PANEL]);
        for v in 0..V {
            store(acc[q][v][0], &mut out[v][0]);
            store(acc[q][v][1], &mut out[v][1]);
        }
    }
    V * PANEL
}
