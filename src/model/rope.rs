//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

use super::config::Keys;
use crate::error::Result;

/// How angles are stretched for contexts longer than those trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595).
    Linear(f32),
}

impl Scaling {
    pub(super) fn read(keys: &Keys<'_>) -> Result<Scaling> {
        let kind = keys.optional_text("rope.scaling.type")?.unwrap_or("linear");
        let factor = keys.float("rope.scaling.factor")?.or(keys.float("rope.scale_linear")?).unwrap_or(1.0);
        keys.check("rope.scaling.factor", factor, factor.is_finite() && factor > 0.0, "a positive number")?;
        match kind {
            "none" => Ok(Scaling::None),
            "linear" => Ok(if factor == 1.0 { Scaling::None } else { Scaling::Linear(factor) }),
            other => Err(keys.unsupported("rope.scaling.type", other, "supported: none, linear")),
        }
    }
}

/// Angles of one kind of layer.
#[derive(Debug)]
pub struct Rope {
    /// `(rotary / 2)`: radians a position.
    frequencies: Vec<f64>,
}

impl Rope {
    /// `base^(-2 i / rotary)`, divided by the factors of the file where it has them.
    pub fn new(rotary: usize, base: f32, scaling: Scaling, factors: Option<&[f32]>) -> Rope {
        let stretch = match scaling {
            Scaling::None => 1.0,
            Scaling::Linear(factor) => 1.0 / f64::from(factor),
        };
        let frequency = |i: usize| {
            let factor = factors.and_then(|factors| factors.get(i)).map_or(1.0, |factor| f64::from(*factor));
            libm::pow(f64::from(base), -2.0 * i as f64 / rotary as f64) * stretch / factor
        };
        Rope { frequencies: (0..rotary / 2).map(frequency).collect() }
    }

    /// Pairs that are rotated.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// Cosines and sines `(pairs)` of `position`.
    ///
    /// In double precision by the `libm` crate, so that every platform has the same bits.
    pub fn angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = libm::sincos(position as f64 * frequency);
            *cos = c as f32;
            *sin = s as f32;
        }
    }
}
