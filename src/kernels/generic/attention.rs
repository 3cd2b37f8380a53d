//! Attention over a page of a KV cache of floats.
//!
//! Both operations work in tiles: the keys or values of `P` panels, loaded once for `Q` queries, whose sums stay in
//! registers.

use std::ops::Range;

use super::vector::{Number, Vector, add_products, rows};
use crate::kernels::kv::{KvSlice, PAGE, ScoreInputs, WeightedValues};
use crate::quant::packed::PANEL;

/// Panels in a page.
pub(super) const PANELS: usize = PAGE / PANEL;

#[inline(always)]
pub(in crate::kernels) fn scores<V: Vector>(v: V, inputs: ScoreInputs<'_>, scores: &mut [f32], stride: usize) {
    let n = inputs.queries.len() / inputs.head_dim.max(1);
    match inputs.keys {
        KvSlice::F32(keys) => over_tiles(&mut Scores { v, inputs, keys, scores, stride }, n),
        KvSlice::F16(keys) => over_tiles(&mut Scores { v, inputs, keys, scores, stride }, n),
    }
}

#[inline(always)]
pub(in crate::kernels) fn weighted_sum<V: Vector>(v: V, inputs: WeightedValues<'_>, out: &mut [f32]) {
    let n = inputs.ranges.len();
    match inputs.values {
        KvSlice::F32(values) => over_tiles(&mut Sums { v, inputs, values, out }, n),
        KvSlice::F16(values) => over_tiles(&mut Sums { v, inputs, values, out }, n),
    }
}

/// Work that is done for `Q` queries and `P` panels at a time.
pub(super) trait Tiles {
    type Vector: Vector;

    /// Does the work for the `Q` queries from `first` on, and returns `Q`.
    fn tile<const Q: usize, const P: usize>(&mut self, first: usize) -> usize;
}

/// Does the work for `n` queries.
#[inline(always)]
pub(super) fn over_tiles<T: Tiles>(work: &mut T, n: usize) {
    // With many registers 24 sums, four keys and a query are nearly all of them. With few, at least four sums of two
    // registers or more hide the latency of FMA, and six leave registers for the keys and a query.
    let many = T::Vector::CAPACITY >= 32;
    let mut i = 0;
    while i < n {
        i += match n - i {
            6.. if many => work.tile::<6, 4>(i),
            6.. => work.tile::<6, 1>(i),
            4.. if many => work.tile::<4, 4>(i),
            4.. => work.tile::<4, 1>(i),
            3 if many => work.tile::<3, 4>(i),
            3 => work.tile::<3, 2>(i),
            2 if many => work.tile::<2, 4>(i),
            2 => work.tile::<2, 2>(i),
            _ => work.tile::<1, 4>(i),
        };
    }
}

/// Dot products of queries and the keys of a page.
struct Scores<'a, V, T> {
    v: V,
    inputs: ScoreInputs<'a>,
    /// The keys, by type: `(PANELS, head_dim, PANEL)`.
    keys: &'a [T],
    /// `(n, stride)`
    scores: &'a mut [f32],
    stride: usize,
}

impl<V: Vector, T: Number> Tiles for Scores<'_, V, T> {
    type Vector = V;

    #[inline(always)]
    fn tile<const Q: usize, const P: usize>(&mut self, first: usize) -> usize {
        let (v, head_dim) = (self.v, self.inputs.head_dim);
        let queries: [&[f32]; Q] = rows(&self.inputs.queries[first * head_dim..], head_dim, head_dim);
        let keys: &[[T; PANEL]] = self.keys.as_chunks().0;
        let scale = v.splat(self.inputs.scale);
        for panel in (0..PANELS).step_by(P) {
            let keys: [&[[T; PANEL]]; P] = rows(&keys[panel * head_dim..], head_dim, head_dim);
            let mut sums = [[v.zeros(); P]; Q];
            for d in 0..head_dim {
                add_products(v, |p| &keys[p][d], |q| queries[q][d], &mut sums);
            }
            for q in 0..Q {
                let scores = &mut self.scores[(first + q) * self.stride..][..PAGE];
                let scores: &mut [[f32; PANEL]] = scores.as_chunks_mut().0;
                for p in 0..P {
                    for part in 0..V::PARTS {
                        v.store(v.mul(sums[q][p][part], scale), &mut scores[panel + p], part);
                    }
                }
            }
        }
        Q
    }
}

/// Sums of a page's values, weighted per query.
struct Sums<'a, V, T> {
    v: V,
    inputs: WeightedValues<'a>,
    /// The values, by type: `(PAGE, width)`.
    values: &'a [T],
    /// `(n, width)`
    out: &'a mut [f32],
}

impl<V: Vector, T: Number> Tiles for Sums<'_, V, T> {
    type Vector = V;

    /// Sums the positions that all `Q` queries see together, and those before and after one query at a time.
    #[inline(always)]
    fn tile<const Q: usize, const P: usize>(&mut self, first: usize) -> usize {
        let ranges = &self.inputs.ranges[first..first + Q];
        let common = common(ranges);
        for (q, range) in ranges.iter().enumerate() {
            self.columns::<1, 4>(first + q, range.start..common.start.min(range.end));
        }
        self.columns::<Q, P>(first, common.clone());
        for (q, range) in ranges.iter().enumerate() {
            self.columns::<1, 4>(first + q, common.end.max(range.start)..range.end);
        }
        Q
    }
}

impl<V: Vector, T: Number> Sums<'_, V, T> {
    /// Adds the values at `positions` for the `Q` queries from `first` on, `P` panels of columns at a time.
    #[inline(always)]
    fn columns<const Q: usize, const P: usize>(&mut self, first: usize, positions: Range<usize>) {
        if positions.is_empty() {
            return;
        }
        let WeightedValues { weights, stride, width, .. } = self.inputs;
        let weights: [&[f32]; Q] = rows(&weights[first * stride + positions.start..], stride, positions.len());
        let mut column = 0;
        while column < width {
            column += match width - column {
                left if left >= P * PANEL => self.sum::<Q, P>(first, positions.clone(), column, &weights),
                left if P > 2 && left >= 2 * PANEL => self.sum::<Q, 2>(first, positions.clone(), column, &weights),
                _ => self.sum::<Q, 1>(first, positions.clone(), column, &weights),
            };
        }
    }

    /// Does so for the `P` panels from `column` on, and returns their number of columns.
    #[inline(always)]
    fn sum<const Q: usize, const P: usize>(
        &mut self,
        first: usize,
        positions: Range<usize>,
        column: usize,
        weights: &[&[f32]; Q],
    ) -> usize {
        let (v, width) = (self.v, self.inputs.width);
        let mut sums = [[v.zeros(); P]; Q];
        for q in 0..Q {
            let out: &[[f32; PANEL]] = self.out[(first + q) * width + column..][..P * PANEL].as_chunks().0;
            for p in 0..P {
                for part in 0..V::PARTS {
                    sums[q][p][part] = v.load(&out[p], part);
                }
            }
        }
        let rows = self.values[positions.start * width..].chunks_exact(width).take(positions.len());
        for (i, row) in rows.enumerate() {
            let row: &[[T; PANEL]] = row[column..][..P * PANEL].as_chunks().0;
            add_products(v, |p| &row[p], |q| weights[q][i], &mut sums);
        }
        for q in 0..Q {
            let out: &mut [[f32; PANEL]] = self.out[(first + q) * width + column..][..P * PANEL].as_chunks_mut().0;
            for p in 0..P {
                for part in 0..V::PARTS {
                    v.store(sums[q][p][part], &mut out[p], part);
                }
            }
        }
        P * PANEL
    }
}

/// The positions that are in all `ranges`; an empty range between them where there are none.
#[inline(always)]
fn common(ranges: &[Range<usize>]) -> Range<usize> {
    let start = ranges.iter().map(|range| range.start).fold(0, usize::max);
    let end = ranges.iter().map(|range| range.end).fold(usize::MAX, usize::min);
    start..end.max(start)
}
