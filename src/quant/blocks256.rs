//! Super-blocks of 256 values: the K types, and IQ4_XS.
//!
//! A super-block holds one or two F16 scales and smaller scales, in few bits, for its sub-blocks of 16 or 32 values.

use super::blocks32::{IQ4_VALUES, scale};

/// The scale and the minimum of sub-block `j` (0 to 7) of Q4_K and Q5_K, 6 bits each, from 12 bytes.
///
/// The first four pairs lie in the low 6 bits of bytes 0 to 7; the last four are cut into 4 bits, in bytes 8 to 11, and
/// 2 bits, at the top of bytes 0 to 7.
fn scale_and_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d * scale * code - dmin * min, 16 sub-blocks of 16, codes of 2 bits
pub(super) fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (scale(block, 80), scale(block, 82));
    for (sub, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (ds, dm) = (d * f32::from(block[sub] & 15), dmin * f32::from(block[sub] >> 4));
        let (first, shift) = two_bits_at(sub);
        for l in 0..16 {
            values[l] = ds * f32::from(block[16 + first + l] >> shift & 3) - dm;
        }
    }
}

/// Where the 2-bit codes of a sub-block of 16 are in Q2_K and Q3_K: the first of their 16 bytes, and the shift.
///
/// Each half of 128 values has 32 bytes; the four shifts go over them in turn, 32 values each.
fn two_bits_at(sub: usize) -> (usize, usize) {
    let (half, shift, part) = (sub / 8, sub / 2 % 4, sub % 2);
    (32 * half + 16 * part, 2 * shift)
}

/// d * (scale - 32) * code, 16 sub-blocks of 16, codes -4 to 3 of which the third bit lies apart
pub(super) fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = scale(block, 108);
    for (sub, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = if sub < 8 { block[96 + sub] & 15 } else { block[96 + sub - 8] >> 4 };
        let high = block[104 + sub % 4] >> (2 * (sub / 4)) & 3;
        let ds = d * f32::from((low | high << 4) as i8 - 32);
        let (first, shift) = two_bits_at(sub);
        for l in 0..16 {
            // Bit `sub / 2` of the 32 mask bytes: one bit for each 32 values.
            let third = block[16 * (sub % 2) + l] >> (sub / 2) & 1;
            let code = (block[32 + first + l] >> shift & 3) as i8 - if third == 0 { 4 } else { 0 };
            values[l] = ds * f32::from(code);
        }
    }
}

/// d * scale * code - dmin * min, 8 sub-blocks of 32, codes of 4 bits
pub(super) fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    for (sub, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, mn) = scale_and_min(&block[4..16], sub);
        let (ds, dm) = (d * sc, dmin * mn);
        // Two sub-blocks share 32 bytes: low nibbles, then high.
        let codes = &block[16 + 32 * (sub / 2)..][..32];
        for l in 0..32 {
            values[l] = ds * f32::from(codes[l] >> (4 * (sub % 2)) & 15) - dm;
        }
    }
}

/// As Q4_K, with a fifth bit for each code
pub(super) fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    for (sub, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, mn) = scale_and_min(&block[4..16], sub);
        let (ds, dm) = (d * sc, dmin * mn);
        let codes = &block[48 + 32 * (sub / 2)..][..32];
        for l in 0..32 {
            // The same 32 bytes serve all sub-blocks, a bit each.
            let fifth = block[16 + l] >> sub & 1;
            values[l] = ds * f32::from((codes[l] >> (4 * (sub % 2)) & 15) | fifth << 4) - dm;
        }
    }
}

/// d * scale * (code - 32), 16 sub-blocks of 16, codes of 6 bits of which the upper two lie apart
pub(super) fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = scale(block, 208);
    for (sub, values) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let ds = d * f32::from(block[192 + sub] as i8);
        // Each half of 128 values is four quarters of 32. Quarters 0 and 2 are the low and high nibbles of the half's
        // first 32 bytes, 1 and 3 those of the next 32; their upper bits are the four pairs of each of 32 bytes.
        let (half, quarter, part) = (sub / 8, sub / 2 % 4, sub % 2);
        let low = &block[64 * half + 32 * (quarter % 2) + 16 * part..][..16];
        let high = &block[128 + 32 * half + 16 * part..][..16];
        for l in 0..16 {
            let code = (low[l] >> (4 * (quarter / 2)) & 15) | (high[l] >> (2 * quarter) & 3) << 4;
            values[l] = ds * f32::from(code as i8 - 32);
        }
    }
}

/// d * (scale - 32) * table\[code\], 8 sub-blocks of 32
pub(super) fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = scale(block, 0);
    let upper = u16::from_le_bytes([block[2], block[3]]);
    for (sub, values) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + sub / 2] >> (4 * (sub % 2)) & 15;
        let high = (upper >> (2 * sub) & 3) as u8;
        let ds = d * f32::from((low | high << 4) as i8 - 32);
        let codes = &block[8 + 16 * sub..][..16];
        for j in 0..16 {
            values[j] = ds * f32::from(IQ4_VALUES[usize::from(codes[j] & 15)]);
            values[j + 16] = ds * f32::from(IQ4_VALUES[usize::from(codes[j] >> 4)]);
        }
    }
}
