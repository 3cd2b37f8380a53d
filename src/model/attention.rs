//! Attention over the cache, in segments of 256 positions counted from 0.
//!
//! Every query reduces each segment in the same way and joins the segments in order (Dao et al. 2022, arXiv 2205.14135),
//! whether it comes alone or with others, and whether one task takes all segments or several share them, so its result
//! has the same bits in a prompt, in a batch and in decoding, on any number of threads.

use std::ops::Range;

use super::kv_cache::{Head, Session};
use crate::kernels::{Kernel, KvSlice, PAGE, Softmax, SoftmaxMut};
use crate::quant::packed::CacheLine;

/// Positions that are reduced together; part of the definition of the result.
const SEGMENT: usize = 256;
/// Queries from which on a page is converted to F32 once for all of them.
const MANY: usize = 4;

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

/// One key/value head for some consecutive rows of one session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) session: &'a Session,
    pub(super) head: usize,
    /// Position of the first row.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// The head's queries of the first row `(group * head_dim)`; those of the next come `stride` later.
    pub(super) queries: &'a [f32],
    pub(super) stride: usize,
}

/// Buffers of one task, kept by the thread. Those of lines hold F32 from the start of a line on, so that no register is
/// loaded from two.
#[derive(Debug, Default)]
struct Work {
    /// `(n, head_dim)`
    queries: Vec<f32>,
    /// `(n, SEGMENT)`: scores, then weights.
    scores: Vec<CacheLine>,
    /// Positions of the segment that each query sees `(n)`.
    seen: Vec<Range<usize>>,
    /// As `seen`, of a page.
    ranges: Vec<Range<usize>>,
    /// Keys or values of a page in F32.
    wide: Vec<CacheLine>,
    /// The softmax of a segment, and of all so far: see [`Attention::sums`].
    part: Vec<CacheLine>,
    total: Vec<CacheLine>,
}

/// A buffer as at least `len` numbers.
fn floats(lines: &mut Vec<CacheLine>, len: usize) -> &mut [f32] {
    let count = len.div_ceil(size_of::<CacheLine>() / size_of::<f32>());
    if lines.len() < count {
        lines.resize(count, CacheLine([0; size_of::<CacheLine>()]));
    }
    &mut bytemuck::cast_slice_mut(lines)[..len]
}

thread_local! {
    static WORK: std::cell::RefCell<Work> = std::cell::RefCell::default();
}

impl Attention<'_> {
    /// The segments that any of `rows` rows from position `first` on sees.
    pub(super) fn segments(&self, first: usize, rows: usize) -> Range<usize> {
        let oldest = self.window.map_or(0, |window| (first + 1).saturating_sub(window));
        oldest / SEGMENT..(first + rows).div_ceil(SEGMENT)
    }

    /// Numbers that a segment of a task is reduced to: `(n, width)` values, `(n)` maximums, `(n)` sums.
    pub(super) fn sums(&self, rows: usize, width: usize) -> usize {
        rows * self.group * (width + 2)
    }

    /// The whole task. `out (rows, group * head_dim)` takes the result.
    pub(super) fn all(&self, kernel: &Kernel, task: &Task<'_>, out: &mut [f32]) {
        WORK.with_borrow_mut(|work| {
            let sums = self.sums(task.rows, task.session.shape.width);
            let (mut part, mut total) = (std::mem::take(&mut work.part), std::mem::take(&mut work.total));
            let (a_part, so_far) = (floats(&mut part, sums), floats(&mut total, sums));
            self.begin(task, so_far);
            self.prepare(task, work);
            for segment in self.segments(task.first, task.rows) {
                self.segment(kernel, task, segment, work, a_part);
                self.join(kernel, task, segment, a_part, so_far);
            }
            finish(task, so_far, out);
            (work.part, work.total) = (part, total);
        });
    }

    /// Only some segments of a task. `parts (segments, stride)` takes their sums.
    pub(super) fn some(
        &self,
        kernel: &Kernel,
        task: &Task<'_>,
        segments: Range<usize>,
        parts: &mut [f32],
        stride: usize,
    ) {
        WORK.with_borrow_mut(|work| {
            let sums = self.sums(task.rows, task.session.shape.width);
            self.prepare(task, work);
            for (segment, part) in segments.zip(parts.chunks_exact_mut(stride)) {
                self.segment(kernel, task, segment, work, &mut part[..sums]);
            }
        });
    }

    /// The result of a task from the sums of all its segments, `parts (segments, stride)`.
    pub(super) fn combine(&self, kernel: &Kernel, task: &Task<'_>, parts: &[f32], stride: usize, out: &mut [f32]) {
        WORK.with_borrow_mut(|work| {
            let sums = self.sums(task.rows, task.session.shape.width);
            let so_far = floats(&mut work.total, sums);
            self.begin(task, so_far);
            for (segment, part) in self.segments(task.first, task.rows).zip(parts.chunks_exact(stride)) {
                self.join(kernel, task, segment, &part[..sums], so_far);
            }
            finish(task, so_far, out);
        });
    }

    /// A softmax over nothing yet.
    fn begin(&self, task: &Task<'_>, so_far: &mut [f32]) {
        let (n, width) = (task.rows * self.group, task.session.shape.width);
        so_far.fill(0.0);
        so_far[n * width..][..n].fill(f32::NEG_INFINITY);
    }

    /// Gathers the queries.
    fn prepare(&self, task: &Task<'_>, work: &mut Work) {
        let width = self.group * task.session.shape.head_dim;
        work.queries.clear();
        for row in task.queries.chunks(task.stride).take(task.rows) {
            work.queries.extend_from_slice(&row[..width]);
        }
    }

    /// Rows are in order of position, so the queries that see anything from `start` on are the last ones, from this one.
    fn skip(&self, task: &Task<'_>, start: usize) -> usize {
        start.saturating_sub(task.first) * self.group
    }

    /// Reduces a segment into `part`. That of queries that come before the segment stays unspecified.
    fn segment(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, work: &mut Work, part: &mut [f32]) {
        let shape = &task.session.shape;
        let (dim, width, n) = (shape.head_dim, shape.width, task.rows * self.group);
        let start = segment * SEGMENT;
        let end = (task.first + task.rows).min(start + SEGMENT);
        let skip = self.skip(task, start);
        let all_scores = floats(&mut work.scores, n * SEGMENT);
        work.seen.clear();
        work.seen.extend((0..n).map(|q| {
            let beyond = task.first + q / self.group + 1;
            let seen = beyond.saturating_sub(start).min(SEGMENT);
            self.window.map_or(0, |window| beyond.saturating_sub(start + window)).min(seen)..seen
        }));
        // The pages with the queries that see something of them: not those before it, nor those whose window is past it.
        let session = task.session;
        let pages = session.pages[start / PAGE..end.div_ceil(PAGE)].iter().enumerate().map(|(i, page)| {
            let from = skip.max(self.skip(task, start + i * PAGE));
            (i * PAGE, from, page.head(shape, self.layer, task.head))
        });
        let to = |from: usize, seen: &[Range<usize>], at: usize| {
            from + seen[from..].iter().take_while(|seen| seen.start < at + PAGE).count()
        };

        for (at, from, Head { keys, scales, .. }) in pages.clone() {
            let to = to(from, &work.seen, at);
            let mut factors = [self.scale; PAGE];
            if let Some([scales, _]) = scales {
                kernel.multiply(&mut factors, scales);
            }
            let keys = widened(kernel, keys, PAGE * dim, to - from, &mut work.wide);
            let scores = &mut all_scores[from * SEGMENT + at..];
            kernel.scores(&work.queries[from * dim..to * dim], dim, keys, &factors, scores, SEGMENT);
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
        for (at, from, Head { values: numbers, scales, .. }) in pages {
            let to = to(from, &work.seen, at);
            work.ranges.clear();
            let range = |seen: &Range<usize>| seen.start.max(at) - at..seen.end.min(at + PAGE) - at;
            work.ranges.extend(work.seen[from..to].iter().map(range));
            let weights = &mut all_scores[from * SEGMENT + at..];
            if let Some([_, scales]) = scales {
                for (weights, range) in weights.chunks_mut(SEGMENT).zip(&work.ranges) {
                    kernel.multiply(&mut weights[range.clone()], &scales[range.clone()]);
                }
            }
            let numbers = widened(kernel, numbers, PAGE * width, to - from, &mut work.wide);
            let out = &mut values[from * width..to * width];
            kernel.weighted_sum(weights, SEGMENT, &work.ranges, numbers, width, out);
        }
    }

    /// Adds a segment to what came before it.
    fn join(&self, kernel: &Kernel, task: &Task<'_>, segment: usize, part: &[f32], total: &mut [f32]) {
        let (n, width) = (task.rows * self.group, task.session.shape.width);
        let skip = self.skip(task, segment * SEGMENT);
        let (values, max) = total.split_at_mut(n * width);
        let (max, sum) = max.split_at_mut(n);
        let so_far = SoftmaxMut { max: &mut max[skip..], sum: &mut sum[skip..], values: &mut values[skip * width..] };
        let (values, max) = part.split_at(n * width);
        let (max, sum) = max.split_at(n);
        kernel.join(so_far, Softmax { max: &max[skip..], sum: &sum[skip..], values: &values[skip * width..] });
    }
}

/// The numbers of a page: as they are for few queries, converted to F32 once for many.
fn widened<'a>(
    kernel: &Kernel,
    numbers: KvSlice<'a>,
    count: usize,
    queries: usize,
    wide: &'a mut Vec<CacheLine>,
) -> KvSlice<'a> {
    if queries < MANY || matches!(numbers, KvSlice::F32(_)) {
        return numbers;
    }
    let wide = floats(wide, count);
    kernel.widen(numbers, wide);
    KvSlice::F32(wide)
}

/// Divides the values by their sums.
fn finish(task: &Task<'_>, total: &[f32], out: &mut [f32]) {
    let (dim, width) = (task.session.shape.head_dim, task.session.shape.width);
    let n = total.len() / (width + 2);
    let (values, sums) = (&total[..n * width], &total[n * (width + 1)..]);
    for ((out, values), sum) in out.chunks_exact_mut(dim).zip(values.chunks_exact(width)).zip(sums) {
        // A row always sees itself, so the sum is at least 1 unless a NaN came in, which goes on.
        let inverse = 1.0 / sum;
        out.iter_mut().zip(values).for_each(|(out, x)| *out = x * inverse);
    }
}
