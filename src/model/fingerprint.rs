//! A hash of everything that affects the results of a model. Session files contain it.

use blake3::Hasher;

use super::arch::{DEFAULT_QUIRKS, Gating, LayerKind, Quirks, Rotated};
use super::config::{Config, ExpertsConfig, LayerConfig};
use super::linear::Linear;
use super::norm::{HeadNorm, Norm};
use crate::error::{Error, Result};
use crate::threads::ThreadPool;

/// A BLAKE3 hash.
pub(super) type Fingerprint = blake3::Hash;

/// Changes when the meaning of a packed byte does, or the order in which parts are hashed.
const VERSION: &[u8] = b"nybble model 1";

/// Takes parts one after the other, each with its length before it, so that no two models give the same bytes.
pub(super) struct FingerprintHasher<'a> {
    hasher: Hasher,
    /// Packs weights that are not in memory.
    pool: &'a ThreadPool,
    /// Why some weights could not be read.
    fault: Option<Error>,
}

impl<'a> FingerprintHasher<'a> {
    /// A hasher that has taken the configuration, and `positions`, the text of what follows from it.
    pub(super) fn new(config: &Config, positions: &str, pool: &'a ThreadPool) -> FingerprintHasher<'a> {
        let mut hasher = FingerprintHasher { hasher: Hasher::new(), pool, fault: None };
        hasher.bytes(VERSION);
        hasher.bytes(format!("{} {positions}", describe(config)).as_bytes());
        hasher
    }

    /// The hash.
    ///
    /// # Errors
    /// What [`FingerprintHasher::fail`] was told.
    pub(super) fn finish(self) -> Result<Fingerprint> {
        self.fault.map_or_else(|| Ok(self.hasher.finalize()), Err)
    }

    /// Notes that weights could not be read.
    pub(super) fn fail(&mut self, fault: Error) {
        self.fault.get_or_insert(fault);
    }

    /// What packs weights that are not in memory.
    pub(super) fn pool(&self) -> &'a ThreadPool {
        self.pool
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(&(bytes.len() as u64).to_le_bytes());
        self.hasher.update(bytes);
    }

    pub(super) fn number(&mut self, number: usize) {
        self.bytes(&(number as u64).to_le_bytes());
    }

    /// Whether a part exists, and the part.
    pub(super) fn optional<T>(&mut self, part: Option<&T>, hash: impl FnOnce(&mut Self, &T)) {
        self.bytes(&[u8::from(part.is_some())]);
        if let Some(part) = part {
            hash(self, part);
        }
    }

    pub(super) fn norm(&mut self, norm: &Norm) {
        // The epsilons are part of the configuration.
        let Norm { weight, bias, eps: _ } = norm;
        self.bytes(bytemuck::cast_slice(weight));
        self.bytes(bytemuck::cast_slice(bias));
    }

    pub(super) fn head_norm(&mut self, norm: &HeadNorm) {
        let HeadNorm { norm, width } = norm;
        self.number(*width);
        self.norm(norm);
    }

    pub(super) fn linear(&mut self, linear: &Linear) {
        for part in linear.parts() {
            // Products of both forms are bit-identical, and sessions do not depend on how much memory the weights take.
            let layout = part.wide_layout();
            let layout =
                format!("Layout {{ code: {:?}, group: {:?}, min: {:?} }}", layout.code, layout.group, layout.min);
            self.bytes(format!("{} {} {layout} {:?}", part.rows(), part.columns(), part.output_scale()).as_bytes());
            part.for_each_wide(|length, for_each| {
                self.hasher.update(&(length as u64).to_le_bytes());
                for_each(&mut |bytes| _ = self.hasher.update(bytes));
            });
        }
        self.bytes(bytemuck::cast_slice(linear.bias()));
        self.optional(linear.order(), |hasher, order| hasher.bytes(bytemuck::cast_slice(order)));
    }
}

/// The configuration as text, with every number written so that it reads back exactly.
///
/// Files on disk depend on these characters, so names in them stay when fields are renamed. A new field is appended only
/// where its value is not the default, so that models without it keep their fingerprints.
fn describe(config: &Config) -> String {
    // Every field by name, so that a new one cannot be forgotten.
    let Config {
        family,
        context,
        // Neither changes the numbers of a session that fits into the context.
        longest: _,
        pooling: _,
        // Hashed below, or no part of a session.
        causal,
        generates: _,
        has_logits: _,
        // Draft tokens do not change results.
        mtp: _,
        classifier,
        dense,
        hidden,
        heads,
        kv_heads,
        head_dim,
        norm_eps,
        activation,
        parallel,
        rotary,
        ropes,
        // The frequencies of both rotations are hashed below.
        plain_windows: _,
        layers,
        alibi,
        attention_scale,
        clamp_qkv,
        attention_cap,
        logit_cap,
        embedding_scale,
        residual_scale,
        logit_scale,
        experts,
        latent,
        recurrent,
        temperature,
        output_norm_eps,
        post_norm_eps,
        unweighted_head_norms,
        sparsity,
        xielu,
        clamped_gate,
        streams,
    } = config;
    let layer = |layer: &LayerConfig| {
        // The kind follows from the family.
        let LayerConfig { kind: _, window, rotated, .. } = layer;
        let default = LayerConfig {
            kind: layer.kind,
            window: *window,
            chunk: None,
            rotated: *rotated,
            heads: *heads,
            kv_heads: *kv_heads,
            head_dim: *head_dim,
            value_dim: *head_dim,
            rotary: *rotary,
            shares: None,
            tempered: false,
        };
        let own = if *layer == default { String::new() } else { format!(", {layer:?}") };
        format!("LayerConfig {{ window: {window:?}, rotated: {rotated:?}{own} }}")
    };
    let kinds: Vec<LayerKind> = layers.iter().map(|layer| layer.kind).collect();
    let layers: Vec<String> = layers.iter().map(layer).collect();
    let ExpertsConfig {
        count,
        used,
        normalized,
        scale,
        gating,
        groups,
        logit_cap: router_cap,
        tolerance,
        latent: narrow,
        skip,
    } = experts;
    let mut experts =
        format!("Experts {{ count: {count:?}, used: {used:?}, normalized: {normalized:?}, scale: {scale:?} }}");
    if (*gating, *groups, *router_cap) != (Gating::Softmax, None, None) {
        experts.push_str(&format!(" {gating:?} {groups:?} {router_cap:?} {tolerance:?}"));
    }
    if let Some(width) = narrow {
        experts.push_str(&format!(" latent: {width:?}"));
    }
    if let Some(skip) = skip.filter(|skip| *skip > 0.0) {
        experts.push_str(&format!(" skip: {skip:?}"));
    }
    let quirks = &family.quirks;
    let unrotated_period = match quirks.rotated {
        Rotated::AllBut(period) => period,
        Rotated::Windowed => 0,
    };
    // The choices that came later count only where they are made.
    let earlier = Quirks {
        scaled_embedding: quirks.scaled_embedding,
        window_period: quirks.window_period,
        window_rope_base: quirks.window_rope_base,
        rotated: Rotated::AllBut(unrotated_period),
        soft_caps: quirks.soft_caps,
        scaled_by_width: quirks.scaled_by_width,
        normalized_experts: quirks.normalized_experts,
        optional_output_norm: quirks.optional_output_norm,
        divided_logits: quirks.divided_logits,
        ..DEFAULT_QUIRKS
    };
    // Without the choices that came after those of the first files with later ones.
    let later = format!(" {quirks:?}")
        .replace(", bidirectional: false", "")
        .replace(", optional_first_norm: false", "")
        .replace(", without_output: false", "");
    let later = if *quirks == earlier { String::new() } else { later };
    let quirks = format!(
        "More {{ scaled_embedding: {:?}, window_period: {:?}, window_rope_base: {:?}, unrotated_period: {:?}, \
         soft_caps: {:?}, scaled_by_width: {:?}, normalized_experts: {:?}, optional_output_norm: {:?}, \
         divided_logits: {:?} }}",
        quirks.scaled_embedding,
        quirks.window_period,
        quirks.window_rope_base,
        unrotated_period,
        quirks.soft_caps,
        quirks.scaled_by_width,
        quirks.normalized_experts,
        quirks.optional_output_norm,
        quirks.divided_logits,
    );
    let family = format!(
        "Family {{ name: {:?}, norm: {:?}, residual: {:?}, position: {:?}, activation: {:?}, more: {quirks} }}",
        family.name, family.norm, family.residual, family.position, family.activation,
    );
    let mut more = Vec::new();
    let mut add = |is_made: bool, text: String| {
        if is_made {
            more.push(text);
        }
    };
    add(recurrent.is_some(), format!("recurrent: {recurrent:?} {kinds:?}"));
    add(latent.is_some(), format!("latent: {latent:?}"));
    add(temperature.is_some(), format!("temperature: {temperature:?}"));
    add(output_norm_eps != norm_eps, format!("output_norm_eps: {output_norm_eps:?}"));
    add(post_norm_eps != norm_eps, format!("post_norm_eps: {post_norm_eps:?}"));
    add(*unweighted_head_norms, format!("unweighted_head_norms: {unweighted_head_norms:?}"));
    add(!sparsity.is_empty(), format!("sparsity: {sparsity:?}"));
    add(!xielu.is_empty(), format!("xielu: {xielu:?}"));
    add(clamped_gate.is_some(), format!("clamped_gate: {clamped_gate:?}"));
    add(streams.is_some(), format!("streams: {streams:?}"));
    add(!causal, "bidirectional".to_owned());
    add(!classifier.labels.is_empty(), format!("classifier: {classifier:?}"));
    add(!dense.is_empty(), format!("dense: {dense:?}"));
    let more = more.join(", ");
    format!(
        "Config {{ family: {family}, context: {context:?}, hidden: {hidden:?}, heads: {heads:?}, kv_heads: {kv_heads:?}, \
         head_dim: {head_dim:?}, norm_eps: {norm_eps:?}, activation: {activation:?}, parallel: {parallel:?}, \
         rotary: {rotary:?}, ropes: {ropes:?}, layers: [{}], alibi: {alibi:?}, attention_scale: {attention_scale:?}, \
         clamp_qkv: {clamp_qkv:?}, attention_cap: {attention_cap:?}, logit_cap: {logit_cap:?}, \
         embedding_scale: {embedding_scale:?}, residual_scale: {residual_scale:?}, logit_scale: {logit_scale:?}, \
         experts: {experts} }}{later}{more}",
        layers.join(", ")
    )
}
