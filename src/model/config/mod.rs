//! Hyperparameters, read from GGUF's keys and validated once. Code that uses them does not check them again.

mod classifier;
mod experts;
mod latent;
mod layers;
pub(super) mod metadata;
mod mtp;
pub(super) mod namespace;
mod recurrent;

pub use classifier::Pooling;
pub(crate) use classifier::{ClassifierConfig, FIRST_DENSE, HeadActivation};
pub use experts::{ExpertsConfig, GroupsConfig};
pub use latent::LatentConfig;
pub use layers::LayerConfig;
pub(crate) use layers::Reach;
pub(crate) use mtp::MtpConfig;
pub use recurrent::RecurrentConfig;
pub(crate) use recurrent::StateSizes;

use super::arch::{self, Family, MixerKind, NormKind, Position, Residual, Temperature};
use super::rope::{self, RopeConfig, Scaling};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::kernels::Activation;
use metadata::MetadataReader;

/// The largest number of layers that a file may have, more than any known model has.
const MAX_LAYERS: usize = 1024;

/// Hyperparameters of a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Choices of the family.
    pub family: &'static Family,
    /// The longest context that the model was made for.
    pub context: usize,
    /// The longest context of a session: more than `context` where the file stretches the rotation further.
    pub(crate) longest: usize,
    /// Whether a position sees no later ones. Otherwise attention goes in both directions, and a text is computed at once.
    pub causal: bool,
    /// Whether the model generates text: hidden states become logits of the next token.
    pub generates: bool,
    /// Whether hidden states become logits of tokens: of the next one, or where attention goes in both directions.
    pub(crate) has_logits: bool,
    /// How the hidden states of a text become its embedding, where the file says it.
    pub(crate) pooling: Option<Pooling>,
    /// The labels of a classification head, and what it reads.
    pub(crate) classifier: ClassifierConfig,
    /// `(dense modules)`: the activations of dense modules after pooling.
    pub(crate) dense: Vec<HeadActivation>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the variance under the square root of a norm.
    pub norm_eps: f32,
    /// Activation of the feed-forward layers.
    pub activation: Activation,
    /// Whether mixer and feed-forward layer read the same stream.
    pub parallel: bool,
    /// Dimensions of a head that are rotated; even, at most `head_dim`; 0 for none.
    pub rotary: usize,
    /// The rotation of layers without and with a window.
    pub ropes: [RopeConfig; 2],
    /// Whether layers with a window rotate without the stretching of the others.
    pub(crate) plain_windows: bool,
    /// `(layers)`: the settings that differ between layers.
    pub layers: Vec<LayerConfig>,
    /// ALiBi's largest slope exponent, and the factor of its slopes.
    pub alibi: Option<(f32, f32)>,
    /// Factor of the dot products of queries and keys.
    pub attention_scale: f32,
    /// Queries, keys and values are clamped to plus and minus this.
    pub clamp_qkv: Option<f32>,
    /// Soft cap of attention scores.
    pub attention_cap: Option<f32>,
    /// Soft cap of logits.
    pub logit_cap: Option<f32>,
    /// Factor of the embeddings.
    pub embedding_scale: f32,
    /// Factor of a branch's output when it is added to the residual stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// Experts of feed-forward layers that have them.
    pub experts: ExpertsConfig,
    /// The widths of latent attention.
    pub latent: Option<LatentConfig>,
    /// The recurrent layers.
    pub recurrent: Option<RecurrentConfig>,
    /// How queries of layers that do so grow with the position.
    pub temperature: Option<Temperature>,
    /// Epsilon of the norm before the output matrix.
    pub(crate) output_norm_eps: f32,
    /// Epsilon of the norms after a branch.
    pub post_norm_eps: f32,
    /// Whether queries and keys of layers that rotate are normalized without weights.
    pub unweighted_head_norms: bool,
    /// `(layers)` or empty: how many deviations above its mean a gate must be to count; `None` for all.
    pub sparsity: Vec<Option<f32>>,
    /// `(layers)` or empty: the four parameters of xIELU.
    pub xielu: Vec<[f32; 4]>,
    /// The factor inside the sigmoid of experts' gates that are clamped, and the bound.
    pub clamped_gate: Option<(f32, f32)>,
    /// Several residual streams. Layers compute one of them.
    pub streams: Option<StreamsConfig>,
    /// The layers behind the last that predict further tokens.
    pub(crate) mtp: Option<MtpConfig>,
}

/// Several residual streams: layers compute one and predict the others (AltUp, Baykal et al. 2023, arXiv 2301.13310).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamsConfig {
    /// Streams in all.
    pub count: usize,
    /// The one that layers compute.
    pub active: usize,
}

impl Config {
    /// Reads and validates the hyperparameters.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing), [`Error::Malformed`](crate::Error::Malformed) or
    /// [`Error::Unsupported`](crate::Error::Unsupported) with the key.
    pub fn read(checkpoint: &dyn Checkpoint) -> Result<Config> {
        let general = MetadataReader::new(checkpoint.path(), checkpoint.metadata());
        let name = general.text("general.architecture")?;
        let Some(family) = arch::by_name(name) else {
            let mut names: Vec<&str> = arch::families().map(|family| family.name).collect();
            names.sort_unstable();
            let supported = format!("supported: {}", names.join(", "));
            return Err(general.unsupported("general.architecture", format_args!("the family {name:?}"), &supported));
        };
        let keys = general.of_family(name);

        let hidden = keys.count("embedding_length")?;
        let blocks = keys.count("block_count")?;
        keys.check("block_count", blocks, blocks <= MAX_LAYERS, format_args!("at most {MAX_LAYERS}"))?;
        let eps_key = match family.norm {
            // The second name is that of some files of families with this norm.
            NormKind::Rms => keys.alias(["attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"]),
            NormKind::Layer => "attention.layer_norm_epsilon",
        };
        let norm_eps = keys.positive(eps_key)?.ok_or_else(|| keys.missing(eps_key))?;
        let context = keys.count("context_length")?;
        // llama.cpp's converter of GLM looks for the names of older configurations. Where it does not find them, it writes the
        // width of the model as the context, and 1e-5 as epsilon.
        let (context, norm_eps) = match family.name {
            "chatglm" if context == hidden && norm_eps == 1e-5 => (1 << 17, 1.562_5e-7),
            _ => (context, norm_eps),
        };

        let default_alibi = (family.position == Position::Alibi).then_some(8.0);
        let alibi = keys.positive_or("attention.max_alibi_bias", default_alibi)?;
        let alibi_scale = keys.positive("attention.alibi_scale")?.unwrap_or(1.0);
        let alibi = alibi.map(|max| (max, alibi_scale));
        let latent = match family.layer(0).mixer {
            MixerKind::LatentAttention => Some(latent::read(&keys)?),
            _ => None,
        };
        let rope = RopeConfig::read(&keys, family.quirks.untruncated_yarn)?;
        let window_base = keys.positive(keys.alias(["rope.freq_base_swa", "rope.local.freq_base"]))?;
        let window_base = window_base.or(family.quirks.window_rope_base);
        let window_rope = window_base.map_or(rope, RopeConfig::plain);

        let original = rope.scaling.yarn().map(|(_, original)| original);
        let temperature = layers::temperature(&keys, family, original)?;
        let rotates = layers::rotates(&keys, family)? && alibi.is_none();
        let count = blocks - mtp::extra_layers(&keys, family, blocks)?;
        let causal = keys.flag("attention.causal")?.unwrap_or(!family.quirks.bidirectional);
        let sizes = [blocks, count];
        let mut layers = layers::read(&keys, family, sizes, hidden, rotates, causal, latent.as_ref(), temperature)?;
        let mtp = MtpConfig::of(layers.split_off(count));
        let recurrent = recurrent::read(&keys, family, hidden, &layers)?;
        if !causal && alibi.is_some() {
            let supported = "supported: true where attention.max_alibi_bias is above 0 (is_causal in config.json)";
            return Err(keys.unsupported("attention.causal", false, supported));
        }
        let attends = |layer: &&LayerConfig| layer.kv_heads > 0 && layer.rope() == 0;
        let first = layers.iter().find(attends).or(layers.first()).copied();
        let Some(first) = first else { return Err(keys.missing("block_count")) };
        let LayerConfig { heads, kv_heads, head_dim, rotary, .. } = first;
        let (attention_cap, logit_cap) = family.quirks.soft_caps.unzip();
        let logit_scale = keys.positive("logit_scale")?.unwrap_or(1.0);
        let embedding_scale = if family.quirks.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 };
        // Model cards add YaRN and leave the length as it is.
        let longest = match rope.scaling.yarn() {
            Some((factor, original)) if rotary > 0 => context.max((factor * original) as usize),
            _ => context,
        };
        // Where divisors do the stretching, the factor is 1.
        let extended = keys.optional_count("rope.scaling.extended_context_length")?;
        let longest = longest.max(extended.unwrap_or(0));
        let has_logits = !family.quirks.without_output && keys.flag("generates")?.unwrap_or(true);
        // Files of Granite 4 list the sizes of recurrent layers in models without any.
        let lists_recurrent = family.recurrent.is_some() || matches!(family.name, "granite" | "granitemoe");
        namespace::check(&keys, [latent.is_some(), lists_recurrent, family.mtp.is_some()])?;
        Ok(Config {
            family,
            context,
            longest,
            causal,
            generates: causal && has_logits,
            has_logits,
            pooling: classifier::pooling(&keys)?,
            classifier: ClassifierConfig::read(&keys, causal)?,
            dense: classifier::dense(&keys)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            activation: activation(&keys)?.unwrap_or(family.activation),
            parallel: keys.flag("use_parallel_residual")?.unwrap_or(family.residual == Residual::Parallel),
            rotary,
            ropes: [rope, window_rope],
            plain_windows: window_base.is_some(),
            attention_scale: attention_scale(&keys, family, hidden, &layers, &rope, latent.as_ref())?,
            layers,
            alibi,
            clamp_qkv: keys.positive("attention.clamp_kqv")?,
            attention_cap: keys.positive_or("attn_logit_softcapping", attention_cap)?,
            logit_cap: keys.positive_or("final_logit_softcapping", logit_cap)?,
            embedding_scale: keys.positive("embedding_scale")?.unwrap_or(embedding_scale),
            residual_scale: keys.positive("residual_scale")?.unwrap_or(1.0),
            logit_scale: if family.quirks.divided_logits { 1.0 / logit_scale } else { logit_scale },
            experts: experts::read(&keys, family)?,
            latent,
            recurrent,
            temperature,
            output_norm_eps: keys.positive("output_norm_epsilon")?.unwrap_or(norm_eps),
            post_norm_eps: keys
                .positive("attention.post_norm_epsilon")?
                .or(family.quirks.post_norm_eps)
                .unwrap_or(norm_eps),
            unweighted_head_norms: unweighted_head_norms(&keys, family)?,
            sparsity: sparsity(&keys, count)?,
            xielu: if family.quirks.xielu { xielu(&general, count)? } else { Vec::new() },
            clamped_gate: clamped_gate(&keys, family)?,
            streams: streams(&keys)?,
            mtp,
        })
    }
}

impl Config {
    /// The factor of epsilon in the norms of layer `index`; of the number of layers, in the one before the output matrix.
    pub(crate) fn eps_scale(&self, index: usize) -> f32 {
        let period = self.recurrent.map_or(0, |recurrent| recurrent.rescale_every);
        index.checked_div(period).map_or(1.0, |count| 4f32.powi(count as i32))
    }

    /// The context of a session by default: the longest that the rotation needs no stretching for, where stretching
    /// for long contexts changes the results of short ones.
    pub fn default_context(&self) -> usize {
        match self.ropes[0].scaling {
            Scaling::Dynamic { original, .. } | Scaling::Long { original } => self.context.min(original as usize),
            _ => self.context,
        }
    }

    /// The context of a session: the `wanted` one, or else the default.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the model was made for less.
    pub(super) fn context_or_default(&self, wanted: Option<usize>) -> Result<usize> {
        let context = wanted.unwrap_or(self.default_context());
        if context == 0 || context > self.longest {
            let expected = format!("1 to {}, the context that the model was made for", self.longest);
            return Err(Error::argument("context", context, expected));
        }
        Ok(context)
    }
}

/// Factor of the dot products of queries and keys.
fn attention_scale(
    keys: &MetadataReader<'_>,
    family: &Family,
    hidden: usize,
    layers: &[LayerConfig],
    rope: &RopeConfig,
    latent: Option<&LatentConfig>,
) -> Result<f32> {
    let (heads, head_dim) = layers.first().map_or((1, 1), |layer| (layer.heads, layer.head_dim));
    let by_width = family.quirks.scaled_by_width == Some(layers.len());
    let width = match latent {
        Some(latent) => (latent.plain + latent.rope) as f32,
        None if by_width => hidden as f32 / heads as f32,
        None => head_dim as f32,
    };
    let default = if family.quirks.unscaled_attention || width == 0.0 { 1.0 } else { 1.0 / width.sqrt() };
    let scale = keys.positive("attention.scale")?.unwrap_or(default);
    // The stretched rotation of latent attention sharpens the whole score, because a part of it is not rotated.
    let sharpened = match (latent, rope.scaling.yarn()) {
        (Some(_), Some((factor, _))) => rope::sharpness(keys, factor)?,
        _ => 1.0,
    };
    Ok(scale * sharpened * sharpened)
}

/// Whether queries and keys are normalized without weights.
fn unweighted_head_norms(keys: &MetadataReader<'_>, family: &Family) -> Result<bool> {
    if !family.quirks.unweighted_head_norms {
        return Ok(false);
    }
    // The largest model of the first family with these norms does without them.
    let largest = keys.get("expert_count").is_some_and(|count| count.as_u64() == Some(128));
    Ok(keys.flag("attention.qk_norm")?.unwrap_or(!largest))
}

/// The numbers of deviations above the mean from which gates count.
fn sparsity(keys: &MetadataReader<'_>, layers: usize) -> Result<Vec<Option<f32>>> {
    let Some(numbers) = keys.floats("activation_sparsity_scale", layers)? else { return Ok(Vec::new()) };
    // Minus infinity, and numbers like it, let everything pass.
    Ok(numbers.into_iter().map(|number| (number > -1e30).then_some(number)).collect())
}

/// xIELU's parameters, whose keys have no family's name, as they apply: without the softplus that training puts around them.
fn xielu(keys: &MetadataReader<'_>, layers: usize) -> Result<Vec<[f32; 4]>> {
    let list = |name: &str| {
        let key = format!("xielu.{name}");
        keys.floats(&key, layers)?.ok_or_else(|| keys.missing(&key))
    };
    let (alpha_p, alpha_n, beta, eps) = (list("alpha_p")?, list("alpha_n")?, list("beta")?, list("eps")?);
    let softplus = |x: f32| x.max(0.0) + libm::log1pf(libm::expf(-x.abs()));
    let all = alpha_p.iter().zip(&alpha_n).zip(beta.iter().zip(&eps));
    Ok(all.map(|((p, n), (beta, eps))| [softplus(*p), beta + softplus(*n), *beta, *eps]).collect())
}

/// The numbers of clamped gates.
fn clamped_gate(keys: &MetadataReader<'_>, family: &Family) -> Result<Option<(f32, f32)>> {
    let (alpha, limit) = (keys.positive("expert_gate_alpha")?, keys.positive("expert_gate_limit")?);
    match family.quirks.clamped_gate {
        Some((usual_alpha, usual_limit)) => Ok(Some((alpha.unwrap_or(usual_alpha), limit.unwrap_or(usual_limit)))),
        None if alpha.is_some() || limit.is_some() => {
            let supported = "supported: families with clamped gates";
            Err(keys.unsupported("expert_gate_limit", "a clamped gate", supported))
        }
        None => Ok(None),
    }
}

fn streams(keys: &MetadataReader<'_>) -> Result<Option<StreamsConfig>> {
    let Some(count) = keys.optional_count("altup.num_inputs")? else { return Ok(None) };
    let active = match keys.get("altup.active_idx") {
        None => 0,
        Some(value) => {
            value.as_u64().ok_or_else(|| keys.malformed("altup.active_idx", value, "the number of a stream"))?
        }
    };
    keys.check("altup.num_inputs", count, count <= 64, "at most 64")?;
    keys.check("altup.active_idx", active, active < count as u64, format_args!("a number below {count}"))?;
    Ok(Some(StreamsConfig { count, active: active as usize }))
}

/// The activation of feed-forward layers where it is not the family's own.
fn activation(keys: &MetadataReader<'_>) -> Result<Option<Activation>> {
    let key = "hidden_activation";
    let Some(found) = keys.optional_text(key)? else { return Ok(None) };
    let activation = Activation::by_name(found);
    keys.check(key, found, activation.is_some(), "silu, gelu, gelu_tanh, relu, relu2 or xielu")?;
    Ok(activation)
}

#[cfg(test)]
mod tests;
