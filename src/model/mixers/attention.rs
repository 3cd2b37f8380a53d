//! Multi-head attention over keys and values in the cache (Vaswani et al. 2017, arXiv 1706.03762), with groups of query
//! heads that share a key/value head (Ainslie et al. 2023, arXiv 2305.13245).

use super::context::MixerContext;
use super::heads::{self, HeadRows};
use super::segments::CacheAttention;
use crate::error::Result;
use crate::model::arch::Position;
use crate::model::batch::Batch;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, LayerConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::{HeadNorm, Norm};
use crate::model::pass::TASK_ROWS;
use crate::model::rope;
use crate::model::weights::loader::{Loader, Part, RowMap};

/// The weights of attention. Those that a family does not have are `None`.
#[derive(Debug)]
pub(in crate::model) struct Attention {
    in_proj: InProj,
    q_norm: Option<HeadNorm>,
    k_norm: Option<HeadNorm>,
    v_norm: Option<HeadNorm>,
    /// `(heads)`, or empty: scores that take a share of the softmax without a value.
    sinks: Vec<f32>,
    /// Of the input of the output projection.
    out_norm: Option<Norm>,
    /// `(hidden, heads * value_dim)`
    out_proj: Linear,
}

/// The projection of the input.
#[derive(Debug)]
struct InProj {
    /// Query, key, value and gate, as far as the layer has them.
    linear: Linear,
    /// Where keys start in a row; `None` where the layer reads those of another one.
    keys: Option<usize>,
    /// Where values start in a row; `None` where they are the keys, or those of another layer.
    values: Option<usize>,
    /// Where gates start in a row, and how many there are: one per head, or one per number.
    gates: Option<(usize, usize)>,
}

/// The widest rows, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    in_proj: usize,
    /// Values that are copies of keys.
    copied: usize,
    attended: usize,
}

/// The workspace of attention.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `(rows, width of in_proj)`: query, key, value and gate.
    in_proj: Buffer,
    /// `(rows, values)`: values that are copies of keys.
    copied: Buffer,
    /// `(tasks)` rows of the widest norm or gate.
    rows: Vec<f32>,
    heads: heads::Workspace,
}

impl Workspace {
    pub(super) fn reserve(&mut self, widths: &Widths, batch: &Batch) -> Result<()> {
        let (rows, spans) = (batch.rows.len(), batch.spans.len());
        self.in_proj.reserve(rows * widths.in_proj)?;
        self.copied.reserve(rows * widths.copied)?;
        self.heads.reserve(spans * batch.longest_span(), widths.attended)
    }
}

impl Attention {
    /// Reads the weights of layer `index`.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Attention> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let layer = &config.layers[index];
        let (heads, kv_heads, dim, eps) = (layer.heads, layer.kv_heads, layer.head_dim, config.norm_eps);
        let unweighted = || (config.unweighted_head_norms && layer.rotated).then(|| HeadNorm::unweighted(dim, eps));
        let own_keys = layer.shares.is_none();
        if !own_keys {
            // Converters keep the tensors of a layer that takes its keys and values from another one.
            for unused in ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight", "attn_k.bias", "attn_v.bias"] {
                loader.ignore(&name(unused));
            }
        }
        // Weights of norms move with the rows of queries and keys.
        let order = |i: usize| if i < layer.rotary { halves_of_pairs(i, layer.rotary) } else { i };
        let adjacent = config.family.position == Position::RopeAdjacent;
        let head_norm = |suffix: &str, heads: usize| {
            let norm = loader.head_norm(&name(suffix), config, heads, dim)?;
            Ok(if adjacent { norm.map(|norm| norm.reordered(dim, order)) } else { norm })
        };
        let k_norm = if own_keys { head_norm("attn_k_norm", kv_heads)? } else { None };
        let v_norm = (config.family.quirks.value_norm && own_keys).then(|| HeadNorm::unweighted(layer.value_dim, eps));
        let sinks = name("attn_sinks.weight");
        Ok(Attention {
            in_proj: InProj::load(loader, config, index)?,
            q_norm: head_norm("attn_q_norm", heads)?.or_else(unweighted),
            k_norm: if own_keys { k_norm.or_else(unweighted) } else { None },
            v_norm,
            sinks: if loader.has(&sinks) { loader.vector(&sinks, heads)? } else { Vec::new() },
            out_norm: loader.norm_of(&name("attn_sub_norm"), config, heads * layer.value_dim, eps)?,
            out_proj: load_out_proj(loader, config, index)?,
        })
    }

    /// Reads query, key, value and gate of layer `index` again.
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.in_proj = InProj::load(loader, config, index)?;
        Ok(())
    }

    /// Reads the output projection of layer `index` again.
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.out_proj = load_out_proj(loader, config, index)?;
        Ok(())
    }

    /// Query, key, value and gate.
    pub(super) fn in_proj(&self) -> &Linear {
        &self.in_proj.linear
    }

    /// The output projection.
    pub(super) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten. The norm of values has no weights.
        let Attention { in_proj, q_norm, k_norm, v_norm: _, sinks, out_norm, out_proj } = self;
        hasher.optional(q_norm.as_ref(), FingerprintHasher::head_norm);
        hasher.optional(k_norm.as_ref(), FingerprintHasher::head_norm);
        hasher.linear(&in_proj.linear);
        hasher.linear(out_proj);
        // Hashed only where they exist, so that models without them keep their fingerprints.
        if !sinks.is_empty() {
            hasher.bytes(bytemuck::cast_slice(sinks));
        }
        if let Some(norm) = out_norm {
            hasher.norm(norm);
        }
    }

    pub(super) fn widen(&self, layer: &LayerConfig, widths: &mut Widths) {
        widths.in_proj = widths.in_proj.max(self.in_proj.linear.width());
        if self.in_proj.values_are_keys() {
            widths.copied = widths.copied.max(layer.kv_heads * layer.value_dim);
        }
        widths.attended = widths.attended.max(layer.heads * layer.value_dim);
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, heads * value_dim)`.
    pub(super) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        angles: &rope::Angles,
        workspace: &mut Workspace,
    ) {
        let layer = context.pass.config.layers[context.layer];
        // Query, key, value and gate.
        context.pass.linear(&self.in_proj.linear, input, &mut workspace.in_proj);
        // Positions, and norms of heads.
        self.values(context, &layer, workspace);
        self.rotate(context, &layer, angles, workspace);
        // Keys and values to the cache.
        let stride = self.in_proj.linear.width();
        if let Some(start) = self.in_proj.keys {
            let values = match self.in_proj.values {
                Some(start) => HeadRows { values: &workspace.in_proj, stride, start },
                None => HeadRows { values: &workspace.copied, stride: layer.kv_heads * layer.value_dim, start: 0 },
            };
            heads::store(context, HeadRows { values: &workspace.in_proj, stride, start }, values);
        }
        // Softmax over the cache.
        let source = layer.shares.unwrap_or(context.layer);
        let Some(attention) = heads::attention(context, source) else { return };
        let attention = CacheAttention { slopes: &context.positions.slopes, sinks: &self.sinks, ..attention };
        let queries = HeadRows { values: &workspace.in_proj, stride, start: 0 };
        heads::softmax(context, &attention, queries, layer.heads, &mut workspace.heads, input);
        // Gate, and norm of the result.
        self.gate(context, &layer, workspace, input);
        if let Some(norm) = &self.out_norm {
            context.pass.norm_rows(&mut input.values, norm, &mut workspace.rows);
        }
    }

    /// Copies keys to the values where they are both, and normalizes values.
    fn values(&self, context: &MixerContext<'_, '_>, layer: &LayerConfig, workspace: &mut Workspace) {
        let (pass, stride, width) = (context.pass, self.in_proj.linear.width(), layer.kv_heads * layer.value_dim);
        let Workspace { in_proj, copied, rows, .. } = workspace;
        let size = self.v_norm.as_ref().map_or(0, |norm| norm.width);
        let normalize = |values: &mut [f32], buffer: &mut [f32]| {
            if let Some(norm) = &self.v_norm {
                norm.apply(pass.config, pass.kernel, values, buffer);
            }
        };
        if let (Some(keys), true) = (self.in_proj.keys, self.in_proj.values_are_keys()) {
            copied.resize(context.batch.rows.len() * width);
            let source = &*in_proj;
            pass.scope.for_each_chunk_with(copied, TASK_ROWS * width, rows, size, |i, chunk, buffer| {
                for (r, values) in chunk.chunks_mut(width).enumerate() {
                    values.copy_from_slice(&source[(i * TASK_ROWS + r) * stride + keys..][..width]);
                    normalize(values, buffer);
                }
            });
        } else if let (Some(start), true) = (self.in_proj.values, self.v_norm.is_some()) {
            pass.scope.for_each_chunk_with(in_proj, TASK_ROWS * stride, rows, size, |_, chunk, buffer| {
                chunk.chunks_mut(stride).for_each(|row| normalize(&mut row[start..][..width], buffer));
            });
        }
    }

    /// Clamps, normalizes, rotates and scales queries and keys in place, as far as the family does.
    fn rotate(
        &self,
        context: &MixerContext<'_, '_>,
        layer: &LayerConfig,
        angles: &rope::Angles,
        workspace: &mut Workspace,
    ) {
        let (pass, config) = (context.pass, context.pass.config);
        let (dim, width, kernel) = (layer.head_dim, self.in_proj.linear.width(), pass.kernel);
        let pairs = if layer.rotated { layer.rotary / 2 } else { 0 };
        let plain = pairs == 0 && !layer.tempered && config.clamp_qkv.is_none();
        if plain && self.q_norm.is_none() && self.k_norm.is_none() {
            return;
        }
        let late = config.family.quirks.norms_after_rotation;
        let widest = [&self.q_norm, &self.k_norm].into_iter().flatten().map(|norm| norm.width).max().unwrap_or(0);
        let (rope, batch, positions) = (layer.rope(), &context.batch.rows, context.positions);
        let buffers = &mut workspace.rows;
        pass.scope.for_each_chunk_with(
            &mut workspace.in_proj,
            TASK_ROWS * width,
            buffers,
            widest,
            |i, chunk, buffer| {
                let clamp = |part: &mut [f32]| {
                    if let Some(bound) = config.clamp_qkv {
                        part.iter_mut().for_each(|x| *x = x.clamp(-bound, bound));
                    }
                };
                for (r, row) in chunk.chunks_mut(width).enumerate() {
                    if let Some(start) = self.in_proj.values {
                        clamp(&mut row[start..][..layer.kv_heads * layer.value_dim]);
                    }
                    let at = i * TASK_ROWS + r;
                    let angles = if pairs > 0 { angles.of(rope, at) } else { (&[][..], &[][..]) };
                    let (queries, keys) = row.split_at_mut(self.in_proj.keys.unwrap_or(width));
                    let parts = [
                        (&mut queries[..layer.heads * dim], &self.q_norm),
                        (keys.get_mut(..layer.kv_heads * dim).unwrap_or_default(), &self.k_norm),
                    ];
                    for (part, norm) in parts {
                        let mut normalize = |part: &mut [f32]| {
                            if let Some(norm) = norm {
                                norm.apply(config, kernel, part, buffer);
                            }
                        };
                        if !late {
                            normalize(part);
                        }
                        clamp(part);
                        if pairs > 0 {
                            for head in part.chunks_exact_mut(dim) {
                                kernel.rope(&mut head[..2 * pairs], angles.0, angles.1);
                            }
                        }
                        if late {
                            normalize(part);
                        }
                    }
                    if layer.tempered {
                        let factor = positions.temperature(batch[at].position);
                        row[..layer.heads * dim].iter_mut().for_each(|x| *x *= factor);
                    }
                }
            },
        );
    }

    /// Multiplies the result by its gate.
    fn gate(
        &self,
        context: &MixerContext<'_, '_>,
        layer: &LayerConfig,
        workspace: &mut Workspace,
        out: &mut LinearInput,
    ) {
        let Some((start, gates)) = self.in_proj.gates else { return };
        let (pass, stride, columns) = (context.pass, self.in_proj.linear.width(), layer.heads * layer.value_dim);
        let Workspace { in_proj, rows, .. } = workspace;
        let in_proj = &*in_proj;
        let activation = pass.config.family.quirks.gate;
        pass.scope.for_each_chunk_with(&mut out.values, TASK_ROWS * columns, rows, gates, |i, chunk, buffer| {
            let buffer = &mut buffer[..gates];
            for (r, row) in chunk.chunks_mut(columns).enumerate() {
                buffer.copy_from_slice(&in_proj[(i * TASK_ROWS + r) * stride + start..][..gates]);
                pass.kernel.activate(activation, buffer);
                if gates == columns {
                    pass.kernel.multiply(row, buffer);
                } else {
                    for (head, gate) in row.chunks_exact_mut(layer.value_dim).zip(&*buffer) {
                        head.iter_mut().for_each(|x| *x *= gate);
                    }
                }
            }
        });
    }
}

impl InProj {
    /// Whether values are copies of keys.
    fn values_are_keys(&self) -> bool {
        self.keys.is_some() && self.values.is_none()
    }

    /// Query, key and value from three tensors, or from one that holds their rows one after the other; and the gate.
    fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<InProj> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let layer = &config.layers[index];
        let (dim, rotary) = (layer.head_dim, layer.rotary);
        let queries = layer.heads * dim;
        let (keys, values) = (layer.kv_heads * dim, layer.kv_heads * layer.value_dim);
        let adjacent = config.family.position == Position::RopeAdjacent;
        // Pairs (2i, 2i + 1) of the file become pairs (i, i + rotary / 2).
        let halves = move |row: usize| match row % dim {
            i if !adjacent || i >= rotary => row,
            i => row - i + halves_of_pairs(i, rotary),
        };
        // For each head its query, then its gate.
        let gated = config.family.gated_queries;
        let q_order = move |row: usize| if gated { row / dim * dim + halves(row) } else { halves(row) };
        let gate_order = move |row: usize| (row / dim + 1) * dim + row;
        let fused = loader.has(&name("attn_qkv.weight"));
        let (k, v) = if fused { (queries, queries + keys) } else { (0, 0) };
        let (k_order, v_order) = (move |row| k + halves(row), move |row| v + row);
        let part = |suffix: &str, rows: usize, order| Part {
            name: name(if fused { "attn_qkv" } else { suffix }),
            rows,
            order,
            of: if fused { queries + keys + values } else { rows },
            stack: None,
        };
        let query = part("attn_q", queries, &q_order as RowMap<'_>);
        let mut parts = vec![if gated { Part { of: 2 * queries, ..query } } else { query }];
        let own_keys = layer.shares.is_none();
        let mut own_values = false;
        if own_keys {
            parts.push(part("attn_k", keys, &k_order));
            // A family whose values have no weights of their own shares those of the keys.
            let same = layer.value_dim == dim && config.family.quirks.value_norm;
            own_values = fused || !same || loader.has(&name("attn_v.weight"));
            if own_values {
                parts.push(part("attn_v", values, &v_order));
            }
        }
        let gates = match loader.dims(&name("attn_gate.weight")) {
            None if gated => {
                parts.push(Part { of: 2 * queries, ..part("attn_q", queries, &gate_order) });
                Some(queries)
            }
            None => None,
            Some(dims) => {
                let (per_head, per_number) = (layer.heads, layer.heads * layer.value_dim);
                let rows = dims.get(1).copied().unwrap_or(1);
                if rows != per_head && rows != per_number {
                    let hidden = config.hidden;
                    let expected = format_args!("[{hidden}, {per_head}] or [{hidden}, {per_number}]");
                    return Err(loader.wrong_shape(&name("attn_gate.weight"), &dims, expected));
                }
                parts.push(Part::new(name("attn_gate"), rows));
                Some(rows)
            }
        };
        let linear = loader.linear(&parts, config.hidden)?;
        let gates = gates.map(|rows| (linear.start(parts.len() - 1), rows));
        Ok(InProj {
            keys: own_keys.then(|| linear.start(1)),
            values: own_values.then(|| linear.start(2)),
            gates,
            linear,
        })
    }
}

/// Where number `i` of `rotary` comes from, so that pairs `(2i, 2i + 1)` become pairs `(i, i + rotary / 2)`.
pub(super) fn halves_of_pairs(i: usize, rotary: usize) -> usize {
    if i < rotary / 2 { 2 * i } else { 2 * (i - rotary / 2) + 1 }
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Linear> {
    let part = Part::new(format!("blk.{index}.attn_output"), config.hidden);
    loader.linear(&[part], config.layers[index].heads * config.layers[index].value_dim)
}
