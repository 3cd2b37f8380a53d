//! The hyperparameters of latent attention.

use super::metadata::MetadataReader;
use crate::error::Result;

/// Latent attention: keys and values are products of one vector per position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatentConfig {
    /// Width of the vector that queries are a product of; `None` where they come from the input.
    pub q_rank: Option<usize>,
    /// Width of the vector that keys and values are products of.
    pub kv_rank: usize,
    /// Width of a head's part that is not rotated.
    pub plain: usize,
    /// Width of a head's part that is rotated. All heads share that of the keys.
    pub rope: usize,
    /// Width of a head's value.
    pub value: usize,
}

/// Reads the keys of latent attention.
pub(super) fn read(keys: &MetadataReader<'_>) -> Result<LatentConfig> {
    let count = |key: &str| {
        let count = keys.count(key)?;
        keys.check(key, count, count <= 1 << 16, "at most 65536")?;
        Ok(count)
    };
    let q_rank = match keys.get("attention.q_lora_rank") {
        Some(value) if value.as_u64() == Some(0) => None,
        Some(_) => Some(count("attention.q_lora_rank")?),
        None => None,
    };
    // Files from before the vector was cached have the widths of heads under the first names.
    let of_heads = |new: &'static str, old: &'static str| if keys.get(new).is_some() { count(new) } else { count(old) };
    let key = of_heads("attention.key_length_mla", "attention.key_length")?;
    let value = of_heads("attention.value_length_mla", "attention.value_length")?;
    let rope = count("rope.dimension_count")?;
    let fits = rope < key && rope.is_multiple_of(2);
    keys.check("rope.dimension_count", rope, fits, format_args!("an even number below {key}, the width of a key"))?;
    Ok(LatentConfig { q_rank, kv_rank: count("attention.kv_lora_rank")?, plain: key - rope, rope, value })
}
