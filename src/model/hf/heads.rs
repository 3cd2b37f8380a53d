//! What follows the hidden states of a text: a classification head, by the class that `config.json` names.

use serde_json::Value;

use super::settings::Settings;
use crate::error::Result;

/// The first class under `architectures`.
fn class(settings: &Settings) -> Option<String> {
    let classes = settings.get("architectures")?;
    Some(classes.as_array()?.first()?.as_str()?.to_owned())
}

/// Whether the checkpoint is a classifier of whole documents.
pub(super) fn classifies(settings: &Settings) -> Result<bool> {
    Ok(class(settings).is_some_and(|class| class.ends_with("ForSequenceClassification")))
}

/// Whether attention between tokens of text goes in both directions.
pub(super) fn is_bidirectional(settings: &Settings) -> Result<bool> {
    const KEY: &str = "use_bidirectional_attention";
    match settings.get(KEY) {
        Some(Value::String(kind)) => match kind.as_str() {
            "all" => Ok(true),
            // Only between the tokens of an image.
            "vision" => Ok(false),
            other => Err(settings.unsupported(KEY, format_args!("{other:?}"), "supported: true, false, vision")),
        },
        _ => settings.switch(KEY, false),
    }
}

/// Whether the checkpoint may lack an output matrix for tokens that is not tied to the embedding.
pub(super) fn is_headless(settings: &Settings) -> Result<bool> {
    let is_body = |class: &str| {
        class.ends_with("Model") && !["LMHeadModel", "DoubleHeadsModel"].iter().any(|end| class.ends_with(end))
    };
    Ok(classifies(settings)? || class(settings).is_some_and(|class| is_body(&class)))
}

/// The names of a classifier's labels; none for other models.
pub(super) fn labels(settings: &Settings) -> Result<Vec<String>> {
    const KEY: &str = "id2label";
    let default = |count: usize| (0..count).map(|id| format!("LABEL_{id}")).collect();
    let listed = settings.object(KEY)?;
    if !classifies(settings)? {
        return Ok(Vec::new());
    }
    let Some(listed) = listed else {
        return Ok(default(settings.optional_count(&["num_labels"])?.unwrap_or(2)));
    };
    let count = listed.len();
    let label = |id: usize| match listed.get(&id.to_string()) {
        Some(Value::String(label)) => Ok(label),
        Some(other) => Err(listed.malformed(&id.to_string(), other, "a string")),
        None => Err(listed.missing(&id.to_string(), "a label for each number from 0")),
    };
    if count == 0 {
        return Err(settings.malformed(KEY, "no labels", "at least one"));
    }
    (0..count).map(label).collect()
}
