//! Loops over the logits of a whole vocabulary, and `exp`.

use crate::error::{Error, Result};

/// Loops over a vocabulary process this many logits at a time, each with an accumulator of its own, so that the compiler
/// uses vectors.
pub(super) const LANES: usize = 16;

/// The largest logit.
///
/// # Errors
/// [`Error::BadLogits`] when one is NaN or plus infinity, or all are minus infinity.
pub(super) fn largest(logits: &[f32]) -> Result<f32> {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let (rows, rest) = logits.as_chunks::<LANES>();
    let mut look = |lane: usize, logit: f32| {
        bad[lane] |= logit.is_nan() | (logit == f32::INFINITY);
        largest[lane] = if logit > largest[lane] { logit } else { largest[lane] };
    };
    rows.iter().for_each(|row| row.iter().enumerate().for_each(|(lane, logit)| look(lane, *logit)));
    rest.iter().for_each(|logit| look(0, *logit));
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if bad.contains(&true) || largest == f32::NEG_INFINITY { Err(Error::BadLogits) } else { Ok(largest) }
}

/// The logarithm of the sum of `exp` of all logits. `largest` is the largest of them.
pub(super) fn log_sum_exp(logits: &[f32], largest: f32) -> f64 {
    let mut sum = 0.0;
    // F32 for short blocks only, so that rounding stays small.
    for block in logits.chunks(4096) {
        let mut lanes = [0.0_f32; LANES];
        let (rows, rest) = block.as_chunks::<LANES>();
        for row in rows {
            for (lane, logit) in lanes.iter_mut().zip(row) {
                *lane += exp(logit - largest);
            }
        }
        sum += lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>();
        sum += rest.iter().map(|logit| f64::from(exp(logit - largest))).sum::<f64>();
    }
    sum.ln() + f64::from(largest)
}

/// The standard deviation of all finite logits.
pub(super) fn deviation(logits: &[f32]) -> f64 {
    let finite = || logits.iter().filter(|logit| logit.is_finite()).map(|logit| f64::from(*logit));
    let (count, sum) = finite().fold((0.0, 0.0), |(count, sum), logit| (count + 1.0, sum + logit));
    if count == 0.0 {
        return 0.0;
    }
    let mean = sum / count;
    (finite().map(|logit| (logit - mean) * (logit - mean)).sum::<f64>() / count).sqrt()
}

/// `x^y` for `x` in [0, 1] and `y >= 0`.
pub(super) fn power(x: f64, y: f32) -> f32 {
    match (x, y) {
        (_, 0.0) => 1.0,
        (0.0, _) => 0.0,
        _ => exp((f64::from(y) * ln(x)) as f32),
    }
}

/// The natural logarithm of a positive normal number, within a few units in the last place. The system's own differs between
/// systems.
///
/// `x = 2^n m` with `m` near 1, and `ln m = 2 artanh((m - 1) / (m + 1))` as a series.
pub(super) fn ln(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    let (mut n, mut m) = ((bits >> 52) as i32 - 1023, f64::from_bits(bits & MANTISSA | 1.0_f64.to_bits()));
    if m > std::f64::consts::SQRT_2 {
        (n, m) = (n + 1, m / 2.0);
    }
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let series = (0..12).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    f64::from(n) * std::f64::consts::LN_2 + 2.0 * s * series
}

/// `exp(x)` for `x <= 0`, within 2 units in the last place; 0 below -87.
///
/// Cephes' `expf`: `x = n ln 2 + r` with ln 2 in two parts, a polynomial in `r`, and `n` added to the exponent. It has no
/// fused multiply-adds, so that every build can vectorize it and gets the same bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it puts the nearest integer into the low bits of the mantissa
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { (p * (r * r) + r + 1.0) * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = 0.0_f32;
        while x > -87.0 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 2.0 * exact * f64::from(f32::EPSILON), "exp({x}) = {exact}, not {ours}");
            x -= 0.000_37 + x.abs() * 1e-6;
        }
        assert_eq!([exp(0.0), exp(-0.0), exp(-87.1), exp(f32::MIN), exp(f32::NEG_INFINITY)], [1.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn ln_and_power_are_those_of_the_system_within_rounding() {
        let mut x = 1e-12_f64;
        while x < 1e13 {
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "ln({x}) = {}, not {}", x.ln(), ln(x));
            x *= 1.003_7;
        }
        for (x, y) in [(0.5, 2.0), (0.3, 0.5), (1.0, 7.0), (0.0, 0.0), (0.0, 3.0), (0.999, 1.0)] {
            assert!((power(x, y) - x.powf(f64::from(y)) as f32).abs() < 1e-6, "{x}^{y} is not {}", power(x, y));
        }
    }

    #[test]
    fn the_deviation_is_that_of_finite_logits() {
        assert_eq!(deviation(&[1.0, 3.0, f32::NEG_INFINITY]), 1.0);
        assert_eq!([deviation(&[]), deviation(&[5.0])], [0.0, 0.0]);
    }
}
