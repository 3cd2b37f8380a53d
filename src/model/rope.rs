//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its extensions to long contexts.

use super::buffer::Buffer;
use super::config::metadata::MetadataReader;
use crate::error::Result;

/// How angles are stretched for contexts longer than in training.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// Not at all.
    None,
    /// Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// The divisor of positions.
        factor: f32,
    },
    /// The base grows with the context ("dynamic NTK"). It is chosen once, for the context that the model is loaded
    /// with, so that a token's result does not depend on later tokens.
    Dynamic {
        /// The factor by which the context may grow.
        factor: f32,
        /// Context in training.
        original: f32,
    },
    /// Fast dimensions unchanged, slow ones divided, a ramp between them (YaRN, Peng et al. 2023, arXiv 2309.00071).
    Yarn {
        /// The divisor of slow dimensions.
        factor: f32,
        /// Context in training.
        original: f32,
        /// A dimension that turns at least this often over the original context is fast.
        beta_fast: f32,
        /// A dimension that turns at most this often is slow.
        beta_slow: f32,
    },
    /// As `Yarn`, with a ramp that need not begin and end at whole dimensions.
    SmoothYarn {
        /// The divisor of slow dimensions.
        factor: f32,
        /// Context in training.
        original: f32,
        /// A dimension that turns at least this often over the original context is fast.
        beta_fast: f32,
        /// A dimension that turns at most this often is slow.
        beta_slow: f32,
    },
    /// A factor per dimension from tensors of the file, one set for short contexts and one for long ones (LongRoPE, Ding
    /// et al. 2024, arXiv 2402.13753).
    Long {
        /// Context in training: a model loaded with a longer one uses the long factors.
        original: f32,
    },
}

/// The rotation of one kind of layer.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// How the angles are stretched.
    pub scaling: Scaling,
    /// Factor of cosines and sines.
    pub magnitude: f32,
}

impl Scaling {
    /// The factor and the original context of YaRN.
    pub(super) fn yarn(self) -> Option<(f32, f32)> {
        match self {
            Scaling::Yarn { factor, original, .. } | Scaling::SmoothYarn { factor, original, .. } => {
                Some((factor, original))
            }
            _ => None,
        }
    }
}

impl RopeConfig {
    /// A rotation without stretching.
    pub(super) fn plain(base: f32) -> RopeConfig {
        RopeConfig { base, scaling: Scaling::None, magnitude: 1.0 }
    }

    /// Reads the rotation of layers without a window. `smooth_yarn` is the family's way of YaRN.
    ///
    /// # Errors
    /// [`Error::Malformed`](crate::Error::Malformed) and [`Error::Unsupported`](crate::Error::Unsupported) with the key.
    pub(super) fn read(keys: &MetadataReader<'_>, smooth_yarn: bool) -> Result<RopeConfig> {
        // The second name is that of Ollama's first files.
        let base = keys.positive(keys.alias(["rope.freq_base", "rope.global.freq_base"]))?.unwrap_or(10000.0);
        let kind = keys.optional_text("rope.scaling.type")?;
        let factor = keys.positive("rope.scaling.factor")?.or(keys.positive("rope.scale_linear")?).unwrap_or(1.0);
        let original = match keys.optional_count("rope.scaling.original_context_length")? {
            Some(length) => length,
            None => keys.optional_count("context_length")?.unwrap_or(1),
        } as f32;
        let attention = keys.positive("rope.scaling.attn_factor")?;
        let dynamic = keys.positive("rope.scaling.dynamic_factor")?;
        let (scaling, magnitude) = match (kind.unwrap_or("linear"), dynamic) {
            ("none", Some(factor)) => (Scaling::Dynamic { factor, original }, 1.0),
            ("none", None) => (Scaling::None, 1.0),
            ("linear", _) if factor == 1.0 => (Scaling::None, 1.0),
            ("linear", _) => (Scaling::Linear { factor }, 1.0),
            ("yarn", _) => {
                let beta = |key: &str, default| Ok(keys.positive(key)?.unwrap_or(default));
                let beta_fast = beta("rope.scaling.yarn_beta_fast", 32.0)?;
                let beta_slow = beta("rope.scaling.yarn_beta_slow", 1.0)?;
                let magnitude = if factor > 1.0 { 0.1 * libm::logf(factor) + 1.0 } else { 1.0 };
                let smooth = !keys.flag("rope.scaling.yarn_truncate")?.unwrap_or(!smooth_yarn);
                let scaling = match smooth {
                    true => Scaling::SmoothYarn { factor, original, beta_fast, beta_slow },
                    false => Scaling::Yarn { factor, original, beta_fast, beta_slow },
                };
                // One key has the whole magnitude, another a factor of what the method prescribes.
                let whole = keys.positive("rope.scaling.yarn_attn_factor")?;
                let sharpness = sharpness(keys, factor)?;
                // In files of latent attention, the magnitude prescribed is the same number, or 1.
                let prescribed =
                    if keys.is_family("deepseek2") && sharpness != 1.0 { 1.0 } else { magnitude / sharpness };
                let magnitude = whole.unwrap_or(prescribed);
                (scaling, magnitude * attention.unwrap_or(1.0))
            }
            ("longrope", _) => (Scaling::Long { original }, attention.unwrap_or(1.0)),
            (other, _) => {
                let supported = "supported: none, linear, yarn, longrope";
                return Err(keys.unsupported("rope.scaling.type", format_args!("{other:?}"), supported));
            }
        };
        Ok(RopeConfig { base, scaling, magnitude })
    }
}

/// What YaRN's magnitude is divided by in models that sharpen scores instead: `0.1 multiplier ln(factor) + 1`.
///
/// # Errors
/// [`Error::Malformed`](crate::Error::Malformed) with the key.
pub(super) fn sharpness(keys: &MetadataReader<'_>, factor: f32) -> Result<f32> {
    let key = "rope.scaling.yarn_log_multiplier";
    let multiplier = keys.positive(key)?.unwrap_or(0.0);
    // Files of latent attention hold a tenth of what the configuration says.
    let multiplier = if keys.is_family("deepseek2") { multiplier } else { 0.1 * multiplier };
    Ok(if factor > 1.0 { multiplier * libm::logf(factor) + 1.0 } else { 1.0 })
}

/// Frequencies of one kind of layer.
#[derive(Debug)]
pub(super) struct Rope {
    /// `(rotary / 2)`, in radians per position.
    frequencies: Vec<f64>,
    magnitude: f32,
}

impl Rope {
    /// Frequencies `base^(-2 i / rotary)`, stretched for sessions of `context` tokens and divided by `factors (rotary / 2)`
    /// where the file has them.
    pub(super) fn new(config: &RopeConfig, rotary: usize, context: usize, factors: Option<&[f32]>) -> Rope {
        let base = f64::from(config.base);
        let width = rotary as f64;
        let plain = |base: f64, i: usize| libm::pow(base, -2.0 * i as f64 / width);
        let stretched = |i: usize| match config.scaling {
            Scaling::None | Scaling::Long { .. } => plain(base, i),
            Scaling::Linear { factor } => plain(base, i) / f64::from(factor),
            Scaling::Dynamic { factor, original } => {
                let (factor, original) = (f64::from(factor), f64::from(original));
                let growth = factor * (context as f64).max(original) / original - (factor - 1.0);
                plain(if rotary > 2 { base * libm::pow(growth, width / (width - 2.0)) } else { base }, i)
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow }
            | Scaling::SmoothYarn { factor, original, beta_fast, beta_slow } => {
                // The dimension that turns `beta` times over the original context.
                let dimension = |beta: f32| {
                    let turns = f64::from(original) / (f64::from(beta) * std::f64::consts::TAU);
                    width * libm::log(turns) / (2.0 * libm::log(base))
                };
                let (low, high) = match config.scaling {
                    Scaling::SmoothYarn { .. } => (dimension(beta_fast), dimension(beta_slow)),
                    _ => (dimension(beta_fast).floor(), dimension(beta_slow).ceil()),
                };
                let (low, high) = (low.max(0.0), high.min(width - 1.0));
                let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                plain(base, i) * (1.0 - ramp + ramp / f64::from(factor))
            }
        };
        let factor = |i: usize| factors.and_then(|factors| factors.get(i)).map_or(1.0, |factor| f64::from(*factor));
        let frequencies = (0..rotary / 2).map(|i| stretched(i) / factor(i)).collect();
        Rope { frequencies, magnitude: config.magnitude }
    }

    /// The number of pairs that are rotated.
    pub(super) fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Writes the cosines and sines `(pairs)` of `position`.
    ///
    /// Computed in double precision by the `libm` crate, so that every platform has the same bits.
    pub(super) fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = libm::sincos(position as f64 * frequency);
            *cos = c as f32 * self.magnitude;
            *sin = s as f32 * self.magnitude;
        }
    }
}

/// The cosines and sines of all rows of a pass, for the rotations of layers without and with a window.
#[derive(Debug, Default)]
pub(super) struct Angles {
    /// `(rotations, rows, pairs)`
    cos: Buffer,
    /// As `cos`.
    sin: Buffer,
    rows: usize,
    pairs: [usize; 2],
}

impl Angles {
    /// Allocates memory for `rows` rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, ropes: &[Rope; 2], rows: usize) -> Result<()> {
        let pairs: usize = ropes.iter().map(Rope::pairs).sum();
        self.cos.reserve(rows * pairs)?;
        self.sin.reserve(rows * pairs)
    }

    /// Computes the angles of rows at `positions`.
    pub(super) fn compute(&mut self, ropes: &[Rope; 2], positions: impl ExactSizeIterator<Item = usize> + Clone) {
        self.rows = positions.len();
        self.pairs = [ropes[0].pairs(), ropes[1].pairs()];
        let len = self.rows * (self.pairs[0] + self.pairs[1]);
        self.cos.resize(len);
        self.sin.resize(len);
        let (mut cos, mut sin) = (&mut self.cos[..], &mut self.sin[..]);
        for rope in ropes {
            for position in positions.clone() {
                let (own_cos, rest) = cos.split_at_mut(rope.pairs());
                let (own_sin, others) = sin.split_at_mut(rope.pairs());
                rope.angles(position, own_cos, own_sin);
                (cos, sin) = (rest, others);
            }
        }
    }

    /// The cosines and sines of a row, `(pairs)` each.
    pub(super) fn of(&self, rope: usize, row: usize) -> (&[f32], &[f32]) {
        let pairs = self.pairs[rope];
        let at = if rope == 0 { 0 } else { self.rows * self.pairs[0] } + row * pairs;
        (&self.cos[at..][..pairs], &self.sin[at..][..pairs])
    }
}
