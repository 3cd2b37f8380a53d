//! Elementary functions and activation functions, bit-identical on every CPU.
//!
//! Rust never reorders float arithmetic and `mul_add` rounds once everywhere, so the source gives the same bits for every
//! instruction set.

/// The activation functions of feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + exp(-x))`
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt 2))`
    Gelu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)^2`
    Relu2,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `ln(1 + exp(x))`
    Softplus,
    /// `exp(x)`
    Exp,
}

impl Activation {
    /// The activation called `name`: `silu`, `gelu`, `gelu_tanh`, `relu` or `relu2`.
    pub fn by_name(name: &str) -> Option<Activation> {
        Some(match name {
            "silu" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "relu2" => Activation::Relu2,
            _ => return None,
        })
    }

    #[inline(always)]
    pub(super) fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => x / (1.0 + exp(-x)),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                let cubed = x * x * x;
                0.5 * x * (1.0 + tanh(0.797_884_6 * cubed.mul_add(0.044_715, x)))
            }
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Relu2 => {
                let positive = if x < 0.0 { 0.0 } else { x };
                positive * positive
            }
            Activation::Sigmoid => 1.0 / (1.0 + exp(-x)),
            Activation::Exp => exp(x),
            // The first summand is x for positive numbers and 0 for negative ones; NaN stays.
            Activation::Softplus => (if x < 0.0 { 0.0 } else { x }) + libm::log1pf(exp(-x.abs())),
        }
    }
}

/// `exp(x)` to within 2 units in the last place; 0 below -87.3, infinite from 88.4 on, NaN stays NaN.
///
/// Range reduction by `x = n ln 2 + r` with ln 2 in two parts, then the degree-5 polynomial of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    let clamped = if x < -87.3 { -87.3 } else { x };
    // From this limit on, the power of two below is infinity. With a large finite number, `silu(-1e38)` would be one too.
    let clamped = if clamped > 88.8 { 88.8 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < -87.3 { 0.0 } else { p * power }
}

/// `exp(x)` for `x <= 0`, to within 2 units in the last place; 0 below -87.3, NaN stays NaN.
///
/// Attention computes one per score, so this omits the steps that [`exp`] needs for other numbers: `x log2 e = n + r`, then
/// `2^r` by a minimax polynomial of degree 6 (relative error 2e-9 on -1/2..1/2) with the value 1 at 0.
#[inline(always)]
pub(super) fn exp_of_difference(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0 + 127.0; // As in `exp`, with the bias of the exponent added in the same step.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = x.mul_add(std::f32::consts::LOG2_E, -n);
    let r = x.mul_add(1.925_963e-8, r); // the part of log2 e beyond F32
    let mut p = 1.535_336_2e-4f32;
    p = p.mul_add(r, 1.339_887_5e-3);
    p = p.mul_add(r, 9.618_437e-3);
    p = p.mul_add(r, 5.550_332_4e-2);
    p = p.mul_add(r, 2.402_264_8e-1);
    p = p.mul_add(r, 6.931_472e-1);
    p = p.mul_add(r, 1.0);
    let power = f32::from_bits(shifted.to_bits() << 23);
    if x < -87.3 { 0.0 } else { p * power }
}

/// As [`exp_of_difference`], with a relative error of at most 5e-6: a polynomial of degree 4.
#[inline(always)]
pub(super) fn coarse_exp_of_difference(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = x.mul_add(std::f32::consts::LOG2_E, ROUND - shifted);
    let mut p = 9.582_853e-3f32;
    p = p.mul_add(r, 5.590_642_6e-2);
    p = p.mul_add(r, 2.402_41e-1);
    p = p.mul_add(r, 6.931_242e-1);
    p = p.mul_add(r, 1.0);
    let power = f32::from_bits(shifted.to_bits() << 23);
    if x < -87.3 { 0.0 } else { p * power }
}

/// `tanh(x)` with an absolute error of about 1e-7.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let t = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    t.copysign(x)
}

/// `erf(x)` with an absolute error below 6e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / a.mul_add(0.327_591_1, 1.0);
    let mut p = 1.061_405_4f32;
    p = p.mul_add(t, -1.453_152);
    p = p.mul_add(t, 1.421_413_7);
    p = p.mul_add(t, -0.284_496_74);
    p = p.mul_add(t, 0.254_829_6);
    let e = (-(p * t)).mul_add(exp(-(a * a)), 1.0);
    e.copysign(x)
}
