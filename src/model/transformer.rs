//! A model in memory: its weights, and the kernel and threads that compute with them.

use super::arch::{FeedForwardKind, LayerKind, MixerKind};
use super::config::Config;
use super::ffn::FeedForward;
use super::fingerprint::{Fingerprint, FingerprintHasher};
use super::linear::Linear;
use super::mixers::Mixer;
use super::mixers::positions::Positions;
use super::norm::Norm;
use super::outputs::heads::Heads;
use super::per_layer::{LayerInput, PerLayer};
use super::pipeline::handover::Handover;
use super::pipeline::held::Held;
use super::rope::Scaling;
use super::streams::{LayerStreams, Streams};
use super::weights::loader::{Loader, Part};
use super::{ffn, mixers};
use crate::error::Result;
use crate::format::Checkpoint;
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;
use crate::threads::{Scope, ThreadPool};

/// Everything that a forward pass reads. It does not change.
#[derive(Debug)]
pub(super) struct Transformer {
    pub(super) config: Config,
    /// What of the model is in memory. Of everything else, matrices have no weights.
    pub(super) held: Held,
    pub(super) weights: Weights,
    /// What stages of a pipeline hand over.
    pub(super) handover: Handover,
    pub(super) positions: Positions,
    pub(super) widths: Widths,
    pub(super) kernel: &'static Kernel,
    pub(super) pool: ThreadPool,
}

/// The weights of a model.
#[derive(Debug)]
pub(super) struct Weights {
    /// `(vocabulary, hidden)`, or of the width of the projections.
    pub(super) embedding: Linear,
    /// Between the embedding's width and that of the residual stream, where they differ.
    pub(super) projections: Option<Projections>,
    /// Of the embeddings.
    pub(super) embedding_norm: Option<Norm>,
    /// `(types, hidden)`: learned vectors of the first text and of a second one.
    pub(super) token_types: Option<Linear>,
    /// `(positions, hidden)`: learned vectors.
    pub(super) positions: Option<Linear>,
    pub(super) layers: Vec<Layer>,
    /// Before the output matrix.
    pub(super) output_norm: Option<Norm>,
    /// As `embedding`, which takes its place where it is `None`.
    output: Option<Linear>,
    /// `(rotary / 2)`: divisors of the rotation's frequencies.
    pub(super) rope_factors: Option<Vec<f32>>,
    /// A vector for each layer that depends on the token.
    pub(super) per_layer: Option<PerLayer>,
    /// Projections to and from several residual streams.
    pub(super) streams: Option<Streams>,
    /// What follows the hidden states.
    pub(super) heads: Heads,
}

/// The projections between an embedding and a residual stream of different widths.
#[derive(Debug)]
pub(super) struct Projections {
    /// `(hidden, embedding)`
    pub(super) in_proj: Linear,
    /// `(embedding, hidden)`
    pub(super) out_proj: Linear,
}

/// One layer: norm, mixer, join, norm, feed-forward, join.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) mixer_norms: BranchNorms,
    pub(super) mixer: Mixer,
    pub(super) ffn_norms: BranchNorms,
    pub(super) ffn: FeedForward,
    /// What the layer adds of its own vector.
    pub(super) per_layer: Option<LayerInput>,
    /// How the layer computes one of several residual streams.
    pub(super) streams: Option<LayerStreams>,
    /// Factor of the residual stream after the layer.
    pub(super) scale: Option<f32>,
}

/// The norms around a branch of a layer. Those that a family does not have are `None`.
#[derive(Debug)]
pub(super) struct BranchNorms {
    /// Of the branch's input.
    pub(super) input: Option<Norm>,
    /// Of the branch's output, before it joins the stream.
    pub(super) output: Option<Norm>,
    /// Of the stream, after the output has joined it.
    pub(super) stream: Option<Norm>,
}

impl BranchNorms {
    fn load(
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
        [input, output, stream]: [&str; 3],
    ) -> Result<BranchNorms> {
        Ok(BranchNorms {
            input: input_norm(loader, config, input, config.norm_eps * config.eps_scale(index))?,
            output: loader.norm_of(output, config, config.hidden, config.post_norm_eps)?,
            stream: loader.norm(stream, config)?,
        })
    }

    fn is_empty(&self) -> bool {
        self.input.is_none() && self.output.is_none() && self.stream.is_none()
    }
}

/// A norm before a branch or before the output, which has no weights in some families.
fn input_norm(loader: &Loader<'_>, config: &Config, name: &str, eps: f32) -> Result<Option<Norm>> {
    let unweighted = || config.family.quirks.unweighted_norms.then(|| Norm::unweighted(config.hidden, eps));
    Ok(loader.norm_of(name, config, config.hidden, eps)?.or_else(unweighted))
}

impl Layer {
    /// Reads layer `index`.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) and [`Error::Malformed`](crate::Error::Malformed) with the tensor; those of
    /// [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Layer> {
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let has = |suffix: &str| loader.has(&name(suffix));
        let after = has("post_attention_norm.weight") && !has("ffn_norm.weight") && !has("post_ffw_norm.weight");
        let inputs = match (has("attn_norm_2.weight"), after) {
            // Of two norms of attention, the second is the mixer's and the first the feed-forward layer's.
            (true, _) => [name("attn_norm_2"), name("attn_norm")],
            // Where nothing is normalized after its branch, the norm after attention is the feed-forward layer's.
            (false, true) => [name("attn_norm"), name("post_attention_norm")],
            (false, false) => [name("attn_norm"), name("ffn_norm")],
        };
        let output = if after { "" } else { "post_attention_norm" };
        // A layer of one branch has one norm.
        let kind = config.layers[index].kind;
        let inputs = match kind {
            LayerKind { mixer: MixerKind::None, .. } => [String::new(), name("attn_norm")],
            LayerKind { mixer: MixerKind::Rwkv, .. } => [name("attn_norm"), name("attn_norm_2")],
            LayerKind { ffn: FeedForwardKind::None, .. } => [name("attn_norm"), String::new()],
            _ => inputs,
        };
        let norms = |input: &str, output: &str, stream: &str| {
            BranchNorms::load(loader, config, index, [input, &name(output), &name(stream)])
        };
        let layer = Layer {
            mixer_norms: norms(&inputs[0], output, "attn_output_norm")?,
            mixer: Mixer::load(loader, config, index)?,
            ffn_norms: norms(&inputs[1], "post_ffw_norm", "layer_output_norm")?,
            ffn: FeedForward::load(loader, config, index)?,
            per_layer: LayerInput::load(loader, config, index)?,
            streams: LayerStreams::load(loader, config, index)?,
            scale: match has("layer_output_scale.weight") {
                true => loader.vector(&name("layer_output_scale.weight"), 1)?.first().copied(),
                false => None,
            },
        };
        let expected = format_args!("{} numbers", config.hidden);
        let may_be_without = index == 0 && config.family.quirks.optional_first_norm;
        if layer.mixer_norms.is_empty() && !may_be_without && kind.mixer != MixerKind::None {
            return Err(loader.missing(&name("attn_norm.weight"), expected));
        }
        if !config.parallel && layer.ffn_norms.is_empty() && kind.ffn != FeedForwardKind::None {
            let missing = if kind.mixer == MixerKind::None { "attn_norm.weight" } else { "ffn_norm.weight" };
            return Err(loader.missing(&name(missing), expected));
        }
        Ok(layer)
    }

    /// The norm of the feed-forward layer's input: its own, or, in parallel blocks, that of the mixer's input.
    pub(super) fn ffn_norm(&self, config: &Config) -> Option<&Norm> {
        self.ffn_norms.input.as_ref().or(if config.parallel { self.mixer_norms.input.as_ref() } else { None })
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let per_layer = self.per_layer.iter().flat_map(LayerInput::linears);
        let streams = self.streams.iter().flat_map(LayerStreams::linears);
        self.mixer.linears().into_iter().chain(self.ffn.linears()).chain(per_layer).chain(streams)
    }

    /// Bytes of weights that one token reads, where it uses `used` experts.
    fn bytes_read(&self, used: usize) -> usize {
        let ffn: usize = self.ffn.linears().into_iter().map(Linear::bytes).sum();
        self.linears().map(Linear::bytes).sum::<usize>() - ffn + self.ffn.bytes_read(used)
    }

    fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let Layer { mixer_norms, mixer, ffn_norms, ffn, per_layer, streams, scale } = self;
        for BranchNorms { input, output, stream } in [mixer_norms, ffn_norms] {
            for norm in [input, output, stream] {
                hasher.optional(norm.as_ref(), FingerprintHasher::norm);
            }
        }
        mixer.fingerprint(hasher);
        ffn.fingerprint(hasher);
        // Hashed only where they exist, so that models without them keep their fingerprints.
        if let Some(per_layer) = per_layer {
            per_layer.fingerprint(hasher);
        }
        if let Some(streams) = streams {
            streams.fingerprint(hasher);
        }
        if let Some(scale) = scale {
            hasher.bytes(&scale.to_le_bytes());
        }
    }
}

impl Weights {
    /// Reads all weights, for sessions of `context` tokens.
    ///
    /// # Errors
    /// Those of [`Layer::load`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, context: usize) -> Result<Weights> {
        Weights::load_part(loader, config, context, &Held::whole(config.layers.len()))
    }

    /// Reads the weights that are held, for sessions of `context` tokens. Names and shapes of all others are checked.
    ///
    /// # Errors
    /// Those of [`Layer::load`].
    pub(super) fn load_part(loader: &Loader<'_>, config: &Config, context: usize, held: &Held) -> Result<Weights> {
        loader.report_start()?;
        let mut weights = Weights::ends(loader, config, context, held)?;
        for index in 0..config.layers.len() {
            let is_held = held.layers.contains(&index);
            weights.layers.push(loader.load_if(is_held, |loader| Layer::load(loader, config, index))?);
        }
        loader.check_leftovers(config)?;
        loader.report_end()?;
        Ok(weights)
    }

    /// Checks that a checkpoint has all tensors of the model and no other that changes what it computes, without reading
    /// its matrices.
    ///
    /// # Errors
    /// Those of [`Weights::load`], but for values of matrices.
    pub(super) fn check(scope: &Scope<'_>, checkpoint: &dyn Checkpoint, config: &Config) -> Result<()> {
        Weights::load(&Loader::hollow(scope, checkpoint), config, config.default_context()).map(drop)
    }

    /// Reads the weights before and after the layers.
    ///
    /// # Errors
    /// Those of [`Layer::load`].
    pub(super) fn without_layers(loader: &Loader<'_>, config: &Config, context: usize) -> Result<Weights> {
        Weights::ends(loader, config, context, &Held::whole(config.layers.len()))
    }

    fn ends(loader: &Loader<'_>, config: &Config, context: usize, held: &Held) -> Result<Weights> {
        let linear =
            |wanted: bool, part: Part<'_>, width: usize| loader.load_if(wanted, |loader| loader.linear(&[part], width));
        let Some(table) = loader.dims("token_embd.weight") else {
            return Err(loader.missing("token_embd.weight", format_args!("shape [{}, vocabulary]", config.hidden)));
        };
        let vocabulary = table.get(1).copied().unwrap_or(0);
        let (width, projections) = match loader.dims("token_embd_proj.weight") {
            None => (config.hidden, None),
            Some(dims) => {
                let width = dims.first().copied().unwrap_or(0);
                let in_proj = linear(held.embedding, Part::new("token_embd_proj", config.hidden), width)?;
                let out_proj = linear(held.head, Part::new("output_proj", width), config.hidden)?;
                (width, Some(Projections { in_proj, out_proj }))
            }
        };
        let has_output = loader.has("output.weight");
        let is_needed = held.embedding || (held.head && !has_output);
        let embedding = linear(is_needed, Part::new("token_embd", vocabulary), width)?;
        let output = match has_output {
            true => Some(linear(held.head, Part::new("output", vocabulary), width)?),
            false => None,
        };
        let positions = match loader.dims("position_embd.weight") {
            Some(dims) => {
                let rows = dims.get(1).copied().unwrap_or(0);
                if rows < config.context {
                    let expected = format_args!("rows for the {} positions of the context", config.context);
                    return Err(loader.wrong_shape("position_embd.weight", &dims, expected));
                }
                Some(linear(held.embedding, Part::new("position_embd", rows), config.hidden)?)
            }
            None => None,
        };
        let token_types = match loader.dims("token_types.weight") {
            // A table of one row may have one dimension.
            Some(dims) => {
                let rows = dims.get(1).copied().unwrap_or(1);
                if rows == 0 {
                    return Err(loader.wrong_shape("token_types.weight", &dims, "a row for each type"));
                }
                Some(linear(held.embedding, Part::new("token_types", rows), config.hidden)?)
            }
            None => None,
        };
        let weights = Weights {
            embedding,
            token_types,
            projections,
            embedding_norm: match loader.norm("token_embd_norm", config)? {
                Some(_) if config.family.output_norm == "token_embd_norm" => None,
                None if config.family.quirks.embedding_norm => Some(Norm::unweighted(config.hidden, config.norm_eps)),
                norm => norm,
            },
            positions,
            layers: Vec::new(),
            output_norm: {
                let eps = config.output_norm_eps * config.eps_scale(config.layers.len());
                input_norm(loader, config, config.family.output_norm, eps)?
            },
            output,
            rope_factors: rope_factors(loader, config, context)?,
            per_layer: loader.load_if(held.embedding, |loader| PerLayer::load(loader, config, vocabulary))?,
            streams: Streams::load(loader, config, held)?,
            heads: loader.load_if(held.head, |loader| Heads::load(loader, config))?,
        };
        if weights.output_norm.is_none() && !config.family.quirks.optional_output_norm {
            let name = format!("{}.weight", config.family.output_norm);
            return Err(loader.missing(&name, format_args!("{} numbers", config.hidden)));
        }
        Ok(weights)
    }

    /// The matrix that turns the last hidden state into logits.
    pub(super) fn output(&self) -> &Linear {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// The output matrix, where it is not the embedding.
    pub(super) fn own_output(&self) -> Option<&Linear> {
        self.output.as_ref()
    }

    /// The linear layers between the embedding and the output, to whose products adapters may add.
    pub(super) fn adaptable(&self) -> impl Iterator<Item = &Linear> {
        let projections = self.projections.iter().flat_map(Projections::linears);
        let per_layer = self.per_layer.iter().map(PerLayer::projection);
        let streams = self.streams.iter().flat_map(Streams::linears);
        projections.chain(per_layer).chain(streams).chain(self.layers.iter().flat_map(Layer::linears))
    }

    /// Rows of the embedding: logits per token.
    pub(super) fn vocabulary(&self) -> usize {
        self.embedding.parts()[0].rows()
    }

    /// Whether the model computes in single precision: the mixers' input projections are F32.
    pub(super) fn is_f32(&self) -> bool {
        self.layers.iter().filter_map(|layer| layer.mixer.in_proj()).all(Linear::is_f32)
    }

    /// The matrices of all layers, and outside of them.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let ends = [Some(&self.embedding), self.token_types.as_ref(), self.positions.as_ref(), self.output.as_ref()];
        let projections = self.projections.iter().flat_map(Projections::linears);
        let per_layer = self.per_layer.iter().flat_map(PerLayer::linears);
        let streams = self.streams.iter().flat_map(Streams::linears);
        let outside =
            ends.into_iter().flatten().chain(projections).chain(per_layer).chain(streams).chain(self.heads.linears());
        outside.chain(self.layers.iter().flat_map(Layer::linears))
    }

    /// Bytes of all matrices.
    pub(super) fn bytes(&self) -> usize {
        self.linears().map(Linear::bytes).sum()
    }

    /// Bytes of the matrices that one decoded token reads, where it uses `used` experts per layer.
    pub(super) fn bytes_read(&self, used: usize) -> usize {
        let projections: usize = self.projections.iter().flat_map(Projections::linears).map(Linear::bytes).sum();
        let layers: usize = self.layers.iter().map(|layer| layer.bytes_read(used)).sum();
        let per_layer = self.per_layer.as_ref().map_or(0, |per_layer| per_layer.projection().bytes());
        let streams: usize = self.streams.iter().flat_map(Streams::linears).map(Linear::bytes).sum();
        layers + projections + per_layer + streams + self.output().bytes()
    }

    /// The number of weights in all matrices.
    pub(super) fn parameters(&self) -> usize {
        self.linears().flat_map(Linear::parts).map(|part| part.rows() * part.columns()).sum()
    }

    fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Every field by name, so that a new one cannot be forgotten.
        let Weights {
            embedding,
            projections,
            embedding_norm,
            token_types,
            positions,
            layers,
            output_norm,
            output,
            rope_factors,
            per_layer,
            streams,
            heads,
        } = self;
        hasher.linear(embedding);
        hasher.optional(projections.as_ref(), |hasher, projections| {
            projections.linears().into_iter().for_each(|linear| hasher.linear(linear));
        });
        hasher.optional(embedding_norm.as_ref(), FingerprintHasher::norm);
        hasher.optional(positions.as_ref(), FingerprintHasher::linear);
        layers.iter().for_each(|layer| layer.fingerprint(hasher));
        hasher.optional(output_norm.as_ref(), FingerprintHasher::norm);
        hasher.optional(output.as_ref(), FingerprintHasher::linear);
        hasher.optional(rope_factors.as_ref(), |hasher, factors| hasher.bytes(bytemuck::cast_slice(factors)));
        // Hashed only where they exist, so that models without them keep their fingerprints.
        if let Some(per_layer) = per_layer {
            per_layer.fingerprint(hasher);
        }
        if let Some(streams) = streams {
            streams.fingerprint(hasher);
        }
        if let Some(types) = token_types {
            hasher.linear(types);
        }
        heads.fingerprint(hasher);
    }
}

impl Projections {
    fn linears(&self) -> [&Linear; 2] {
        [&self.in_proj, &self.out_proj]
    }
}

/// Divisors of the rotation's frequencies `(rotary / 2)`: one set, or one for short and one for long contexts.
fn rope_factors(loader: &Loader<'_>, config: &Config, context: usize) -> Result<Option<Vec<f32>>> {
    let name = match config.ropes[0].scaling {
        Scaling::Long { original } if context as f32 > original => "rope_factors_long.weight",
        Scaling::Long { .. } => "rope_factors_short.weight",
        _ => "rope_freqs.weight",
    };
    if config.rotary == 0 || !loader.has(name) {
        return Ok(None);
    }
    let factors = loader.vector(name, config.rotary / 2)?;
    match factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
        Some(bad) => Err(loader.malformed(name, bad, "positive factors")),
        None => Ok(Some(factors)),
    }
}

/// The widest rows of a model, in numbers: what the workspaces of a pass are allocated for.
#[derive(Debug, Default)]
pub(super) struct Widths {
    pub(super) mixers: mixers::Widths,
    pub(super) ffn: ffn::Widths,
    /// The input of any linear layer outside the experts.
    pub(super) input: usize,
    /// The output of a branch, or of a projection.
    pub(super) branch: usize,
}

impl Widths {
    pub(super) fn new(config: &Config, weights: &Weights) -> Widths {
        let mut widths = Widths { branch: config.hidden.next_multiple_of(PANEL), ..Widths::default() };
        for (layer, own) in weights.layers.iter().zip(&config.layers) {
            layer.mixer.widen(config, own, &mut widths.mixers);
            layer.ffn.widen(config, &mut widths.ffn);
            if let FeedForward::ChannelMix(mix) = &layer.ffn {
                widths.mixers.widen_to(mix);
            }
        }
        widths.input = config.hidden.max(widths.mixers.input).max(widths.ffn.input);
        for linear in weights.projections.iter().flat_map(Projections::linears) {
            widths.branch = widths.branch.max(linear.width());
            widths.input = widths.input.max(linear.columns());
        }
        for linear in weights.heads.linears() {
            widths.branch = widths.branch.max(linear.width());
            widths.input = widths.input.max(linear.columns());
        }
        let per_layer = weights.per_layer.iter().flat_map(PerLayer::linears);
        let inside = weights.layers.iter().flat_map(|layer| &layer.per_layer).flat_map(LayerInput::linears);
        let streams = weights.layers.iter().flat_map(|layer| &layer.streams).flat_map(LayerStreams::linears);
        for linear in per_layer.chain(inside).chain(streams) {
            widths.branch = widths.branch.max(linear.width());
            widths.input = widths.input.max(linear.columns());
        }
        widths
    }
}

impl Transformer {
    /// A hash of the configuration and the packed weights.
    ///
    /// # Errors
    /// Those of reading experts that are not in memory.
    pub(super) fn fingerprint(&self) -> Result<Fingerprint> {
        let mut hasher = FingerprintHasher::new(&self.config, &self.positions.describe(), &self.pool);
        self.weights.fingerprint(&mut hasher);
        hasher.finish()
    }
}
