//! Multi-head attention over keys and values in the cache (Vaswani et al. 2017, arXiv 1706.03762), with groups of query
//! heads that share a key/value head (Ainslie et al. 2023, arXiv 2305.13245).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::context::MixerContext;
use super::positions::Positions;
use super::segments::{CacheAttention, Task};
use crate::error::Result;
use crate::kernels::PAGE;
use crate::model::arch::Position;
use crate::model::batch::Batch;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, LayerConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::HeadNorm;
use crate::model::pass::{TASK_ROWS, TASKS};
use crate::model::weights::loader::{Loader, Part, RowMap};

/// Queries of one head that a task takes together, as long as there are tasks for all threads: enough that converting
/// keys and values costs little, few enough that their scores stay in the second-level cache.
const TASK_QUERIES: usize = 128;
/// The largest number of rows that a task takes.
const SPAN_ROWS: usize = 64;

/// Rows that a span may have when there are `rows` rows in all, so that there are tasks for all threads.
pub(in crate::model) fn span_rows(config: &Config, threads: usize, rows: usize) -> usize {
    let enough = rows * config.kv_heads / (TASKS * threads);
    (TASK_QUERIES * config.kv_heads / config.heads).min(enough).clamp(1, SPAN_ROWS)
}

/// The weights of attention. Norms that a family does not have are `None`.
#[derive(Debug)]
pub(in crate::model) struct Attention {
    /// Query, key and value.
    qkv: Linear,
    q_norm: Option<HeadNorm>,
    k_norm: Option<HeadNorm>,
    /// `(hidden, heads * head_dim)`
    out_proj: Linear,
}

/// The widest rows, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    qkv: usize,
}

/// The workspace of attention.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `(2, rows, pairs)`: cosines for layers without and with a window.
    cos: Buffer,
    /// `(2, rows, pairs)`: sines, likewise.
    sin: Buffer,
    /// `(rows, width of qkv)`: query, key and value.
    qkv: Buffer,
    /// `(tasks)` rows of the widest norm of queries and keys.
    norms: Vec<f32>,
    /// `(spans, kv_heads, segments, sums)`: softmax of parts of the cache, where several tasks share a span.
    parts: Buffer,
    /// `(spans, kv_heads, longest span, heads per kv_head * head_dim)`: the result, where a span has several rows.
    attended: Buffer,
}

impl Workspace {
    pub(super) fn reserve(
        &mut self,
        widths: &Widths,
        config: &Config,
        positions: &Positions,
        batch: &Batch,
    ) -> Result<()> {
        let (rows, spans) = (batch.rows.len(), batch.spans.len());
        let angles = 2 * rows * positions.ropes[0].pairs();
        self.cos.reserve(angles)?;
        self.sin.reserve(angles)?;
        self.qkv.reserve(rows * widths.qkv)?;
        self.attended.reserve(spans * batch.longest_span() * config.heads * config.head_dim)
    }

    /// Computes the angles of all rows.
    pub(super) fn prepare(&mut self, positions: &Positions, batch: &Batch) {
        let (rows, pairs) = (&batch.rows, positions.ropes[0].pairs());
        self.cos.resize(2 * rows.len() * pairs);
        self.sin.resize(2 * rows.len() * pairs);
        if pairs == 0 {
            return;
        }
        let angles = self.cos.chunks_mut(pairs).zip(self.sin.chunks_mut(pairs));
        for (i, (cos, sin)) in angles.enumerate() {
            positions.ropes[i / rows.len()].angles(rows[i % rows.len()].position, cos, sin);
        }
    }
}

impl Attention {
    /// Reads the weights of layer `index`.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Attention> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        Ok(Attention {
            qkv: load_qkv(loader, config, index)?,
            q_norm: loader.head_norm(&name("attn_q_norm"), config, config.heads)?,
            k_norm: loader.head_norm(&name("attn_k_norm"), config, config.kv_heads)?,
            out_proj: load_out_proj(loader, config, index)?,
        })
    }

    /// Reads query, key and value of layer `index` again.
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.qkv = load_qkv(loader, config, index)?;
        Ok(())
    }

    /// Reads the output projection of layer `index` again.
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.out_proj = load_out_proj(loader, config, index)?;
        Ok(())
    }

    /// Query, key and value.
    pub(super) fn in_proj(&self) -> &Linear {
        &self.qkv
    }

    /// The output projection.
    pub(super) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let Attention { qkv, q_norm, k_norm, out_proj } = self;
        hasher.optional(q_norm.as_ref(), FingerprintHasher::head_norm);
        hasher.optional(k_norm.as_ref(), FingerprintHasher::head_norm);
        hasher.linear(qkv);
        hasher.linear(out_proj);
    }

    pub(super) fn widen(&self, widths: &mut Widths) {
        widths.qkv = widths.qkv.max(self.qkv.width());
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, heads * head_dim)`.
    pub(super) fn mix(&self, context: &mut MixerContext<'_, '_>, input: &mut LinearInput, workspace: &mut Workspace) {
        // Query, key and value.
        context.pass.linear(&self.qkv, input, &mut workspace.qkv);
        // Positions, and norms of heads.
        self.rotate(context, workspace);
        // Keys and values to the cache.
        self.store(context, &workspace.qkv);
        // Softmax over the cache.
        self.softmax(context, workspace, input);
    }

    /// Clamps, normalizes and rotates queries and keys in place, as far as the family does.
    fn rotate(&self, context: &MixerContext<'_, '_>, workspace: &mut Workspace) {
        let (pass, config) = (context.pass, context.pass.config);
        let (dim, width, kernel) = (config.head_dim, self.qkv.width(), pass.kernel);
        let LayerConfig { window, rotated, .. } = config.layers[context.layer];
        let pairs = if rotated { context.positions.ropes[0].pairs() } else { 0 };
        if pairs == 0 && self.q_norm.is_none() && self.k_norm.is_none() && config.clamp_qkv.is_none() {
            return;
        }
        // The angles of layers with a window come second.
        let offset = if window.is_some() { context.batch.rows.len() } else { 0 };
        let (cos, sin) = (&workspace.cos, &workspace.sin);
        let widest = [&self.q_norm, &self.k_norm].into_iter().flatten().map(|norm| norm.width).max().unwrap_or(0);
        let norms = &mut workspace.norms;
        pass.scope.for_each_chunk_with(&mut workspace.qkv, TASK_ROWS * width, norms, widest, |i, chunk, buffer| {
            for (r, row) in chunk.chunks_mut(width).enumerate() {
                if let Some(bound) = config.clamp_qkv {
                    row.iter_mut().for_each(|x| *x = x.clamp(-bound, bound));
                }
                let at = (offset + i * TASK_ROWS + r) * pairs;
                let (queries, keys) = row.split_at_mut(self.qkv.start(1));
                let parts = [(queries, config.heads, &self.q_norm), (keys, config.kv_heads, &self.k_norm)];
                for (part, heads, norm) in parts {
                    let part = &mut part[..heads * dim];
                    if let Some(norm) = norm {
                        norm.apply(config, kernel, part, buffer);
                    }
                    if pairs > 0 {
                        for head in part.chunks_exact_mut(dim) {
                            kernel.rope(&mut head[..2 * pairs], &cos[at..][..pairs], &sin[at..][..pairs]);
                        }
                    }
                }
            }
        });
    }

    /// Stores keys and values in the pages of their sessions, a task per page.
    fn store(&self, context: &mut MixerContext<'_, '_>, qkv: &[f32]) {
        let (pass, config, layer, rows) = (context.pass, context.pass.config, context.layer, &context.batch.rows);
        let (keys, values, dim, width) = (self.qkv.start(1), self.qkv.start(2), config.head_dim, self.qkv.width());
        let mut row = 0;
        for (i, input) in context.inputs.iter_mut().enumerate() {
            let count = rows[row..].iter().take_while(|row| row.input == i).count();
            if count == 0 {
                continue;
            }
            let (first, own) = (rows[row].position, &qkv[row * width..]);
            let (start, shape) = (first / PAGE, input.session.shape);
            let overflow = AtomicUsize::new(usize::MAX);
            let pages = &mut input.session.pages[start..(first + count).div_ceil(PAGE)];
            pass.scope.for_each_chunk(pages, 1, |p, pages| {
                let from = first.max((start + p) * PAGE);
                let to = (first + count).min((start + p + 1) * PAGE);
                let page =
                    pages.first_mut().and_then(Arc::get_mut).expect("`Session::reserve` has made the page unshared");
                for position in from..to {
                    let qkv = &own[(position - first) * width..][..width];
                    for head in 0..config.kv_heads {
                        let [key, value] = [keys, values].map(|start| &qkv[start + head * dim..][..dim]);
                        if !page.store(pass.kernel, &shape, layer, head, position % PAGE, key, value) {
                            overflow.fetch_min(position, Ordering::Relaxed);
                        }
                    }
                }
            });
            input.session.overflowed_at(overflow.into_inner());
            row += count;
        }
    }

    /// Attention of all rows into `out (rows, heads * head_dim)`: a task per span and key/value head, or several that
    /// share the segments of the cache where one each would be too few for all threads.
    fn softmax(&self, context: &MixerContext<'_, '_>, workspace: &mut Workspace, out: &mut LinearInput) {
        let (pass, config, kernel) = (context.pass, context.pass.config, context.pass.kernel);
        let (dim, kv_heads, group) = (config.head_dim, config.kv_heads, config.heads / config.kv_heads);
        let (columns, width) = (config.heads * dim, self.qkv.width());
        let attention = CacheAttention {
            layer: context.layer,
            group,
            scale: config.attention_scale,
            cap: config.attention_cap,
            window: config.layers[context.layer].window,
            slopes: &context.positions.slopes,
        };
        let (rows, spans, inputs) = (&context.batch.rows, &context.batch.spans, &*context.inputs);
        let qkv = &workspace.qkv;
        let task = |task: usize| {
            let (span, head) = (spans[task / kv_heads], task % kv_heads);
            let (session, queries) = (&*inputs[span.input].session, &qkv[span.row * width + head * group * dim..]);
            Task { session, head, first: span.position, rows: span.len, queries, stride: width }
        };
        out.resize(rows.len(), columns);
        let longest = context.batch.longest_span();
        let most = spans.iter().map(|span| attention.segments(span.position, span.len).len()).max().unwrap_or(0);
        let tasks = spans.len() * kv_heads;
        // Segments per task, and tasks per span and head.
        let share = most.div_ceil((TASKS * pass.threads).div_ceil(tasks));
        let pieces = most.div_ceil(share);
        let sums = attention.sums(longest, inputs[0].session.shape.width);
        if pieces > 1 {
            workspace.parts.resize(tasks * pieces * share * sums);
            pass.scope.for_each_chunk(&mut workspace.parts, share * sums, |i, parts| {
                let (task, piece) = (task(i / pieces), i % pieces);
                let segments = attention.segments(task.first, task.rows);
                let first = segments.start + piece * share;
                attention.some(kernel, &task, first..segments.end.min(first + share), parts, sums);
            });
        }
        let parts = &workspace.parts;
        let finish = |i: usize, out: &mut [f32]| {
            if pieces > 1 {
                attention.combine(kernel, &task(i), &parts[i * pieces * share * sums..], sums, out);
            } else {
                attention.all(kernel, &task(i), out);
            }
        };
        if longest == 1 {
            // With one row per span, the results of the tasks in order are the output.
            pass.scope.for_each_chunk(&mut out.values, group * dim, finish);
            return;
        }
        let attended = &mut workspace.attended;
        attended.resize(tasks * longest * group * dim);
        pass.scope.for_each_chunk(attended, longest * group * dim, finish);
        pass.scope.for_each_chunk(&mut out.values, TASK_ROWS * columns, |i, chunk| {
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

/// Query, key and value from three tensors, or from one that holds their rows one after the other.
fn load_qkv(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    let name = |suffix: &str| format!("blk.{index}.{suffix}");
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let (dim, rotary) = (config.head_dim, config.rotary);
    let adjacent = config.family.position == Position::RopeAdjacent;
    // Pairs (2i, 2i + 1) of the file become pairs (i, i + rotary / 2).
    let halves = move |row: usize| match row % dim {
        i if !adjacent || i >= rotary => row,
        i if i < rotary / 2 => row - i + 2 * i,
        i => row - i + 2 * (i - rotary / 2) + 1,
    };
    let fused = loader.has(&name("attn_qkv.weight"));
    let (k, v) = if fused { (queries, queries + keys) } else { (0, 0) };
    let (q_order, k_order, v_order) = (halves, move |row| k + halves(row), move |row| v + row);
    let part = |suffix: &str, rows: usize, order| Part {
        name: name(if fused { "attn_qkv" } else { suffix }),
        rows,
        order,
        of: if fused { queries + 2 * keys } else { rows },
        stack: None,
    };
    let parts = [
        part("attn_q", queries, &q_order as RowMap<'_>),
        part("attn_k", keys, &k_order),
        part("attn_v", keys, &v_order),
    ];
    loader.linear(&parts, config.hidden)
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    let part = Part::new(format!("blk.{index}.attn_output"), config.hidden);
    loader.linear(&[part], config.heads * config.head_dim)
}
