//! Attention over pages of an INT8 cache: queries and weights become codes, too, so that products are those of integers.

use std::ops::Range;

use crate::kernels::{INT8_GROUP, Int8Queries, Int8ScoreInputs, Int8WeightedValues, Int8Weights, Kernel, PAGE};
use crate::model::buffer::Buffer;
use crate::model::state::page_head::Int8Page;
use crate::quant::packed::{CacheLine, PANEL};

/// Codes that are multiplied together.
const QUAD: usize = 4;

/// The workspace of one task.
#[derive(Debug, Default)]
pub(super) struct Int8Workspace {
    /// Numbers in a query or key.
    head_dim: usize,
    /// Queries.
    count: usize,
    /// `(head_dim / 4, n)`, rounded up.
    codes: Vec<[i8; QUAD]>,
    /// The codes of one query.
    query: Vec<[i8; QUAD]>,
    /// `(n, groups)`: scales of the queries.
    scales: Vec<f32>,
    /// `(n, groups)`: sums of codes.
    sums: Vec<i32>,
    /// Packed keys or values of a page.
    lines: Vec<CacheLine>,
    /// `(groups, PAGE)`: scales of keys or values of a page.
    factors: Buffer,
    /// `(groups, n, PAGE)`: codes of the weights of a page.
    weights: Vec<u8>,
    /// `(groups, n)`: their factors.
    weight_factors: Vec<f32>,
}

impl Int8Workspace {
    /// Quantizes the queries of a task `(n, head_dim)`.
    pub(super) fn take_queries(&mut self, kernel: &Kernel, queries: &[f32], head_dim: usize) {
        let (quads, groups) = (head_dim.div_ceil(QUAD), head_dim.div_ceil(INT8_GROUP));
        (self.head_dim, self.count) = (head_dim, queries.len() / head_dim);
        self.codes.resize(quads * self.count, [0; QUAD]);
        self.query.resize(quads, [0; QUAD]);
        self.scales.resize(self.count * groups, 0.0);
        self.sums.resize(self.count * groups, 0);
        let of_groups = self.scales.chunks_exact_mut(groups).zip(self.sums.chunks_exact_mut(groups));
        for (i, (query, (scales, sums))) in queries.chunks_exact(head_dim).zip(of_groups).enumerate() {
            let codes = self.query.as_flattened_mut().chunks_mut(INT8_GROUP);
            for ((x, codes), (scale, sum)) in query.chunks(INT8_GROUP).zip(codes).zip(scales.iter_mut().zip(sums)) {
                let (codes, padding) = codes.split_at_mut(x.len());
                padding.fill(0);
                *scale = kernel.to_int8(x, codes);
                *sum = codes.iter().map(|code| i32::from(*code)).sum();
            }
            for (code, codes) in self.query.iter().zip(self.codes.chunks_exact_mut(self.count)) {
                codes[i] = *code;
            }
        }
    }

    /// Dot products of `queries` with the keys of a page, times `factor`, into `scores (queries, stride)`.
    pub(super) fn scores(
        &mut self,
        kernel: &Kernel,
        page: &Int8Page<'_>,
        queries: Range<usize>,
        factor: f32,
        scores: &mut [f32],
        stride: usize,
    ) {
        let groups = self.head_dim.div_ceil(INT8_GROUP);
        self.factors.resize(page.key_scales.len());
        kernel.expand_scales(page.key_scales, factor, &mut self.factors);
        self.lines.resize(self.head_dim.div_ceil(QUAD) * PAGE / PANEL, CacheLine([0; 64]));
        kernel.pack_keys(page.keys, self.head_dim, &mut self.lines);
        let of_groups = queries.start * groups..queries.end * groups;
        let queries = Int8Queries {
            head_dim: self.head_dim,
            codes: &self.codes[queries.start..],
            stride: self.count,
            scales: &self.scales[of_groups.clone()],
            sums: &self.sums[of_groups],
        };
        kernel.scores_int8(Int8ScoreInputs { queries, keys: &self.lines, scales: &self.factors }, scores, stride);
    }

    /// Adds to `out (n, width)` the values of a page, weighted by `weights (n, stride)` at the positions `seen (n)`.
    pub(super) fn add_values(
        &mut self,
        kernel: &Kernel,
        page: &Int8Page<'_>,
        weights: &[f32],
        stride: usize,
        seen: &[Range<usize>],
        out: &mut [f32],
    ) {
        let width = page.values.len() / PAGE;
        let (of_page, n) = (page.value_scales.len(), seen.len());
        self.factors.resize(of_page);
        kernel.expand_scales(page.value_scales, 1.0, &mut self.factors);
        self.weights.resize(n * of_page, 0);
        self.weight_factors.resize(n * of_page / PAGE, 0.0);
        let (codes, factors) = (&mut self.weights, &mut self.weight_factors);
        kernel.quantize_weights(Int8Weights { weights, stride, seen, scales: &self.factors }, codes, factors);
        self.lines.resize(width / PANEL * (PAGE / QUAD + 1), CacheLine([0; 64]));
        kernel.pack_values(page.values, width, &mut self.lines);
        let (weights, scales, values) = (&self.weights[..], &self.weight_factors[..], &self.lines[..]);
        kernel.weighted_sum_int8(Int8WeightedValues { weights, scales, values, width }, out);
    }
}
