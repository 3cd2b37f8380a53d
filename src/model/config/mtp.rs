//! The layers of a head for multi-token prediction, which follow the last layer of the model.

use super::layers::LayerConfig;
use super::metadata::MetadataReader;
use crate::error::Result;
use crate::model::arch::Family;

/// The layers behind the last that predict further tokens. The first one is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MtpConfig {
    /// The settings of the first.
    pub(crate) layer: LayerConfig,
    /// Their number.
    pub(crate) layers: usize,
}

impl MtpConfig {
    /// The head of these layers; `None` where there are none.
    pub(super) fn of(layers: Vec<LayerConfig>) -> Option<MtpConfig> {
        layers.first().map(|layer| MtpConfig { layer: *layer, layers: layers.len() })
    }
}

/// How many of the `blocks` layers of a file belong to its head.
pub(super) fn extra_layers(keys: &MetadataReader<'_>, family: &Family, blocks: usize) -> Result<usize> {
    let key = "nextn_predict_layers";
    let Some(value) = keys.get(key).filter(|_| family.mtp.is_some()) else { return Ok(0) };
    let extra = value.as_u64().ok_or_else(|| keys.malformed(key, value.type_name(), "an integer"))?;
    let expected = format_args!("fewer than the {blocks} layers of block_count, which counts them");
    keys.check(key, extra, extra < blocks as u64, expected)?;
    Ok(extra as usize)
}
