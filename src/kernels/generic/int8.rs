//! Attention over an INT8 cache: how weights become codes, as plain Rust.

use crate::kernels::kv::{Int8Weights, PAGE};
use crate::quant::packed::PANEL;

/// The low bits of `x + ROUND` are `x` rounded to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// The largest code of a weight.
const LARGEST: f32 = 255.0;
/// The largest product that counts as zero: the inverses of larger ones are finite.
const TINY: f32 = 1e-30;

/// [`Kernel::quantize_weights`](crate::kernels::Kernel::quantize_weights), with the bits of `flip` flipped in all codes.
#[inline(always)]
pub(in crate::kernels) fn quantize_weights(inputs: Int8Weights<'_>, codes: &mut [u8], factors: &mut [f32], flip: u8) {
    let Int8Weights { weights, stride, seen, scales } = inputs;
    let codes: &mut [[[u8; 4]; PANEL]] = bytemuck::cast_slice_mut(codes);
    let groups = codes.chunks_exact_mut(seen.len().max(1)).zip(factors.chunks_exact_mut(seen.len().max(1)));
    for (scales, (codes, factors)) in scales.as_chunks::<PAGE>().0.iter().zip(groups) {
        // Queries one after the other, so that the CPU begins the next while it waits for the largest product of this one.
        for (i, (seen, (code, factor))) in seen.iter().zip(codes.iter_mut().zip(factors)).enumerate() {
            let weights: &[f32; PAGE] = weights[i * stride..].first_chunk().expect("a page of weights");
            *factor = if seen.len() == PAGE {
                quantize(weights, scales, flip, code)
            } else {
                // What is stored at other positions may not be finite.
                let mut own = [[0.0; PAGE]; 2];
                own[0][seen.clone()].copy_from_slice(&weights[seen.clone()]);
                own[1][seen.clone()].copy_from_slice(&scales[seen.clone()]);
                quantize(&own[0], &own[1], flip, code)
            };
        }
    }
}

/// Quantizes the products of weights and scales, and returns the scale of their codes.
#[inline(always)]
fn quantize(weights: &[f32; PAGE], scales: &[f32; PAGE], flip: u8, codes: &mut [[u8; 4]; PANEL]) -> f32 {
    // The bits of a NaN are the largest. One number at a time, because the compiler would take several rows of an array together.
    let top = weights.iter().zip(scales).map(|(weight, scale)| (weight * scale).to_bits()).fold(0, u32::max);
    let top = f32::from_bits(top);
    if !top.is_finite() || top < TINY {
        codes.fill([flip; 4]);
        return if top.is_finite() { 0.0 } else { f32::NAN };
    }
    let inverse = LARGEST / top;
    for (i, code) in codes.iter_mut().enumerate() {
        let rounded = |j: usize| (weights[j * PANEL + i] * scales[j * PANEL + i]).mul_add(inverse, ROUND).to_bits();
        let low = (rounded(0) & 0xff) | (rounded(1) << 8 & 0xff00);
        let high = (rounded(2) << 16 & 0xff_0000) | rounded(3) << 24;
        *code = ((low | high) ^ u32::from_ne_bytes([flip; 4])).to_le_bytes();
    }
    top * (1.0 / LARGEST)
}
