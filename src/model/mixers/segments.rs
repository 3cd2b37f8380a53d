//! Softmax attention over the KV cache, in segments of 256 positions counted from 0.
//!
//! Every query reduces each segment in the same way and joins the segments in order (Dao et al. 2022, arXiv 2205.14135),
//! whether it comes alone or with others, and whether one task takes all segments or several share them. So results are
//! bit-identical in prompts, batches and decoding, on any number of threads.

use std::ops::Range;

use super::int8_pages::Int8Workspace;
use crate::kernels::{Kernel, KvSlice, PAGE, ScoreInputs, Softmax, SoftmaxMut, WeightedValues, exp};
use crate::model::buffer::Buffer;
use crate::model::config::Reach;
use crate::model::state::cache::LayerShape;
use crate::model::state::page_head::PageHead;
use crate::model::state::session::Session;

/// Positions that are reduced together; part of the definition of the result.
const SEGMENT: usize = 256;
/// From this number of queries on, a page is converted to F32 once for all of them.
const MANY_QUERIES: usize = 4;

/// Attention of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheAttention<'a> {
    /// The keys and values of the layer in a page.
    pub(super) shape: LayerShape,
    /// Query heads of a task, which share a key/value head.
    pub(super) group: usize,
    /// Factor of the scores.
    pub(super) scale: f32,
    /// Soft cap of the scores.
    pub(super) cap: Option<f32>,
    /// Whether a query sees no later positions than its own.
    pub(super) causal: bool,
    /// How far back a query sees, and as far forwards where attention is not causal.
    pub(super) reach: Reach,
    /// `(heads)`: the slope of each query head, times the distance to a key subtracted from its score; or empty.
    pub(super) slopes: &'a [f32],
    /// `(heads)`: a score of each query head that takes a share of the softmax without a value; or empty.
    pub(super) sinks: &'a [f32],
}

/// Query heads that share a key/value head, for consecutive rows of one session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) session: &'a Session,
    /// The key/value head.
    pub(super) head: usize,
    /// The first query head.
    pub(super) query: usize,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Positions whose keys and values are stored.
    pub(super) end: usize,
    /// The queries of the first row `(group * head_dim)`; those of the next row are `stride` numbers further.
    pub(super) queries: &'a [f32],
    pub(super) stride: usize,
}

/// The workspace of one task, kept by the thread. `n` is the number of queries: rows times `group`.
#[derive(Debug, Default)]
struct TaskWorkspace {
    /// `(n, head_dim)`
    queries: Vec<f32>,
    /// `(n, SEGMENT)`: scores, then weights.
    scores: Buffer,
    /// `(n)`: positions of the segment that each query sees.
    seen: Vec<Range<usize>>,
    /// `(n)`: positions of a page that each query sees.
    ranges: Vec<Range<usize>>,
    /// Keys `(PAGE / 16, head_dim, 16)` or values `(PAGE, width)` of a page in F32.
    wide: Buffer,
    /// What an INT8 cache needs.
    int8: Int8Workspace,
    /// The softmax of a segment: see [`CacheAttention::sums`].
    part: Buffer,
    /// The softmax of all segments so far, likewise.
    total: Buffer,
}

thread_local! {
    static WORKSPACE: std::cell::RefCell<TaskWorkspace> = std::cell::RefCell::default();
}

impl CacheAttention<'_> {
    /// The position after the last that a query at `position` sees, where `end` positions are stored.
    fn newest(&self, position: usize, end: usize) -> usize {
        if self.causal {
            return position + 1;
        }
        let in_window = self.reach.window.map_or(end, |window| position.saturating_add(window));
        let in_chunk = self.reach.chunk.map_or(end, |chunk| (position / chunk + 1).saturating_mul(chunk));
        in_window.min(in_chunk).min(end)
    }

    /// The first position that a query at `position` sees in `session`.
    fn oldest(&self, session: &Session, position: usize) -> usize {
        self.reach.oldest(position).max(session.first)
    }

    /// The segments of `session` that are seen by any of `rows` rows from position `first` on, where `end` positions are
    /// stored.
    pub(super) fn segments(&self, session: &Session, first: usize, rows: usize, end: usize) -> Range<usize> {
        self.oldest(session, first) / SEGMENT..self.newest(first + rows - 1, end).div_ceil(SEGMENT)
    }

    /// How many numbers a segment of a task is reduced to: `(n, width)` values, `(n)` maximums, `(n)` sums.
    pub(super) fn sums(&self, rows: usize) -> usize {
        rows * self.group * (self.shape.width + 2)
    }

    /// Computes the whole task into `out (rows, group * head_dim)`.
    pub(super) fn all(&self, kernel: &Kernel, task: &Task<'_>, out: &mut [f32]) {
        WORKSPACE.with_borrow_mut(|work| {
            let sums = self.sums(task.rows);
            let (mut part, mut total) = (std::mem::take(&mut work.part), std::mem::take(&mut work.total));
            part.resize(sums);
            total.resize(sums);
            self.begin(task, &mut total);
            self.gather_queries(kernel, task, work);
            for segment in self.segments(task.session, task.first, task.rows, task.end) {
                self.segment(kernel, task, segment, work, &mut part);
                self.join(kernel, task, segment, &part, &mut total);
            }
            self.finish(kernel, task, &total, out);
            (work.part, work.total) = (part, total);
        });
    }

    /// Reduces some segments of a task into `parts (segments, stride)`.
    pub(super) fn some(
        &self,
        kernel: &Kernel,
        task: &Task<'_>,
        segments: Range<usize>,
        parts: &mut [f32],
        stride: usize,
    ) {
        WORKSPACE.with_borrow_mut(|work| {
            let sums = self.sums(task.rows);
            self.gather_queries(kernel, task, work);
            for (segment, part) in segments.zip(parts.chunks_exact_mut(stride)) {
                self.segment(kernel, task, segment, work, &mut part[..sums]);
            }
        });
    }

    /// Computes the result of a task, `out (rows, group * head_dim)`, from all its segments, `parts (segments, stride)`.
    pub(super) fn combine(&self, kernel: &Kernel, task: &Task<'_>, parts: &[f32], stride: usize, out: &mut [f32]) {
        WORKSPACE.with_borrow_mut(|work| {
            let sums = self.sums(task.rows);
            let total = &mut work.total;
            total.resize(sums);
            self.begin(task, total);
            let segments = self.segments(task.session, task.first, task.rows, task.end);
            for (segment, part) in segments.zip(parts.chunks_exact(stride)) {
                self.join(kernel, task, segment, &part[..sums], total);
            }
            self.finish(kernel, task, total, out);
        });
    }

    /// Makes `total` a softmax over no positions.
    fn begin(&self, task: &Task<'_>, total: &mut [f32]) {
        let (n, width) = (task.rows * self.group, self.shape.width);
        total.fill(0.0);
        total[n * width..][..n].fill(f32::NEG_INFINITY);
    }

    /// Copies the queries of the task to the workspace, rotated as the keys are.
    fn gather_queries(&self, kernel: &Kernel, task: &Task<'_>, work: &mut TaskWorkspace) {
        let width = self.group * self.shape.head_dim;
        work.queries.clear();
        for row in task.queries.chunks(task.stride).take(task.rows) {
            work.queries.extend_from_slice(&row[..width]);
        }
        if self.shape.is_int8() {
            kernel.hadamard(&mut work.queries, self.shape.key_rotation());
            work.int8.take_queries(kernel, &work.queries, self.shape.head_dim);
        }
    }

    /// The first query that sees anything from `start` on. Rows are in order of position, so the later ones do, too.
    fn skip(&self, task: &Task<'_>, start: usize) -> usize {
        let row = match (self.causal, self.reach.window, self.reach.chunk) {
            (true, ..) => start.saturating_sub(task.first),
            (false, None, None) => 0,
            (false, ..) => {
                let rows = task.first..task.first + task.rows;
                rows.take_while(|position| self.newest(*position, task.end) <= start).count()
            }
        };
        row * self.group
    }

    /// Reduces a segment into `part`. The numbers of queries before the segment are unspecified.
    fn segment(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, work: &mut TaskWorkspace, part: &mut [f32]) {
        let shape = &self.shape;
        let (dim, width, n) = (shape.head_dim, shape.width, task.rows * self.group);
        let start = segment * SEGMENT;
        let end = self.newest(task.first + task.rows - 1, task.end).min(start + SEGMENT);
        let skip = self.skip(task, start);
        work.scores.resize(n * SEGMENT);
        let all_scores = &mut work.scores;
        work.seen.clear();
        work.seen.extend((0..n).map(|q| {
            let position = task.first + q / self.group;
            let seen = self.newest(position, task.end).saturating_sub(start).min(SEGMENT);
            self.oldest(task.session, position).saturating_sub(start).min(seen)..seen
        }));
        // The pages that are still seen, with the first query that is not before them. Queries whose window is past a page are
        // left out below.
        let first = start.max(self.oldest(task.session, task.first)) / PAGE;
        let pages = task.session.pages[first..end.div_ceil(PAGE)].iter().zip(first..).map(|(page, index)| {
            let from = skip.max(self.skip(task, index * PAGE));
            (index * PAGE - start, from, page.head(&self.shape, task.head))
        });
        let to = |from: usize, seen: &[Range<usize>], at: usize| {
            from + seen[from..].iter().take_while(|seen| seen.start < at + PAGE).count()
        };

        for (at, from, page) in pages.clone() {
            let to = to(from, &work.seen, at);
            let scores = &mut all_scores[from * SEGMENT + at..];
            match page {
                PageHead::Floats { keys, .. } => {
                    let keys = widened(kernel, keys, PAGE * dim, to - from, &mut work.wide);
                    let queries = &work.queries[from * dim..to * dim];
                    kernel.scores(ScoreInputs { queries, head_dim: dim, keys, scale: self.scale }, scores, SEGMENT);
                }
                PageHead::Int8(page) => {
                    // A power of two undoes the lengthening of queries and keys by the rotation.
                    let factor = self.scale / shape.key_rotation() as f32;
                    work.int8.scores(kernel, &page, from..to, factor, scores, SEGMENT);
                }
            }
        }
        let (values, maxima) = part.split_at_mut(n * width);
        let (maxima, sums) = maxima.split_at_mut(n);
        for q in skip..n {
            let seen = work.seen[q].clone();
            let scores = &mut all_scores[q * SEGMENT..][seen.clone()];
            if let Some(cap) = self.cap {
                kernel.soft_cap(scores, cap);
            }
            if let Some(slope) = self.slopes.get(task.query + q % self.group) {
                let distance = task.first + q / self.group - start - seen.start;
                kernel.add_slope(scores, *slope, distance as f32);
            }
            let is_int8 = shape.is_int8();
            (maxima[q], sums[q]) = if is_int8 { kernel.exp_segment_coarse(scores) } else { kernel.exp_segment(scores) };
        }
        values[skip * width..].fill(0.0);
        for (at, from, page) in pages {
            let to = to(from, &work.seen, at);
            work.ranges.clear();
            let range = |seen: &Range<usize>| seen.start.max(at) - at..seen.end.min(at + PAGE) - at;
            work.ranges.extend(work.seen[from..to].iter().map(range));
            let weights = &all_scores[from * SEGMENT + at..];
            let (out, ranges) = (&mut values[from * width..to * width], &work.ranges);
            match page {
                PageHead::Floats { values, .. } => {
                    let values = widened(kernel, values, PAGE * width, to - from, &mut work.wide);
                    kernel.weighted_sum(WeightedValues { weights, stride: SEGMENT, ranges, values, width }, out);
                }
                PageHead::Int8(page) => work.int8.add_values(kernel, &page, weights, SEGMENT, ranges, out),
            }
        }
    }

    /// Adds a segment to the softmax of the segments before it.
    fn join(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, part: &[f32], total: &mut [f32]) {
        let (n, width) = (task.rows * self.group, self.shape.width);
        let skip = self.skip(task, segment * SEGMENT);
        let (values, max) = total.split_at_mut(n * width);
        let (max, sum) = max.split_at_mut(n);
        let total = SoftmaxMut { max: &mut max[skip..], sum: &mut sum[skip..], values: &mut values[skip * width..] };
        let (values, max) = part.split_at(n * width);
        let (max, sum) = max.split_at(n);
        kernel.join(total, Softmax { max: &max[skip..], sum: &sum[skip..], values: &values[skip * width..] });
    }

    /// Divides the values by their sums, and takes their rotation back.
    fn finish(&self, kernel: &Kernel, task: &Task<'_>, total: &[f32], out: &mut [f32]) {
        let LayerShape { value_dim, width, .. } = self.shape;
        let n = task.rows * self.group;
        let (values, rest) = total.split_at(n * width);
        let (maxima, sums) = rest.split_at(n);
        let rows = out.chunks_exact_mut(value_dim).zip(values.chunks_exact(width)).zip(maxima.iter().zip(sums));
        for (q, ((out, values), (max, sum))) in rows.enumerate() {
            // A row always sees itself, so the sum is at least 1, or NaN, which is passed on.
            let inverse = match self.sinks.get(task.query + q % self.group) {
                None => 1.0 / sum,
                // The sink joins the sums as a position without a value does.
                Some(sink) if sink > max => exp(max - sink) / sum.mul_add(exp(max - sink), 1.0),
                Some(sink) => 1.0 / (sum + exp(sink - max)),
            };
            out.iter_mut().zip(values).for_each(|(out, x)| *out = x * inverse);
        }
        let rotation = self.shape.value_rotation();
        if rotation > 1 {
            // Twice the rotation is a factor.
            kernel.hadamard(out, rotation);
            out.iter_mut().for_each(|x| *x /= rotation as f32);
        }
    }
}

/// `count` numbers of a page: as stored for few queries, converted to F32 once for many.
fn widened<'a>(
    kernel: &Kernel,
    stored: KvSlice<'a>,
    count: usize,
    queries: usize,
    wide: &'a mut Buffer,
) -> KvSlice<'a> {
    if queries < MANY_QUERIES || matches!(stored, KvSlice::F32(_)) {
        return stored;
    }
    wide.resize(count);
    kernel.widen(stored, wide);
    KvSlice::F32(wide)
}
