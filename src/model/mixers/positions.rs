//! Position encodings of attention: rotary embedding, or ALiBi's bias by distance.

use crate::model::arch::Temperature;
use crate::model::config::Config;
use crate::model::rope::Rope;

/// The position encoding of a model, derived from the configuration and the file's factors.
#[derive(Debug)]
pub(in crate::model) struct Positions {
    /// Rotations of layers without and with a window.
    pub(in crate::model) ropes: [Rope; 2],
    /// `(heads)`: ALiBi's slopes, or empty.
    pub(in crate::model) slopes: Vec<f32>,
    /// How queries grow with the position, in layers where they do.
    temperature: Option<Temperature>,
}

impl Positions {
    /// Positions of a model of `heads` heads for sessions of `context` tokens. `factors` belong to layers without a window.
    pub(in crate::model) fn new(config: &Config, context: usize, factors: Option<&[f32]>) -> Positions {
        let [rope, window_rope] = &config.ropes;
        // The numbers that layers without and with a window rotate; where there are only layers of one kind, the same.
        let of = |kind: usize| config.layers.iter().find(|layer| layer.rope() == kind).map(|layer| layer.rotary);
        let rotary = [of(0).unwrap_or(config.rotary), of(1).unwrap_or(config.rotary)];
        let same = !config.plain_windows && rotary[0] == rotary[1];
        let window_factors = if same { factors } else { None };
        Positions {
            ropes: [
                Rope::new(rope, rotary[0], context, factors),
                Rope::new(window_rope, rotary[1], context, window_factors),
            ],
            slopes: config.alibi.map_or(Vec::new(), |(max, scale)| slopes(config.heads, max, scale)),
            temperature: config.temperature,
        }
    }

    /// The factor of queries at `position`: `1 + scale ln(1 + floor((position + offset) / length))`.
    ///
    /// Computed in double precision by the `libm` crate, so that every platform has the same bits.
    pub(in crate::model) fn temperature(&self, position: usize) -> f32 {
        let Some(Temperature { scale, length, offset }) = self.temperature else { return 1.0 };
        let steps = libm::floor((position as f64 + f64::from(offset)) / f64::from(length));
        (1.0 + f64::from(scale) * libm::log1p(steps)) as f32
    }

    /// The positions as text for the model's fingerprint, with every number written so that it reads back exactly.
    pub(in crate::model) fn describe(&self) -> String {
        format!("{:?} {:?}", self.ropes, self.slopes)
    }
}

/// ALiBi's slopes: powers of `2^(-max / n)`, and for the heads beyond a power of two every second power of its square root
/// (Press et al. 2021, arXiv 2108.12409).
fn slopes(heads: usize, max: f32, scale: f32) -> Vec<f32> {
    let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let power = |exponent: f64| libm::exp2(-f64::from(max) * exponent / whole as f64) as f32 * scale;
    let slope = |head: usize| match head {
        head if head < whole => power((head + 1) as f64),
        head => power((2 * (head - whole) + 1) as f64 / 2.0),
    };
    (0..heads).map(slope).collect()
}
