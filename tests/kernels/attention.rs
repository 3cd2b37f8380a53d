//! The two products of attention, over pages of keys and values.

use half::f16;
use nybble::kernels::{PAGE, available};
use nybble::quant::packed::PANEL;

use crate::support::*;

/// Below, at and above each tile of queries.
const QUERIES: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32];

#[test]
fn scores_have_the_bits_of_the_scalar_ones_and_touch_only_their_page() {
    let mut rng = Rng(40);
    for head_dim in [1, 16, 33, 64, 100, 128] {
        let keys = rng.halves(PAGE * head_dim);
        for n in QUERIES {
            let queries = rng.values(n * head_dim);
            let stride = PAGE + 5;
            let guard = f32::from_bits(0x7fc0_4321);
            let expected = {
                let mut scores = vec![guard; n * stride];
                scalar().scores(&queries, head_dim, &keys, 0.125, &mut scores, stride);
                scores
            };
            for kernel in available() {
                let what = format!("{}, {n} queries of {head_dim}", kernel.name());
                let mut scores = vec![guard; n * stride];
                kernel.scores(&queries, head_dim, &keys, 0.125, &mut scores, stride);
                assert_same(&scores, &expected, &what);
                for row in scores.chunks(stride) {
                    assert!(row[PAGE..].iter().all(|x| x.to_bits() == guard.to_bits()), "{what}: beyond the page");
                }
            }
        }
    }
}

#[test]
fn scores_are_dot_products_of_queries_with_keys_in_panels() {
    let mut rng = Rng(41);
    let (n, head_dim) = (3, 64);
    let (queries, keys) = (rng.values(n * head_dim), rng.halves(PAGE * head_dim));
    for kernel in available() {
        let mut scores = vec![f32::NAN; n * PAGE];
        kernel.scores(&queries, head_dim, &keys, 0.125, &mut scores, PAGE);
        for (i, score) in scores.iter().enumerate() {
            let (query, position) = (i / PAGE, i % PAGE);
            let terms = (0..head_dim).map(|d| {
                let key = keys[(position / PANEL * head_dim + d) * PANEL + position % PANEL];
                f64::from(key.to_f32()) * f64::from(queries[query * head_dim + d]) * 0.125
            });
            let magnitude: f64 = terms.clone().map(f64::abs).sum();
            assert_close(*score, terms.sum(), 1e-6 * magnitude, kernel.name());
        }
    }
}

/// Weights `(n, stride)`, counts and values of a page.
fn page(rng: &mut Rng, n: usize, width: usize) -> (Vec<f32>, Vec<usize>, Vec<f16>) {
    let counts = (0..n).map(|_| [0, 1, PAGE, rng.below(PAGE + 1)][rng.below(4)]).collect();
    (rng.values(n * (PAGE + 3)), counts, rng.halves(PAGE * width))
}

#[test]
fn weighted_sums_have_the_bits_of_the_scalar_ones() {
    let mut rng = Rng(42);
    for width in [16, 32, 48, 64, 80, 112, 128, 576] {
        for n in QUERIES {
            let (weights, counts, values) = page(&mut rng, n, width);
            for counts in [counts, vec![PAGE; n], (0..n).map(|i| 20 + i).collect()] {
                let before = rng.values(n * width);
                let mut expected = before.clone();
                scalar().weighted_sum(&weights, PAGE + 3, &counts, &values, width, &mut expected);
                for kernel in available() {
                    let mut out = before.clone();
                    kernel.weighted_sum(&weights, PAGE + 3, &counts, &values, width, &mut out);
                    assert_same(&out, &expected, format!("{}, {n} queries of {width}, {counts:?}", kernel.name()));
                }
            }
        }
    }
}

#[test]
fn weighted_sums_add_the_counted_rows_to_what_was_there() {
    let mut rng = Rng(43);
    let (n, width) = (5, 48);
    let (weights, counts, values) = page(&mut rng, n, width);
    let before = rng.values(n * width);
    for kernel in available() {
        let mut out = before.clone();
        kernel.weighted_sum(&weights, PAGE + 3, &counts, &values, width, &mut out);
        for (i, found) in out.iter().enumerate() {
            let (query, column) = (i / width, i % width);
            let terms = (0..counts[query])
                .map(|p| f64::from(weights[query * (PAGE + 3) + p]) * f64::from(values[p * width + column].to_f32()));
            let start = f64::from(before[i]);
            let magnitude: f64 = start.abs() + terms.clone().map(f64::abs).sum::<f64>();
            assert_close(*found, start + terms.sum::<f64>(), 1e-6 * magnitude, kernel.name());
        }
    }
}

#[test]
fn a_query_alone_has_the_bits_that_it_has_among_others() {
    let mut rng = Rng(44);
    let (n, head_dim) = (13, 64);
    let (weights, counts, values) = page(&mut rng, n, head_dim);
    let (queries, keys) = (rng.values(n * head_dim), rng.halves(PAGE * head_dim));
    for kernel in available() {
        let (mut scores, mut sums) = (vec![f32::NAN; n * PAGE], vec![0.0; n * head_dim]);
        kernel.scores(&queries, head_dim, &keys, 1.0, &mut scores, PAGE);
        kernel.weighted_sum(&weights, PAGE + 3, &counts, &values, head_dim, &mut sums);
        for i in 0..n {
            let (mut score, mut sum) = (vec![f32::NAN; PAGE], vec![0.0; head_dim]);
            kernel.scores(&queries[i * head_dim..][..head_dim], head_dim, &keys, 1.0, &mut score, PAGE);
            let weights = &weights[i * (PAGE + 3)..][..PAGE + 3];
            kernel.weighted_sum(weights, PAGE + 3, &counts[i..][..1], &values, head_dim, &mut sum);
            assert_same(&score, &scores[i * PAGE..][..PAGE], format!("{}, scores {i}", kernel.name()));
            assert_same(&sum, &sums[i * head_dim..][..head_dim], format!("{}, sums {i}", kernel.name()));
        }
    }
}

#[test]
fn values_beyond_a_count_are_never_read_into_a_sum() {
    // Positions that are not written yet may hold anything.
    let width = 64;
    for kernel in available() {
        let mut values = vec![f16::NAN; PAGE * width];
        values[..3 * width].fill(f16::ONE);
        let mut out = vec![0.5; 4 * width];
        let mut weights = vec![f32::NAN; 4 * PAGE];
        for row in weights.chunks_mut(PAGE) {
            row[..3].fill(2.0);
        }
        kernel.weighted_sum(&weights, PAGE, &[3, 0, 1, 2], &values, width, &mut out);
        for (row, expected) in out.chunks(width).zip([6.5, 0.5, 2.5, 4.5]) {
            assert_same(row, &vec![expected; width], kernel.name());
        }
    }
}
