//! Attention over a page of the key/value cache.

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{load_f16, load_f32, store};
use crate::kernels::{PAGE, portable};
use crate::quant::packed::PANEL;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
        i += match n - i {
            6.. => scores_tile::<6>(queries, head_dim, keys, scale, scores, stride),
            3.. => scores_tile::<3>(queries, head_dim, keys, scale, scores, stride),
            2 => scores_tile::<2>(queries, head_dim, keys, scale, scores, stride),
            _ => scores_tile::<1>(queries, head_dim, keys, scale, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, four registers of 16 positions. Returns `Q`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn scores_tile<const Q: usize>(
    queries: &[f32],
    head_dim: usize,
    keys: &[f16],
    scale: f32,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    const PANELS: usize = PAGE / PANEL;
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[[f16; PANEL]] = bytemuck::cast_slice(keys);
    let keys: [&[[f16; PANEL]]; PANELS] = portable::rows(keys, head_dim, head_dim);
    let mut acc = [[_mm512_setzero_ps(); PANELS]; Q];
    for d in 0..head_dim {
        let k: [__m512; PANELS] =
            [load_f16(&keys[0][d]), load_f16(&keys[1][d]), load_f16(&keys[2][d]), load_f16(&keys[3][d])];
        for q in 0..Q {
            let x = _mm512_set1_ps(queries[q][d]);
            for p in 0..PANELS {
                acc[q][p] = _mm512_fmadd_ps(k[p], x, acc[q][p]);
            }
        }
    }
    for q in 0..Q {
        let scores = &mut scores[q * stride..][..PAGE];
        for p in 0..PANELS {
            store(_mm512_mul_ps(acc[q][p], _mm512_set1_ps(scale)), &mut scores[p * PANEL..]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
            4.. => sum_queries::<4>(weights, stride, counts, values, width, out),
            2.. => sum_queries::<2>(weights, stride, counts, values, width, out),
            _ => sum_queries::<1>(weights, stride, counts, values, width, out),
        };
    }
}

/// `Q` queries: together as far as all of them reach, then each to its own end. Returns `Q`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_queries<const Q: usize>(
    weights: &[f32],
    stride: usize,
    counts: &[usize],
    values: &[f16],
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = counts[..Q].iter().copied().min().unwrap_or(0);
    sum_columns::<Q>(weights, stride, 0..common, values, width, out);
    for q in 0..Q {
        if counts[q] > common {
            sum_columns::<1>(&weights[q * stride..], stride, common..counts[q], values, width, &mut out[q * width..]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_columns<const Q: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    out: &mut [f32],
) {
    let mut column = 0;
    while column < width {
        column += match width - column {
            64.. => sum_tile::<Q, 4>(weights, stride, positions.clone(), values, width, column, out),
            32.. => sum_tile::<Q, 2>(weights, stride, positions.clone(), values, width, column, out),
            _ => sum_tile::<Q, 1>(weights, stride, positions.clone(), values, width, column, out),
        };
    }
}

/// `Q` queries, `16 * V` columns. Returns `16 * V`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[f16],
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(weights, stride, positions.end);
    let mut acc = [[_mm512_setzero_ps(); V]; Q];
    for q in 0..Q {
        for v in 0..V {
            acc[q][v] = load_f32(&out[q * width + column + v * PANEL..]);
        }
    }
    for position in positions {
        let row = &values[position * width + column..][..V * PANEL];
        let row: &[[f16; PANEL]] = row.as_chunks().0;
        let mut value = [_mm512_setzero_ps(); V];
        for v in 0..V {
            value[v] = load_f16(&row[v]);
        }
        for q in 0..Q {
            let weight = _mm512_set1_ps(weights[q][position]);
            for v in 0..V {
                acc[q][v] = _mm512_fmadd_ps(value[v], weight, acc[q][v]);
            }
        }
    }
    for q in 0..Q {
        for v in 0..V {
            store(acc[q][v], &mut out[q * width + column + v * PANEL..][..PANEL]);
        }
    }
    V * PANEL
}
