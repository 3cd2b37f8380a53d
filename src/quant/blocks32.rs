//! Blocks of 32 values.
//!
//! In all of them byte `j` of the codes holds value `j` in its low nibble and value `j + 16` in its high nibble.
//! An encoder appends one block and says true, or appends nothing of use and says false when a value or a scale is not
//! finite once rounded to F16.

use half::f16;

/// The 16 values that the codes of IQ4_NL and IQ4_XS stand for.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The 16 values that the codes of MXFP4 stand for: E2M1 floats, doubled to be whole.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The little-endian F16 at byte `at`.
pub(super) fn scale<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Calls `value(index, code)` for the 32 codes of 4 bits that start at byte `at`.
fn nibbles<const B: usize>(block: &[u8; B], at: usize, mut value: impl FnMut(usize, u8)) {
    for j in 0..16 {
        value(j, block[at + j] & 15);
        value(j + 16, block[at + j] >> 4);
    }
}

/// d * (code - 8)
pub(super) fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    nibbles(block, 2, |i, code| out[i] = d * f32::from(code as i8 - 8));
}

/// d * code + m
pub(super) fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    nibbles(block, 4, |i, code| out[i] = d * f32::from(code) + m);
}

/// d * (code - 16), the fifth bits apart
pub(super) fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(block, 6, |i, code| out[i] = d * f32::from((code | fifth_bit(fifth, i)) as i8 - 16));
}

/// d * code + m, the fifth bits apart
pub(super) fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(block, 8, |i, code| out[i] = d * f32::from(code | fifth_bit(fifth, i)) + m);
}

fn fifth_bit(bits: u32, index: usize) -> u8 {
    ((bits >> index & 1) << 4) as u8
}

/// d * code, codes of 8 bits
pub(super) fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for i in 0..32 {
        out[i] = d * f32::from(block[2 + i] as i8);
    }
}

/// d * table\[code\]
pub(super) fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    nibbles(block, 2, |i, code| out[i] = d * f32::from(IQ4_VALUES[usize::from(code)]));
}

/// 2^(e - 128) * table\[code\]
///
/// The OCP specification calls e = 255 NaN; ggml computes with it as with any other, and so do we.
pub(super) fn decode_mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    let d = half_e8m0(block[0]);
    nibbles(block, 1, |i, code| out[i] = d * f32::from(MXFP4_VALUES[usize::from(code)]));
}

/// Half of the power of two that an E8M0 byte stands for: 2^(e - 128).
pub(crate) fn half_e8m0(e: u8) -> f32 {
    // Below 2 the power is smaller than the smallest normal F32.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Appends `value` as F16; false when it is not finite as such.
fn push_scale(value: f32, out: &mut Vec<u8>) -> bool {
    let rounded = f16::from_f32(value);
    out.extend(rounded.to_le_bytes());
    rounded.is_finite()
}

/// Appends 32 codes below 16 as 16 bytes.
fn push_nibbles(codes: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend((0..16).map(|j| codes(j) | codes(j + 16) << 4));
}

/// 1/d, or 0 for 0: a block of zeros has no scale.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude, with its sign, becomes code 0, that is -8.
pub(super) fn encode_q4_0(values: &[f32; 32], out: &mut Vec<u8>) -> bool {
    let extreme = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = extreme / -8.0;
    let id = inverse(d);
    // ggml's compilers fuse this product and sum. In F64 the product is exact, so one rounding to F32 remains, as there.
    let code = |i: usize| (((f64::from(values[i]) * f64::from(id)) + 8.5) as f32 as u8).min(15);
    let fits = push_scale(d, out);
    push_nibbles(code, out);
    fits && values.iter().all(|v| v.is_finite())
}

/// The smallest value becomes code 0, the largest 15.
pub(super) fn encode_q4_1(values: &[f32; 32], out: &mut Vec<u8>) -> bool {
    let min = values.iter().fold(f32::INFINITY, |m, v| m.min(*v));
    let max = values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let d = (max - min) / 15.0;
    let id = inverse(d);
    let code = |i: usize| (((values[i] - min) * id + 0.5) as u8).min(15);
    let fits = push_scale(d, out) & push_scale(min, out);
    push_nibbles(code, out);
    fits && values.iter().all(|v| v.is_finite())
}

/// The largest magnitude becomes 127; halves round away from zero.
pub(super) fn encode_q8_0(values: &[f32; 32], out: &mut Vec<u8>) -> bool {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let id = inverse(d);
    let fits = push_scale(d, out);
    out.extend(values.iter().map(|v| (v * id).round() as i8 as u8));
    fits && values.iter().all(|v| v.is_finite())
}
