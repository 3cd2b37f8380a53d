//! Metadata under GGUF's keys, while they are written.

use super::settings::Settings;
use super::sizes::Sizes;
use crate::error::Result;
use crate::format::gguf::{Metadata, Value};
use crate::model::arch;
use crate::model::config::FIRST_DENSE;

/// The name and the values of a vector that follows from the configuration.
pub(super) type ComputedTensor = (String, Vec<f32>);

/// Writes the metadata of a model, and the tensors that it has besides those of its files.
pub(super) struct MetadataWriter<'a> {
    /// `general.architecture`, the prefix of most keys.
    architecture: &'static str,
    pub(super) settings: &'a Settings,
    pub(super) sizes: &'a Sizes,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<ComputedTensor>,
    /// `(layers)`: whether a layer has a window.
    pub(super) windowed: Vec<bool>,
    /// Whether attention goes only backwards.
    pub(super) causal: bool,
}

impl<'a> MetadataWriter<'a> {
    pub(super) fn new(architecture: &'static str, settings: &'a Settings, sizes: &'a Sizes) -> MetadataWriter<'a> {
        MetadataWriter {
            architecture,
            settings,
            sizes,
            metadata: Metadata::new(),
            tensors: Vec::new(),
            windowed: Vec::new(),
            causal: true,
        }
    }

    /// Whether readers of the architecture let YaRN's ramp begin and end anywhere.
    pub(super) fn is_smooth_yarn(&self) -> bool {
        arch::by_name(self.architecture).is_some_and(|family| family.quirks.untruncated_yarn)
    }

    /// Sets a key of the architecture.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.set(format!("{}.{key}", self.architecture), value);
    }

    /// Sets the keys of a router. `normalize` says whether the weights of the chosen experts are divided by their sum.
    pub(super) fn experts(&mut self, normalize: bool) -> Result<()> {
        self.experts_used(&["num_experts_per_tok"], normalize)
    }

    /// As [`MetadataWriter::experts`], with the keys of `config.json` that may hold the number of experts of a token.
    pub(super) fn experts_used(&mut self, keys: &[&'static str], normalize: bool) -> Result<()> {
        if self.sizes.experts == 0 {
            return Ok(());
        }
        let used = self.settings.count(keys)?;
        if used > self.sizes.experts {
            let expected = format!("at most the {} experts", self.sizes.experts);
            return Err(self.settings.malformed(keys.first().unwrap_or(&""), used, expected));
        }
        self.set("expert_used_count", used as u32);
        self.set("expert_weights_norm", normalize);
        Ok(())
    }

    /// Sets the keys of a router by sigmoids, with a selection bias, groups and a factor.
    pub(super) fn sigmoid_router(&mut self) -> Result<()> {
        self.experts(self.settings.switch("norm_topk_prob", true)?)?;
        self.set("expert_gating_func", 2u32);
        self.copy("expert_weights_scale", "routed_scaling_factor")?;
        for (key, supported) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
            match self.settings.text(&[key])? {
                Some(other) if other != supported => {
                    let supported = format!("supported: {supported}");
                    return Err(self.settings.unsupported(key, format_args!("{other:?}"), &supported));
                }
                _ => {}
            }
        }
        self.leading_dense_layers();
        self.groups()
    }

    /// Sets the keys of groups of experts.
    pub(super) fn groups(&mut self) -> Result<()> {
        let (count, used) = (self.settings.number(&["n_group"])?, self.settings.number(&["topk_group"])?);
        if count > 1 {
            self.set("expert_group_count", count as u32);
            self.set("expert_group_used_count", used as u32);
        }
        Ok(())
    }

    /// Sets the number of layers before the first with experts, which other readers need.
    pub(super) fn leading_dense_layers(&mut self) {
        let dense = (0..self.sizes.layers).take_while(|layer| !self.sizes.is_sparse(*layer)).count();
        self.set("leading_dense_block_count", dense as u32);
        if let Some(shared) = self.sizes.shared_ffn.checked_div(self.sizes.expert_ffn) {
            self.set("expert_shared_count", shared as u32);
        }
    }

    /// Sets which layers rotate: those with a window. `otherwise` says what holds for a model without any.
    pub(super) fn rotate_windows(&mut self, otherwise: bool) {
        let any = self.windowed.contains(&true);
        let rotated = if any { self.windowed.clone() } else { vec![otherwise; self.sizes.layers] };
        self.set("attention.rope_pattern", rotated);
    }

    /// Makes layers with a window rotate with the plain base where the others are stretched.
    pub(super) fn plain_windows(&mut self) -> Result<()> {
        let [base, window] = ["freq_base", "freq_base_swa"].map(|key| format!("{}.rope.{key}", self.architecture));
        let base = self.metadata.get(&base).and_then(Value::as_f32);
        if let (true, Some(base), None) = (self.windowed.contains(&true), base, self.metadata.get(&window)) {
            self.set("rope.freq_base_swa", base);
        }
        Ok(())
    }

    /// Sets the bases of the rotation from `layer_rope_theta`: 0 for layers that do not rotate, otherwise one number for
    /// layers with a window and one for the others.
    pub(super) fn layer_bases(&mut self) -> Result<()> {
        let layers = self.sizes.layers;
        let key = "layer_rope_theta";
        let listed =
            self.settings.per_layer(key, layers, "a base, or 0", |base| base.as_f64().filter(|base| *base >= 0.0))?;
        let Some(bases) = listed else {
            let rotated = self.settings.per_layer("no_rope_layers", layers, "1 to rotate, 0 not to", |rotates| {
                rotates.as_u64().map(|rotates| rotates != 0)
            })?;
            if let Some(rotated) = rotated {
                self.set("attention.rope_pattern", rotated);
            }
            return Ok(());
        };
        let windowed = |layer: usize| self.windowed.get(layer).copied().unwrap_or(false);
        let mut found = [None, None];
        for (layer, base) in bases.iter().enumerate().filter(|(_, base)| **base > 0.0) {
            let first = found[usize::from(windowed(layer))].get_or_insert(*base);
            if first != base {
                let what = format_args!("{first} in one layer and {base} in layer {layer}");
                let supported = "supported: one base for layers with a window, and one for the others";
                return Err(self.settings.unsupported(key, what, supported));
            }
        }
        self.set("attention.rope_pattern", bases.iter().map(|base| *base > 0.0).collect::<Vec<bool>>());
        let [full, window] = found;
        if let Some(base) = full.or(window) {
            self.set("rope.freq_base", base as f32);
        }
        if let (Some(base), true) = (window, full.is_some() && full != window) {
            self.set("rope.freq_base_swa", base as f32);
        }
        Ok(())
    }

    /// Sets `key` to the activation of a head that `config.json` calls `name` under `source`.
    pub(super) fn head_activation(&mut self, key: &str, source: &str, name: &str) -> Result<()> {
        let known = match name {
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => "gelu_tanh",
            "gelu" | "silu" | "tanh" | "relu" | "sigmoid" | "identity" => name,
            other => {
                let supported = "supported: gelu, gelu_new, gelu_pytorch_tanh, identity, relu, sigmoid, silu, tanh";
                return Err(self.settings.unsupported(source, format_args!("{other:?}"), supported));
            }
        };
        self.set(key, known);
        Ok(())
    }

    /// Sets the keys of the next dense module: its input and output features, and its activation.
    pub(super) fn dense_module(&mut self, [input, output]: [usize; 2], activation: &str) -> usize {
        let is_free =
            |number: &usize| self.metadata.get(&format!("{}.dense_{number}_activation", self.architecture)).is_none();
        let number = (FIRST_DENSE..).find(is_free).unwrap_or(FIRST_DENSE);
        self.set(&format!("dense_{number}_activation"), activation);
        self.set(&format!("dense_{number}_feat_in"), input as u32);
        self.set(&format!("dense_{number}_feat_out"), output as u32);
        number
    }

    /// Sets `key` to the number under `name` of `config.json`, if there is one.
    pub(super) fn copy(&mut self, key: &str, name: &str) -> Result<()> {
        if let Some(number) = self.settings.optional_float(&[name])? {
            self.set(key, number as f32);
        }
        Ok(())
    }

    /// Returns an error unless the switch `key` of `config.json` is `expected`, which is also its default.
    pub(super) fn require(&self, key: &str, expected: bool) -> Result<()> {
        if self.settings.switch(key, expected)? == expected {
            return Ok(());
        }
        Err(self.settings.unsupported(key, !expected, if expected { "supported: true" } else { "supported: false" }))
    }
}
