//! Softmax attention over the KV cache, in segments of 256 positions counted from 0.
//!
//! Every query reduces each segment in the same way and joins the segments in order (Dao et al. 2022, arXiv 2205.14135),
//! whether it comes alone or with others, and whether one task takes all segments or several share them. So results are
//! bit-identical in prompts, batches and decoding, on any number of threads.

use std::ops::Range;

use crate::kernels::{INT8_GROUP, Kernel, KvSlice, PAGE, ScoreInputs, Softmax, SoftmaxMut, WeightedValues};
use crate::model::buffer::Buffer;
use crate::model::state::cache::PageHead;
use crate::model::state::session::Session;

/// Positions that are reduced together; part of the definition of the result.
const SEGMENT: usize = 256;
/// From this number of queries on, a page is converted to F32 once for all of them.
const MANY_QUERIES: usize = 4;

/// Attention of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheAttention<'a> {
    /// Index of the layer in the cache.
    pub(super) layer: usize,
    /// Query heads per key/value head.
    pub(super) group: usize,
    /// Factor of the scores.
    pub(super) scale: f32,
    /// Soft cap of the scores.
    pub(super) cap: Option<f32>,
    /// Positions that a query sees, including its own.
    pub(super) window: Option<usize>,
    /// `(heads)`: the slope of each query head, times the distance to a key subtracted from its score; or empty.
    pub(super) slopes: &'a [f32],
}

/// One key/value head for consecutive rows of one session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) session: &'a Session,
    pub(super) head: usize,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// The head's queries of the first row `(group * head_dim)`; those of the next row are `stride` numbers further.
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
    /// `(groups, PAGE)`: scales of keys or values of a page.
    factors: Buffer,
    /// The softmax of a segment: see [`CacheAttention::sums`].
    part: Buffer,
    /// The softmax of all segments so far, likewise.
    total: Buffer,
}

thread_local! {
    static WORKSPACE: std::cell::RefCell<TaskWorkspace> = std::cell::RefCell::default();
}

impl CacheAttention<'_> {
    /// The segments that are seen by any of `rows` rows from position `first` on.
    pub(super) fn segments(&self, first: usize, rows: usize) -> Range<usize> {
        let oldest = self.window.map_or(0, |window| (first + 1).saturating_sub(window));
        oldest / SEGMENT..(first + rows).div_ceil(SEGMENT)
    }

    /// How many numbers a segment of a task is reduced to: `(n, width)` values, `(n)` maximums, `(n)` sums.
    pub(super) fn sums(&self, rows: usize, width: usize) -> usize {
        rows * self.group * (width + 2)
    }

    /// Computes the whole task into `out (rows, group * head_dim)`.
    pub(super) fn all(&self, kernel: &Kernel, task: &Task<'_>, out: &mut [f32]) {
        WORKSPACE.with_borrow_mut(|work| {
            let sums = self.sums(task.rows, task.session.shape.width);
            let (mut part, mut total) = (std::mem::take(&mut work.part), std::mem::take(&mut work.total));
            part.resize(sums);
            total.resize(sums);
            self.begin(task, &mut total);
            self.gather_queries(kernel, task, work);
            for segment in self.segments(task.first, task.rows) {
                self.segment(kernel, task, segment, work, &mut part);
                self.join(kernel, task, segment, &part, &mut total);
            }
            finish(kernel, task, &total, out);
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
            let sums = self.sums(task.rows, task.session.shape.width);
            self.gather_queries(kernel, task, work);
            for (segment, part) in segments.zip(parts.chunks_exact_mut(stride)) {
                self.segment(kernel, task, segment, work, &mut part[..sums]);
            }
        });
    }

    /// Computes the result of a task, `out (rows, group * head_dim)`, from all its segments, `parts (segments, stride)`.
    pub(super) fn combine(&self, kernel: &Kernel, task: &Task<'_>, parts: &[f32], stride: usize, out: &mut [f32]) {
        WORKSPACE.with_borrow_mut(|work| {
            let sums = self.sums(task.rows, task.session.shape.width);
            let total = &mut work.total;
            total.resize(sums);
            self.begin(task, total);
            for (segment, part) in self.segments(task.first, task.rows).zip(parts.chunks_exact(stride)) {
                self.join(kernel, task, segment, &part[..sums], total);
            }
            finish(kernel, task, total, out);
        });
    }

    /// Makes `total` a softmax over no positions.
    fn begin(&self, task: &Task<'_>, total: &mut [f32]) {
        let (n, width) = (task.rows * self.group, task.session.shape.width);
        total.fill(0.0);
        total[n * width..][..n].fill(f32::NEG_INFINITY);
    }

    /// Copies the queries of the task to the workspace, rotated as the keys are.
    fn gather_queries(&self, kernel: &Kernel, task: &Task<'_>, work: &mut TaskWorkspace) {
        let width = self.group * task.session.shape.head_dim;
        work.queries.clear();
        for row in task.queries.chunks(task.stride).take(task.rows) {
            work.queries.extend_from_slice(&row[..width]);
        }
        kernel.hadamard(&mut work.queries, task.session.shape.rotation());
    }

    /// The first query that sees anything from `start` on. Rows are in order of position, so the later ones do, too.
    fn skip(&self, task: &Task<'_>, start: usize) -> usize {
        start.saturating_sub(task.first) * self.group
    }

    /// Reduces a segment into `part`. The numbers of queries before the segment are unspecified.
    fn segment(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, work: &mut TaskWorkspace, part: &mut [f32]) {
        let shape = &task.session.shape;
        let (dim, width, n) = (shape.head_dim, shape.width, task.rows * self.group);
        let start = segment * SEGMENT;
        let end = (task.first + task.rows).min(start + SEGMENT);
        let skip = self.skip(task, start);
        work.scores.resize(n * SEGMENT);
        let all_scores = &mut work.scores;
        work.seen.clear();
        work.seen.extend((0..n).map(|q| {
            let beyond = task.first + q / self.group + 1;
            let seen = beyond.saturating_sub(start).min(SEGMENT);
            self.window.map_or(0, |window| beyond.saturating_sub(start + window)).min(seen)..seen
        }));
        // The pages, with the first query that is not before them. Queries whose window is past a page are left out below.
        let session = task.session;
        let pages = session.pages[start / PAGE..end.div_ceil(PAGE)].iter().enumerate().map(|(i, page)| {
            let from = skip.max(self.skip(task, start + i * PAGE));
            (i * PAGE, from, page.head(shape, self.layer, task.head))
        });
        let to = |from: usize, seen: &[Range<usize>], at: usize| {
            from + seen[from..].iter().take_while(|seen| seen.start < at + PAGE).count()
        };

        for (at, from, PageHead { keys, scales, .. }) in pages.clone() {
            let to = to(from, &work.seen, at);
            let group = match scales {
                Some([scales, _]) => {
                    work.factors.resize(scales.len());
                    // A power of two undoes the lengthening of queries and keys by the rotation.
                    kernel.expand_scales(scales, self.scale / shape.rotation() as f32, &mut work.factors);
                    INT8_GROUP
                }
                None => {
                    work.factors.resize(PAGE);
                    work.factors.fill(self.scale);
                    dim
                }
            };
            let keys = widened(kernel, keys, PAGE * dim, to - from, &mut work.wide);
            let scores = &mut all_scores[from * SEGMENT + at..];
            let queries = &work.queries[from * dim..to * dim];
            let inputs = ScoreInputs { queries, head_dim: dim, keys, group, scales: &work.factors };
            kernel.scores(inputs, scores, SEGMENT);
        }
        let (values, maxima) = part.split_at_mut(n * width);
        let (maxima, sums) = maxima.split_at_mut(n);
        for q in skip..n {
            let seen = work.seen[q].clone();
            let scores = &mut all_scores[q * SEGMENT..][seen.clone()];
            if let Some(cap) = self.cap {
                kernel.soft_cap(scores, cap);
            }
            if let Some(slope) = self.slopes.get(task.head * self.group + q % self.group) {
                let distance = task.first + q / self.group - start - seen.start;
                kernel.add_slope(scores, *slope, distance as f32);
            }
            (maxima[q], sums[q]) = kernel.exp_segment(scores);
        }
        values[skip * width..].fill(0.0);
        for (at, from, PageHead { values: stored, scales, .. }) in pages {
            let to = to(from, &work.seen, at);
            work.ranges.clear();
            let range = |seen: &Range<usize>| seen.start.max(at) - at..seen.end.min(at + PAGE) - at;
            work.ranges.extend(work.seen[from..to].iter().map(range));
            let weights = &all_scores[from * SEGMENT + at..];
            let scales = scales.map_or(&[][..], |[_, scales]| scales);
            work.factors.resize(scales.len());
            kernel.expand_scales(scales, 1.0, &mut work.factors);
            let stored = widened(kernel, stored, PAGE * width, to - from, &mut work.wide);
            let out = &mut values[from * width..to * width];
            let (ranges, group, scales) = (&work.ranges, INT8_GROUP, &work.factors);
            let inputs = WeightedValues { weights, stride: SEGMENT, ranges, values: stored, width, group, scales };
            kernel.weighted_sum(inputs, out);
        }
    }

    /// Adds a segment to the softmax of the segments before it.
    fn join(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, part: &[f32], total: &mut [f32]) {
        let (n, width) = (task.rows * self.group, task.session.shape.width);
        let skip = self.skip(task, segment * SEGMENT);
        let (values, max) = total.split_at_mut(n * width);
        let (max, sum) = max.split_at_mut(n);
        let total = SoftmaxMut { max: &mut max[skip..], sum: &mut sum[skip..], values: &mut values[skip * width..] };
        let (values, max) = part.split_at(n * width);
        let (max, sum) = max.split_at(n);
        kernel.join(total, Softmax { max: &max[skip..], sum: &sum[skip..], values: &values[skip * width..] });
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

/// Divides the values by their sums, and takes their rotation back.
fn finish(kernel: &Kernel, task: &Task<'_>, total: &[f32], out: &mut [f32]) {
    let shape = &task.session.shape;
    let (dim, width, rotation) = (shape.head_dim, shape.width, shape.rotation());
    let n = total.len() / (width + 2);
    let (values, sums) = (&total[..n * width], &total[n * (width + 1)..]);
    for ((out, values), sum) in out.chunks_exact_mut(dim).zip(values.chunks_exact(width)).zip(sums) {
        // A row always sees itself, so the sum is at least 1, or NaN, which is passed on.
        let inverse = 1.0 / sum;
        out.iter_mut().zip(values).for_each(|(out, x)| *out = x * inverse);
    }
    if rotation > 1 {
        // Twice the rotation is a factor.
        kernel.hadamard(out, rotation);
        out.iter_mut().for_each(|x| *x /= rotation as f32);
    }
}
