//! Attention over the cache, in segments of 256 positions counted from 0.
//!
//! Every query reduces each segment in the same way and joins the segments in order (Dao et al. 2022, arXiv 2205.14135),
//! whether it comes alone or with others, so its result has the same bits in a prompt, in a batch and in decoding.

use super::kv_cache::Session;
use crate::kernels::{self, Kernel, PAGE};

/// Positions that are reduced together; part of the definition of the result.
const SEGMENT: usize = 256;

/// What attention needs to know of a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention<'a> {
    pub(super) layer: usize,
    /// Query heads to a key/value head.
    pub(super) group: usize,
    pub(super) scale: f32,
    /// Soft bound of scores.
    pub(super) cap: Option<f32>,
    /// Positions that a query sees, itself included.
    pub(super) window: Option<usize>,
    /// What the distance to a key is multiplied with and taken from the score, a query head `(heads)`; or empty.
    pub(super) slopes: &'a [f32],
}

/// Slopes of a bias by distance: powers of `2^(-max / n)`, and for the heads beyond a power of two every second power of
/// its root (Press et al. 2021, arXiv 2108.12409).
pub(super) fn slopes(heads: usize, max: f32, scale: f32) -> Vec<f32> {
    let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let power = |exponent: f64| libm::exp2(-f64::from(max) * exponent / whole as f64) as f32 * scale;
    let slope = |head: usize| match head {
        head if head < whole => power((head + 1) as f64),
        head => power((2 * (head - whole) + 1) as f64 / 2.0),
    };
    (0..heads).map(slope).collect()
}

/// Buffers of one task, kept by the thread.
#[derive(Debug, Default)]
struct Work {
    /// `(queries, head_dim)`
    queries: Vec<f32>,
    /// `(queries, SEGMENT)`
    scores: Vec<f32>,
    /// As `scores`, of the second plane of keys.
    low: Vec<f32>,
    /// `(queries, width)`: the segment's weighted values, and those joined so far.
    part: Vec<f32>,
    total: Vec<f32>,
    /// `(queries)`: maximum and sum so far.
    max: Vec<f32>,
    sum: Vec<f32>,
    /// Maximum and sum of the segment.
    reduced: Vec<(f32, f32)>,
    counts: Vec<usize>,
}

thread_local! {
    static WORK: std::cell::RefCell<Work> = std::cell::RefCell::default();
}

impl Attention<'_> {
    /// One key/value head for some consecutive rows of one session.
    ///
    /// `queries(row)` is the row's `(group * head_dim)` values of this head's queries, row `i` at position `first + i`;
    /// `out (rows, group * head_dim)` takes the result.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn head<'q>(
        &self,
        kernel: &dyn Kernel,
        session: &Session,
        head: usize,
        first: usize,
        rows: usize,
        queries: impl Fn(usize) -> &'q [f32],
        out: &mut [f32],
    ) {
        WORK.with_borrow_mut(|work| {
            let (dim, width, n) = (session.shape.head_dim, session.shape.width, rows * self.group);
            work.queries.clear();
            (0..rows).for_each(|row| work.queries.extend_from_slice(queries(row)));
            work.scores.resize(n * SEGMENT, 0.0);
            work.low.resize(if session.shape.planes == 2 { n * SEGMENT } else { 0 }, 0.0);
            for buffer in [&mut work.part, &mut work.total] {
                buffer.clear();
                buffer.resize(n * width, 0.0);
            }
            work.max.clear();
            work.max.resize(n, f32::NEG_INFINITY);
            work.sum.clear();
            work.sum.resize(n, 0.0);
            // Segments that lie before every row's window are not looked at; those before some rows' windows are masked.
            let oldest = self.window.map_or(0, |window| (first + 1).saturating_sub(window));
            for start in (oldest / SEGMENT * SEGMENT..first + rows).step_by(SEGMENT) {
                self.segment(kernel, session, head, start, first, work);
            }
            for ((out, total), sum) in out.chunks_exact_mut(dim).zip(work.total.chunks_exact(width)).zip(&work.sum) {
                // A row always sees itself, so the sum is at least 1 unless a NaN came in, which goes on.
                let inverse = 1.0 / sum;
                out.iter_mut().zip(total).for_each(|(out, x)| *out = x * inverse);
            }
        });
    }

    /// Adds the segment that starts at `start` to what the work holds.
    fn segment(
        &self,
        kernel: &dyn Kernel,
        session: &Session,
        head: usize,
        start: usize,
        first: usize,
        work: &mut Work,
    ) {
        let (dim, width) = (session.shape.head_dim, session.shape.width);
        let n = work.max.len();
        let last_position = first + n / self.group - 1;
        let end = (last_position + 1).min(start + SEGMENT);
        let pages = &session.pages[start / PAGE..end.div_ceil(PAGE)];
        // Rows are in order of position, so those that see anything of the segment are the last ones.
        let skip = start.saturating_sub(first) * self.group;
        for plane in 0..session.shape.planes {
            for (i, page) in pages.iter().enumerate() {
                let (keys, _) = page.head(&session.shape, self.layer, head, plane);
                let from = skip.max((start + i * PAGE).saturating_sub(first) * self.group);
                let buffer = if plane == 0 { &mut work.scores } else { &mut work.low };
                let scores = &mut buffer[from * SEGMENT + i * PAGE..];
                kernel.scores(&work.queries[from * dim..], dim, keys, self.scale, scores, SEGMENT);
            }
        }
        work.part[skip * width..].fill(0.0);
        work.reduced.clear();
        for q in skip..n {
            let position = first + q / self.group;
            let seen = (position + 1 - start).min(SEGMENT);
            let scores = &mut work.scores[q * SEGMENT..][..seen];
            if session.shape.planes == 2 {
                kernel.add_scaled(scores, &work.low[q * SEGMENT..][..seen], 1.0);
            }
            if let Some(cap) = self.cap {
                kernel.soft_cap(scores, cap);
            }
            if let Some(slope) = self.slopes.get(head * self.group + q % self.group) {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = slope.mul_add(-((position - start - i) as f32), *score);
                }
            }
            let hidden = self.window.map_or(0, |window| (position + 1).saturating_sub(start + window).min(seen));
            scores[..hidden].fill(f32::NEG_INFINITY);
            work.reduced.push(kernel.exp_segment(scores));
        }
        for (i, page) in pages.iter().enumerate() {
            let from = skip.max((start + i * PAGE).saturating_sub(first) * self.group);
            work.counts.clear();
            work.counts.extend((from..n).map(|q| (first + q / self.group + 1 - start - i * PAGE).min(PAGE)));
            let weights = &work.scores[from * SEGMENT + i * PAGE..];
            for plane in 0..session.shape.planes {
                let (_, values) = page.head(&session.shape, self.layer, head, plane);
                kernel.weighted_sum(weights, SEGMENT, &work.counts, values, width, &mut work.part[from * width..]);
            }
        }
        for (q, (max, sum)) in (skip..n).zip(&work.reduced) {
            if *max == f32::NEG_INFINITY && *sum == 0.0 {
                continue; // The window hides all of it.
            }
            let joined = if work.max[q] > *max { work.max[q] } else { *max };
            let (a, b) = (kernels::exp(work.max[q] - joined), kernels::exp(max - joined));
            let part = &work.part[q * width..][..width];
            kernel.blend(&mut work.total[q * width..][..width], a, part, b);
            work.sum[q] = work.sum[q].mul_add(a, sum * b);
            work.max[q] = joined;
        }
    }
}
