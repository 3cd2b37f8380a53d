//! Attention over a page of the key/value cache.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{load_f16, load_f32, load_i8, store};
use crate::kernels::kv::KvSlice;
use crate::kernels::{PAGE, portable};
use crate::quant::packed::PANEL;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn widen(numbers: KvSlice<'_>, out: &mut [f32]) {
    let (chunks, tail) = out.as_chunks_mut::<PANEL>();
    let done = chunks.len() * PANEL;
    match numbers {
        KvSlice::F32(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| *out = *x),
        KvSlice::F16(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| store(load_f16(x), out)),
        KvSlice::Int8(x) => x.as_chunks().0.iter().zip(chunks).for_each(|(x, out)| store(load_i8(x), out)),
    }
    tail.iter_mut().enumerate().for_each(|(i, out)| *out = numbers.get(done + i));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_scores<T>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512 + Copy,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) {
    let n = queries.len() / head_dim.max(1);
    let mut i = 0;
    while i < n {
        let (queries, scores) = (&queries[i * head_dim..], &mut scores[i * stride..]);
        // Six queries are 24 sums, which with four registers of keys and a query are nearly all registers.
        i += match n - i {
            6.. => scores_tile::<6, T>(queries, head_dim, keys, load, scales, scores, stride),
            4.. => scores_tile::<4, T>(queries, head_dim, keys, load, scales, scores, stride),
            3 => scores_tile::<3, T>(queries, head_dim, keys, load, scales, scores, stride),
            2 => scores_tile::<2, T>(queries, head_dim, keys, load, scales, scores, stride),
            _ => scores_tile::<1, T>(queries, head_dim, keys, load, scales, scores, stride),
        };
    }
}

/// `Q` queries times the 64 keys of a page, four registers of 16 positions. Returns `Q`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn scores_tile<const Q: usize, T>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512,
    scales: &[f32; PAGE],
    scores: &mut [f32],
    stride: usize,
) -> usize {
    const PANELS: usize = PAGE / PANEL;
    let queries: [&[f32]; Q] = portable::rows(queries, head_dim, head_dim);
    let keys: [&[[T; PANEL]]; PANELS] = portable::rows(keys.as_chunks().0, head_dim, head_dim);
    let mut acc = [[_mm512_setzero_ps(); PANELS]; Q];
    for d in 0..head_dim {
        let k: [__m512; PANELS] = [load(&keys[0][d]), load(&keys[1][d]), load(&keys[2][d]), load(&keys[3][d])];
        for q in 0..Q {
            let x = _mm512_set1_ps(queries[q][d]);
            for p in 0..PANELS {
                acc[q][p] = _mm512_fmadd_ps(k[p], x, acc[q][p]);
            }
        }
    }
    let scales: &[[f32; PANEL]] = scales.as_chunks().0;
    for q in 0..Q {
        let scores: &mut [[f32; PANEL]] = scores[q * stride..][..PAGE].as_chunks_mut().0;
        for p in 0..PANELS {
            store(_mm512_mul_ps(acc[q][p], load_f32(&scales[p])), &mut scores[p]);
        }
    }
    Q
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn all_sums<T>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512 + Copy,
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
            3 => sum_queries::<3, T>(weights, stride, ranges, values, load, width, out),
            2 => sum_queries::<2, T>(weights, stride, ranges, values, load, width, out),
            _ => sum_queries::<1, T>(weights, stride, ranges, values, load, width, out),
        };
    }
}

/// `Q` queries: together where all of them look, each alone before and after. Returns `Q`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_queries<const Q: usize, T>(
    weights: &[f32],
    stride: usize,
    ranges: &[Range<usize>],
    values: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512 + Copy,
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_columns<const Q: usize, T>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512 + Copy,
    width: usize,
    out: &mut [f32],
) {
    if positions.is_empty() {
        return;
    }
    let mut column = 0;
    while column < width {
        column += match width - column {
            64.. => sum_tile::<Q, 4, T>(weights, stride, positions.clone(), values, load, width, column, out),
            32.. => sum_tile::<Q, 2, T>(weights, stride, positions.clone(), values, load, width, column, out),
            _ => sum_tile::<Q, 1, T>(weights, stride, positions.clone(), values, load, width, column, out),
        };
    }
}

/// `Q` queries, `16 * V` columns. Returns `16 * V`.
#[inline]
#[allow(clippy::too_many_arguments, reason = "a tile of what its caller has")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sum_tile<const Q: usize, const V: usize, T>(
    weights: &[f32],
    stride: usize,
    positions: Range<usize>,
    values: &[T],
    load: impl Fn(&[T; PANEL]) -> __m512,
    width: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    let weights: [&[f32]; Q] = portable::rows(&weights[positions.start..], stride, positions.len());
    let mut acc = [[_mm512_setzero_ps(); V]; Q];
    for q in 0..Q {
        let out: &[[f32; PANEL]] = out[q * width + column..][..V * PANEL].as_chunks().0;
        for v in 0..V {
            acc[q][v] = load_f32(&out[v]);
        }
    }
    let rows = values[positions.start * width..].chunks_exact(width).take(positions.len());
    for (i, row) in rows.enumerate() {
        let row: &[[T; PANEL]] = row[column..][..V * PANEL].as_chunks().0;
        let mut value = [_mm512_setzero_ps(); V];
        for v in 0..V {
            value[v] = load(&row[v]);
        }
        for q in 0..Q {
            let weight = _mm512_set1_ps(weights[q][i]);
            for v in 0..V {
                acc[q][v] = _mm512_fmadd_ps(value[v], weight, acc[q][v]);
            }
        }
    }
    for q in 0..Q {
        let out: &mut [[f32; PANEL]] = out[q * width + column..][..V * PANEL].as_chunks_mut().0;
        for v in 0..V {
            store(acc[q][v], &mut out[v]);
        }
    }
    V * PANEL
}
