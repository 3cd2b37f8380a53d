//! Metadata under GGUF's keys, while they are written.

use super::settings::Settings;
use super::sizes::Sizes;
use crate::error::Result;
use crate::format::gguf::{Metadata, Value};

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
}

impl<'a> MetadataWriter<'a> {
    pub(super) fn new(architecture: &'static str, settings: &'a Settings, sizes: &'a Sizes) -> MetadataWriter<'a> {
        MetadataWriter { architecture, settings, sizes, metadata: Metadata::new(), tensors: Vec::new() }
    }

    /// Sets a key of the architecture.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.set(format!("{}.{key}", self.architecture), value);
    }

    /// Sets the keys of a router. `normalize` says whether the weights of the chosen experts are divided by their sum.
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
