//! Tensors by name, checked against the configuration and packed.

use std::cell::Cell;
use std::path::Path;

use super::{Ffn, HeadNorm, Layer, Mlp, Norm, Weights};
use crate::error::{Error, Place, Result};
use crate::format::{Checkpoint, Tensor};
use crate::model::arch::{NormKind, Position};
use crate::model::config::Config;
use crate::model::linear::Linear;
use crate::model::rope::Scaling;
use crate::quant::block::BlockType;
use crate::quant::pack;
use crate::quant::packed::Packed;
use crate::threads::Scope;

/// Told how much of something is done and how much there is of it. An error ends it: [`Error::Interrupted`] says no more
/// than that.
pub type Progress<'a> = &'a (dyn Fn(usize, usize) -> Result<()> + Sync);

impl Weights {
    pub(in crate::model) fn load(loader: &Loader<'_>, config: &Config, context: usize) -> Result<Weights> {
        loader.report(0)?;
        let mut weights = Weights::without_layers(loader, config, context)?;
        for index in 0..config.layers.len() {
            weights.layers.push(loader.layer(config, index)?);
        }
        // A file may hold more than is used.
        loader.report(loader.total)?;
        Ok(weights)
    }

    /// What stands before and after the layers.
    pub(in crate::model) fn without_layers(loader: &Loader<'_>, config: &Config, context: usize) -> Result<Weights> {
        let checkpoint = loader.checkpoint;
        let table = loader.tensor("token_embd.weight", format_args!("dimensions [{}, vocabulary]", config.hidden))?;
        let vocabulary = table.dims.get(1).copied().unwrap_or(0);
        let (width, projections) = loader.projections(config)?;
        let embedding = loader.linear(&[Part::new("token_embd", vocabulary)], width)?;
        let output = match checkpoint.tensor("output.weight") {
            Some(_) => Some(loader.linear(&[Part::new("output", vocabulary)], width)?),
            None => None,
        };
        let positions = match checkpoint.tensor("position_embd.weight") {
            Some(table) => {
                let rows = table.dims.get(1).copied().unwrap_or(0);
                if rows < config.context {
                    let expected = format_args!("rows for the {} positions of the context", config.context);
                    return Err(loader.shape_error("position_embd.weight", &table.dims, expected));
                }
                Some(loader.linear(&[Part::new("position_embd", rows)], config.hidden)?)
            }
            None => None,
        };
        let weights = Weights {
            embedding,
            projections,
            embedding_norm: loader.norm("token_embd_norm", config)?,
            positions,
            layers: Vec::new(),
            output_norm: loader.norm("output_norm", config)?,
            output,
            rope_factors: loader.rope_factors(config, context)?,
        };
        if weights.output_norm.is_none() && !config.family.more.optional_output_norm {
            return Err(loader.missing("output_norm.weight", format_args!("{} numbers", config.hidden)));
        }
        Ok(weights)
    }
}

type Order<'a> = &'a (dyn Fn(usize) -> usize + Sync);

/// Rows of a tensor that become part of a [`Linear`].
pub(in crate::model) struct Part<'a> {
    /// Without `.weight`.
    name: String,
    rows: usize,
    /// Row `i` of the result is this row of the file.
    order: Order<'a>,
    /// Rows that the tensor has in all: more than `rows` where several parts are fused in one tensor.
    of: usize,
    /// Matrices that the tensor holds: experts in three dimensions.
    stack: Option<usize>,
}

impl<'a> Part<'a> {
    pub(in crate::model) fn new(name: impl Into<String>, rows: usize) -> Part<'a> {
        Part { name: name.into(), rows, order: &|row| row, of: rows, stack: None }
    }
}

/// Reads tensors of a checkpoint.
pub(in crate::model) struct Loader<'a> {
    pub(in crate::model) scope: &'a Scope<'a>,
    pub(in crate::model) checkpoint: &'a dyn Checkpoint,
    progress: Option<Progress<'a>>,
    /// Weights that are packed, of how many.
    done: Cell<usize>,
    total: usize,
}

impl<'a> Loader<'a> {
    pub(in crate::model) fn new(
        scope: &'a Scope<'a>,
        checkpoint: &'a dyn Checkpoint,
        progress: Option<Progress<'a>>,
    ) -> Loader<'a> {
        let total = match progress {
            Some(_) => {
                let tensors = checkpoint.names().into_iter().filter_map(|name| checkpoint.tensor(name));
                let dims = tensors.map(|tensor| tensor.dims).filter(|dims| dims.len() > 1);
                dims.map(|dims| dims.iter().product::<usize>()).sum()
            }
            None => 0,
        };
        Loader { scope, checkpoint, progress, done: Cell::new(0), total }
    }
}

impl Loader<'_> {
    fn report(&self, done: usize) -> Result<()> {
        self.done.set(done);
        self.progress.map_or(Ok(()), |progress| progress(done, self.total))
    }

    fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn tensor(&self, name: &str, expected: impl std::fmt::Display) -> Result<Tensor<'_>> {
        self.checkpoint.tensor(name).ok_or_else(|| self.missing(name, expected))
    }

    fn missing(&self, name: &str, expected: impl std::fmt::Display) -> Error {
        Error::Missing {
            path: self.path().to_path_buf(),
            place: Place::Tensor(name.to_owned()),
            expected: expected.to_string(),
        }
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
        self.numbers(name, &tensor, width)
    }

    /// All `len` numbers of a small tensor, whatever its dimensions.
    fn numbers(&self, name: &str, tensor: &Tensor<'_>, len: usize) -> Result<Vec<f32>> {
        let block_type = tensor.rows.block_type();
        if !matches!(block_type, BlockType::F32 | BlockType::F16 | BlockType::BF16) {
            let place = Place::Tensor(name.to_owned());
            return Err(Error::malformed(self.path(), place, block_type.name(), "F32, F16 or BF16"));
        }
        let mut values = vec![0.0; len];
        let width = tensor.dims.first().copied().unwrap_or(1);
        for (index, row) in values.chunks_mut(width.max(1)).enumerate() {
            block_type.decode(tensor.rows.row(index, &mut Vec::new()), row)?;
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(self.unusable(name, format_args!("{} at index {at}", values[at]))),
            None => Ok(values),
        }
    }

    /// Weights with which nothing can be computed.
    fn unusable(&self, name: &str, found: impl std::fmt::Display) -> Error {
        Error::malformed(self.path(), Place::Tensor(name.to_owned()), found, "finite numbers")
    }

    fn optional_vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        match self.checkpoint.tensor(name) {
            Some(_) => self.vector(name, width),
            None => Ok(Vec::new()),
        }
    }

    /// The norm of that name, if the file has it.
    fn norm(&self, name: &str, config: &Config) -> Result<Option<Norm>> {
        let weight_name = format!("{name}.weight");
        if self.checkpoint.tensor(&weight_name).is_none() {
            return Ok(None);
        }
        let weight = self.vector(&weight_name, config.hidden)?;
        let bias = match config.family.norm {
            NormKind::Rms => Vec::new(),
            NormKind::Layer => self.optional_vector(&format!("{name}.bias"), config.hidden)?,
        };
        Ok(Some(Norm { weight, bias }))
    }

    /// The norm of queries or keys: `(head_dim)` shared by the heads, `(heads, head_dim)`, or all heads as one row.
    fn head_norm(&self, name: &str, config: &Config, heads: usize) -> Result<Option<HeadNorm>> {
        let Some(tensor) = self.checkpoint.tensor(&format!("{name}.weight")) else { return Ok(None) };
        let (dim, all) = (config.head_dim, heads * config.head_dim);
        let (len, width) = match tensor.dims[..] {
            [width] if width == dim => (dim, dim),
            [width] if width == all => (all, all),
            [width, count] if width == dim && count == heads => (all, dim),
            _ => {
                let expected = format_args!("dimensions [{dim}], [{dim}, {heads}] or [{all}]");
                return Err(self.shape_error(&format!("{name}.weight"), &tensor.dims, expected));
            }
        };
        let weight = self.numbers(&format!("{name}.weight"), &tensor, len)?;
        let bias = match self.checkpoint.tensor(&format!("{name}.bias")) {
            Some(tensor) if config.family.norm == NormKind::Layer => {
                self.numbers(&format!("{name}.bias"), &tensor, len)?
            }
            _ => Vec::new(),
        };
        Ok(Some(HeadNorm { norm: Norm { weight, bias }, width }))
    }

    /// The width of the embedding, and what leads from it to the stream and from the stream to it.
    fn projections(&self, config: &Config) -> Result<(usize, Option<[Linear; 2]>)> {
        let Some(first) = self.checkpoint.tensor("token_embd_proj.weight") else { return Ok((config.hidden, None)) };
        let width = first.dims.first().copied().unwrap_or(0);
        let inward = self.linear(&[Part::new("token_embd_proj", config.hidden)], width)?;
        let outward = self.linear(&[Part::new("output_proj", width)], config.hidden)?;
        Ok((width, Some([inward, outward])))
    }

    /// Divisors of the rotation's frequencies: one set, or one for short and one for long contexts.
    fn rope_factors(&self, config: &Config, context: usize) -> Result<Option<Vec<f32>>> {
        let name = match config.ropes[0].scaling {
            Scaling::Long { original } if context as f32 > original => "rope_factors_long.weight",
            Scaling::Long { .. } => "rope_factors_short.weight",
            _ => "rope_freqs.weight",
        };
        if config.rotary == 0 || self.checkpoint.tensor(name).is_none() {
            return Ok(None);
        }
        let factors = self.vector(name, config.rotary / 2)?;
        match factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
            Some(bad) => Err(Error::malformed(self.path(), Place::Tensor(name.to_owned()), bad, "positive factors")),
            None => Ok(Some(factors)),
        }
    }

    /// Matrices with `columns` input features, side by side.
    pub(in crate::model) fn linear(&self, parts: &[Part<'_>], columns: usize) -> Result<Linear> {
        let mut tensors = Vec::new();
        for part in parts {
            let name = format!("{}.weight", part.name);
            let mut wanted = vec![columns, part.of];
            wanted.extend(part.stack);
            let expected = format!("dimensions {wanted:?}");
            let tensor = self.tensor(&name, &expected)?;
            if tensor.dims != wanted {
                return Err(self.shape_error(&name, &tensor.dims, expected));
            }
            tensors.push((part, name, tensor));
        }
        // Parts share their input, so that they can be multiplied with it in another order only if that is the same for all.
        let reordered: Option<Vec<_>> = tensors.iter().map(|(_, _, tensor)| tensor.rows.reordered()).collect();
        let reordered = reordered.filter(|all| {
            parts.iter().all(|part| part.name.starts_with("blk.")) && all.iter().all(|one| one.0 == all[0].0)
        });
        let mut packed = Vec::new();
        for (at, (part, name, tensor)) in tensors.iter().enumerate() {
            let source = reordered.as_ref().map_or(tensor.rows.as_ref(), |all| all[at].1.as_ref());
            packed.push((self.pack(name, source, part.rows, columns, part.order)?, self.bias(part)?));
            self.report(self.done.get() + part.rows * columns)?;
        }
        let order = reordered.and_then(|all| all.into_iter().next()).map(|first| first.0);
        // Parts may share a tensor, so its pages go back when all of them are packed.
        for part in parts.iter().filter(|part| part.stack.is_none()) {
            self.checkpoint.release(&format!("{}.weight", part.name));
        }
        Ok(Linear::new(packed).with_order(order))
    }

    fn bias(&self, part: &Part<'_>) -> Result<Vec<f32>> {
        if part.stack.is_some() {
            return Ok(Vec::new());
        }
        let bias = self.optional_vector(&format!("{}.bias", part.name), part.of)?;
        Ok(if bias.is_empty() { bias } else { (0..part.rows).map(|row| bias[(part.order)(row)]).collect() })
    }

    fn pack(
        &self,
        name: &str,
        source: &dyn pack::Rows,
        rows: usize,
        columns: usize,
        order: Order<'_>,
    ) -> Result<Packed> {
        let block_type = source.block_type();
        if !block_type.is_supported() {
            return Err(Error::Unsupported {
                path: self.path().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                what: format!("the type {}", block_type.name()),
                supported: "supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, \
                            IQ4_NL, IQ4_XS, MXFP4"
                    .to_owned(),
            });
        }
        // The packed form of a tensor is at most a panel and a block larger than the tensor, which bounds what a small file
        // can ask for.
        let job = pack::PackJob { source, rows, columns, order, release: &|| self.checkpoint.release(name) };
        job.run(self.scope).map_err(|error| match error {
            pack::PackError::Memory(error) => error,
            pack::PackError::NotFinite(row) => {
                self.unusable(name, format_args!("NaN or an infinity in row {}", order(row)))
            }
        })
    }

    pub(in crate::model) fn layer(&self, config: &Config, index: usize) -> Result<Layer> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let attn_norm = self.norm(&name("attn_norm"), config)?;
        let attn_norm_2 = self.norm(&name("attn_norm_2"), config)?;
        let ffn_norm = self.norm(&name("ffn_norm"), config)?;
        // Where there are two, the second one is attention's and the first the feed-forward layer's.
        let (attn_norm, ffn_norm) = match attn_norm_2 {
            Some(second) => (Some(second), attn_norm),
            None => (attn_norm, ffn_norm),
        };
        let layer = Layer {
            qkv: self.qkv(config, &name)?,
            q_norm: self.head_norm(&name("attn_q_norm"), config, config.heads)?,
            k_norm: self.head_norm(&name("attn_k_norm"), config, config.kv_heads)?,
            attn_output: self.linear(&[Part::new(name("attn_output"), config.hidden)], queries)?,
            attn_post_norm: self.norm(&name("post_attention_norm"), config)?,
            attn_joined_norm: self.norm(&name("attn_output_norm"), config)?,
            ffn: self.ffn(config, &name)?,
            ffn_post_norm: self.norm(&name("post_ffw_norm"), config)?,
            ffn_joined_norm: self.norm(&name("layer_output_norm"), config)?,
            attn_norm,
            ffn_norm,
        };
        let has_one = |norms: [&Option<Norm>; 3]| norms.into_iter().any(Option::is_some);
        if !has_one([&layer.attn_norm, &layer.attn_post_norm, &layer.attn_joined_norm]) {
            return Err(self.missing(&name("attn_norm.weight"), format_args!("{} numbers", config.hidden)));
        }
        if !config.parallel && !has_one([&layer.ffn_norm, &layer.ffn_post_norm, &layer.ffn_joined_norm]) {
            return Err(self.missing(&name("ffn_norm.weight"), format_args!("{} numbers", config.hidden)));
        }
        debug_assert_eq!(layer.qkv.parts().iter().map(Packed::rows).sum::<usize>(), queries + 2 * keys);
        Ok(layer)
    }

    /// Query, key and value from three tensors, or from one with their rows one after the other.
    pub(in crate::model) fn qkv(&self, config: &Config, name: &dyn Fn(&str) -> String) -> Result<Linear> {
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (dim, rotary) = (config.head_dim, config.rotary);
        let adjacent = config.family.position == Position::RopeAdjacent;
        // Pairs (2i, 2i + 1) of the file become pairs (i, i + rotary / 2).
        let halves = move |row: usize| match row % dim {
            i if !adjacent || i >= rotary => row,
            i if i < rotary / 2 => row - i + 2 * i,
            i => row - i + 2 * (i - rotary / 2) + 1,
        };
        let fused = self.checkpoint.tensor(&name("attn_qkv.weight")).is_some();
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
            part("attn_q", queries, &q_order as Order<'_>),
            part("attn_k", keys, &k_order),
            part("attn_v", keys, &v_order),
        ];
        self.linear(&parts, config.hidden)
    }

    fn ffn(&self, config: &Config, name: &dyn Fn(&str) -> String) -> Result<Ffn> {
        if self.checkpoint.tensor(&name("ffn_gate_inp.weight")).is_none() {
            return Ok(Ffn::Dense(self.mlp(config, name, "", None)?));
        }
        let count = config.experts.count;
        let place = Place::Tensor(name("ffn_gate_inp.weight"));
        if count == 0 {
            return Err(Error::malformed(self.path(), place, "a router", "expert_count above 0 among the keys"));
        }
        let router = self.linear(&[Part::new(name("ffn_gate_inp"), count)], config.hidden)?;
        let experts = (0..count).map(|expert| self.mlp(config, name, "_exps", Some((expert, count))));
        let experts = experts.collect::<Result<Vec<_>>>()?;
        for stack in ["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"] {
            self.checkpoint.release(&name(stack));
        }
        let shared = match self.checkpoint.tensor(&name("ffn_up_shexp.weight")) {
            Some(_) => {
                let gate_name = name("ffn_gate_inp_shexp");
                let gate = match self.checkpoint.tensor(&format!("{gate_name}.weight")).map(|gate| gate.dims.len()) {
                    None => None,
                    // One row, written with one dimension or two.
                    Some(1) => Some(self.row(&gate_name, config.hidden)?),
                    Some(_) => Some(self.linear(&[Part::new(gate_name, 1)], config.hidden)?),
                };
                Some((self.mlp(config, name, "_shexp", None)?, gate))
            }
            None => None,
        };
        Ok(Ffn::Experts { router, experts, shared })
    }

    /// A vector as a matrix of one row.
    fn row(&self, name: &str, columns: usize) -> Result<Linear> {
        let name = format!("{name}.weight");
        let tensor = self.tensor(&name, format_args!("{columns} numbers"))?;
        if tensor.dims != [columns] {
            return Err(self.shape_error(&name, &tensor.dims, format_args!("dimensions [{columns}]")));
        }
        Ok(Linear::new(vec![(self.pack(&name, tensor.rows.as_ref(), 1, columns, &|row| row)?, Vec::new())]))
    }

    /// Gate, up and down, of one expert of a stack if `expert` is its index and their number.
    pub(in crate::model) fn mlp(
        &self,
        config: &Config,
        name: &dyn Fn(&str) -> String,
        suffix: &str,
        expert: Option<(usize, usize)>,
    ) -> Result<Mlp> {
        let tensor = |part: &str| name(&format!("ffn_{part}{suffix}"));
        let dims = |part: &str| self.checkpoint.tensor(&format!("{}.weight", tensor(part))).map(|tensor| tensor.dims);
        let Some(up) = dims("up") else { return Err(self.missing(&format!("{}.weight", tensor("up")), "a matrix")) };
        let Some(down) = dims("down") else {
            return Err(self.missing(&format!("{}.weight", tensor("down")), "a matrix"));
        };
        let (width, rows) = (down.first().copied().unwrap_or(0), up.get(1).copied().unwrap_or(0));
        let stack = expert.map(|(_, count)| count);
        let first = |rows: usize| expert.map_or(0, |(index, _)| index * rows);
        let (wide, narrow, second) = (first(width), first(config.hidden), first(2 * width) + width);
        let (at_wide, at_narrow) = (move |row| wide + row, move |row| narrow + row);
        let (at_both, at_second) = (move |row| second - width + row, move |row| second + row);
        let part = |part: &str, rows: usize, of: usize, order| Part { name: tensor(part), rows, order, of, stack };
        let up = if dims("gate").is_some() {
            vec![part("gate", width, width, &at_wide as Order<'_>), part("up", width, width, &at_wide)]
        } else if rows == 2 * width {
            // Gate and up one after the other in one tensor.
            vec![part("up", width, rows, &at_both as Order<'_>), part("up", width, rows, &at_second)]
        } else {
            vec![part("up", width, width, &at_wide as Order<'_>)]
        };
        Ok(Mlp {
            up: self.linear(&up, config.hidden)?,
            down: self.linear(&[part("down", config.hidden, config.hidden, &at_narrow)], width)?,
            width,
        })
    }
}
