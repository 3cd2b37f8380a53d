//! Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values of all heads are products of one short
//! vector per position, and the cache holds that vector.
//!
//! Computed in the absorbed form, for prompts and decoding alike: the part of a query that is not rotated is multiplied with
//! the head's matrix of keys, so that it attends to the vectors themselves, and the result with the head's matrix of values.

use super::attention::halves_of_pairs;
use super::context::MixerContext;
use super::heads::{self, HeadRows};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::model::arch::Position;
use crate::model::batch::Batch;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, LatentConfig};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::Norm;
use crate::model::pass::TASK_ROWS;
use crate::model::rope;
use crate::model::weights::loader::{Loader, Part, RowMap};

/// The weights of latent attention.
#[derive(Debug)]
pub(in crate::model) struct LatentAttention {
    sizes: LatentConfig,
    /// Queries, or the vector that they are a product of; then the vector of keys and values, and the rotated part of keys.
    in_proj: Linear,
    /// The norm of the queries' vector, and the matrix `(heads * (plain + rope), q_rank)`.
    queries: Option<(Norm, Linear)>,
    /// Of the vector of keys and values.
    kv_norm: Norm,
    /// `(heads)` matrices `(kv_rank, plain)`: from queries to the vector.
    keys: Vec<Linear>,
    /// `(heads)` matrices `(value, kv_rank)`: from the vector to values.
    values: Vec<Linear>,
    /// `(hidden, heads * value)`
    out_proj: Linear,
}

/// The widest rows, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    in_proj: usize,
    queries: usize,
    heads: usize,
    /// The vector of keys and values, and the widest input and output of a head's matrices.
    kv_rank: usize,
    head: usize,
    /// Width of a cached key.
    key: usize,
    q_rank: usize,
}

/// The workspace of latent attention.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `(rows, width of in_proj)`
    in_proj: Buffer,
    /// `(rows, width of the queries' matrix)`
    queries: Buffer,
    /// `(rows, heads * (kv_rank + rope))`: queries that attend to the vectors.
    absorbed: Buffer,
    /// `(rows, q_rank)`
    input: LinearInput,
    /// `(tasks)` rows of the widest norm.
    rows: Vec<f32>,
    /// `(heads)`
    heads: Vec<HeadWorkspace>,
    attention: heads::Workspace,
}

/// The workspace of one head's matrices.
#[derive(Debug, Default)]
struct HeadWorkspace {
    /// `(rows, columns of the matrix)`
    input: LinearInput,
    /// `(rows, width of the matrix)`
    out: Buffer,
}

impl Workspace {
    pub(super) fn reserve(&mut self, widths: &Widths, batch: &Batch) -> Result<()> {
        if widths.heads == 0 {
            return Ok(());
        }
        let rows = batch.rows.len();
        self.in_proj.reserve(rows * widths.in_proj)?;
        self.queries.reserve(rows * widths.queries)?;
        self.absorbed.reserve(rows * widths.heads * widths.key)?;
        self.input.reserve(rows, widths.q_rank)?;
        self.heads.resize_with(widths.heads, HeadWorkspace::default);
        for head in &mut self.heads {
            head.input.reserve(rows, widths.head)?;
            head.out.reserve(rows * widths.head)?;
        }
        self.attention.reserve(batch.spans.len() * batch.longest_span(), widths.heads * widths.kv_rank)
    }
}

impl LatentAttention {
    /// Reads the weights of layer `index`.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<LatentAttention> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let Some(latent) = config.latent else {
            return Err(
                loader.missing(&name("attn_kv_a_mqa.weight"), "the widths of latent attention in the file's keys")
            );
        };
        let heads = config.layers[index].heads;
        let eps = config.family.quirks.latent_norm_eps.unwrap_or(config.norm_eps);
        let norm = |suffix: &str, width: usize| match loader.norm_of(&name(suffix), config, width, eps)? {
            Some(norm) => Ok(norm),
            None => Err(loader.missing(&name(&format!("{suffix}.weight")), format_args!("{width} numbers"))),
        };
        let queries = match latent.q_rank {
            None => None,
            Some(rank) => {
                let rows = heads * (latent.plain + latent.rope);
                let order = query_order(config, &latent);
                let part = Part { name: name("attn_q_b"), rows, order: &order, of: rows, stack: None };
                Some((norm("attn_q_a_norm", rank)?, loader.linear(&[part], rank)?))
            }
        };
        let (keys, values) = load_heads(loader, &latent, index, heads)?;
        Ok(LatentAttention {
            sizes: latent,
            in_proj: load_in_proj(loader, config, &latent, index)?,
            queries,
            kv_norm: norm("attn_kv_a_norm", latent.kv_rank)?,
            keys,
            values,
            out_proj: load_out_proj(loader, config, &latent, index)?,
        })
    }

    /// Reads the projection of the input of layer `index` again.
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.in_proj = load_in_proj(loader, config, &self.sizes, index)?;
        Ok(())
    }

    /// Reads the output projection of layer `index` again.
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        self.out_proj = load_out_proj(loader, config, &self.sizes, index)?;
        Ok(())
    }

    /// The projection of the input.
    pub(super) fn in_proj(&self) -> &Linear {
        &self.in_proj
    }

    /// The output projection.
    pub(super) fn out_proj(&self) -> &Linear {
        &self.out_proj
    }

    /// All linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let LatentAttention { sizes: _, in_proj, queries, kv_norm: _, keys, values, out_proj } = self;
        let queries = queries.iter().map(|(_, linear)| linear);
        [in_proj].into_iter().chain(queries).chain(keys).chain(values).chain([out_proj]).collect()
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let LatentAttention { sizes: _, in_proj, queries, kv_norm, keys, values, out_proj } = self;
        hasher.linear(in_proj);
        hasher.optional(queries.as_ref(), |hasher, (norm, linear)| {
            hasher.norm(norm);
            hasher.linear(linear);
        });
        hasher.norm(kv_norm);
        keys.iter().chain(values).for_each(|linear| hasher.linear(linear));
        hasher.linear(out_proj);
    }

    pub(super) fn widen(&self, widths: &mut Widths) {
        let LatentConfig { q_rank, kv_rank, rope, .. } = self.sizes;
        widths.in_proj = widths.in_proj.max(self.in_proj.width());
        widths.queries = widths.queries.max(self.queries.as_ref().map_or(0, |(_, linear)| linear.width()));
        widths.q_rank = q_rank.unwrap_or(0);
        widths.heads = widths.heads.max(self.keys.len());
        widths.kv_rank = kv_rank;
        widths.key = kv_rank + rope;
        let of_heads = self.keys.iter().chain(&self.values).map(|linear| linear.width().max(linear.columns()));
        widths.head = widths.head.max(of_heads.max().unwrap_or(0));
    }

    /// Replaces `input (rows, hidden)` by the input of the output projection `(rows, heads * value)`.
    pub(super) fn mix(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        angles: &rope::Angles,
        workspace: &mut Workspace,
    ) {
        let LatentConfig { kv_rank, rope, value, .. } = self.sizes;
        let heads = self.keys.len();
        if workspace.heads.len() < heads {
            // A layer that is computed alone: nothing was reserved for the model.
            workspace.heads.resize_with(heads, HeadWorkspace::default);
        }
        self.store(context, input, angles, workspace);
        self.project_queries(context, workspace);
        // From queries to what attends to the vector.
        self.absorb(context, angles, workspace);
        // Softmax over the cache.
        let Some(attention) = heads::attention(context, context.layer) else { return };
        let stride = heads * (kv_rank + rope);
        let queries = HeadRows { values: &workspace.absorbed, stride, start: 0 };
        heads::softmax(context, &attention, queries, heads, &mut workspace.attention, input);
        // From the vectors that were attended to, to values.
        self.expand(context, input, value, &mut workspace.heads);
    }

    /// Computes queries, and the vector of keys and values, which it stores in the cache.
    pub(super) fn store(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        angles: &rope::Angles,
        workspace: &mut Workspace,
    ) {
        context.pass.linear(&self.in_proj, input, &mut workspace.in_proj);
        self.rotate(context, angles, workspace);
        // The vector to the cache: with the rotated part as key, alone as value.
        let (stride, start) = (self.in_proj.width(), self.in_proj.start(1));
        let vector = HeadRows { values: &workspace.in_proj, stride, start };
        heads::store(context, vector, vector);
    }

    /// Computes queries from their vector, where they have one.
    fn project_queries(&self, context: &MixerContext<'_, '_>, workspace: &mut Workspace) {
        let Some((norm, linear)) = &self.queries else { return };
        let (pass, stride, rank) = (context.pass, self.in_proj.width(), linear.columns());
        let Workspace { in_proj, queries, input, .. } = workspace;
        let (in_proj, rows) = (&*in_proj, context.batch.rows.len());
        input.resize(rows, rank);
        pass.scope.for_each_chunk(&mut input.values, TASK_ROWS * rank, |i, chunk| {
            for (r, out) in chunk.chunks_mut(rank).enumerate() {
                norm.apply(pass.config, pass.kernel, &in_proj[(i * TASK_ROWS + r) * stride..][..rank], out);
            }
        });
        pass.linear(linear, input, queries);
    }

    /// Normalizes the vector of keys and values, and rotates the keys' own part, in place.
    fn rotate(&self, context: &MixerContext<'_, '_>, angles: &rope::Angles, workspace: &mut Workspace) {
        let (pass, stride, start) = (context.pass, self.in_proj.width(), self.in_proj.start(1));
        let rotates = pass.config.layers[context.layer].rotated;
        let LatentConfig { kv_rank, rope, .. } = self.sizes;
        let rows = &mut workspace.rows;
        pass.scope.for_each_chunk_with(
            &mut workspace.in_proj,
            TASK_ROWS * stride,
            rows,
            kv_rank,
            |i, chunk, buffer| {
                for (r, row) in chunk.chunks_mut(stride).enumerate() {
                    let (vector, key) = row[start..][..kv_rank + rope].split_at_mut(kv_rank);
                    let buffer = &mut buffer[..kv_rank];
                    self.kv_norm.apply(pass.config, pass.kernel, vector, buffer);
                    vector.copy_from_slice(buffer);
                    let (cos, sin) = if rotates { angles.of(0, i * TASK_ROWS + r) } else { (&[][..], &[][..]) };
                    pass.kernel.rope(key, cos, sin);
                }
            },
        );
    }

    /// Multiplies the plain part of queries with the heads' matrices of keys, and rotates the rest: a task per head, then the
    /// parts side by side.
    fn absorb(&self, context: &MixerContext<'_, '_>, angles: &rope::Angles, workspace: &mut Workspace) {
        let pass = context.pass;
        let rotates = pass.config.layers[context.layer].rotated;
        let LatentConfig { kv_rank, plain, rope, .. } = self.sizes;
        let (rows, heads, key) = (context.batch.rows.len(), self.keys.len(), kv_rank + rope);
        let Workspace { in_proj, queries, absorbed, heads: works, .. } = workspace;
        let (queries, stride) = match &self.queries {
            Some((_, linear)) => (&*queries, linear.width()),
            None => (&*in_proj, self.in_proj.width()),
        };
        let query = |row: usize, head: usize| &queries[row * stride + head * (plain + rope)..][..plain + rope];
        pass.scope.for_each_chunk(&mut works[..heads], 1, |head, work| {
            for HeadWorkspace { input, out } in work {
                input.resize(rows, plain);
                for (row, part) in input.values.chunks_exact_mut(plain).enumerate() {
                    part.copy_from_slice(&query(row, head)[..plain]);
                }
                self.keys[head].apply_alone(pass.kernel, input, out);
            }
        });
        let works = &*works;
        absorbed.resize(rows * heads * key);
        pass.scope.for_each_chunk(absorbed, heads * key, |row, out| {
            let (cos, sin) = if rotates { angles.of(0, row) } else { (&[][..], &[][..]) };
            for (head, out) in out.chunks_exact_mut(key).enumerate() {
                let (vector, rotated) = out.split_at_mut(kv_rank);
                vector.copy_from_slice(&works[head].out[row * self.keys[head].width()..][..kv_rank]);
                rotated.copy_from_slice(&query(row, head)[plain..]);
                pass.kernel.rope(rotated, cos, sin);
            }
        });
    }

    /// Multiplies the vectors that each head attended to, `(rows, heads * kv_rank)`, with the heads' matrices of values: a
    /// task per head, then the values side by side.
    fn expand(
        &self,
        context: &MixerContext<'_, '_>,
        input: &mut LinearInput,
        value: usize,
        works: &mut [HeadWorkspace],
    ) {
        let (pass, heads, rows) = (context.pass, self.values.len(), context.batch.rows.len());
        let rank = input.values.len() / (rows * heads);
        let attended = &*input.values;
        pass.scope.for_each_chunk(&mut works[..heads], 1, |head, work| {
            for HeadWorkspace { input, out } in work {
                input.resize(rows, rank);
                for (row, part) in input.values.chunks_exact_mut(rank).enumerate() {
                    part.copy_from_slice(&attended[(row * heads + head) * rank..][..rank]);
                }
                self.values[head].apply_alone(pass.kernel, input, out);
            }
        });
        let works = &*works;
        input.resize(rows, heads * value);
        pass.scope.for_each_chunk(&mut input.values, heads * value, |row, out| {
            for (head, out) in out.chunks_exact_mut(value).enumerate() {
                out.copy_from_slice(&works[head].out[row * self.values[head].width()..][..value]);
            }
        });
    }
}

/// The order of the queries' rows: pairs `(2i, 2i + 1)` of the rotated part become pairs `(i, i + rope / 2)`.
fn query_order(config: &Config, latent: &LatentConfig) -> impl Fn(usize) -> usize + Sync + use<> {
    let LatentConfig { plain, rope, .. } = *latent;
    let adjacent = config.family.position == Position::RopeAdjacent;
    move |row| match row % (plain + rope) {
        i if !adjacent || i < plain => row,
        i => row - i + plain + halves_of_pairs(i - plain, rope),
    }
}

/// Queries or their vector, and the vector of keys and values.
fn load_in_proj(loader: &Loader<'_>, config: &Config, latent: &LatentConfig, index: usize) -> Result<Linear> {
    let LatentConfig { q_rank, kv_rank, plain, rope, .. } = *latent;
    let name = |suffix: &str| format!("blk.{index}.{suffix}");
    let order = query_order(config, latent);
    let adjacent = config.family.position == Position::RopeAdjacent;
    let key_order = move |row: usize| match row.checked_sub(kv_rank) {
        Some(i) if adjacent => kv_rank + halves_of_pairs(i, rope),
        _ => row,
    };
    let rows = config.layers[index].heads * (plain + rope);
    let queries = match q_rank {
        Some(rank) => Part::new(name("attn_q_a"), rank),
        None => Part { name: name("attn_q"), rows, order: &order as RowMap<'_>, of: rows, stack: None },
    };
    let rows = kv_rank + rope;
    let vector = Part { name: name("attn_kv_a_mqa"), rows, order: &key_order, of: rows, stack: None };
    loader.linear(&[queries, vector], config.hidden)
}

/// The heads' matrices of keys and of values.
fn load_heads(
    loader: &Loader<'_>,
    latent: &LatentConfig,
    index: usize,
    heads: usize,
) -> Result<(Vec<Linear>, Vec<Linear>)> {
    let name = |suffix: &str| format!("blk.{index}.{suffix}");
    let LatentConfig { kv_rank, plain, value, .. } = *latent;
    let both = name("attn_kv_b");
    if !loader.has(&name("attn_k_b.weight")) && loader.has(&format!("{both}.weight")) {
        // Files from before the vector was cached: `(heads, plain + value)` rows of `kv_rank` numbers.
        let of = heads * (plain + value);
        let keys = (0..heads).map(|head| loader.transposed(&both, [head * (plain + value), plain], kv_rank, of));
        let keys = keys.collect::<Result<Vec<_>>>()?;
        let values = (0..heads).map(|head| {
            let order = move |row| head * (plain + value) + plain + row;
            let part = Part { name: both.clone(), rows: value, order: &order, of, stack: None };
            loader.linear(&[part], kv_rank).map(Linear::without_adapters)
        });
        return Ok((keys, values.collect::<Result<Vec<_>>>()?));
    }
    let stack = |suffix: &str, rows: usize, columns: usize| {
        let all = (0..heads).map(|head| {
            let order = move |row| head * rows + row;
            let part = Part { name: name(suffix), rows, order: &order, of: rows, stack: Some(heads) };
            loader.linear(&[part], columns).map(Linear::without_adapters)
        });
        let all = all.collect::<Result<Vec<_>>>();
        loader.release(&name(&format!("{suffix}.weight")));
        all
    };
    Ok((stack("attn_k_b", kv_rank, plain)?, stack("attn_v_b", value, kv_rank)?))
}

fn load_out_proj(loader: &Loader<'_>, config: &Config, latent: &LatentConfig, index: usize) -> Result<Linear> {
    let part = Part::new(format!("blk.{index}.attn_output"), config.hidden);
    loader.linear(&[part], config.layers[index].heads * latent.value)
}

impl Linear {
    /// As [`Linear::apply`], by one thread, for tasks that run side by side. Quantizes the input where it is needed.
    fn apply_alone(&self, kernel: &Kernel, x: &mut LinearInput, out: &mut Buffer) {
        x.prepare_alone(kernel, self);
        self.product_alone(kernel, x, out);
    }
}
