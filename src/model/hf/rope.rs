//! Rotary embedding: its parameters in `config.json`, in both styles, and its keys in GGUF.
//!
//! Before version 5 transformers wrote `rope_theta`, `rope_scaling` and the rotated share of a head at the top level. Since
//! then all of them are in `rope_parameters`, for some families once per kind of layer.

use super::families::Rotation;
use super::metadata::MetadataWriter;
use super::settings::Settings;
use super::sizes::Sizes;
use crate::error::Result;
use crate::format::json;

/// The parameters of layers with full attention, and the base of layers with a window.
struct Parameters {
    /// `rope_parameters` or `rope_scaling`, if the configuration has one of them.
    scaling: Option<Settings>,
    /// The key under which they were found.
    key: &'static str,
    base: f64,
    /// Base in layers with a sliding window, where it differs.
    window_base: Option<f64>,
    /// The share of a head that is rotated in layers with a sliding window, if the configuration has one.
    window_share: Option<f64>,
}

impl Parameters {
    fn read(settings: &Settings) -> Result<Parameters> {
        const THETA: &[&str] = &["rope_theta", "rotary_emb_base", "global_rope_theta"];
        let top = settings.optional_float(THETA)?;
        let old_window = settings.optional_float(&["rope_local_base_freq", "local_rope_theta"])?;
        let old = settings.object("rope_scaling")?.filter(|old| !old.is_empty());
        let new = settings.object("rope_parameters")?;
        let full = match &new {
            Some(new) => new.object("full_attention")?,
            None => None,
        };
        let mut window_share = None;
        let (scaling, key, window_base) = match (new, full, old) {
            (Some(new), Some(full), old) => {
                let window = new.object("sliding_attention")?;
                if let Some(window) = &window {
                    let kind = kind(window)?;
                    if kind != "default" {
                        return Err(window.unsupported("rope_type", json_text(&kind), "supported: default"));
                    }
                }
                let base = match window {
                    Some(window) => {
                        window_share = window.optional_float(&["partial_rotary_factor"])?;
                        window.optional_float(THETA)?.or(old_window)
                    }
                    None => old_window,
                };
                // Where layers differ, the old key changes those with full attention. Elsewhere it takes the new one's place.
                let full = old.iter().fold(full, Settings::updated);
                (Some(full), "rope_parameters", base)
            }
            (_, _, Some(old)) => (Some(old), "rope_scaling", old_window),
            (new, _, None) => (new, "rope_parameters", old_window),
        };
        let inside = scaling.as_ref().map(|scaling| scaling.optional_float(THETA)).transpose()?.flatten();
        Ok(Parameters { scaling, key, base: inside.or(top).unwrap_or(10000.0), window_base, window_share })
    }
}

fn json_text(text: &str) -> String {
    json::brief(&serde_json::Value::from(text))
}

/// The kind of scaling.
fn kind(scaling: &Settings) -> Result<String> {
    Ok(scaling.text(&["rope_type", "type"])?.unwrap_or_else(|| "default".to_owned()))
}

/// Dimensions of a head that are rotated in layers with a window, where the configuration says so; 0 where it does not.
pub(super) fn window_rotary(rotation: Rotation, settings: &Settings, sizes: &Sizes) -> Result<usize> {
    let width = if sizes.window_head_dim > 0 { sizes.window_head_dim } else { sizes.head_dim };
    let share = match rotation {
        Rotation::Part => Parameters::read(settings)?.window_share,
        _ => (sizes.window_head_dim > 0).then_some(1.0),
    };
    let Some(share) = share else { return Ok(0) };
    let rotary = (width as f64 * share) as usize;
    if rotary == 0 || rotary > width || !rotary.is_multiple_of(2) {
        let found = format!("{rotary} dimensions to rotate in layers with a window");
        return Err(settings.malformed("partial_rotary_factor", found, format_args!("an even number, 2 to {width}")));
    }
    Ok(rotary)
}

/// Dimensions of a head that are rotated.
pub(super) fn rotary(rotation: Rotation, settings: &Settings, sizes: &Sizes) -> Result<usize> {
    let whole = match rotation {
        Rotation::None => return Ok(0),
        Rotation::Unless(key) if settings.switch(key, false)? => return Ok(0),
        Rotation::Latent => return Ok(sizes.latent.rope),
        Rotation::All | Rotation::Unless(_) => true,
        Rotation::Part => false,
    };
    const SHARE: &[&str] = &["partial_rotary_factor", "rotary_pct", "rope_pct"];
    let scaling = Parameters::read(settings)?.scaling;
    if let Some(scaling) = scaling.as_ref().filter(|_| whole) {
        // The share of a proportional rotation is part of its frequencies.
        if kind(scaling)? == "proportional" {
            return Ok(sizes.head_dim);
        }
    }
    let is_stretched = scaling.as_ref().map(kind).transpose()?.is_some_and(|kind| kind != "default");
    let inside = scaling.map(|scaling| scaling.optional_float(SHARE)).transpose()?.flatten();
    if whole {
        // Classes that rotate whole heads do not read the share, except where angles are stretched.
        let share = inside.or(settings.optional_float(&SHARE[..1])?);
        if is_stretched && share.is_some_and(|share| share != 1.0) {
            let what = format!("rotation of a share of {} of each head", share.unwrap_or_default());
            return Err(settings.unsupported(SHARE[0], what, "supported in this family: 1"));
        }
    }
    let (key, rotary) = match settings.optional_count(&["rotary_dim", "attn_rotary_emb"])? {
        _ if whole => ("head_dim", sizes.head_dim),
        Some(rotary) if inside.is_none() => ("rotary_dim", rotary),
        _ => {
            let share = match inside {
                Some(share) => share,
                None => settings.optional_float(SHARE)?.unwrap_or(1.0),
            };
            // Rounded as in transformers. Numbers out of range saturate, and fail the check below.
            ("partial_rotary_factor", (sizes.head_dim as f64 * share) as usize)
        }
    };
    if rotary == 0 || rotary > sizes.head_dim || !rotary.is_multiple_of(2) {
        let found = format!("{rotary} dimensions to rotate");
        return Err(settings.malformed(key, found, format_args!("an even number, 2 to {}", sizes.head_dim)));
    }
    Ok(rotary)
}

/// Writes the keys of the rotary embedding, and the tensors of factors that some kinds of scaling have.
pub(super) fn write(keys: &mut MetadataWriter<'_>) -> Result<()> {
    let settings = keys.settings;
    let rotary = keys.sizes.rotary;
    let Parameters { scaling, key, base, window_base, .. } = Parameters::read(settings)?;
    if !(base > 0.0 && window_base.is_none_or(|base| base > 0.0)) {
        return Err(settings.malformed("rope_theta", base, "a positive number"));
    }
    keys.set("rope.dimension_count", rotary as u32);
    keys.set("rope.freq_base", base as f32);
    if let Some(base) = window_base {
        keys.set("rope.freq_base_swa", base as f32);
    }
    if keys.sizes.window_rotary > 0 {
        keys.set("rope.dimension_count_swa", keys.sizes.window_rotary as u32);
    }
    let Some(scaling) = scaling else { return Ok(()) };
    let kind = kind(&scaling)?;
    let context = keys.sizes.context as f64;
    // The context before it was stretched.
    let original = match scaling.optional_count(&["original_max_position_embeddings"])? {
        Some(original) => Some(original),
        None => settings.optional_count(&["original_max_position_embeddings"])?,
    };
    let before = original.map_or(context, |original| original as f64);
    match kind.as_str() {
        "default" => {}
        "linear" => {
            keys.set("rope.scaling.type", "linear");
            keys.set("rope.scaling.factor", factor(&scaling)? as f32);
        }
        // Hunyuan's way: the base grows once, for any context.
        "dynamic" if scaling.optional_float(&["alpha"])?.is_some_and(|alpha| alpha > 0.0) => {
            let alpha = positive(&scaling, "alpha")?;
            let width = keys.sizes.head_dim as f64;
            keys.set("rope.freq_base", (base * alpha.powf(width / (width - 2.0))) as f32);
        }
        "proportional" => {
            let share = scaling.optional_float(&["partial_rotary_factor"])?.unwrap_or(1.0);
            let rotated = (share * rotary as f64 / 2.0).floor() as usize;
            let stretch = scaling.optional_float(&["factor"])?.unwrap_or(1.0);
            if !(0.0..=1.0).contains(&share) || stretch <= 0.0 {
                return Err(scaling.malformed("partial_rotary_factor", share, "a share from 0 to 1"));
            }
            // So large a divisor makes the angle 0 at every position.
            let divisor = |i: usize| if i < rotated { stretch as f32 } else { 1e30 };
            keys.tensors.push(("rope_freqs.weight".to_owned(), (0..rotary / 2).map(divisor).collect()));
        }
        "dynamic" => {
            let factor = factor(&scaling)?;
            // GGUF has no such type, and llama.cpp aborts on types that it does not know. Up to the original length
            // there is no scaling, so other readers are correct that far.
            keys.set("rope.scaling.type", "none");
            keys.set("rope.scaling.dynamic_factor", factor as f32);
            keys.set("rope.scaling.original_context_length", context as u32);
            keys.set("context_length", (context * factor.max(1.0)) as u32);
        }
        "llama3" => keys.tensors.push(("rope_freqs.weight".to_owned(), llama3(&scaling, base, rotary, before)?)),
        "yarn" => {
            let factor = match scaling.get("factor") {
                Some(_) => factor(&scaling)?,
                None => context / before,
            };
            keys.set("rope.scaling.type", "yarn");
            keys.set("rope.scaling.original_context_length", before as u32);
            for (theirs, ours) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                if let Some(beta) = scaling.optional_float(&[theirs])? {
                    keys.set(&format!("rope.scaling.{ours}"), beta as f32);
                }
            }
            let magnitude = yarn_magnitude(&scaling, factor)?;
            // In GGUF the ramp begins and ends at whole dimensions. Where it must not, divisors do all of the stretching,
            // except in families for which readers know.
            let (truncate, default) = (scaling.switch("truncate", true)?, !keys.is_smooth_yarn());
            let is_latent = keys.sizes.latent.kv_rank > 0;
            if truncate != default && (truncate || is_latent) {
                keys.set("rope.scaling.yarn_truncate", truncate);
            }
            // Latent attention needs the factor for its scores, too.
            let factor = if truncate || !default || is_latent {
                factor
            } else {
                keys.tensors.push(("rope_freqs.weight".to_owned(), yarn(&scaling, base, rotary, before, factor)?));
                keys.set("rope.scaling.extended_context_length", (before * factor.max(1.0)) as u32);
                1.0
            };
            keys.set("rope.scaling.factor", factor as f32);
            // GGUF's factor multiplies the magnitude that the method prescribes.
            let prescribed = if keys.sizes.latent.kv_rank > 0 {
                yarn_sharpness(keys, &scaling)?
            } else {
                0.1 * factor.max(1.0).ln() + 1.0
            };
            let magnitude = magnitude / prescribed;
            if (magnitude - 1.0).abs() > 1e-6 {
                keys.set("rope.scaling.attn_factor", magnitude as f32);
            }
        }
        "longrope" | "su" => {
            let stretch = match original {
                Some(_) => context / before,
                None => scaling.optional_float(&["factor"])?.unwrap_or(1.0),
            };
            let magnitude = match scaling.optional_float(&["attention_factor"])? {
                Some(factor) => factor,
                None if stretch <= 1.0 => 1.0,
                None => (1.0 + stretch.ln() / before.ln()).sqrt(),
            };
            keys.set("rope.scaling.type", "longrope");
            keys.set("rope.scaling.attn_factor", magnitude as f32);
            keys.set("rope.scaling.original_context_length", before as u32);
            for (theirs, ours) in [("long_factor", "rope_factors_long"), ("short_factor", "rope_factors_short")] {
                let factors = scaling.floats(theirs)?.ok_or_else(|| scaling.missing(theirs, "a list of numbers"))?;
                if factors.len() != rotary / 2 || factors.iter().any(|factor| *factor <= 0.0) {
                    let found = format!("{} numbers", factors.len());
                    let expected = format!("{} positive numbers", rotary / 2);
                    return Err(scaling.malformed(theirs, found, expected));
                }
                keys.tensors.push((format!("{ours}.weight"), factors));
            }
        }
        other => {
            let supported = "supported: default, linear, dynamic, llama3, yarn, longrope";
            return Err(settings.unsupported(key, format_args!("scaling of type {}", json_text(other)), supported));
        }
    }
    Ok(())
}

fn positive(scaling: &Settings, key: &str) -> Result<f64> {
    let number = scaling.float(&[key])?;
    if number > 0.0 { Ok(number) } else { Err(scaling.malformed(key, number, "a positive number")) }
}

fn factor(scaling: &Settings) -> Result<f64> {
    let factor = positive(scaling, "factor")?;
    if factor < 1e6 { Ok(factor) } else { Err(scaling.malformed("factor", factor, "less than a million")) }
}

/// Writes how much the stretched rotation of latent attention sharpens scores. Returns the magnitude of cosines and sines
/// that readers take for it.
fn yarn_sharpness(keys: &mut MetadataWriter<'_>, scaling: &Settings) -> Result<f64> {
    let multiplier = scaling.optional_float(&["mscale_all_dim"])?.unwrap_or(0.0);
    if multiplier > 0.0 {
        keys.set("rope.scaling.yarn_log_multiplier", (0.1 * multiplier) as f32);
        return Ok(1.0);
    }
    let factor = factor(scaling)?;
    Ok(0.1 * factor.max(1.0).ln() + 1.0)
}

/// The factor of cosines and sines in YaRN (Peng et al. 2023, arXiv 2309.00071).
fn yarn_magnitude(scaling: &Settings, factor: f64) -> Result<f64> {
    let by = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    if let Some(factor) = scaling.optional_float(&["attention_factor"])? {
        return Ok(factor);
    }
    let (mscale, all) = (scaling.optional_float(&["mscale"])?, scaling.optional_float(&["mscale_all_dim"])?);
    Ok(match (mscale, all) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => by(mscale) / by(all),
        _ => by(1.0),
    })
}

/// YaRN's divisors of the frequencies `(rotary / 2)`: dimensions that turn `beta_slow` times or less over the original
/// context are stretched by the factor, those that turn `beta_fast` times or more are not.
fn yarn(scaling: &Settings, base: f64, rotary: usize, before: f64, factor: f64) -> Result<Vec<f32>> {
    let dimension = |key: &str, default: f64| {
        let turns = if scaling.get(key).is_some() { positive(scaling, key)? } else { default };
        Ok(rotary as f64 * (before / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln()))
    };
    let low = dimension("beta_fast", 32.0)?.max(0.0);
    let high = dimension("beta_slow", 1.0)?.min(rotary as f64 - 1.0);
    let divisor = |i: usize| {
        let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
        (1.0 / (1.0 - ramp + ramp / factor)) as f32
    };
    Ok((0..rotary / 2).map(divisor).collect())
}

/// Llama 3.1's divisors of the frequencies `(rotary / 2)`: long wavelengths are stretched by the factor, short ones are not,
/// with a smooth transition between them.
fn llama3(scaling: &Settings, base: f64, rotary: usize, before: f64) -> Result<Vec<f32>> {
    let factor = factor(scaling)?;
    let (low, high) = (positive(scaling, "low_freq_factor")?, positive(scaling, "high_freq_factor")?);
    if high <= low {
        return Err(scaling.malformed("high_freq_factor", high, format_args!("more than low_freq_factor, {low}")));
    }
    let divisor = |i: usize| {
        let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / rotary as f64);
        if wavelength < before / high {
            1.0
        } else if wavelength > before / low {
            factor
        } else {
            let smooth = (before / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Ok((0..rotary / 2).map(|i| divisor(i) as f32).collect())
}
