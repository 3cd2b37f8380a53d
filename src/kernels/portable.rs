//! Elementwise operations and norms, written once.
//!
//! Every function is `#[inline(always)]`: an instruction set's file calls it from a `#[target_feature]` function, and the
//! compiler turns the same source into that set's vectors. Rust never reorders float arithmetic and `mul_add` is exact
//! everywhere, so the bits are those of the scalar build. Reductions go over [`LANES`] partial sums joined in one fixed
//! order, whatever the register width.

use std::ops::{Add, Range};

use half::f16;

use super::activations::RowMut;
use super::kv::{Softmax, SoftmaxMut};
use crate::quant::packed::BLOCK;

/// Partial sums of a reduction.
const LANES: usize = 32;

/// `N` rows of `length` values, `stride` apart.
///
/// Not a function with target features: `from_fn` could not be inlined with a closure that has more of them than itself,
/// and then the compiler would not know the lengths and check every index in the loops over a row.
#[inline(always)]
pub(super) fn rows<const N: usize, T>(x: &[T], stride: usize, length: usize) -> [&[T]; N] {
    std::array::from_fn(|i| &x[i * stride..][..length])
}

/// The positions that are in all `ranges`; an empty range between them where there are none.
#[inline(always)]
pub(super) fn common(ranges: &[Range<usize>]) -> Range<usize> {
    let start = ranges.iter().map(|range| range.start).fold(0, usize::max);
    let end = ranges.iter().map(|range| range.end).fold(usize::MAX, usize::min);
    start..end.max(start)
}

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
}

impl Activation {
    /// The activation of that name: `silu`, `gelu`, `gelu_tanh` or `relu`.
    pub fn by_name(name: &str) -> Option<Activation> {
        Some(match name {
            "silu" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            _ => return None,
        })
    }

    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
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
        }
    }
}

/// `exp(x)` to within 2 units in the last place; 0 below -87.3, infinite from 88.4 on, NaN stays NaN.
///
/// Range reduction by `x = n ln 2 + r` with ln 2 in two parts, then the degree-5 polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    let clamped = if x < -87.3 { -87.3 } else { x };
    // The power of two below is then infinity. A large finite number instead would make `silu(-1e38)` one too.
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
/// Attention computes one for every score, so this spares what [`exp`] needs for other numbers: `x log2 e = n + r`, then
/// `2^r` by a polynomial of degree 6 (least relative error on -1/2..1/2, 2e-9) with the value 1 at 0.
#[inline(always)]
fn exp_of_difference(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0 + 127.0; // As in `exp`, with the bias of the exponent added in the same step.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = x.mul_add(std::f32::consts::LOG2_E, -n);
    let r = x.mul_add(1.925_963e-8, r); // what log2 e has beyond an F32
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

/// `tanh(x)` with an absolute error of about 1e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
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

/// Goes through `x` with `f(x, lane)` on [`LANES`] partial results from `start` on, then joins those pairwise.
#[inline(always)]
fn reduce(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = f(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane = f(*x, *lane);
    }
    join_lanes(lanes, join)
}

#[inline(always)]
fn join_lanes(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(super) fn quantize(x: &[f32], out: RowMut<'_>) {
    let RowMut { height, row, codes, scales, sums, zeros, half_sums, half_zeros } = out;
    let (whole, mut tail) = x.as_chunks::<BLOCK>();
    let blocks = codes.len() / height;
    for b in 0..blocks {
        let padded;
        let x = match whole.get(b) {
            Some(block) => block,
            None => {
                padded = pad(std::mem::take(&mut tail));
                &padded
            }
        };
        // The order of magnitudes is that of their bits, with NaN on top: a NaN becomes the scale and is not lost.
        let mut top = 0u32;
        for x in x {
            top = top.max(x.abs().to_bits());
        }
        let top = f32::from_bits(top);
        let inverse = if top < 1e-30 { 0.0 } else { 127.0 / top };
        let mut rounded = [0i8; BLOCK];
        for (rounded, x) in rounded.iter_mut().zip(x) {
            // The low bits of x + 1.5 * 2^23 are x rounded to the nearest integer, ties to even.
            *rounded = x.mul_add(inverse, 12_582_912.0).to_bits() as i8;
        }
        codes[b * height + row] = rounded;
        scales[b * height + row] = if top < 1e-30 { 0.0 } else { top / 127.0 };
    }
    // A loop of its own, as the compiler would take the codes out of the vector in which they were made one by one.
    for b in 0..blocks {
        let at = b * height + row;
        let halves: [[i8; BLOCK / 2]; 2] = bytemuck::cast(codes[at]);
        let (sum, scale) = ([sum(halves[0]), sum(halves[1])], scales[at]);
        sums[at] = scale * (sum[0] + sum[1]) as f32;
        zeros[at] = -8 * (sum[0] + sum[1]);
        for half in 0..2 {
            half_sums[(2 * b + half) * height + row] = scale * sum[half] as f32;
            half_zeros[(2 * b + half) * height + row] = -8 * sum[half];
        }
    }
}

/// Sum of half a block, eight codes at a time in a word.
#[inline(always)]
fn sum(codes: [i8; BLOCK / 2]) -> i32 {
    const LOW: u64 = 0x00ff_00ff_00ff_00ff;
    let mut pairs = 0;
    for word in bytemuck::cast::<_, [u64; 2]>(codes) {
        // 128 more than each code, which makes it unsigned.
        let word = word ^ 0x8080_8080_8080_8080;
        pairs += (word & LOW) + ((word >> 8) & LOW);
    }
    // The upper 16 bits of the product are the sum of the four numbers of 16 bits.
    (pairs.wrapping_mul(0x0001_0001_0001_0001) >> 48) as i32 - 128 * codes.len() as i32
}

/// The last block of a row, filled up with zeros.
#[cold]
fn pad(x: &[f32]) -> [f32; BLOCK] {
    std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0))
}

/// Quantizes to INT8 with one scale for all, which it returns: `max|x| / 127`, ties to even.
#[inline(always)]
pub(super) fn to_int8(x: &[f32], codes: &mut [i8]) -> f32 {
    // As in `quantize`, a NaN becomes the scale.
    let mut tops = [0u32; LANES];
    for chunk in x.chunks(LANES) {
        for (top, x) in tops.iter_mut().zip(chunk) {
            *top = (*top).max(x.abs().to_bits());
        }
    }
    let top = f32::from_bits(tops.into_iter().fold(0, u32::max));
    let inverse = if top < 1e-30 { 0.0 } else { 127.0 / top };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = x.mul_add(inverse, 12_582_912.0).to_bits() as i8;
    }
    if top < 1e-30 { 0.0 } else { top / 127.0 }
}

#[inline(always)]
pub(super) fn add_slope(scores: &mut [f32], slope: f32, distance: f32) {
    for (i, score) in scores.iter_mut().enumerate() {
        *score = slope.mul_add(-(distance - i as f32), *score);
    }
}

#[inline(always)]
pub(super) fn exp_segment(scores: &mut [f32]) -> (f32, f32) {
    // Not `f32::max`, which leaves open which zero is larger. A NaN is passed over here and comes back as a weight.
    let larger = |x: f32, max: f32| if x > max { x } else { max };
    let max = reduce(scores, f32::NEG_INFINITY, larger, |a, b| larger(b, a));
    // Everything masked: weights of zero, not NaN.
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0; LANES];
    let mut exp = |chunk: &mut [f32; LANES]| {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            *x = exp_of_difference(*x - shift);
            *sum += *x;
        }
    };
    let (chunks, tail) = scores.as_chunks_mut::<LANES>();
    chunks.iter_mut().for_each(&mut exp);
    if !tail.is_empty() {
        // Filled up with what adds nothing, a tail takes as long as a chunk instead of as long as a dozen.
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..tail.len()].copy_from_slice(tail);
        exp(&mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
    }
    (max, join_lanes(sums, Add::add))
}

#[inline(always)]
pub(super) fn join(so_far: SoftmaxMut<'_>, more: Softmax<'_>) {
    /// Queries whose factors are computed side by side.
    const TOGETHER: usize = 16;
    let (n, width) = (so_far.max.len(), so_far.values.len() / so_far.max.len().max(1));
    for first in (0..n).step_by(TOGETHER) {
        let last = n.min(first + TOGETHER);
        let (mut factors, mut others) = ([0.0; TOGETHER], [0.0; TOGETHER]);
        let (max, sum) = (&mut so_far.max[first..last], &mut so_far.sum[first..last]);
        let rest = more.max[first..last].iter().zip(&more.sum[first..last]);
        let factors_of = factors.iter_mut().zip(&mut others);
        for (((max, sum), (other_max, other_sum)), (factor, other)) in max.iter_mut().zip(sum).zip(rest).zip(factors_of)
        {
            let joined = if *max > *other_max { *max } else { *other_max };
            // Nothing seen so far and nothing now: zeros, not NaN.
            let shift = if joined == f32::NEG_INFINITY { 0.0 } else { joined };
            (*factor, *other) = (exp_of_difference(*max - shift), exp_of_difference(*other_max - shift));
            *sum = (*sum).mul_add(*factor, other_sum * *other);
            *max = joined;
        }
        let values = so_far.values[first * width..last * width].chunks_exact_mut(width);
        let others = values.zip(more.values[first * width..].chunks_exact(width)).zip(factors.iter().zip(&others));
        for ((values, more), (factor, other)) in others {
            for (x, more) in values.iter_mut().zip(more) {
                *x = (*x).mul_add(*factor, more * other);
            }
        }
    }
}

#[inline(always)]
pub(super) fn multiply(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x *= y;
    }
}

#[inline(always)]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares = reduce(x, 0.0, |x, sum| x.mul_add(x, sum), Add::add);
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

#[inline(always)]
pub(super) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = reduce(x, 0.0, |x, sum| sum + x, Add::add) / n;
    let squares = reduce(x, 0.0, |x, sum| (x - mean).mul_add(x - mean, sum), Add::add);
    let scale = 1.0 / (squares / n + eps).sqrt();
    if bias.is_empty() {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (x - mean) * scale * weight;
        }
    } else {
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = ((x - mean) * scale).mul_add(*weight, *bias);
        }
    }
}

#[inline(always)]
pub(super) fn add_scaled(x: &mut [f32], y: &[f32], scale: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        *x = y.mul_add(scale, *x);
    }
}

#[inline(always)]
pub(super) fn activate(activation: Activation, x: &mut [f32]) {
    // The match stands outside the loops so that each of them is straight-line code.
    match activation {
        Activation::Silu => x.iter_mut().for_each(|x| *x = Activation::Silu.apply(*x)),
        Activation::Gelu => x.iter_mut().for_each(|x| *x = Activation::Gelu.apply(*x)),
        Activation::GeluTanh => x.iter_mut().for_each(|x| *x = Activation::GeluTanh.apply(*x)),
        Activation::Relu => x.iter_mut().for_each(|x| *x = Activation::Relu.apply(*x)),
    }
}

#[inline(always)]
pub(super) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(x, up)| *x = Activation::Silu.apply(*x) * up),
        Activation::Gelu => pairs.for_each(|(x, up)| *x = Activation::Gelu.apply(*x) * up),
        Activation::GeluTanh => pairs.for_each(|(x, up)| *x = Activation::GeluTanh.apply(*x) * up),
        Activation::Relu => pairs.for_each(|(x, up)| *x = Activation::Relu.apply(*x) * up),
    }
}

#[inline(always)]
pub(super) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    let (first, second) = x.split_at_mut(n);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x0, x1) = (*a, *b);
        *a = x0.mul_add(*cos, -(x1 * sin));
        *b = x1.mul_add(*cos, x0 * sin);
    }
}

#[inline(always)]
pub(super) fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

#[inline(always)]
pub(super) fn to_f16(x: &[f32], out: &mut [f16]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(*x);
    }
}

#[inline(always)]
pub(super) fn read_sum(data: &[u64]) -> u64 {
    data.iter().fold(0, |sum, x| sum.wrapping_add(*x))
}

/// The trait methods that an instruction set takes from this file, compiled with its features.
///
/// One `fn name(args) -> result;` a method; the function of the same name in [`portable`](self) is the body.
macro_rules! portable_methods {
    ($features:literal) => {
        super::portable::portable_methods! { @each $features
            fn quantize(x: &[f32], out: RowMut<'_>);
            fn exp_segment(scores: &mut [f32]) -> (f32, f32);
            fn join(so_far: SoftmaxMut<'_>, more: Softmax<'_>);
            fn multiply(x: &mut [f32], y: &[f32]);
            fn add_slope(scores: &mut [f32], slope: f32, distance: f32);
            fn to_int8(x: &[f32], codes: &mut [i8]) -> f32;
            fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
            fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]);
            fn add_scaled(x: &mut [f32], y: &[f32], scale: f32);
            fn activate(activation: Activation, x: &mut [f32]);
            fn gate(activation: Activation, gate: &mut [f32], up: &[f32]);
            fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]);
            fn soft_cap(x: &mut [f32], cap: f32);
            fn read_sum(data: &[u64]) -> u64;
        }
    };
    (@each $features:literal $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            fn $name(&self, $($arg: $type),*) $(-> $result)? {
                #[target_feature(enable = $features)]
                fn inner($($arg: $type),*) $(-> $result)? {
                    portable::$name($($arg),*)
                }
                // SAFETY: `self` exists, so the detection has found every feature that `inner` enables.
                unsafe { inner($($arg),*) }
            }
        )*
    };
}
pub(super) use portable_methods;
