//! A vector for each layer that depends on the token (Gemma 3n and 4): a row of a table of its own, added to a projection of
//! the embedding. Layers multiply it with a gate and add the result.

use super::batch::Row;
use super::buffer::Buffer;
use super::config::Config;
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::norm::Norm;
use super::pass::{Pass, TASK_ROWS};
use super::weights::loader::{Loader, Part};
use crate::error::Result;

/// The weights that all layers share.
#[derive(Debug)]
pub(super) struct PerLayer {
    /// `(vocabulary, layers * width)`; `None` where the vectors are the projection alone.
    table: Option<Linear>,
    /// `(layers * width, hidden)`
    projection: Linear,
    /// Of the projection, layer by layer.
    norm: Norm,
}

impl PerLayer {
    /// Reads the weights, where the file has them.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, vocabulary: usize) -> Result<Option<PerLayer>> {
        let (name, layers) = ("per_layer_token_embd", config.layers.len());
        let Some((source, dims, width)) = width_of(loader) else { return Ok(None) };
        if width == 0 || !width.is_multiple_of(layers) {
            let expected = format_args!("a multiple of the {layers} layers");
            return Err(loader.wrong_shape(source, &dims, expected));
        }
        let norm = loader.norm_of("per_layer_proj_norm", config, width / layers, config.norm_eps)?;
        Ok(Some(PerLayer {
            table: match loader.has(&format!("{name}.weight")) {
                true => Some(loader.linear(&[Part::new(name, vocabulary)], width)?),
                false => None,
            },
            projection: loader.linear(&[Part::new("per_layer_model_proj", width)], config.hidden)?,
            norm: norm.ok_or_else(|| loader.missing("per_layer_proj_norm.weight", "a norm"))?,
        }))
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.table.iter().chain([&self.projection])
    }

    /// The projection of the embedding.
    pub(super) fn projection(&self) -> &Linear {
        &self.projection
    }

    /// Numbers of all layers' vectors.
    pub(super) fn width(&self) -> usize {
        self.projection.parts()[0].rows()
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let PerLayer { table, projection, norm } = self;
        if let Some(table) = table {
            hasher.linear(table);
        }
        hasher.linear(projection);
        hasher.norm(norm);
    }

    /// Computes the vectors of all rows into `out (rows, layers * width)`, from the embeddings `x (rows, hidden)`.
    #[allow(clippy::too_many_arguments, reason = "the input, the output and three buffers")]
    pub(super) fn compute(
        &self,
        pass: &Pass<'_>,
        rows: &[Row],
        x: &[f32],
        input: &mut LinearInput,
        branch: &mut Buffer,
        buffers: &mut Vec<f32>,
        out: &mut Buffer,
    ) {
        let (width, own) = (self.width(), self.norm.weight.len());
        pass.norm(x, None, input);
        pass.linear(&self.projection, input, branch);
        let (branch, stride) = (&*branch, self.projection.width());
        let table = self.table.as_ref().map(|table| &table.parts()[0]);
        let scale = (pass.config.hidden as f32).sqrt().recip();
        let table_scale = (own as f32).sqrt();
        out.resize(rows.len() * width);
        pass.scope.for_each_chunk_with(out, TASK_ROWS * width, buffers, width, |i, chunk, buffer| {
            for (r, out) in chunk.chunks_mut(width).enumerate() {
                let row = i * TASK_ROWS + r;
                let projected = &mut buffer[..width];
                projected.copy_from_slice(&branch[row * stride..][..width]);
                projected.iter_mut().for_each(|x| *x *= scale);
                for (x, out) in projected.chunks(own).zip(out.chunks_mut(own)) {
                    self.norm.apply(pass.config, pass.kernel, x, out);
                }
                let Some(table) = table else { continue };
                table.decode_row(rows[row].token as usize, projected);
                pass.kernel.add_scaled(out, projected, table_scale);
                out.iter_mut().for_each(|x| *x *= std::f32::consts::FRAC_1_SQRT_2);
            }
        });
    }
}

/// The tensor that says how many numbers the vectors of all layers have, its dimensions, and that number: the table, or
/// the projection where there is no table.
fn width_of(loader: &Loader<'_>) -> Option<(&'static str, Vec<usize>, usize)> {
    [("per_layer_token_embd.weight", 0), ("per_layer_model_proj.weight", 1)].into_iter().find_map(|(name, at)| {
        let dims = loader.dims(name)?;
        let width = dims.get(at).copied().unwrap_or(0);
        Some((name, dims, width))
    })
}

/// The weights of one layer.
#[derive(Debug)]
pub(super) struct LayerInput {
    /// `(width, hidden)`
    gate: Linear,
    /// `(hidden, width)`
    projection: Linear,
    /// Of the result.
    norm: Option<Norm>,
}

impl LayerInput {
    /// Reads the weights of layer `index`, where the file has them.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Option<LayerInput>> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let Some(dims) = loader.dims(&name("inp_gate.weight")) else { return Ok(None) };
        let width = dims.get(1).copied().unwrap_or(0);
        let all = width_of(loader).map_or(0, |found| found.2);
        if width == 0 || all != width * config.layers.len() {
            let own = all / config.layers.len();
            return Err(loader.wrong_shape(
                &name("inp_gate.weight"),
                &dims,
                format_args!("[{}, {own}]", config.hidden),
            ));
        }
        Ok(Some(LayerInput {
            gate: loader.linear(&[Part::new(name("inp_gate"), width)], config.hidden)?,
            projection: loader.linear(&[Part::new(name("proj"), config.hidden)], width)?,
            norm: loader.norm(&name("post_norm"), config)?,
        }))
    }

    pub(super) fn linears(&self) -> [&Linear; 2] {
        [&self.gate, &self.projection]
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let LayerInput { gate, projection, norm } = self;
        hasher.linear(gate);
        hasher.linear(projection);
        hasher.optional(norm.as_ref(), FingerprintHasher::norm);
    }

    /// Computes what layer `index` adds to the stream, `branch (rows, hidden rounded up to panels)`, from `x (rows, hidden)`
    /// and the vectors of all layers.
    #[allow(clippy::too_many_arguments, reason = "the input, the vectors and three buffers")]
    pub(super) fn compute(
        &self,
        pass: &Pass<'_>,
        index: usize,
        x: &[f32],
        input: &mut LinearInput,
        vectors: &[f32],
        branch: &mut Buffer,
        rows: &mut Vec<f32>,
    ) {
        let (width, stride) = (self.projection.columns(), self.gate.width());
        pass.norm(x, None, input);
        pass.linear(&self.gate, input, branch);
        let count = x.len() / pass.config.hidden;
        let all = vectors.len() / count;
        input.resize(count, width);
        for (row, out) in input.values.chunks_exact_mut(width).enumerate() {
            out.copy_from_slice(&branch[row * stride..][..width]);
            pass.kernel.gate(pass.config.activation, out, &vectors[row * all + index * width..][..width]);
        }
        pass.linear(&self.projection, input, branch);
        pass.norm_branch(branch, self.norm.as_ref(), rows);
    }
}
