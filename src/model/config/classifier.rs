//! What follows the hidden states of a text: pooling, dense modules, and a classification head.

use std::borrow::Cow;

use super::metadata::MetadataReader;
use crate::error::{Error, Result};
use crate::kernels::Activation;

/// How the hidden states of a text become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the first token.
    Cls,
    /// That of the last token.
    Last,
}

impl Pooling {
    const ALL: [Pooling; 3] = [Pooling::Mean, Pooling::Cls, Pooling::Last];

    /// Its name in Python and in the server.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Cls => "cls",
            Pooling::Last => "last",
        }
    }

    /// The pooling called `mean`, `cls` or `last`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<Pooling> {
        let found = Pooling::ALL.into_iter().find(|pooling| pooling.name() == name);
        found.ok_or_else(|| Error::argument("pooling", format_args!("{name:?}"), "mean, cls or last"))
    }
}

/// The activation of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadActivation {
    /// None.
    Identity,
    /// The hyperbolic tangent.
    Tanh,
    /// One that feed-forward layers have, too.
    Of(Activation),
}

impl HeadActivation {
    /// The activation called `name`: `identity`, `tanh`, `sigmoid`, or one of [`Activation::by_name`].
    pub(crate) fn by_name(name: &str) -> Option<HeadActivation> {
        Some(match name {
            "identity" => HeadActivation::Identity,
            "tanh" => HeadActivation::Tanh,
            "sigmoid" => HeadActivation::Of(Activation::Sigmoid),
            _ => HeadActivation::Of(Activation::by_name(name)?),
        })
    }
}

/// The head of a classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClassifierConfig {
    /// The names of the labels, where the file has them.
    pub(crate) labels: Vec<String>,
    /// The hidden state that the head reads.
    pub(crate) pooling: Pooling,
    /// Between the two matrices of the head.
    pub(crate) activation: HeadActivation,
}

impl ClassifierConfig {
    /// Reads the keys of a classification head.
    pub(super) fn read(keys: &MetadataReader<'_>, causal: bool) -> Result<ClassifierConfig> {
        let key = "classifier.output_labels";
        let labels = match keys.get(key) {
            None => Vec::new(),
            Some(value) => {
                let texts = value.as_strings().map(|texts| texts.iter().map(String::from_utf8_lossy));
                let texts = texts.ok_or_else(|| keys.malformed(key, value.type_name(), "an array of strings"))?;
                texts.map(Cow::into_owned).collect()
            }
        };
        let pooling = match numbered(keys, "classifier.pooling_type", &[])? {
            Some(pooling) => pooling,
            None if !causal && keys.is_family("modern-bert") => Pooling::Mean,
            None if !causal => Pooling::Cls,
            None => Pooling::Last,
        };
        let default = match keys.is_family("modern-bert") {
            true => HeadActivation::Of(Activation::Gelu),
            false => HeadActivation::Tanh,
        };
        let activation = named(keys, "classifier.activation")?.unwrap_or(default);
        Ok(ClassifierConfig { labels, pooling, activation })
    }
}

/// How the file wants embeddings to be made, by llama.cpp's numbers. 4 is a classification head, which pools by itself.
pub(super) fn pooling(keys: &MetadataReader<'_>) -> Result<Option<Pooling>> {
    numbered(keys, "pooling_type", &[4])
}

/// A pooling by its number; `None` where the file does not say it, and for the numbers in `none`.
fn numbered(keys: &MetadataReader<'_>, key: &str, none: &[i64]) -> Result<Option<Pooling>> {
    let Some(value) = keys.get(key) else { return Ok(None) };
    match value.as_i64().ok_or_else(|| keys.malformed(key, value, "an integer"))? {
        // Not said, or none, as generation needs.
        -1 | 0 => Ok(None),
        other if none.contains(&other) => Ok(None),
        1 => Ok(Some(Pooling::Mean)),
        2 => Ok(Some(Pooling::Cls)),
        3 => Ok(Some(Pooling::Last)),
        other => {
            let supported = "supported: 0 for none, 1 for the mean, 2 for the first token, 3 for the last token";
            Err(keys.unsupported(key, other, supported))
        }
    }
}

/// The activations of dense modules.
pub(super) fn dense(keys: &MetadataReader<'_>) -> Result<Vec<HeadActivation>> {
    let mut all = Vec::new();
    while let Some(activation) = named(keys, &format!("dense_{}_activation", all.len() + FIRST_DENSE))? {
        all.push(activation);
    }
    Ok(all)
}

/// The number of the first dense module, which follows the model and its pooling.
pub(crate) const FIRST_DENSE: usize = 2;

/// An activation by its name.
fn named(keys: &MetadataReader<'_>, key: &str) -> Result<Option<HeadActivation>> {
    let Some(name) = keys.optional_text(key)? else { return Ok(None) };
    let activation = HeadActivation::by_name(name);
    keys.check(key, name, activation.is_some(), "the name of an activation")?;
    Ok(activation)
}
