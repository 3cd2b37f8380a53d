//! Attention over an INT8 cache: codes of queries and weights, packed pages, and products of integers.

use std::ops::Range;

use nybble::kernels::{
    INT8_GROUP, Int8Queries, Int8ScoreInputs, Int8WeightedValues, Int8Weights, Kernel, PAGE, available,
};
use nybble::quant::packed::{CacheLine, PANEL};

use crate::support::*;

/// Numbers of queries below, at and above each tile size.
const QUERIES: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 32];
const STRIDE: usize = PAGE + 3;

/// Codes of the whole range, with many at its ends.
fn codes(rng: &mut Rng, n: usize) -> Vec<i8> {
    let code = |rng: &mut Rng| match rng.below(4) {
        0 => [-128, -127, 127, 0][rng.below(4)],
        _ => rng.next() as i8,
    };
    (0..n).map(|_| code(rng)).collect()
}

/// Quantized queries.
struct Queries {
    head_dim: usize,
    count: usize,
    /// `(head_dim / 4, n)`, rounded up.
    codes: Vec<[i8; 4]>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl Queries {
    fn of(kernel: &Kernel, queries: &[f32], head_dim: usize) -> Queries {
        let (quads, groups, count) = (head_dim.div_ceil(4), head_dim.div_ceil(INT8_GROUP), queries.len() / head_dim);
        let mut all = Queries {
            head_dim,
            count,
            codes: vec![[99; 4]; count * quads],
            scales: vec![f32::NAN; count * groups],
            sums: vec![i32::MIN; count * groups],
        };
        let groups = all.scales.chunks_mut(groups).zip(all.sums.chunks_mut(groups));
        for (i, (query, (scales, sums))) in queries.chunks(head_dim).zip(groups).enumerate() {
            let mut codes = vec![[0; 4]; quads];
            let groups = codes.as_flattened_mut().chunks_mut(INT8_GROUP).zip(scales.iter_mut().zip(sums));
            for (x, (codes, (scale, sum))) in query.chunks(INT8_GROUP).zip(groups) {
                *scale = kernel.to_int8(x, &mut codes[..x.len()]);
                *sum = codes.iter().map(|code| i32::from(*code)).sum();
            }
            codes.into_iter().enumerate().for_each(|(d, code)| all.codes[d * count + i] = code);
        }
        all
    }

    /// The codes of query `i`, with those beyond its end.
    fn codes(&self, i: usize) -> Vec<i8> {
        self.codes[i..].iter().step_by(self.count).flatten().copied().collect()
    }

    fn range(&self, queries: Range<usize>) -> Int8Queries<'_> {
        let groups = self.head_dim.div_ceil(INT8_GROUP);
        let of_groups = queries.start * groups..queries.end * groups;
        Int8Queries {
            head_dim: self.head_dim,
            codes: &self.codes[queries.start..],
            stride: self.count,
            scales: &self.scales[of_groups.clone()],
            sums: &self.sums[of_groups],
        }
    }
}

fn packed_keys(kernel: &Kernel, keys: &[i8], head_dim: usize) -> Vec<CacheLine> {
    let mut lines = vec![CacheLine([0x5a; 64]); PAGE / PANEL * head_dim.div_ceil(4)];
    kernel.pack_keys(keys, head_dim, &mut lines);
    lines
}

fn packed_values(kernel: &Kernel, values: &[i8], width: usize) -> Vec<CacheLine> {
    let mut lines = vec![CacheLine([0x5a; 64]); width / PANEL * (PAGE / 4 + 1)];
    kernel.pack_values(values, width, &mut lines);
    lines
}

/// All that attention over a page of an INT8 cache takes.
pub(crate) struct Int8Case<'a> {
    pub(crate) head_dim: usize,
    /// `(n, head_dim)`
    pub(crate) queries: &'a [f32],
    pub(crate) keys: &'a [i8],
    pub(crate) key_scales: &'a [f32],
    /// `(n, stride)`, none of them negative.
    pub(crate) weights: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) seen: &'a [Range<usize>],
    pub(crate) values: &'a [i8],
    pub(crate) value_scales: &'a [f32],
}

impl Int8Case<'_> {
    pub(crate) fn compute(&self, kernel: &Kernel, scores: &mut [f32], out: &mut [f32]) {
        let (n, width) = (self.seen.len(), self.values.len() / PAGE);
        let (queries, keys) =
            (Queries::of(kernel, self.queries, self.head_dim), packed_keys(kernel, self.keys, self.head_dim));
        let inputs = Int8ScoreInputs { queries: queries.range(0..n), keys: &keys, scales: self.key_scales };
        kernel.scores_int8(inputs, scores, self.stride);
        let (weights, scales) = quantized(kernel, self.weights, self.stride, self.seen, self.value_scales);
        let values = packed_values(kernel, self.values, width);
        let inputs = Int8WeightedValues { weights: &weights, scales: &scales, values: &values, width };
        kernel.weighted_sum_int8(inputs, out);
    }
}

#[test]
fn scores_match_the_scalar_kernel_alone_and_in_a_batch() {
    let mut rng = Rng(61);
    for head_dim in [1usize, 16, 33, 64, 72, 100, 128, 256] {
        let groups = head_dim.div_ceil(INT8_GROUP);
        let (keys, scales) = (codes(&mut rng, PAGE * head_dim), rng.values(groups * PAGE));
        for n in QUERIES {
            let queries = Queries::of(scalar(), &rng.values(n * head_dim), head_dim);
            let guard = f32::from_bits(0x7fc0_4321);
            let scores = |kernel: &Kernel, queries: Int8Queries<'_>, n: usize| {
                let mut scores = vec![guard; n * STRIDE];
                let lines = packed_keys(kernel, &keys, head_dim);
                kernel.scores_int8(Int8ScoreInputs { queries, keys: &lines, scales: &scales }, &mut scores, STRIDE);
                scores
            };
            let expected = scores(scalar(), queries.range(0..n), n);
            for kernel in available() {
                let what = format!("{}, {n} queries of {head_dim}", kernel.name());
                assert_same(&scores(kernel, queries.range(0..n), n), &expected, &what);
                let alone = scores(kernel, queries.range(n - 1..n), 1);
                assert_same(&alone, &expected[(n - 1) * STRIDE..], format!("{what}: the last alone"));
            }
        }
    }
}

#[test]
fn scores_are_dot_products_of_queries_and_keys() {
    let mut rng = Rng(62);
    let (n, head_dim) = (3, 72usize);
    let groups = head_dim.div_ceil(INT8_GROUP);
    let (keys, scales) = (codes(&mut rng, PAGE * head_dim), rng.values(groups * PAGE));
    let queries = Queries::of(scalar(), &rng.values(n * head_dim), head_dim);
    for kernel in available() {
        let (mut scores, lines) = (vec![f32::NAN; n * PAGE], packed_keys(kernel, &keys, head_dim));
        let inputs = Int8ScoreInputs { queries: queries.range(0..n), keys: &lines, scales: &scales };
        kernel.scores_int8(inputs, &mut scores, PAGE);
        for (i, score) in scores.iter().enumerate() {
            let (query, position) = (i / PAGE, i % PAGE);
            let terms = (0..head_dim).map(|d| {
                let group = d / INT8_GROUP;
                let query = f64::from(queries.codes(query)[d]) * f64::from(queries.scales[query * groups + group]);
                let key = f64::from(keys[(position / PANEL * head_dim + d) * PANEL + position % PANEL].max(-127));
                query * key * f64::from(scales[group * PAGE + position])
            });
            let magnitude: f64 = terms.clone().map(f64::abs).sum();
            assert_close(*score, terms.sum(), 1e-6 * magnitude, kernel.name());
        }
    }
}

/// What queries see of a page: all, nothing, a beginning or a middle.
fn ranges(rng: &mut Rng, n: usize) -> Vec<Range<usize>> {
    let range = |_| {
        let end = [0, 1, PAGE, rng.below(PAGE + 1)][rng.below(4)];
        [0, end, rng.below(end + 1)][rng.below(3)]..end
    };
    (0..n).map(range).collect()
}

/// Quantized weights: codes `(groups, n, PAGE)` and factors `(groups, n)`.
fn quantized(
    kernel: &Kernel,
    weights: &[f32],
    stride: usize,
    seen: &[Range<usize>],
    scales: &[f32],
) -> (Vec<u8>, Vec<f32>) {
    let n = seen.len();
    let (mut codes, mut factors) = (vec![99u8; n * scales.len()], vec![7.0; n * scales.len() / PAGE]);
    kernel.quantize_weights(Int8Weights { weights, stride, seen, scales }, &mut codes, &mut factors);
    (codes, factors)
}

/// The code of a weight of 0.
fn zero_weight(kernel: &Kernel) -> u8 {
    let (mut codes, mut factor) = ([7; PAGE], [7.0]);
    let (seen, scales) = (std::slice::from_ref(&(0..PAGE)), &[1.0; PAGE]);
    let inputs = Int8Weights { weights: &[0.0; PAGE], stride: PAGE, seen, scales };
    kernel.quantize_weights(inputs, &mut codes, &mut factor);
    assert!(factor == [0.0] && codes.iter().all(|code| *code == codes[0]) && [0, 128].contains(&codes[0]));
    codes[0]
}

/// Where the code of a position is in a page: bytes of a lane are those of four positions 16 apart.
fn place(position: usize) -> usize {
    position % PANEL * 4 + position / PANEL
}

#[test]
fn weights_become_codes_that_include_the_scales_of_the_values() {
    let mut rng = Rng(63);
    for groups in [1, 2, 3, 8] {
        let n = 12;
        let mut scales: Vec<f32> = (0..groups * PAGE).map(|_| rng.unit().abs()).collect();
        // A negative scale, which only a forged file has.
        scales[(groups - 1) * PAGE + 5] *= if groups > 1 { -1.0 } else { 1.0 };
        let mut weights: Vec<f32> = (0..n * STRIDE).map(|_| rng.unit().abs()).collect();
        weights[..STRIDE].fill(0.0);
        let seen = ranges(&mut rng, n);
        let (codes, factors) = quantized(scalar(), &weights, STRIDE, &seen, &scales);
        for kernel in available() {
            let (found, found_factors) = quantized(kernel, &weights, STRIDE, &seen, &scales);
            let zero = zero_weight(kernel);
            assert!(found.iter().zip(&codes).all(|(found, code)| found ^ zero == *code), "{}", kernel.name());
            assert_same(&found_factors, &factors, kernel.name());
        }
        for (i, factor) in factors.iter().enumerate() {
            let (group, seen) = (i / n, &seen[i % n]);
            for position in 0..PAGE {
                let code = codes[i * PAGE + place(position)];
                let exact = weights[i % n * STRIDE + position] * scales[group * PAGE + position];
                if !seen.contains(&position) {
                    assert_eq!(code, 0);
                } else if group + 1 < groups || groups == 1 {
                    let error = (f64::from(exact) - f64::from(code) * f64::from(*factor)).abs();
                    assert!(error <= f64::from(*factor) * 0.5001, "{exact} {code} {factor}");
                }
            }
        }
    }
}

#[test]
fn weights_that_are_not_finite_make_the_factor_nan_only_where_they_are_seen() {
    let mut rng = Rng(64);
    let mut scales: Vec<f32> = (0..PAGE).map(|_| rng.unit().abs()).collect();
    let mut weights: Vec<f32> = (0..2 * STRIDE).map(|_| rng.unit().abs()).collect();
    weights[9] = f32::NAN;
    weights[STRIDE + 9] = f32::INFINITY;
    // The scale of a value that is not finite.
    scales[40] = f32::NAN;
    for kernel in available() {
        for (seen, is_nan) in [(0..9, false), (0..10, true), (10..40, false), (10..PAGE, true), (41..PAGE, false)] {
            let (codes, factors) = quantized(kernel, &weights, STRIDE, &[seen.clone(), seen.clone()], &scales);
            assert!(factors.iter().all(|factor| factor.is_nan() == is_nan), "{}, {seen:?}: {factors:?}", kernel.name());
            assert_eq!(codes.iter().all(|code| *code == zero_weight(kernel)), is_nan);
        }
    }
}

#[test]
fn weighted_sums_match_the_scalar_kernel_alone_and_in_a_batch() {
    let mut rng = Rng(65);
    for width in [16usize, 32, 48, 64, 80, 112, 128, 256] {
        let groups = width.div_ceil(INT8_GROUP);
        let values = codes(&mut rng, PAGE * width);
        for n in QUERIES {
            let weights: Vec<u8> = (0..n * groups * PAGE).map(|_| rng.next() as u8).collect();
            let (factors, before) = (rng.values(groups * n), rng.values(n * width));
            let sums = |kernel: &Kernel, queries: Range<usize>| {
                let flip = zero_weight(kernel);
                let lines = packed_values(kernel, &values, width);
                let rows = |row: usize| {
                    (0..groups).flat_map(move |g| (g * n + queries.start) * row..(g * n + queries.end) * row)
                };
                let (queries, rows) = (queries.clone(), rows);
                let weights: Vec<u8> = rows(PAGE).map(|i| weights[i] ^ flip).collect();
                let scales: Vec<f32> = rows(1).map(|i| factors[i]).collect();
                let mut out = before[queries.start * width..queries.end * width].to_vec();
                let inputs = Int8WeightedValues { weights: &weights, scales: &scales, values: &lines, width };
                kernel.weighted_sum_int8(inputs, &mut out);
                out
            };
            let expected = sums(scalar(), 0..n);
            for kernel in available() {
                let what = format!("{}, {n} queries of {width}", kernel.name());
                assert_same(&sums(kernel, 0..n), &expected, &what);
                assert_same(&sums(kernel, n - 1..n), &expected[(n - 1) * width..], format!("{what}: the last alone"));
            }
            for (i, found) in expected.iter().enumerate() {
                let (query, column) = (i / width, i % width);
                let at = column / INT8_GROUP * n + query;
                let term = |p: usize| {
                    let weight = weights[at * PAGE + place(p)];
                    i32::from(weight) * i32::from(values[p * width + column].max(-127))
                };
                let dot = f64::from((0..PAGE).map(term).sum::<i32>());
                let (sum, start) = (dot * f64::from(factors[at]), f64::from(before[i]));
                assert_close(*found, start + sum, 1e-6 * (start.abs() + sum.abs()), "the scalar kernel");
            }
        }
    }
}
