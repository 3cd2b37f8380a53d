//! Blocks whose codes are computed from few bits: ternary and binary weights, and NVFP4.

use std::array::from_fn;

use bytemuck::AnyBitPattern;
use half::f16;

use super::blocks32::{Half, MXFP4_VALUES};
use super::decoder::{Block, Group, Groups};
use super::layout::{Code, Layout};
use super::panel::{Nibbles, Planes, nibbles};

/// A block of few-bit codes with one scale. Its weights are `scale * (code - 1)`.
pub(super) trait FewBits: AnyBitPattern {
    /// An array with the scale of each 32 weights.
    type Groups: Groups<Scale = f16>;

    /// The scale in as many groups as the block has.
    fn groups(&self) -> Self::Groups;

    /// The code of a weight, 0 to 3.
    fn code(&self, weight: usize) -> u8;
}

/// The [`Block`] of [`FewBits`].
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct OneScale<B>(B);

impl<B: FewBits> Block for OneScale<B> {
    const LAYOUT: Layout = Layout::scaled(Code::Int2, 32);
    const SHARED: usize = Self::WEIGHTS;
    type Codes = Planes<2, 0>;
    type Groups = B::Groups;

    #[inline(always)]
    fn codes(&self, index: usize) -> Planes<2, 0> {
        Planes(from_fn(|i| self.0.code(32 * index + i)))
    }

    #[inline(always)]
    fn groups(&self) -> B::Groups {
        self.0.groups()
    }
}

/// `scale * (code - 1)`, five codes of base 3 in a byte
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Tq1 {
    /// Digit `n` of byte `i` is the code of weight `32 * n + i`.
    first: [u8; 32],
    /// Digit `n` of byte `i` is the code of weight `160 + 16 * n + i`.
    second: [u8; 16],
    /// Four digits in a byte: digit `n` of byte `i` is the code of weight `240 + 4 * n + i`.
    last: [u8; 4],
    scale: Half,
}

impl FewBits for Tq1 {
    type Groups = [Group<f16>; 8];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 8] {
        [Group::scaled(self.scale.get()); 8]
    }

    #[inline(always)]
    fn code(&self, weight: usize) -> u8 {
        let (byte, digit) = match weight {
            0..160 => (self.first[weight % 32], weight / 32),
            160..240 => (self.second[weight % 16], (weight - 160) / 16),
            _ => (self.last[weight % 4], (weight - 240) / 4),
        };
        // A byte is the fraction 0.d0d1d2d3d4 in base 3, in units of 1/256. A multiplication shifts its digits, and the
        // whole part above them is dropped.
        let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][digit]);
        ((u16::from(shifted) * 3) >> 8) as u8
    }
}

/// `scale * (code - 1)`, codes of 2 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Tq2 {
    /// Each half of the block has 32 bytes, and each pair of bits in them belongs to another 32 weights.
    codes: [[u8; 32]; 2],
    scale: Half,
}

impl FewBits for Tq2 {
    type Groups = [Group<f16>; 8];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 8] {
        [Group::scaled(self.scale.get()); 8]
    }

    #[inline(always)]
    fn code(&self, weight: usize) -> u8 {
        self.codes[weight / 128][weight % 32] >> (2 * (weight / 32 % 4)) & 3
    }
}

/// `scale` where the bit is set, `-scale` elsewhere
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q1 {
    scale: Half,
    bits: [u8; 16],
}

impl FewBits for Q1 {
    type Groups = [Group<f16>; 4];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 4] {
        [Group::scaled(self.scale.get()); 4]
    }

    #[inline(always)]
    fn code(&self, weight: usize) -> u8 {
        2 * (self.bits[weight / 8] >> (weight % 8) & 1)
    }
}

/// `scale * (code - 1)`, codes of 2 bits in the order of the weights, a scale for `4 * BYTES` of them
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q2<const BYTES: usize, const GROUPS: usize> {
    scale: Half,
    codes: [u8; BYTES],
}

impl<const BYTES: usize, const GROUPS: usize> FewBits for Q2<BYTES, GROUPS> {
    type Groups = [Group<f16>; GROUPS];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; GROUPS] {
        const { assert!(4 * BYTES == 32 * GROUPS) };
        [Group::scaled(self.scale.get()); GROUPS]
    }

    #[inline(always)]
    fn code(&self, weight: usize) -> u8 {
        self.codes[weight / 4] >> (2 * (weight % 4)) & 3
    }
}

/// `scale * (code - 1)`, codes of 2 bits, the scale of the whole tensor in each block
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct I2S {
    /// Each pair of bits in the 32 bytes belongs to another 32 weights, the highest to the first ones.
    codes: [u8; 32],
    /// A little-endian F32.
    scale: [u8; 4],
}

impl Block for I2S {
    const LAYOUT: Layout = Layout::scaled(Code::Int2, 32);
    const SHARED: usize = 256;
    const IS_ONE_SCALE: bool = true;
    type Codes = Planes<2, 0>;
    type Groups = [Group<f32>; 4];

    #[inline(always)]
    fn codes(&self, index: usize) -> Planes<2, 0> {
        Planes(self.codes.map(|byte| byte >> (6 - 2 * index) & 3))
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 4] {
        [Group::scaled(f32::from_le_bytes(self.scale)); 4]
    }

    fn bounds(&self) -> [f32; 2] {
        [f32::from_le_bytes(self.scale).abs(), 0.0]
    }
}

/// `scale * MXFP4_VALUES[code]`, a scale for each 16 weights
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Nvfp4 {
    /// Unsigned E4M3 floats.
    scales: [u8; 4],
    /// For each 16 weights: the first 8 in the low nibbles, the others in the high ones.
    codes: [[u8; 8]; 4],
}

impl Block for Nvfp4 {
    const LAYOUT: Layout = Layout::scaled(Code::Table4(MXFP4_VALUES), 16);
    type Codes = Nibbles;
    type Groups = [Group<f16>; 4];

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        nibbles(|i| self.codes[2 * index + i / 16][i % 8] >> (4 * (i % 16 / 8)) & 15)
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 4] {
        self.scales.map(|scale| Group::scaled(half_of_e4m3(scale)))
    }
}

/// Half of an unsigned E4M3 float, for the doubled values. F16 holds it exactly. The sign bit is ignored, and the only NaN
/// without it counts as 0, as in ggml.
#[inline(always)]
fn half_of_e4m3(bits: u8) -> f16 {
    let (exponent, mantissa) = (u16::from(bits >> 3 & 15), u16::from(bits & 7));
    match (bits, exponent) {
        (0x7f, _) => f16::ZERO,
        (_, 0) => f16::from_f32_const(f32::from(bits & 7) / 1024.0),
        // The bias of E4M3 is 7, that of F16 is 15; one less halves the number.
        _ => f16::from_bits((exponent + 7) << 10 | mantissa << 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_nvfp4_are_half_of_e4m3() {
        for bits in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
            let value = match exponent {
                0 => mantissa * 2f32.powi(-9),
                _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
            };
            let expected = if bits == 0x7f { 0.0 } else { value / 2.0 };
            assert_eq!(half_of_e4m3(bits).to_f32(), expected, "{bits:#04x}");
        }
    }

    #[test]
    fn base_3_bytes_hold_every_combination_of_digits() {
        for number in 0..243u16 {
            let digits: [u8; 5] = from_fn(|n| (number / [81, 27, 9, 3, 1][n] % 3) as u8);
            let byte = (number * 256).div_ceil(243) as u8;
            let block = Tq1 { first: [byte; 32], second: [byte; 16], last: [byte; 4], scale: Half::default() };
            for (n, digit) in digits.into_iter().enumerate() {
                assert_eq!([block.code(32 * n), block.code(160 + 16 * n)], [digit; 2], "{number}");
            }
        }
    }
}
