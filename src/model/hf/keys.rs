//! `config.json` under GGUF's keys.

use serde_json::Value as Json;

use super::families::{Activation, Family, Norm, Window};
use super::rope;
use super::settings::Settings;
use super::sizes::Sizes;
use crate::error::Result;
use crate::format::gguf::{Metadata, Value};
use crate::format::json;

/// A vector whose values follow from the configuration, with its name.
pub(super) type ComputedTensor = (String, Vec<f32>);

/// Metadata that are being written.
pub(super) struct Keys<'a> {
    pub(super) family: &'a Family,
    pub(super) settings: &'a Settings,
    pub(super) sizes: &'a Sizes,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<ComputedTensor>,
}

impl<'a> Keys<'a> {
    /// All keys of a model and the tensors that it has besides those of its files.
    pub(super) fn write(
        family: &'a Family,
        settings: &'a Settings,
        sizes: &'a Sizes,
        name: &str,
    ) -> Result<(Metadata, Vec<ComputedTensor>)> {
        let mut keys = Keys { family, settings, sizes, metadata: Metadata::new(), tensors: Vec::new() };
        keys.metadata.set("general.architecture", family.architecture).set("general.type", "model");
        if !name.is_empty() {
            keys.metadata.set("general.name", name);
        }
        keys.sizes();
        keys.norm()?;
        keys.activation()?;
        keys.window()?;
        if sizes.rotary > 0 {
            rope::write(&mut keys)?;
        }
        (family.keys)(&mut keys)?;
        Ok((keys.metadata, keys.tensors))
    }

    /// Gives a key of the architecture a value.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.set(format!("{}.{key}", self.family.architecture), value);
    }

    fn sizes(&mut self) {
        let sizes = self.sizes;
        let mut set = |key, size: usize| self.set(key, size as u32);
        set("vocab_size", sizes.vocabulary);
        set("context_length", sizes.context);
        set("embedding_length", sizes.hidden);
        set("block_count", sizes.layers);
        set("feed_forward_length", sizes.ffn);
        set("attention.head_count", sizes.heads);
        set("attention.head_count_kv", sizes.kv_heads);
        set("attention.key_length", sizes.head_dim);
        set("attention.value_length", sizes.head_dim);
        if sizes.experts > 0 {
            set("expert_count", sizes.experts);
            set("expert_feed_forward_length", sizes.expert_ffn);
        }
        if sizes.shared_ffn > 0 {
            set("expert_shared_feed_forward_length", sizes.shared_ffn);
        }
    }

    fn norm(&mut self) -> Result<()> {
        let (key, names): (_, &[&str]) = match self.family.norm {
            Norm::Rms => ("attention.layer_norm_rms_epsilon", &["rms_norm_eps"]),
            Norm::Layer => ("attention.layer_norm_epsilon", &["layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"]),
        };
        let epsilon = self.settings.float(names)?;
        if epsilon <= 0.0 {
            return Err(self.settings.malformed(names[0], epsilon, "a positive number"));
        }
        self.set(key, epsilon as f32);
        Ok(())
    }

    fn activation(&mut self) -> Result<()> {
        let name = match self.family.activation {
            Activation::Is(name) => name,
            Activation::Under(keys) => {
                let first = keys.first().copied().unwrap_or_default();
                let name = self.settings.text(keys)?.ok_or_else(|| self.settings.missing(first, "an activation"))?;
                match name.as_str() {
                    "silu" | "swish" => "silu",
                    "gelu" | "gelu_python" => "gelu",
                    "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => "gelu_tanh",
                    "relu" => "relu",
                    other => {
                        let supported = "supported: silu, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu";
                        return Err(self.settings.unsupported(first, json::brief(&Json::from(other)), supported));
                    }
                }
            }
        };
        self.set("hidden_activation", name);
        Ok(())
    }

    /// Windows of attention, and which layers have one.
    fn window(&mut self) -> Result<()> {
        let settings = self.settings;
        if matches!(self.family.window, Window::Never) || !settings.switch("use_sliding_window", true)? {
            return Ok(());
        }
        let Some(window) = settings.optional_count(&["sliding_window"])? else { return Ok(()) };
        let kinds =
            settings.per_layer("layer_types", self.sizes.layers, "full_attention or sliding_attention", |kind| {
                match kind.as_str() {
                    Some("full_attention") => Some(false),
                    Some("sliding_attention") => Some(true),
                    _ => None,
                }
            })?;
        let slides = match (kinds, self.family.window) {
            (Some(kinds), _) => kinds,
            (None, Window::From(key)) => {
                let first = settings.get(key).and_then(|first| first.as_u64()).unwrap_or(0);
                (0..self.sizes.layers).map(|layer| layer as u64 >= first).collect()
            }
            (None, Window::Period(keys)) => {
                let period = settings.count(keys)?;
                (0..self.sizes.layers).map(|layer| !(layer + 1).is_multiple_of(period)).collect()
            }
            (None, Window::Listed) => return Err(settings.missing("layer_types", "a list")),
            (None, _) => vec![true; self.sizes.layers],
        };
        if slides.contains(&true) {
            self.set("attention.sliding_window", window as u32);
            if !matches!(self.family.window, Window::Always) || slides.contains(&false) {
                self.set("attention.sliding_window_pattern", pattern(&slides));
            }
        }
        Ok(())
    }

    /// The keys of a choice among experts.
    pub(super) fn experts(&mut self, normalize: bool) -> Result<()> {
        let used = self.settings.count(&["num_experts_per_tok"])?;
        if used > self.sizes.experts {
            let expected = format!("at most the {} experts", self.sizes.experts);
            return Err(self.settings.malformed("num_experts_per_tok", used, expected));
        }
        self.set("expert_used_count", used as u32);
        self.set("expert_weights_norm", normalize);
        Ok(())
    }

    /// Sets `key` to the number under `name` if there is one.
    pub(super) fn copy(&mut self, key: &str, name: &str) -> Result<()> {
        if let Some(number) = self.settings.optional_float(&[name])? {
            self.set(key, number as f32);
        }
        Ok(())
    }

    /// An error unless the switch `key` is as it must be.
    pub(super) fn require(&self, key: &str, expected: bool) -> Result<()> {
        if self.settings.switch(key, expected)? == expected {
            return Ok(());
        }
        Err(self.settings.unsupported(key, !expected, if expected { "supported: true" } else { "supported: false" }))
    }
}

/// Which layers have a window: the period `n` where all but every `n`th have one, otherwise a switch a layer.
fn pattern(slides: &[bool]) -> Value {
    let repeats = |period: &usize| slides.iter().enumerate().all(|(i, slides)| *slides == (i % period < period - 1));
    match (1..=slides.len() + 1).find(repeats) {
        Some(period) => Value::U32(period as u32),
        None => Value::from(slides.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_in_all_but_every_nth_layer_are_written_as_their_period() {
        assert_eq!(pattern(&[true, false, true, false]), Value::U32(2));
        assert_eq!(pattern(&[true, true, true, true, true, false, true]), Value::U32(6));
        assert_eq!(pattern(&[false, false]), Value::U32(1));
        assert_eq!(pattern(&[true, true]), Value::U32(3));
        assert_eq!(pattern(&[false, true]), Value::from(vec![false, true]));
    }
}
