//! Elementwise operations, norms and reductions, as plain Rust.
//!
//! To add one, add it to the list below and its function underneath. Each function is `#[inline(always)]`: the tables of
//! the instruction sets call it from a `#[target_feature]` function, and the compiler turns the same source into that
//! set's vectors. Rust never reorders float arithmetic and `mul_add` rounds once everywhere, so the bits are those of the
//! scalar build. Reductions go over [`LANES`] partial sums, joined in one fixed order for any register width.

use std::ops::Add;

use super::math::{Activation, coarse_exp_of_difference, exp_of_difference, tanh};
pub(in crate::kernels) use super::recurrence::{add_product, advance_state, selective_step, wkv_step};
use crate::kernels::activations::RowMut;
use crate::kernels::kv::{Softmax, SoftmaxMut};
use crate::quant::packed::BLOCK;

/// The operations of this file, for [`operations!`](crate::kernels::operations::operations).
macro_rules! elementwise_operations {
    ($then:ident $argument:tt $($others:tt)*) => {
        $then! { $argument $($others)* {
            /// Quantizes a row of activations to INT8 with one scale per 32 values: `scale = max|x| / 127`, ties to even.
            fn quantize(x: &[f32], out: RowMut<'_>);

            /// Quantizes numbers to INT8 with a single scale, which it returns. Of the first eight BF16 numbers from
            /// `max|x| / 127.4` on, it is the one with the least sum of squared errors, or the first of them. Codes are rounded
            /// to nearest, ties to even. If a number is not finite, neither is the scale, and the codes are unspecified.
            fn to_int8(x: &[f32], codes: &mut [i8]) -> f32;

            /// `out = factor * scale`, where `scales` has the upper 16 bits of each scale: BF16.
            fn expand_scales(scales: &[u16], factor: f32, out: &mut [f32]);

            /// Replaces each `block` numbers, a power of two, by their Walsh-Hadamard transform, without a factor: pairs at
            /// the distances `block / 2`, `block / 4`, ... 1 become their sum and their difference.
            fn hadamard(x: &mut [f32], block: usize);

            /// Replaces scores by `exp(score - max)` and returns `(max, sum)`. Minus infinity counts as absent.
            fn exp_segment(scores: &mut [f32]) -> (f32, f32);

            /// As [`Kernel::exp_segment`], with exponentials to within 5e-6 of themselves, for weights that become codes.
            fn exp_segment_coarse(scores: &mut [f32]) -> (f32, f32);

            /// Joins softmax sums over `more` positions to those so far: with the larger maximum `m` of a query, both are
            /// multiplied by `exp(max - m)` and added.
            fn join(so_far: SoftmaxMut<'_>, more: Softmax<'_>);

            /// `scores[i] -= slope * (distance - i)`: a bias by the distance to the keys. `distance` is that to the first.
            fn add_slope(scores: &mut [f32], slope: f32, distance: f32);

            /// `x *= y`, elementwise.
            fn multiply(x: &mut [f32], y: &[f32]);

            /// The sum of `x * y`.
            fn dot(x: &[f32], y: &[f32]) -> f32;

            /// `out += x * y`, elementwise.
            fn add_product(out: &mut [f32], x: &[f32], y: &[f32]);

            /// A step of a recurrence on a panel of its state `(n, 16)`. Over the rows `i` in order: with an update,
            /// `s = fma(key[i], delta, gate[i] * s)`; then, for each of the reads that is not empty, `sum = fma(s, read[i],
            /// sum)` from 0. The first read needs the second.
            fn advance_state(
                state: &mut [f32],
                update: Option<StateUpdate<'_>>,
                reads: [&[f32]; 2],
                sums: [&mut [f32; PANEL]; 2],
            );

            /// A step of Mamba's recurrence on a panel of its state `(n, 16)`. Over the rows `i` in order:
            /// `s = fma(key[i], delta, exp(time * rates[i]) * s)`, then, unless `read` is empty, `out = fma(s, read[i], out)`
            /// from 0.
            fn selective_step(state: &mut [f32], step: SelectiveStep<'_>, out: &mut [f32; PANEL]);

            /// A step of RWKV's mean on a panel of its state `(3, 16)`: sums of values and of weights without the factor
            /// `exp(m)`, and `m`. With `m = max(m, key + first)` for the output: `out = (exp(m0 - m) sum0 + exp(key + first -
            /// m) value) / (exp(m0 - m) sum1 + exp(key + first - m))`; then the state takes the value in with `m = max(m0 +
            /// decay, key)`. A state without weights has seen nothing.
            fn wkv_step(state: &mut [f32], step: WkvStep<'_>, out: &mut [f32; PANEL]);

            /// `x += scale * y`, elementwise.
            fn add_scaled(x: &mut [f32], y: &[f32], scale: f32);

            /// `out = x / sqrt(mean(x^2) + eps) * weight`.
            fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

            /// `out = (x - mean) / sqrt(variance + eps) * weight + bias`; no bias if it is empty.
            fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]);

            /// `x = activation(x)`, elementwise.
            fn activate(activation: Activation, x: &mut [f32]);

            /// `gate = activation(gate) * up`, elementwise.
            fn gate(activation: Activation, gate: &mut [f32], up: &[f32]);

            /// `gate = min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (1 + clamp(up, -limit, limit))`, elementwise.
            fn clamped_gate(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32);

            /// xIELU (Huang and Schlag 2024, arXiv 2411.13010), elementwise: `alpha_p x^2 + beta x` for positive numbers,
            /// `alpha_n (exp(min(x, eps)) - 1 - x) + beta x` for others. `parameters` are these four, in this order:
            /// `alpha_p`, `alpha_n`, `beta`, `eps`.
            fn xielu(x: &mut [f32], parameters: [f32; 4]);

            /// Rotates the pairs `(x[i], x[i + n])` with `n = cos.len()`: `(x0 cos - x1 sin, x1 cos + x0 sin)`.
            fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]);

            /// `x = cap * tanh(x / cap)`, elementwise.
            fn soft_cap(x: &mut [f32], cap: f32);

            /// Sum of a buffer read as `u64`: measures read bandwidth.
            fn read_sum(data: &[u64]) -> u64;
        } }
    };
}
pub(in crate::kernels) use elementwise_operations;

/// Numbers that [`to_int8`] tries as a scale.
const SCALES: u32 = 8;
/// The low bits of `x + ROUND` are `x` rounded to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// Partial sums of a reduction.
const LANES: usize = 32;

/// Folds `x` with `f(x, lane)` into [`LANES`] partial results that begin as `start`, then joins those pairwise.
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
pub(in crate::kernels) fn quantize(x: &[f32], out: RowMut<'_>) {
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
        // Magnitudes compare like their bits, with NaN the largest: a NaN becomes the scale and is not lost.
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
    // A separate loop: in the one above, the compiler would extract the codes from their vector one by one.
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

/// The sum of half a block, with eight codes at a time in a word.
#[inline(always)]
fn sum(codes: [i8; BLOCK / 2]) -> i32 {
    const LOW: u64 = 0x00ff_00ff_00ff_00ff;
    let mut pairs = 0;
    for word in bytemuck::cast::<_, [u64; 2]>(codes) {
        // Adds 128 to each code, which makes it unsigned.
        let word = word ^ 0x8080_8080_8080_8080;
        pairs += (word & LOW) + ((word >> 8) & LOW);
    }
    // The upper 16 bits of the product are the sum of the four numbers of 16 bits.
    (pairs.wrapping_mul(0x0001_0001_0001_0001) >> 48) as i32 - 128 * codes.len() as i32
}

/// The last block of a row, padded with zeros.
#[cold]
fn pad(x: &[f32]) -> [f32; BLOCK] {
    std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0))
}

#[inline(always)]
pub(in crate::kernels) fn to_int8(x: &[f32], codes: &mut [i8]) -> f32 {
    // As in `quantize`, a NaN becomes the scale.
    let mut tops = [0u32; LANES];
    for chunk in x.chunks(LANES) {
        for (top, x) in tops.iter_mut().zip(chunk) {
            *top = (*top).max(x.abs().to_bits());
        }
    }
    let top = f32::from_bits(tops.into_iter().fold(0, u32::max));
    if top < 1e-30 {
        codes.fill(0);
        return 0.0;
    }
    if !top.is_finite() {
        return f32::NAN;
    }
    // Rounded up, so that the largest code is below 127.5.
    let first = ((top / 127.4).to_bits() + 0xffff) & 0xffff_0000;
    let (mut scale, mut least) = (f32::from_bits(first), f32::INFINITY);
    // The errors of a group vary with its scale by a sixth, so the best of a few scales loses less than the smallest.
    for step in 0..SCALES {
        let tried = f32::from_bits(first + (step << 16));
        let inverse = 1.0 / tried;
        let squared = |x: f32, sum: f32| {
            let error = (x.mul_add(inverse, ROUND) - ROUND).mul_add(tried, -x);
            error.mul_add(error, sum)
        };
        let error = reduce(x, 0.0, squared, |a, b| a + b);
        if error < least {
            (scale, least) = (tried, error);
        }
    }
    let inverse = 1.0 / scale;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = x.mul_add(inverse, ROUND).to_bits() as i8;
    }
    scale
}

#[inline(always)]
pub(in crate::kernels) fn expand_scales(scales: &[u16], factor: f32, out: &mut [f32]) {
    for (out, scale) in out.iter_mut().zip(scales) {
        *out = factor * f32::from_bits(u32::from(*scale) << 16);
    }
}

#[inline(always)]
pub(in crate::kernels) fn hadamard(x: &mut [f32], block: usize) {
    /// Numbers within which the compiler shuffles lanes.
    const LAST: usize = 8;
    let (mut distance, least) = (block / 2, if block < LAST { 1 } else { LAST });
    while distance >= least {
        butterflies(x, distance);
        distance /= 2;
    }
    if block < LAST {
        return;
    }
    for x in x.as_chunks_mut::<LAST>().0 {
        for distance in [4, 2, 1] {
            let before = *x;
            for i in 0..LAST {
                let (low, high) = (before[i & !distance], before[i | distance]);
                x[i] = if i & distance == 0 { low + high } else { low - high };
            }
        }
    }
}

/// Replaces the pairs at this distance by their sum and their difference.
#[inline(always)]
fn butterflies(x: &mut [f32], distance: usize) {
    for pair in x.chunks_exact_mut(2 * distance) {
        let (low, high) = pair.split_at_mut(distance);
        for (low, high) in low.iter_mut().zip(high) {
            (*low, *high) = (*low + *high, *low - *high);
        }
    }
}

#[inline(always)]
pub(in crate::kernels) fn add_slope(scores: &mut [f32], slope: f32, distance: f32) {
    for (i, score) in scores.iter_mut().enumerate() {
        *score = slope.mul_add(-(distance - i as f32), *score);
    }
}

#[inline(always)]
pub(in crate::kernels) fn exp_segment(scores: &mut [f32]) -> (f32, f32) {
    exp_segment_by(scores, exp_of_difference)
}

#[inline(always)]
pub(in crate::kernels) fn exp_segment_coarse(scores: &mut [f32]) -> (f32, f32) {
    exp_segment_by(scores, coarse_exp_of_difference)
}

/// Replaces scores by `exp(score - max)`, with `exp` of differences.
#[inline(always)]
fn exp_segment_by(scores: &mut [f32], exp_of_difference: impl Fn(f32) -> f32) -> (f32, f32) {
    // Not `f32::max`, which does not specify which zero is larger. A NaN is ignored here and becomes a NaN weight below.
    let larger = |x: f32, max: f32| if x > max { x } else { max };
    let max = reduce(scores, f32::NEG_INFINITY, larger, |a, b| larger(b, a));
    // If everything is masked, weights are zero rather than NaN.
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
        // Padded with scores that add nothing, a tail takes as long as a chunk. A scalar loop would take a dozen times as long.
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..tail.len()].copy_from_slice(tail);
        exp(&mut padded);
        tail.copy_from_slice(&padded[..tail.len()]);
    }
    (max, join_lanes(sums, Add::add))
}

#[inline(always)]
pub(in crate::kernels) fn join(so_far: SoftmaxMut<'_>, more: Softmax<'_>) {
    /// Queries whose factors are computed together.
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
            // A query that has seen no position gets zeros rather than NaN.
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
pub(in crate::kernels) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane = x.mul_add(*y, *lane);
        }
    }
    join_lanes(lanes, Add::add)
}

#[inline(always)]
pub(in crate::kernels) fn multiply(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x *= y;
    }
}

#[inline(always)]
pub(in crate::kernels) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares = reduce(x, 0.0, |x, sum| x.mul_add(x, sum), Add::add);
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

#[inline(always)]
pub(in crate::kernels) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
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
pub(in crate::kernels) fn add_scaled(x: &mut [f32], y: &[f32], scale: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        *x = y.mul_add(scale, *x);
    }
}

#[inline(always)]
pub(in crate::kernels) fn activate(activation: Activation, x: &mut [f32]) {
    // The match is outside the loops, so that each loop is straight-line code.
    match activation {
        Activation::Silu => x.iter_mut().for_each(|x| *x = Activation::Silu.apply(*x)),
        Activation::Gelu => x.iter_mut().for_each(|x| *x = Activation::Gelu.apply(*x)),
        Activation::GeluTanh => x.iter_mut().for_each(|x| *x = Activation::GeluTanh.apply(*x)),
        Activation::Relu => x.iter_mut().for_each(|x| *x = Activation::Relu.apply(*x)),
        Activation::Relu2 => x.iter_mut().for_each(|x| *x = Activation::Relu2.apply(*x)),
        Activation::Sigmoid => x.iter_mut().for_each(|x| *x = Activation::Sigmoid.apply(*x)),
        Activation::Softplus => x.iter_mut().for_each(|x| *x = Activation::Softplus.apply(*x)),
        Activation::Exp => x.iter_mut().for_each(|x| *x = Activation::Exp.apply(*x)),
    }
}

#[inline(always)]
pub(in crate::kernels) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(x, up)| *x = Activation::Silu.apply(*x) * up),
        Activation::Gelu => pairs.for_each(|(x, up)| *x = Activation::Gelu.apply(*x) * up),
        Activation::GeluTanh => pairs.for_each(|(x, up)| *x = Activation::GeluTanh.apply(*x) * up),
        Activation::Relu => pairs.for_each(|(x, up)| *x = Activation::Relu.apply(*x) * up),
        Activation::Relu2 => pairs.for_each(|(x, up)| *x = Activation::Relu2.apply(*x) * up),
        Activation::Sigmoid => pairs.for_each(|(x, up)| *x = Activation::Sigmoid.apply(*x) * up),
        Activation::Softplus => pairs.for_each(|(x, up)| *x = Activation::Softplus.apply(*x) * up),
        Activation::Exp => pairs.for_each(|(x, up)| *x = Activation::Exp.apply(*x) * up),
    }
}

#[inline(always)]
pub(in crate::kernels) fn clamped_gate(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    for (x, up) in gate.iter_mut().zip(up) {
        // Comparisons that are false for NaN, which passes through.
        let gate = if *x > limit { limit } else { *x };
        let up = if *up > limit { limit } else { *up };
        let up = if up < -limit { -limit } else { up };
        *x = gate * Activation::Sigmoid.apply(alpha * gate) * (1.0 + up);
    }
}

#[inline(always)]
pub(in crate::kernels) fn xielu(x: &mut [f32], parameters: [f32; 4]) {
    let [alpha_p, alpha_n, beta, eps] = parameters;
    for x in x {
        let curved =
            if *x > 0.0 { alpha_p * *x * *x } else { (libm::expm1f(if *x > eps { eps } else { *x }) - *x) * alpha_n };
        *x = beta.mul_add(*x, curved);
    }
}

#[inline(always)]
pub(in crate::kernels) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    let (first, second) = x.split_at_mut(n);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x0, x1) = (*a, *b);
        *a = x0.mul_add(*cos, -(x1 * sin));
        *b = x1.mul_add(*cos, x0 * sin);
    }
}

#[inline(always)]
pub(in crate::kernels) fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}

#[inline(always)]
pub(in crate::kernels) fn read_sum(data: &[u64]) -> u64 {
    data.iter().fold(0, |sum, x| sum.wrapping_add(*x))
}
