//! Encoders of quantized blocks.
//!
//! An encoder appends one block. If a value or a scale is not finite after rounding to F16, it returns false and the appended
//! bytes are invalid.

use half::f16;

use super::layout::BLOCK;
use super::panel::nibbles;

/// Appends the block of 32 values. Returns whether the type can hold them.
pub(super) type Encoder = fn(&[f32; BLOCK], &mut Vec<u8>) -> bool;

/// Appends `value` as F16. Returns whether it is finite as such.
fn push_scale(value: f32, out: &mut Vec<u8>) -> bool {
    let rounded = f16::from_f32(value);
    out.extend(rounded.to_le_bytes());
    rounded.is_finite()
}

/// 1/d, or 0 for the scale 0 of a block of zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Maps the value of largest magnitude, with its sign, to -8.
pub(super) fn q4_0(values: &[f32; BLOCK], out: &mut Vec<u8>) -> bool {
    let extreme = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = extreme / -8.0;
    let id = inverse(d);
    // ggml's compilers fuse this product and sum. In F64 the product is exact, so one rounding to F32 remains, as there.
    let code = |i: usize| (((f64::from(values[i]) * f64::from(id)) + 8.5) as f32 as u8).min(15);
    let fits = push_scale(d, out);
    out.extend(nibbles(code));
    fits && values.iter().all(|v| v.is_finite())
}

/// Maps the smallest value to 0 and the largest to 15.
pub(super) fn q4_1(values: &[f32; BLOCK], out: &mut Vec<u8>) -> bool {
    let min = values.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let max = values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let d = (max - min) / 15.0;
    let id = inverse(d);
    let code = |i: usize| (((values[i] - min) * id + 0.5) as u8).min(15);
    let fits = push_scale(d, out) & push_scale(min, out);
    out.extend(nibbles(code));
    fits && values.iter().all(|v| v.is_finite())
}

/// Maps the largest magnitude to 127. Halves round away from zero.
pub(super) fn q8_0(values: &[f32; BLOCK], out: &mut Vec<u8>) -> bool {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let id = inverse(d);
    let fits = push_scale(d, out);
    out.extend(values.iter().map(|v| (v * id).round() as i8 as u8));
    fits && values.iter().all(|v| v.is_finite())
}
