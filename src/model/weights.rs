//! Tensors by name, checked against the configuration and packed.

use std::path::Path;

use super::config::Config;
use super::linear::Linear;
use crate::error::{Error, Place, Result};
use crate::format::{Checkpoint, Tensor};
use crate::kernels::Activation;
use crate::model::arch::{NormKind, Position};
use crate::quant::block::BlockType;
use crate::quant::pack;
use crate::quant::packed::Packed;
use crate::threads::Scope;

/// Scale and bias of a norm.
#[derive(Debug)]
pub(super) struct Norm {
    /// `(width)`
    pub(super) weight: Vec<f32>,
    /// `(width)`, or empty.
    pub(super) bias: Vec<f32>,
}

/// One transformer block.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attn_norm: Norm,
    /// Query, key and value.
    pub(super) qkv: Linear,
    pub(super) attn_output: Linear,
    pub(super) ffn_norm: Norm,
    /// Gate and up, or up alone.
    pub(super) ffn_up: Linear,
    pub(super) ffn_down: Linear,
    /// Width between up and down.
    pub(super) ffn: usize,
    pub(super) activation: Activation,
}

/// Everything that a forward pass reads.
#[derive(Debug)]
pub(super) struct Weights {
    /// `(vocabulary, hidden)`
    pub(super) embedding: Linear,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Norm,
    /// `(vocabulary, hidden)`; the embedding where there is none.
    pub(super) output: Option<Linear>,
    /// Divisors of the rotation's frequencies `(rotary / 2)`.
    pub(super) rope_factors: Option<Vec<f32>>,
}

/// How far loading has come, in bytes of packed weights and in all.
pub type Progress<'a> = &'a (dyn Fn(usize, usize) + Sync);

impl Weights {
    pub(super) fn load(
        scope: &Scope<'_>,
        checkpoint: &dyn Checkpoint,
        config: &Config,
        progress: Option<Progress<'_>>,
    ) -> Result<Weights> {
        let loader = Loader { scope, checkpoint };
        let done = |layer: usize| {
            if let Some(progress) = progress {
                progress(layer, config.layers + 1);
            }
        };
        done(0);
        let embedding = loader.linear(&[Part::new("token_embd", None)], config.hidden)?;
        let vocabulary = embedding.parts()[0].rows();
        let output = match checkpoint.tensor("output.weight") {
            Some(_) => Some(loader.linear(&[Part::new("output", Some(vocabulary))], config.hidden)?),
            None => None,
        };
        let mut layers = Vec::new();
        for index in 0..config.layers {
            layers.push(loader.layer(config, index)?);
            done(index + 1);
        }
        let rope_factors = match checkpoint.tensor("rope_freqs.weight") {
            Some(_) => {
                let factors = loader.vector("rope_freqs.weight", config.rotary / 2)?;
                if let Some(bad) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
                    let place = Place::Tensor("rope_freqs.weight".to_owned());
                    return Err(Error::malformed(loader.path(), place, bad, "positive factors"));
                }
                Some(factors)
            }
            None => None,
        };
        let output_norm = loader.norm("output_norm", config)?;
        done(config.layers + 1);
        Ok(Weights { embedding, layers, output_norm, output, rope_factors })
    }

    /// The matrix that turns the last hidden state into logits.
    pub(super) fn output(&self) -> &Linear {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of all matrices, and those of them that one decoded token reads.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let layer = |l: &Layer| l.qkv.bytes() + l.attn_output.bytes() + l.ffn_up.bytes() + l.ffn_down.bytes();
        let layers: usize = self.layers.iter().map(layer).sum();
        let read = layers + self.output().bytes();
        (layers + self.embedding.bytes() + self.output.as_ref().map_or(0, Linear::bytes), read)
    }

    /// Weights of all matrices.
    pub(super) fn parameters(&self) -> usize {
        let linear = |l: &Linear| l.parts().iter().map(|part| part.rows() * part.columns()).sum::<usize>();
        let layer = |l: &Layer| linear(&l.qkv) + linear(&l.attn_output) + linear(&l.ffn_up) + linear(&l.ffn_down);
        let layers: usize = self.layers.iter().map(layer).sum();
        layers + linear(&self.embedding) + self.output.as_ref().map_or(0, linear)
    }
}

/// A tensor that becomes part of a [`Linear`].
struct Part<'a> {
    /// Without `.weight`.
    name: String,
    /// Rows that it must have; any number if `None`.
    rows: Option<usize>,
    /// Row `i` of the result is this row of the file.
    order: &'a (dyn Fn(usize) -> usize + Sync),
}

impl<'a> Part<'a> {
    fn new(name: impl Into<String>, rows: Option<usize>) -> Part<'a> {
        Part { name: name.into(), rows, order: &|row| row }
    }
}

struct Loader<'a> {
    scope: &'a Scope<'a>,
    checkpoint: &'a dyn Checkpoint,
}

impl Loader<'_> {
    fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn tensor(&self, name: &str, expected: impl std::fmt::Display) -> Result<Tensor<'_>> {
        self.checkpoint.tensor(name).ok_or_else(|| Error::Missing {
            path: self.path().to_path_buf(),
            place: Place::Tensor(name.to_owned()),
            expected: expected.to_string(),
        })
    }

    fn shape_error(&self, name: &str, found: &[usize], expected: impl std::fmt::Display) -> Error {
        Error::malformed(self.path(), Place::Tensor(name.to_owned()), format_args!("dimensions {found:?}"), expected)
    }

    /// A vector of `width` numbers, decoded.
    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, format_args!("{width} numbers"))?;
        if tensor.dims != [width] {
            return Err(self.shape_error(name, &tensor.dims, format_args!("dimensions [{width}]")));
        }
        let block_type = tensor.rows.block_type();
        if !matches!(block_type, BlockType::F32 | BlockType::F16 | BlockType::BF16) {
            let place = Place::Tensor(name.to_owned());
            return Err(Error::malformed(self.path(), place, block_type.name(), "F32, F16 or BF16"));
        }
        let mut values = vec![0.0; width];
        block_type.decode(tensor.rows.row(0, &mut Vec::new()), &mut values)?;
        Ok(values)
    }

    fn optional_vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        match self.checkpoint.tensor(name) {
            Some(_) => self.vector(name, width),
            None => Ok(Vec::new()),
        }
    }

    fn norm(&self, name: &str, config: &Config) -> Result<Norm> {
        let weight = self.vector(&format!("{name}.weight"), config.hidden)?;
        let bias = match config.family.norm {
            NormKind::Rms => Vec::new(),
            NormKind::Layer => self.optional_vector(&format!("{name}.bias"), config.hidden)?,
        };
        Ok(Norm { weight, bias })
    }

    /// Matrices with `columns` input features, side by side.
    fn linear(&self, parts: &[Part<'_>], columns: usize) -> Result<Linear> {
        let mut packed = Vec::new();
        for part in parts {
            let name = format!("{}.weight", part.name);
            let expected = match part.rows {
                Some(rows) => format!("dimensions [{columns}, {rows}]"),
                None => format!("dimensions [{columns}, any]"),
            };
            let tensor = self.tensor(&name, &expected)?;
            let rows = match tensor.dims[..] {
                [found, rows] if found == columns && part.rows.is_none_or(|wanted| wanted == rows) => rows,
                _ => return Err(self.shape_error(&name, &tensor.dims, expected)),
            };
            let matrix = self.pack(&name, &tensor, rows, columns, part.order)?;
            drop(tensor);
            self.checkpoint.release(&name);
            let bias = self.optional_vector(&format!("{}.bias", part.name), rows)?;
            let bias = (0..bias.len()).map(|row| bias[(part.order)(row)]).collect();
            packed.push((matrix, bias));
        }
        Ok(Linear::new(packed))
    }

    fn pack(
        &self,
        name: &str,
        tensor: &Tensor<'_>,
        rows: usize,
        columns: usize,
        order: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Packed> {
        let block_type = tensor.rows.block_type();
        let Some(layout) = pack::layout(block_type) else {
            return Err(Error::Unsupported {
                path: self.path().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                what: format!("the type {}", block_type.name()),
                supported: "supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, \
                            IQ4_NL, IQ4_XS, MXFP4"
                    .to_owned(),
            });
        };
        // The packed form of a tensor is at most a panel and a block larger than the tensor, which is there: this bounds
        // what a small file can ask for.
        let bytes = Packed::bytes_needed(rows, columns, layout);
        Packed::try_reserve(bytes).map_err(|()| Error::OutOfMemory { what: "packed weights", bytes })?;
        Ok(pack::pack(self.scope, tensor.rows.as_ref(), rows, columns, order))
    }

    fn layer(&self, config: &Config, index: usize) -> Result<Layer> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (dim, rotary) = (config.head_dim, config.rotary);
        let halves = move |row: usize| {
            // Pairs (2i, 2i + 1) of the file become pairs (i, i + rotary / 2).
            let (head, i) = (row / dim * dim, row % dim);
            if i >= rotary {
                row
            } else {
                head + if i < rotary / 2 { 2 * i } else { 2 * (i - rotary / 2) + 1 }
            }
        };
        let same = |row: usize| row;
        let order: &(dyn Fn(usize) -> usize + Sync) = match config.family.position {
            Position::Rope { adjacent: true } => &halves,
            _ => &same,
        };
        let qkv = self.linear(
            &[
                Part { name: name("attn_q"), rows: Some(queries), order },
                Part { name: name("attn_k"), rows: Some(keys), order },
                Part::new(name("attn_v"), Some(keys)),
            ],
            config.hidden,
        )?;
        let attn_output = self.linear(&[Part::new(name("attn_output"), Some(config.hidden))], queries)?;
        let up = self.tensor(&name("ffn_up.weight"), "the feed-forward layer")?;
        let ffn = up.dims.get(1).copied().unwrap_or(0);
        drop(up);
        let mut parts = vec![Part::new(name("ffn_up"), Some(ffn))];
        if self.checkpoint.tensor(&name("ffn_gate.weight")).is_some() {
            parts.insert(0, Part::new(name("ffn_gate"), Some(ffn)));
        }
        Ok(Layer {
            attn_norm: self.norm(&name("attn_norm"), config)?,
            qkv,
            attn_output,
            ffn_norm: self.norm(&name("ffn_norm"), config)?,
            ffn_up: self.linear(&parts, config.hidden)?,
            ffn_down: self.linear(&[Part::new(name("ffn_down"), Some(config.hidden))], ffn)?,
            ffn,
            activation: config.family.activation,
        })
    }
}
