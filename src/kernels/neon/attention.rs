//! Attention over a page of the key/value cache.

use std::arch::aarch64::*;
use std::ops::Range;

use super::{Four, LANES, QUARTERS, load_f16, load_f32, load_i8x4, store};
use crate::kernels::kv::KvSlice;
use crate::kernels::{PAGE, portable};
use crate::quant::packed::PANEL;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn widen(numbers: KvSlice<'_>, out: &mut [f32]) {
    match numbers {
        KvSlice::F32(x) => out.copy_from_slice(x),
        KvSlice::F16(x) => {
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (out, out_tail) = out.as_chunks_mut::<LANES>();
            x.iter().zip(out).for_each(|(x, out)| store(load_f16(x), out));
            x_tail.iter().zip(out_tail).for_each(|(x, out)| *out = x.to_f32());
        }
        KvSlice::Int8(x) => x.iter().zip(out).for_each(|(x, out)| *out = f32::from(*x)),
    }
}

#[target_feature(enable = "neon,dotprod")]
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
        KvSlice::Int8(keys) => all_scores(queries, head_dim, keys, |x| load_i8x4(x), scales, scores, stride),
    }
}

#[target_feature(enable = "neon,dotprod")]
fn all_scores<T: Copy>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; LANES]) -> float32x4_t + Copy,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        i += match n - i {
            6.. => scores_tile::<6, T>(queries, head_dim, keys, load, scales, scores, stride),
            4.. => scores_tile::<4, T>(queries, head_dim, keys, load, scales, scores, stride),
            2.. => scores_tile::<2, T>(queries, head_dim, keys, load, scales, scores, stride),
            _ => scores_tile::<1, T>(queries, head_dim, keys, load, scales, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, a panel of 16 positions at a time. Returns `Q`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn scores_tile<const Q: usize, T: Copy>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; LANES]) -> float32x4_t,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) -> usize {
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: &[Four<T>] = keys.as_chunks().0.as_chunks().0;
    let scales: &[Four<f32>] = scales.as_chunks().0.as_chunks().0;
    for p in 0..PAGE / PANEL {
        let keys = &keys[p * head_dim..][..head_dim];
        let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; Q];
        for d in 0..head_dim {
            for i in 0..QUARTERS {
                let k = load(&keys[d][i]);
                for q in 0..Q {
                    acc[q][i] = vfmaq_n_f32(acc[q][i], k, queries[q][d]);
                }
            }
        }
        for q in 0..Q {
            let scores: &mut [Four<f32>] = scores[q * stride..][..PAGE].as_chunks_mut().0.as_chunks_mut().0;
            for i in 0..QUARTERS {
                store(vmulq_f32(acc[q][i], load_f32(&scales[p][i])), &mut scores[p][i]);
            }
        }
    }
    Q
}

#[target_feature(enable = "neon,dotprod")]
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
        KvSlice::Int8(values) => all_sums(weights, stride, ranges, values, |x| load_i8x4(x), width, out),
    }
}

#[target_feature(enable = "neon,dotprod")]
fn all_sums<T: Copy>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; LANES]) -> float32x4_t + Copy,
    width: usize,
    out: &mut [f32],
) {
    let n = ranges.len();
    let mut i = 0;
    while i < n {
        let (weights, ranges, out) = (&weights[i * stride..], &ranges[i..], &mut out[i * width..]);
        i += match n - i {
            6.. => sum_queries::<6, T>(weights, stride, ranges, values, load, width, out),
            4.. => sum_queries::<4, T>(weights, stride, ranges, values, load, width, out),
            2.. => sum_queries::<2, T>(weights, stride, ranges, values, load, width, out),
            _ => sum_queries::<1, T>(weights, stride, ranges, values, load, width, out),
        };
    }
}

/// `Q` queries: together where all of them look, each alone before and after. Returns `Q`.
#[target_feature(enable = "neon,dotprod")]
fn sum_queries<const Q: usize, T: Copy>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; LANES]) -> float32x4_t + Copy,
    width: usize,
    out: &mut [f32],
) -> usize {
    let common = portable::common(&ranges[..Q]);
    for q in 0..Q {
        let before = ranges[q].start..common.start.min(ranges[q].end);
        sum_columns::<1, T>(&weights[q * stride..], stride, before, values, load, width, &mut out[q * width..]);
    }
    sum_columns::<Q, T>(weights, stride, common.clone(), values, load, width, out);
    for q in 0..Q {
        let after = common.end.max(ranges[q].start)..ranges[q].end;
        sum_columns::<1, T>(&weights[q * stride..], stride, after, values, load, width, &mut out[q * width..]);
    }
    Q
}

/// `Q` queries and all columns, 16 at a time, over a range of positions.
#[target_feature(enable = "neon,dotprod")]
fn sum_columns<const Q: usize, T: Copy>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[T],
    load: impl Fn(&[T; LANES]) -> float32x4_t,
    width: usize,
    out: &mut [f32],
) {
    if positions.is_empty() {
        return;
    }
    let weights: [&[f32]; Q] = portable::rows(&weights[positions.start..], stride, positions.len());
    for column in (0..width).step_by(PANEL) {
        let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; Q];
        for q in 0..Q {
            let out: &[[f32; LANES]] = out[q * width + column..][..PANEL].as_chunks().0;
            (0..QUARTERS).for_each(|i| acc[q][i] = load_f32(&out[i]));
        }
        let rows = values[positions.start * width..].chunks_exact(width).take(positions.len());
        for (position, row) in rows.enumerate() {
            let row: &[[T; LANES]] = row[column..][..PANEL].as_chunks().0;
            for i in 0..QUARTERS {
                let value = load(&row[i]);
                for q in 0..Q {
                    acc[q][i] = vfmaq_n_f32(acc[q][i], value, weights[q][position]);
                }
            }
        }
        for q in 0..Q {
            let out: &mut [[f32; LANES]] = out[q * width + column..][..PANEL].as_chunks_mut().0;
            (0..QUARTERS).for_each(|i| store(acc[q][i], &mut out[i]));
        }
    }
}
