//! The hyperparameters of experts and their router.

use super::metadata::MetadataReader;
use crate::error::{Error, Result};
use crate::format::gguf::Value;
use crate::model::arch::{Family, Gating};

/// Mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ExpertsConfig {
    /// Experts in a layer.
    pub count: usize,
    /// Experts that each token uses.
    pub used: usize,
    /// Whether the weights of the used experts are divided by their sum.
    pub normalized: bool,
    /// Factor of the weights.
    pub scale: f32,
    /// How logits become weights.
    pub gating: Gating,
    /// Experts are chosen from a few groups.
    pub groups: Option<GroupsConfig>,
    /// Soft cap of the router's logits.
    pub logit_cap: Option<f32>,
    /// How far below the best logit others may be to count, as a share of the larger magnitude. For
    /// [`Gating::SparseMixer`].
    pub tolerance: f32,
    /// The width that experts compute in, where it is not that of the residual stream.
    pub latent: Option<usize>,
    /// Chosen experts are left out whose weights are less than this share of the largest one's. With 0, weights are only counted.
    pub skip: Option<f32>,
}

impl ExpertsConfig {
    /// Leaves out experts whose weights are less than this share of the largest one's.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other numbers than 0 to 1, and for a model without experts.
    pub(in crate::model) fn set_skip(&mut self, ratio: Option<f32>) -> Result<()> {
        let Some(ratio) = ratio else { return Ok(()) };
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::argument("expert_skip", ratio, "a number from 0 to 1"));
        }
        if self.count == 0 {
            let found = format_args!("{ratio} for a model without experts");
            return Err(Error::argument("expert_skip", found, "None, or a model with experts"));
        }
        self.skip = Some(ratio);
        Ok(())
    }
}

/// Groups of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupsConfig {
    /// Groups of equal size.
    pub count: usize,
    /// Groups that a token uses.
    pub used: usize,
    /// The best experts whose sum is the score of a group.
    pub best: usize,
}

/// Reads the keys of experts.
pub(super) fn read(keys: &MetadataReader<'_>, family: &Family) -> Result<ExpertsConfig> {
    let quirks = &family.quirks;
    let mut config = ExpertsConfig {
        count: 0,
        used: 0,
        normalized: false,
        scale: 1.0,
        gating: Gating::Softmax,
        groups: None,
        logit_cap: None,
        tolerance: 0.0,
        latent: None,
        skip: None,
    };
    // Files of dense models may have a count of 0.
    if keys.get("expert_count").is_none_or(|count| count.as_u64() == Some(0)) {
        return Ok(config);
    }
    let (count, used) = (keys.count("expert_count")?, keys.count("expert_used_count")?);
    keys.check("expert_used_count", used, used <= count, format_args!("at most the {count} experts"))?;
    (config.count, config.used) = (count, used);
    config.gating = gating(keys, quirks.gating)?;
    // The second name is that of Ollama's files.
    let normalized = keys.flag(keys.alias(["expert_weights_norm", "norm_top_k_prob"]))?;
    config.normalized = normalized.unwrap_or(quirks.normalized_experts);
    config.scale = keys.positive("expert_weights_scale")?.unwrap_or(1.0);
    config.groups = groups(keys, quirks.group_best, count, used)?;
    config.logit_cap = keys.positive("router_logit_softcapping")?;
    config.latent = keys.optional_count("moe_latent_size")?;
    if let Some(width) = config.latent {
        keys.check("moe_latent_size", width, width <= 1 << 16, "at most 65536")?;
    }
    if config.gating == Gating::SparseMixer {
        keys.check("expert_used_count", used, used == 2, "2, as its router chooses")?;
        // Twice the noise that training adds. Files of other converters do not have it.
        config.tolerance = match keys.get("expert_jitter").map(Value::as_f32) {
            Some(Some(0.0)) => 0.0,
            _ => 2.0 * keys.positive("expert_jitter")?.unwrap_or(0.01),
        };
    }
    Ok(config)
}

/// The function of the router, by llama.cpp's numbers.
fn gating(keys: &MetadataReader<'_>, default: Gating) -> Result<Gating> {
    let key = "expert_gating_func";
    let number = match keys.get(key) {
        Some(value) if value.as_u64() == Some(0) => None,
        _ => keys.optional_count(key)?,
    };
    match number {
        None => Ok(default),
        // Their files name the function of the family's relatives.
        Some(1) if default == Gating::SparseMixer => Ok(default),
        Some(1) => Ok(Gating::Softmax),
        Some(2) => Ok(Gating::Sigmoid),
        Some(3) => Ok(Gating::SoftmaxOfChosen),
        Some(other) => {
            let supported = "supported: 1 for a softmax, 2 for a sigmoid, 3 for a softmax over the chosen experts";
            Err(keys.unsupported(key, other, supported))
        }
    }
}

fn groups(keys: &MetadataReader<'_>, best: usize, count: usize, used: usize) -> Result<Option<GroupsConfig>> {
    let optional = |key: &str| match keys.get(key) {
        Some(value) if value.as_u64() == Some(0) => Ok(1),
        _ => Ok(keys.optional_count(key)?.unwrap_or(1)),
    };
    let (groups, used_groups) = (optional("expert_group_count")?, optional("expert_group_used_count")?);
    let best = match keys.optional_count("expert_group_best")? {
        None => best,
        Some(best) => best,
    };
    if groups == 1 {
        return Ok(None);
    }
    let expected = format_args!("a divisor of the {count} experts");
    keys.check("expert_group_count", groups, count.is_multiple_of(groups), expected)?;
    let size = count / groups;
    let enough = used_groups <= groups && used <= used_groups * size;
    let expected = format_args!("at most the {groups} groups, and enough for {used} experts");
    keys.check("expert_group_used_count", used_groups, enough, expected)?;
    keys.check("expert_group_best", best, best <= size, format_args!("at most the {size} experts of a group"))?;
    Ok(Some(GroupsConfig { count: groups, used: used_groups, best }))
}
