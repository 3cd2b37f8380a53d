//! The type of a family's entry.

use super::parts::EMBEDDING;
use crate::error::Result;
use crate::model::arch::NormKind;
use crate::model::hf::entry::Entry;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::{Defaults, Settings};
use crate::model::hf::sizes::Sizes;

/// Where the activation of the feed-forward layers comes from.
#[derive(Debug, Clone, Copy)]
pub(in crate::model::hf) enum ActivationSource {
    /// The first of these keys that has a value.
    Under(&'static [&'static str]),
    /// As `Under`, but `gelu` means its approximation by tanh, as transformers reads the first models of Gemma.
    UnderForTanh(&'static [&'static str]),
    /// The family: this name in the metadata.
    Is(&'static str),
    /// xIELU, whose parameters are tensors.
    Xielu,
}

/// Which dimensions of queries and keys are rotated.
#[derive(Debug, Clone, Copy)]
pub(in crate::model::hf) enum Rotation {
    None,
    All,
    /// The number, or the share, that the configuration has.
    Part,
    /// All, unless this switch is on.
    Unless(&'static str),
    /// The part of latent attention that is rotated.
    Latent,
}

/// Which layers have the window of `sliding_window`, where there is no `layer_types`.
#[derive(Debug, Clone, Copy)]
pub(in crate::model::hf) enum WindowRule {
    /// None, for any `sliding_window`.
    Never,
    /// All.
    Always,
    /// The layers from the one whose number is under this key.
    From(&'static str),
    /// All but every nth. The number is under one of these keys.
    Period(&'static [&'static str]),
    /// A number n, all but every nth, or a letter per layer of a period, under this key.
    Pattern(&'static str),
    /// As `Period`, and never the last layer.
    PeriodThenFull(&'static [&'static str]),
    /// All but the first of this many.
    FullFirst(usize),
    /// All but the first of a period, whose length is under this key.
    FullFirstOf(&'static str),
    /// Only `layer_types` lists them.
    Listed,
    /// None.
    ListedOrNone,
}

/// A family as transformers writes its checkpoints.
pub(in crate::model::hf) struct HfFamily {
    /// `model_type` in `config.json`.
    pub(in crate::model::hf) model_types: &'static [&'static str],
    /// `general.architecture` in GGUF.
    pub(in crate::model::hf) architecture: &'static str,
    /// Defaults for keys that `config.json` lacks, where they differ from those of the class in transformers.
    pub(in crate::model::hf) defaults: Defaults,
    /// Keys of the class without influence on the result, besides those of all families.
    #[cfg_attr(not(test), allow(dead_code, reason = "a list that a test holds against transformers"))]
    pub(in crate::model::hf) without_influence: &'static [&'static str],
    /// Prefixes that `~` may stand for in names. The first that a tensor begins with is taken.
    pub(in crate::model::hf) bases: &'static [&'static str],
    /// Tensors outside the layers.
    pub(in crate::model::hf) outside: &'static [&'static [Entry]],
    /// The prefix of the names of layer N's tensors, before N.
    pub(in crate::model::hf) layers: &'static str,
    /// Tensors of a layer.
    pub(in crate::model::hf) layer: &'static [&'static [Entry]],
    /// Prefixes of the names of tensors that are not needed.
    pub(in crate::model::hf) ignored: &'static [&'static str],
    /// What the names of tensors end with that are not needed.
    pub(in crate::model::hf) unused: &'static [&'static str],
    /// What `#` stands for in names: a layer's mixer.
    pub(in crate::model::hf) mixer: &'static str,
    pub(in crate::model::hf) norm: NormKind,
    /// Where the epsilon of norms is, if not under the names that most families have.
    pub(in crate::model::hf) epsilon: &'static [&'static str],
    pub(in crate::model::hf) activation: ActivationSource,
    pub(in crate::model::hf) rotation: Rotation,
    pub(in crate::model::hf) window: WindowRule,
    /// Whether attention goes in both directions.
    pub(in crate::model::hf) encoder: bool,
    /// Whether a window in both directions is as wide on either side of a position as the configuration says; otherwise
    /// it is half of that.
    pub(in crate::model::hf) radius: bool,
    /// The family that takes its place where `use_bidirectional_attention` is on.
    pub(in crate::model::hf) bidirectional: Option<&'static HfFamily>,
    /// Whether layers attend. Otherwise the configuration has no heads and no context length.
    pub(in crate::model::hf) attends: bool,
    /// The family that takes its place where the configuration describes another architecture.
    pub(in crate::model::hf) variant: fn(&Settings) -> Result<Option<&'static HfFamily>>,
    /// Corrects sizes that the family defines differently from most.
    pub(in crate::model::hf) adjust: fn(&Settings, &mut Sizes) -> Result<()>,
    /// Writes the keys that only this family has.
    pub(in crate::model::hf) keys: fn(&mut MetadataWriter<'_>) -> Result<()>,
}

/// What most families have in common, without the tensors of layers.
pub(super) const BASE: HfFamily = HfFamily {
    model_types: &[],
    architecture: "",
    defaults: &[],
    without_influence: &[],
    bases: &["model.", ""],
    outside: &[EMBEDDING],
    layers: "~layers.",
    layer: &[],
    ignored: &[],
    unused: &[],
    mixer: "",
    norm: NormKind::Rms,
    epsilon: &[],
    activation: ActivationSource::Under(&["hidden_act"]),
    rotation: Rotation::All,
    window: WindowRule::Never,
    encoder: false,
    radius: true,
    bidirectional: None,
    attends: true,
    variant: |_| Ok(None),
    adjust: |_, _| Ok(()),
    keys: |_| Ok(()),
};
