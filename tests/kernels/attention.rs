//! Attention: scores and weighted sums over pages of keys and values, and the join of partial results.

use std::ops::Range;

use half::f16;
use nybble::kernels::{KvSlice, PAGE, ScoreInputs, Softmax, SoftmaxMut, WeightedValues, available};
use nybble::quant::packed::PANEL;

use crate::support::*;

/// Numbers of queries below, at and above each tile size.
const QUERIES: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32];
const STRIDE: usize = PAGE + 3;

/// Keys or values of every type.
struct Stored {
    f32: Vec<f32>,
    f16: Vec<f16>,
}

impl Stored {
    fn random(rng: &mut Rng, n: usize) -> Stored {
        Stored { f32: rng.values(n), f16: rng.halves(n) }
    }

    fn all(&self) -> [(&'static str, KvSlice<'_>); 2] {
        [("f32", KvSlice::F32(&self.f32)), ("f16", KvSlice::F16(&self.f16))]
    }
}

/// The number at index `i`.
fn get(numbers: KvSlice<'_>, i: usize) -> f64 {
    match numbers {
        KvSlice::F32(x) => f64::from(x[i]),
        KvSlice::F16(x) => f64::from(x[i].to_f32()),
    }
}

/// A factor of scores.
const SCALE: f32 = 0.3;

#[test]
fn scores_match_the_scalar_kernel_and_write_only_their_page() {
    let mut rng = Rng(40);
    for head_dim in [1, 16, 33, 64, 100, 128] {
        let keys = Stored::random(&mut rng, PAGE * head_dim);
        for n in QUERIES {
            let queries = rng.values(n * head_dim);
            let guard = f32::from_bits(0x7fc0_4321);
            for (stored, keys) in keys.all() {
                let inputs = ScoreInputs { queries: &queries, head_dim, keys, scale: SCALE };
                let mut expected = vec![guard; n * STRIDE];
                scalar().scores(inputs, &mut expected, STRIDE);
                for kernel in available() {
                    let what = format!("{}, {n} queries of {head_dim}, {stored}", kernel.name());
                    let mut scores = vec![guard; n * STRIDE];
                    kernel.scores(inputs, &mut scores, STRIDE);
                    assert_same(&scores, &expected, &what);
                    for row in scores.chunks(STRIDE) {
                        assert!(row[PAGE..].iter().all(|x| x.to_bits() == guard.to_bits()), "{what}: beyond the page");
                    }
                }
            }
        }
    }
}

#[test]
fn scores_are_dot_products_of_queries_and_keys() {
    let mut rng = Rng(41);
    let (n, head_dim) = (3, 64);
    let (queries, keys) = (rng.values(n * head_dim), Stored::random(&mut rng, PAGE * head_dim));
    for kernel in available() {
        for (stored, keys) in keys.all() {
            let mut scores = vec![f32::NAN; n * PAGE];
            kernel.scores(ScoreInputs { queries: &queries, head_dim, keys, scale: SCALE }, &mut scores, PAGE);
            for (i, score) in scores.iter().enumerate() {
                let (query, position) = (i / PAGE, i % PAGE);
                let terms = (0..head_dim).map(|d| {
                    let key = get(keys, (position / PANEL * head_dim + d) * PANEL + position % PANEL);
                    key * f64::from(queries[query * head_dim + d]) * f64::from(SCALE)
                });
                let magnitude: f64 = terms.clone().map(f64::abs).sum();
                assert_close(*score, terms.sum(), 1e-6 * magnitude, format!("{}, {stored}", kernel.name()));
            }
        }
    }
}

/// Weights `(n, STRIDE)`, visible positions and values of a page.
fn page(rng: &mut Rng, n: usize, width: usize) -> (Vec<f32>, Vec<Range<usize>>, Stored) {
    let range = |_| {
        let end = [0, 1, PAGE, rng.below(PAGE + 1)][rng.below(4)];
        [0, end, rng.below(end + 1)][rng.below(3)]..end
    };
    let ranges = (0..n).map(range).collect();
    (rng.values(n * STRIDE), ranges, Stored::random(rng, PAGE * width))
}

/// A page, and numbers of its queries.
#[allow(clippy::type_complexity, reason = "taken apart at once")]
fn case(seed: u64, n: usize, width: usize) -> ((Vec<f32>, Vec<Range<usize>>, Stored), Vec<f32>) {
    let mut rng = Rng(seed);
    (page(&mut rng, n, width), rng.values(n * width))
}

#[test]
fn weighted_sums_match_the_scalar_kernel() {
    let mut rng = Rng(42);
    for width in [16, 32, 48, 64, 80, 112, 128, 576] {
        for n in QUERIES {
            let (weights, ranges, values) = page(&mut rng, n, width);
            let growing = (0..n).map(|i| i / 2..20 + i).collect();
            for ranges in [ranges, vec![0..PAGE; n], growing] {
                let before = rng.values(n * width);
                for (stored, values) in values.all() {
                    let weights = &weights;
                    let inputs = WeightedValues { weights, stride: STRIDE, ranges: &ranges, values, width };
                    let mut expected = before.clone();
                    scalar().weighted_sum(inputs, &mut expected);
                    for kernel in available() {
                        let mut out = before.clone();
                        kernel.weighted_sum(inputs, &mut out);
                        let what = format!("{}, {n} queries of {width}, {stored}, {ranges:?}", kernel.name());
                        assert_same(&out, &expected, what);
                    }
                }
            }
        }
    }
}

#[test]
fn weighted_sums_are_added_to_the_output() {
    let (n, width) = (5, 48);
    let ((weights, ranges, values), before) = case(43, n, width);
    for kernel in available() {
        for (stored, values) in values.all() {
            let mut out = before.clone();
            let ranges = &ranges;
            let inputs = WeightedValues { weights: &weights, stride: STRIDE, ranges, values, width };
            kernel.weighted_sum(inputs, &mut out);
            for (i, found) in out.iter().enumerate() {
                let (query, column) = (i / width, i % width);
                let term = |p| f64::from(weights[query * STRIDE + p]) * get(values, p * width + column);
                let terms = ranges[query].clone().map(term);
                let start = f64::from(before[i]);
                let magnitude: f64 = start.abs() + terms.clone().map(f64::abs).sum::<f64>();
                let what = format!("{}, {stored}", kernel.name());
                assert_close(*found, start + terms.sum::<f64>(), 1e-6 * magnitude, what);
            }
        }
    }
}

#[test]
fn a_query_alone_gives_the_same_bits_as_in_a_batch() {
    let (n, head_dim) = (13, 64);
    let ((weights, ranges, values), queries) = case(44, n, head_dim);
    for (stored, page) in values.all() {
        for kernel in available() {
            let (mut scores, mut sums) = (vec![f32::NAN; n * PAGE], vec![0.0; n * head_dim]);
            let inputs = ScoreInputs { queries: &queries, head_dim, keys: page, scale: SCALE };
            kernel.scores(inputs, &mut scores, PAGE);
            let (ranges, stride, width) = (&ranges[..], STRIDE, head_dim);
            let values = WeightedValues { weights: &weights, stride, ranges, values: page, width };
            kernel.weighted_sum(values, &mut sums);
            for i in 0..n {
                let (mut score, mut sum) = (vec![f32::NAN; PAGE], vec![0.0; head_dim]);
                let own = &queries[i * head_dim..][..head_dim];
                kernel.scores(ScoreInputs { queries: own, ..inputs }, &mut score, PAGE);
                let weights = &weights[i * STRIDE..][..STRIDE];
                let alone = WeightedValues { weights, ranges: &ranges[i..][..1], ..values };
                kernel.weighted_sum(alone, &mut sum);
                let what = format!("{}, {stored}, query {i}", kernel.name());
                assert_same(&score, &scores[i * PAGE..][..PAGE], format!("{what}: scores"));
                assert_same(&sum, &sums[i * head_dim..][..head_dim], format!("{what}: sums"));
            }
        }
    }
}

#[test]
fn widened_numbers_are_exact_and_give_the_same_bits() {
    let mut rng = Rng(45);
    let (n, head_dim) = (7, 40);
    let queries = rng.values(n * head_dim);
    for kernel in available() {
        for count in [PAGE * head_dim, 1, 15, 16, 33] {
            let numbers = Stored::random(&mut rng, count);
            for (stored, numbers) in numbers.all() {
                let mut wide = vec![f32::NAN; count];
                kernel.widen(numbers, &mut wide);
                let what = format!("{}, {stored}", kernel.name());
                assert!(wide.iter().enumerate().all(|(i, x)| f64::from(*x) == get(numbers, i)), "{what}");
                if count == PAGE * head_dim {
                    let mut scores = [vec![f32::NAN; n * PAGE], vec![f32::NAN; n * PAGE]];
                    let inputs = ScoreInputs { queries: &queries, head_dim, keys: numbers, scale: SCALE };
                    kernel.scores(inputs, &mut scores[0], PAGE);
                    kernel.scores(ScoreInputs { keys: KvSlice::F32(&wide), ..inputs }, &mut scores[1], PAGE);
                    assert_same(&scores[0], &scores[1], what);
                }
            }
        }
    }
}

#[test]
fn values_outside_the_range_of_a_query_do_not_affect_its_sum() {
    // Positions that are not written yet may hold any bits.
    let width = 64;
    for kernel in available() {
        let mut values = vec![f16::NAN; PAGE * width];
        values[..3 * width].fill(f16::ONE);
        let mut out = vec![0.5; 5 * width];
        let mut weights = vec![f32::NAN; 5 * PAGE];
        for row in weights.chunks_mut(PAGE) {
            row[..3].fill(2.0);
        }
        let ranges = [0..3, 0..0, 0..1, 0..2, 1..3];
        let (values, weights) = (KvSlice::F16(&values), &weights);
        let inputs = WeightedValues { weights, stride: PAGE, ranges: &ranges, values, width };
        kernel.weighted_sum(inputs, &mut out);
        for (row, expected) in out.chunks(width).zip([6.5, 0.5, 2.5, 4.5, 4.5]) {
            assert_same(row, &vec![expected; width], kernel.name());
        }
    }
}

#[test]
fn joined_sums_equal_sums_over_all_positions() {
    let mut rng = Rng(46);
    let (n, width) = (19, 48);
    let none = f32::NEG_INFINITY;
    let (mut max, mut more_max) = (rng.values(n), rng.values(n));
    let (mut sum, mut more_sum) = (rng.values(n), rng.values(n));
    let (mut values, mut more_values) = (rng.values(n * width), rng.values(n * width));
    // No positions before, none now, none at all.
    for (q, before, now) in [(3, false, true), (4, true, false), (5, false, false)] {
        for (seen, max, sum, values) in
            [(before, &mut max, &mut sum, &mut values), (now, &mut more_max, &mut more_sum, &mut more_values)]
        {
            if !seen {
                (max[q], sum[q]) = (none, 0.0);
                values[q * width..][..width].fill(0.0);
            }
        }
    }
    for kernel in available() {
        let (mut max, mut sum, mut values) = (max.clone(), sum.clone(), values.clone());
        let before = (max.clone(), sum.clone(), values.clone());
        let so_far = SoftmaxMut { max: &mut max, sum: &mut sum, values: &mut values };
        kernel.join(so_far, Softmax { max: &more_max, sum: &more_sum, values: &more_values });
        for q in 0..n {
            let joined = before.0[q].max(more_max[q]);
            assert_eq!(max[q], joined);
            let factor = |max: f32| if max == none { 0.0 } else { libm::exp(f64::from(max) - f64::from(joined)) };
            let (a, b) = (factor(before.0[q]), factor(more_max[q]));
            let check = |found: f32, x: f32, y: f32| {
                let (x, y) = (f64::from(x) * a, f64::from(y) * b);
                assert_close(found, x + y, 1e-6 * (x.abs() + y.abs()) + 1e-35, format!("{}, query {q}", kernel.name()));
            };
            check(sum[q], before.1[q], more_sum[q]);
            for i in q * width..(q + 1) * width {
                check(values[i], before.2[i], more_values[i]);
            }
        }
    }
}

#[test]
fn joined_sums_match_the_scalar_kernel_alone_and_in_a_batch() {
    let mut rng = Rng(47);
    let width = 32;
    for n in [1, 15, 16, 17, 40] {
        let start: [Vec<f32>; 3] = [rng.values(n), rng.values(n), rng.values(n * width)];
        let more: [Vec<f32>; 3] = [rng.values(n), rng.values(n), rng.values(n * width)];
        let joined = |kernel: &nybble::kernels::Kernel, queries: Range<usize>| {
            let part = |x: &[f32], width: usize| x[queries.start * width..queries.end * width].to_vec();
            let [mut max, mut sum, mut values] = [part(&start[0], 1), part(&start[1], 1), part(&start[2], width)];
            let more = [part(&more[0], 1), part(&more[1], 1), part(&more[2], width)];
            let so_far = SoftmaxMut { max: &mut max, sum: &mut sum, values: &mut values };
            kernel.join(so_far, Softmax { max: &more[0], sum: &more[1], values: &more[2] });
            [max, sum, values].concat()
        };
        let expected = joined(scalar(), 0..n);
        for kernel in available() {
            assert_same(&joined(kernel, 0..n), &expected, format!("{}, {n}", kernel.name()));
            let alone = joined(kernel, n - 1..n);
            let width = expected.len() / n - 2;
            assert_same(&alone[2..], &expected[expected.len() - width..], format!("{}, last of {n}", kernel.name()));
        }
    }
}
