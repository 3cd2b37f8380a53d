//! Attention over a page of the key/value cache.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Both, LANES, SIDES, load_f16, load_f32, load_i8, store};
use crate::kernels::kv::KvSlice;
use crate::kernels::{PAGE, portable};
use crate::quant::packed::PANEL;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(numbers: KvSlice<'_>, out: &mut [f32]) {
    let (chunks, tail) = out.as_chunks_mut::<LANES>();
    let done = chunks.len() * LANES;
    match numbers {
        KvSlice::F32(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| *out = *x),
        KvSlice::F16(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| store(load_f16(x), out)),
        KvSlice::Int8(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| store(load_i8(x), out)),
    }
    tail.iter_mut().enumerate().for_each(|(i, out)| *out = numbers.get(done + i));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores(
    queries: &[f32],
    head_dim: usize,
    keys: KvSlice<'_>,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) {
    match keys {
        KvSlice::F32(keys) => all_scores(queries, head_dim, keys, |x| load_f32(x), scales, scores, stride),
        KvSlice::F16(keys) => all_scores(queries, head_dim, keys, |x| load_f16(x), scales, scores, stride),
        KvSlice::Int8(keys) => all_scores(queries, head_dim, keys, |x| load_i8(x), scales, scores, stride),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn all_scores<T: Copy>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        // Eight to twelve sums: enough to hide the latency of FMA, few enough to stay in registers.
        i += match n - i {
            6.. => scores_tile::<6, 1, T>(queries, head_dim, keys, load, scales, scores, stride),
            4.. => scores_tile::<4, 1, T>(queries, head_dim, keys, load, scales, scores, stride),
            3 => scores_tile::<3, 2, T>(queries, head_dim, keys, load, scales, scores, stride),
            2 => scores_tile::<2, 2, T>(queries, head_dim, keys, load, scales, scores, stride),
            _ => scores_tile::<1, 4, T>(queries, head_dim, keys, load, scales, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, `P` panels of 16 positions at a time. Returns `Q`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scores_tile<const Q: usize, const P: usize, T: Copy>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; LANES]) -> __m256,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) -> usize {
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[Both<T>] = keys.as_chunks().0.as_chunks().0;
    for first in (0..PAGE / PANEL).step_by(P) {
        let keys: [&[Both<T>]; P] = portable::rows(&keys[first * head_dim..], head_dim, head_dim);
        let mut acc = [[[_mm256_setzero_ps(); SIDES]; P]; Q];
        for d in 0..head_dim {
            for p in 0..P {
                for side in 0..SIDES {
                    let k = load(&keys[p][d][side]);
                    for q in 0..Q {
                        acc[q][p][side] = _mm256_fmadd_ps(k, _mm256_set1_ps(queries[q][d]), acc[q][p][side]);
                    }
                }
            }
        }
        let scales: &[Both<f32>] = scales.as_chunks().0.as_chunks().0;
        for q in 0..Q {
            let scores: &mut [Both<f32>] = scores[q * stride..][..PAGE].as_chunks_mut().0.as_chunks_mut().0;
            for p in 0..P {
                for side in 0..SIDES {
                    let scale = load_f32(&scales[first + p][side]);
                    store(_mm256_mul_ps(acc[q][p][side], scale), &mut scores[first + p][side]);
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
    ranges: &[Range<usize>],
    values: KvSlice<'_>,
    width: usize,
    out: &mut [f32],
) {
    match values {
        KvSlice::F32(values) => all_sums(weights, stride, ranges, values, |x| load_f32(x), width, out),
        KvSlice::F16(values) => all_sums(weights, stride, ranges, values, |x| load_f16(x), width, out),
        KvSlice::Int8(values) => all_sums(weights, stride, ranges, values, |x| load_i8(x), width, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn all_sums<T: Copy>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    width: usize,
    out: &mut [f32],
) {
    let n = ranges.len();
    let mut i = 0;
    while i < n {
        let (weights, ranges, out) = (&weights[i * stride..], &ranges[i..], &mut out[i * width..]);
        i += match n - i {
            6.. => sum_queries::<6, 1, T>(weights, stride, ranges, values, load, width, out),
            4.. => sum_queries::<4, 1, T>(weights, stride, ranges, values, load, width, out),
            3 => sum_queries::<3, 2, T>(weights, stride, ranges, values, load, width, out),
            2 => sum_queries::<2, 2, T>(weights, stride, ranges, values, load, width, out),
            _ => sum_queries::<1, 4, T>(weights, stride, ranges, values, load, width, out),
        };
    }
}

/// `Q` queries: together where all of them look, each alone before and after. Returns `Q`.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_queries<const Q: usize, const V: usize, T: Copy>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = portable::common(&ranges[..Q]);
    for q in 0..Q {
        let before = ranges[q].start..common.start.min(ranges[q].end);
        sum_columns::<1, 4, T>(&weights[q * stride..], stride, before, values, load, width, &mut out[q * width..]);
    }
    sum_columns::<Q, V, T>(weights, stride, common.clone(), values, load, width, out);
    for q in 0..Q {
        let after = common.end.max(ranges[q].start)..ranges[q].end;
        sum_columns::<1, 4, T>(&weights[q * stride..], stride, after, values, load, width, &mut out[q * width..]);
    }
    Q
}

#[target_feature(enable = "avx2,fma,f16c")]
fn sum_columns<const Q: usize, const V: usize, T: Copy>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[T],
    load: impl Fn(&[T; LANES]) -> __m256 + Copy,
    width: usize,
    out: &mut [f32],
) {
    if positions.is_empty() {
        return;
    }
    let mut column = 0;
    while column < width {
        column += if width - column >= V * PANEL {
            sum_tile::<Q, V, T>(weights, stride, positions.clone(), values, load, width, column, out)
        } else {
            sum_tile::<Q, 1, T>(weights, stride, positions.clone(), values, load, width, column, out)
        };
    }
}

/// `Q` queries and `V` times 16 columns over a range of positions. Returns the columns done.
#[inline]
#[allow(clippy::too_many_arguments, reason = "a tile of what its caller has")]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize, T: Copy>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[T],
    load: impl Fn(&[T; LANES]) -> __m256,
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(&weights[positions.start..], stride, positions.len());
    let mut acc = [[[_mm256_setzero_ps(); SIDES]; V]; Q];
    for q in 0..Q {
        let out: &[Both<f32>] = out[q * width + column..][..V * PANEL].as_chunks().0.as_chunks().0;
        for v in 0..V {
            acc[q][v] = [load_f32(&out[v][0]), load_f32(&out[v][1])];
        }
    }
    let rows = values[positions.start * width..].chunks_exact(width).take(positions.len());
    for (i, row) in rows.enumerate() {
        let row: &[Both<T>] = row[column..][..V * PANEL].as_chunks().0.as_chunks().0;
        for v in 0..V {
            for side in 0..SIDES {
                let value = load(&row[v][side]);
                for q in 0..Q {
                    acc[q][v][side] = _mm256_fmadd_ps(value, _mm256_set1_ps(weights[q][i]), acc[q][v][side]);
                }
            }
        }
    }
    for q in 0..Q {
        let out: &mut [Both<f32>] = out[q * width + column..][..V * PANEL].as_chunks_mut().0.as_chunks_mut().0;
        for v in 0..V {
            store(acc[q][v][0], &mut out[v][0]);
            store(acc[q][v][1], &mut out[v][1]);
        }
    }
    V * PANEL
}
