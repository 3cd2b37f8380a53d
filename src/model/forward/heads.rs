//! What a pass does with heads: queries and keys normalized and rotated, keys and values into the cache, attention over it.

use std::sync::Arc;

use super::{Input, Pass, Scratch, TASK_ROWS, TASKS};
use crate::kernels::PAGE;
use crate::model::attention::{Attention, Task};
use crate::model::config::LayerConfig;
use crate::model::weights::Layer;

impl Pass<'_> {
    /// Bounds, normalizes and rotates queries and keys in place, as the family does.
    pub(super) fn heads(&self, s: &mut Scratch, layer: &Layer, index: usize) {
        let (model, config) = (self.model, &self.model.config);
        let (dim, width) = (config.head_dim, layer.qkv.width());
        let LayerConfig { window, rotated } = config.layers[index];
        let pairs = if rotated { self.model.ropes[0].pairs() } else { 0 };
        if pairs == 0 && layer.q_norm.is_none() && layer.k_norm.is_none() && config.clamp_qkv.is_none() {
            return;
        }
        // Layers with a window have angles of their own, which come second.
        let offset = if window.is_some() { s.rows.len() } else { 0 };
        let (cos, sin) = (&s.cos, &s.sin);
        let widest = [&layer.q_norm, &layer.k_norm].into_iter().flatten().map(|norm| norm.width).max().unwrap_or(0);
        self.scope.for_each_chunk_with(&mut s.qkv, TASK_ROWS * width, &mut s.room, widest, |i, chunk, room| {
            for (r, row) in chunk.chunks_mut(width).enumerate() {
                if let Some(bound) = config.clamp_qkv {
                    row.iter_mut().for_each(|x| *x = x.clamp(-bound, bound));
                }
                let at = (offset + i * TASK_ROWS + r) * pairs;
                let (queries, keys) = row.split_at_mut(layer.qkv.start(1));
                let parts = [(queries, config.heads, &layer.q_norm), (keys, config.kv_heads, &layer.k_norm)];
                for (part, heads, norm) in parts {
                    let part = &mut part[..heads * dim];
                    if let Some(norm) = norm {
                        model.head_norm(part, norm, room);
                    }
                    if pairs > 0 {
                        for head in part.chunks_exact_mut(dim) {
                            self.kernel.rope(&mut head[..2 * pairs], &cos[at..][..pairs], &sin[at..][..pairs]);
                        }
                    }
                }
            }
        });
    }

    /// Stores keys and values in the pages of their sessions, a page to a task.
    pub(super) fn store(&self, s: &Scratch, layer: &Layer, index: usize, inputs: &mut [Input<'_>]) {
        let (config, shape, width) = (&self.model.config, &self.model.shape, layer.qkv.width());
        let (keys, values, dim) = (layer.qkv.start(1), layer.qkv.start(2), config.head_dim);
        let mut row = 0;
        for (i, input) in inputs.iter_mut().enumerate() {
            let count = s.rows[row..].iter().take_while(|row| row.input == i).count();
            if count == 0 {
                continue;
            }
            let (first, own) = (s.rows[row].position, &s.qkv[row * width..]);
            let start = first / PAGE;
            let pages = &mut input.session.pages[start..(first + count).div_ceil(PAGE)];
            self.scope.for_each_chunk(pages, 1, |p, pages| {
                let from = first.max((start + p) * PAGE);
                let to = (first + count).min((start + p + 1) * PAGE);
                let page =
                    pages.first_mut().and_then(Arc::get_mut).expect("a page that `reserve` has made the session's own");
                for position in from..to {
                    let qkv = &own[(position - first) * width..][..width];
                    for head in 0..config.kv_heads {
                        let [key, value] = [keys, values].map(|start| &qkv[start + head * dim..][..dim]);
                        page.store(self.kernel, shape, index, head, position % PAGE, key, value);
                    }
                }
            });
            row += count;
        }
    }

    /// Attention of all rows into `input (rows, heads * head_dim)`: a task a span of rows and key/value head, or several,
    /// each with some of the cache's segments, where those would be too few for all threads.
    pub(super) fn attend(&self, s: &mut Scratch, layer: &Layer, index: usize, inputs: &[Input<'_>]) {
        let config = &self.model.config;
        let (dim, kv_heads, group) = (config.head_dim, config.kv_heads, config.heads / config.kv_heads);
        let (columns, width) = (config.heads * dim, layer.qkv.width());
        let attention = Attention {
            layer: index,
            group,
            scale: config.attention_scale,
            cap: config.attention_cap,
            window: config.layers[index].window,
            slopes: &self.model.slopes,
        };
        let (rows, spans, qkv) = (&s.rows, &s.spans, &s.qkv);
        let task = |task: usize| {
            let (span, head) = (spans[task / kv_heads], task % kv_heads);
            let (session, queries) = (&*inputs[span.input].session, &qkv[span.row * width + head * group * dim..]);
            Task { session, head, first: span.position, rows: span.len, queries, stride: width }
        };
        s.input.resize(rows.len(), columns);
        let longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
        let most = spans.iter().map(|span| attention.segments(span.position, span.len).len()).max().unwrap_or(0);
        let tasks = spans.len() * kv_heads;
        // Segments of a task.
        let share = most.div_ceil((TASKS * self.model.threads()).div_ceil(tasks));
        let sums = attention.sums(longest, self.model.shape.width);
        let pieces = most.div_ceil(share);
        if pieces > 1 {
            s.parts.resize(tasks * pieces * share * sums, 0.0);
            self.scope.for_each_chunk(&mut s.parts, share * sums, |i, parts| {
                let (task, piece) = (task(i / pieces), i % pieces);
                let segments = attention.segments(task.first, task.rows);
                let first = segments.start + piece * share;
                attention.some(self.kernel, &task, first..segments.end.min(first + share), parts, sums);
            });
        }
        let parts = &s.parts;
        let finish = |i: usize, out: &mut [f32]| {
            if pieces > 1 {
                attention.combine(self.kernel, &task(i), &parts[i * pieces * share * sums..], sums, out);
            } else {
                attention.all(self.kernel, &task(i), out);
            }
        };
        if longest == 1 {
            // One row a span: the tasks in order are the output.
            self.scope.for_each_chunk(&mut s.input.values, group * dim, finish);
            return;
        }
        s.attended.resize(tasks * longest * group * dim, 0.0);
        self.scope.for_each_chunk(&mut s.attended, longest * group * dim, finish);
        let attended = &s.attended;
        self.scope.for_each_chunk(&mut s.input.values, TASK_ROWS * columns, |i, chunk| {
            for (r, out) in chunk.chunks_mut(columns).enumerate() {
                let row = i * TASK_ROWS + r;
                let span = rows[row].span;
                for (head, out) in out.chunks_mut(group * dim).enumerate() {
                    let at = ((span * kv_heads + head) * longest + row - spans[span].row) * group * dim;
                    out.copy_from_slice(&attended[at..][..group * dim]);
                }
            }
        });
    }
}
