//! The parts that all kinds of attention share: keys and values go to the cache, and queries attend to it, a task per span
//! and group of heads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::context::MixerContext;
use super::segments::{CacheAttention, Task};
use crate::kernels::PAGE;
use crate::model::arch::MixerKind;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, LayerConfig};
use crate::model::linear::LinearInput;
use crate::model::pass::{TASK_ROWS, TASKS};
use crate::model::state::cache::LayerShape;

/// Queries of one head that a task takes together, as long as there are tasks for all threads: enough that converting
/// keys and values costs little, few enough that their scores stay in the second-level cache.
const TASK_QUERIES: usize = 128;
/// The largest number of rows that a task takes.
const SPAN_ROWS: usize = 64;
/// The largest number of heads that a task takes where all share one key.
const TASK_HEADS: usize = 16;

/// Query heads that a task takes: those of a key/value head, or fewer where all heads share one.
pub(super) fn group(layer: &LayerConfig) -> usize {
    let group = layer.heads / layer.kv_heads;
    if layer.kind.mixer == MixerKind::LatentAttention {
        return (1..=TASK_HEADS.min(group)).rev().find(|part| group.is_multiple_of(*part)).unwrap_or(1);
    }
    group
}

/// Attention of the current layer to the keys and values of layer `source`, without slopes and sinks. `None` for a step
/// without inputs.
pub(super) fn attention(context: &MixerContext<'_, '_>, source: usize) -> Option<CacheAttention<'static>> {
    let config = context.pass.config;
    let layer = &config.layers[context.layer];
    Some(CacheAttention {
        shape: *context.inputs.first()?.session.shape.layer(source),
        group: group(layer),
        scale: config.attention_scale,
        cap: config.attention_cap,
        causal: config.causal,
        reach: layer.reach(),
        slopes: &[],
        sinks: &[],
    })
}

/// Rows that a span may have when there are `rows` rows in all, so that there are tasks for all threads.
pub(in crate::model) fn span_rows(config: &Config, threads: usize, rows: usize) -> usize {
    let span = |layer: &LayerConfig| {
        let group = group(layer);
        (TASK_QUERIES / group).min(rows * (layer.heads / group) / (TASKS * threads))
    };
    let attention = config.layers.iter().filter(|layer| layer.kv_heads > 0);
    attention.map(span).min().unwrap_or(SPAN_ROWS).clamp(1, SPAN_ROWS)
}

/// Rows of several heads inside wider rows.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    /// `(rows, stride)`
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
    /// Where the heads start in a row.
    pub(super) start: usize,
}

impl<'a> HeadRows<'a> {
    /// The numbers of `row` from the heads on.
    fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.stride + self.start..]
    }

    fn head(&self, row: usize, head: usize, width: usize) -> &'a [f32] {
        &self.row(row)[head * width..][..width]
    }
}

/// Stores keys and values in the pages of their sessions, a task per page.
pub(super) fn store(context: &mut MixerContext<'_, '_>, keys: HeadRows<'_>, values: HeadRows<'_>) {
    let (pass, layer, rows) = (context.pass, context.layer, &context.batch.rows);
    let mut row = 0;
    for (i, input) in context.inputs.iter_mut().enumerate() {
        let count = rows[row..].iter().take_while(|row| row.input == i).count();
        if count == 0 {
            continue;
        }
        let (first, first_row) = (rows[row].position, row);
        let start = first / PAGE;
        let layer = *input.session.shape.layer(layer);
        let LayerShape { kv_heads, head_dim, value_dim, .. } = layer;
        let overflow = AtomicUsize::new(usize::MAX);
        let pages = &mut input.session.pages[start..(first + count).div_ceil(PAGE)];
        pass.scope.for_each_chunk(pages, 1, |p, pages| {
            let from = first.max((start + p) * PAGE);
            let to = (first + count).min((start + p + 1) * PAGE);
            let mut page = pages[0].layer_mut(&layer);
            for position in from..to {
                let row = first_row + position - first;
                for head in 0..kv_heads {
                    let (key, value) = (keys.head(row, head, head_dim), values.head(row, head, value_dim));
                    if !page.store(pass.kernel, head, position % PAGE, key, value) {
                        overflow.fetch_min(position, Ordering::Relaxed);
                    }
                }
            }
        });
        input.session.overflowed_at(overflow.into_inner());
        row += count;
    }
}

/// The workspace of queries that attend to the cache.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `(spans, tasks of a row, segments, sums)`: softmax of parts of the cache, where several tasks share a span.
    parts: Buffer,
    /// `(spans, tasks of a row, longest span, heads of a task * value_dim)`: the result, where a span has several rows.
    attended: Buffer,
}

impl Workspace {
    /// Allocates memory for results of `width` numbers in each of `rows` rows.
    pub(super) fn reserve(&mut self, rows: usize, width: usize) -> crate::error::Result<()> {
        self.attended.reserve(rows * width)
    }
}

/// Attention of all rows into `out (rows, heads * value_dim)`: a task per span and group of heads, or several that share
/// the segments of the cache where one each would be too few for all threads.
pub(super) fn softmax(
    context: &MixerContext<'_, '_>,
    attention: &CacheAttention<'_>,
    queries: HeadRows<'_>,
    heads: usize,
    workspace: &mut Workspace,
    out: &mut LinearInput,
) {
    let (pass, kernel, group) = (context.pass, context.pass.kernel, attention.group);
    let LayerShape { kv_heads, head_dim, value_dim, .. } = attention.shape;
    // Tasks of a row, and query heads per key/value head.
    let (count, per_head) = (heads / group, heads / kv_heads);
    let columns = heads * value_dim;
    let (rows, spans, inputs) = (&context.batch.rows, &context.batch.spans, &*context.inputs);
    let task = |task: usize| {
        let (span, query) = (spans[task / count], task % count * group);
        let own = &queries.row(span.row)[query * head_dim..];
        let session = &*inputs[span.input].session;
        let (head, stride) = (query / per_head, queries.stride);
        Task { session, head, query, first: span.position, rows: span.len, end: span.end, queries: own, stride }
    };
    out.resize(rows.len(), columns);
    let longest = context.batch.longest_span();
    let most = spans.iter().map(|span| attention.segments(span.position, span.len, span.end).len()).max().unwrap_or(0);
    let tasks = spans.len() * count;
    // Segments per task, and tasks per span and group.
    let share = most.div_ceil((TASKS * pass.threads).div_ceil(tasks));
    let pieces = most.div_ceil(share);
    let sums = attention.sums(longest);
    let Workspace { parts, attended } = workspace;
    if pieces > 1 {
        parts.resize(tasks * pieces * share * sums);
        pass.scope.for_each_chunk(parts, share * sums, |i, parts| {
            let (task, piece) = (task(i / pieces), i % pieces);
            let segments: Range<usize> = attention.segments(task.first, task.rows, task.end);
            let first = segments.start + piece * share;
            attention.some(kernel, &task, first..segments.end.min(first + share), parts, sums);
        });
    }
    let parts = &*parts;
    let finish = |i: usize, out: &mut [f32]| {
        if pieces > 1 {
            attention.combine(kernel, &task(i), &parts[i * pieces * share * sums..], sums, out);
        } else {
            attention.all(kernel, &task(i), out);
        }
    };
    let width = group * value_dim;
    if longest == 1 {
        // With one row per span, the results of the tasks in order are the output.
        pass.scope.for_each_chunk(&mut out.values, width, finish);
        return;
    }
    attended.resize(tasks * longest * width);
    pass.scope.for_each_chunk(attended, longest * width, finish);
    let attended = &*attended;
    pass.scope.for_each_chunk(&mut out.values, TASK_ROWS * columns, |i, chunk| {
        for (r, out) in chunk.chunks_mut(columns).enumerate() {
            let row = i * TASK_ROWS + r;
            let span = rows[row].span;
            for (task, out) in out.chunks_mut(width).enumerate() {
                let at = ((span * count + task) * longest + row - spans[span].row) * width;
                out.copy_from_slice(&attended[at..][..width]);
            }
        }
    });
}
