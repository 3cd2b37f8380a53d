//! The memory that a model takes, from the headers of its files, before it is loaded.

use std::path::Path;

use super::config::Config;
use super::model::open;
use super::state::cache::{CacheShape, CacheType};
use super::weights::expert_cache;
use super::weights::load_options::LoadOptions;
use super::weights::sizes::{count, holds_experts, packed_bytes};
use crate::error::Result;
use crate::format::Checkpoint;
use crate::kernels;
use crate::quant::block::BlockType;
use crate::threads::resolve_threads;

/// What a model needs once it is loaded. No weight is read to find out.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Needs {
    /// The name of the family.
    pub family: &'static str,
    /// The number of weights in matrices.
    pub parameters: usize,
    /// The largest number of tokens in a session.
    pub context: usize,
    /// Bytes of the packed weights, at most.
    pub weight_bytes: usize,
    /// Bytes of keys, values and states of a session that fills the context.
    pub cache_bytes: usize,
    /// Bytes per token of a session.
    pub cache_bytes_per_token: usize,
    /// Bytes of the recurrent states of a session.
    pub state_bytes: usize,
}

impl Needs {
    /// What the model at `path` needs when it is loaded with `options`.
    ///
    /// # Errors
    /// Those of [`Model::load`](super::Model::load) for the header, the configuration and options.
    pub fn read(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Needs> {
        open(path.as_ref(), options, |checkpoint| Needs::of(checkpoint, options))
    }

    fn of(checkpoint: &dyn Checkpoint, options: &LoadOptions) -> Result<Needs> {
        // They cost nothing, but a wrong one is known now.
        kernels::choose(options.kernel.as_deref())?;
        resolve_threads(options.threads)?;
        let config = Config::read(checkpoint)?;
        let context = config.context_or_default(options.context)?;
        let (mut parameters, mut in_layers, mut f32_in_layers) = (0usize, 0usize, 0usize);
        let (mut weight_bytes, mut expert_bytes) = (0usize, 0usize);
        for name in checkpoint.names() {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            let bytes = if holds_experts(name) { &mut expert_bytes } else { &mut weight_bytes };
            *bytes = bytes.saturating_add(packed_bytes(name, &tensor));
            if tensor.dims.len() < 2 {
                continue;
            }
            let count = count(&tensor.dims);
            parameters = parameters.saturating_add(count);
            if name.starts_with("blk.") {
                in_layers = in_layers.saturating_add(count);
                if tensor.rows.block_type() == BlockType::F32 {
                    f32_in_layers = f32_in_layers.saturating_add(count);
                }
            }
        }
        let expert_bytes = match expert_cache::wanted(options, &config, expert_bytes)? {
            Some(limit) => limit.min(expert_bytes),
            None => expert_bytes,
        };
        // As the model chooses by its input projections, which make up a good part of the layers.
        let default_type = if f32_in_layers > in_layers / 2 { CacheType::F32 } else { CacheType::F16 };
        let shape = CacheShape::of(&config, options.cache_type.unwrap_or(default_type));
        Ok(Needs {
            family: config.family.name,
            parameters,
            context,
            weight_bytes: weight_bytes.saturating_add(expert_bytes),
            cache_bytes: shape.kept_bytes(context),
            cache_bytes_per_token: shape.page_bytes().div_ceil(kernels::PAGE),
            state_bytes: shape.state_bytes(),
        })
    }
}
