//! Super-blocks of 256 weights: the K types and IQ4_XS.
//!
//! A super-block holds one or two F16 scales and, in few bits, the scales and minimums of its groups of 16 or 32 weights.

use std::array::from_fn;

use bytemuck::AnyBitPattern;

use super::blocks32::{Half, Iq4, Scales, Sequential, Stored};
use super::decoder::{Block, Group};
use super::layout::{Code, Layout};
use super::panel::{Nibbles, Planes, Words, bytes, in_all, nibbles_of, words};

/// `scale * code - min`, codes of 2 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q2K {
    /// The scale in the low nibble, the minimum in the high one.
    groups: [u8; 16],
    codes: [[u8; 32]; 2],
    scale: Half,
    min: Half,
}

impl Block for Q2K {
    const LAYOUT: Layout = Layout::with_min(Code::Int2, 16);
    type Codes = Planes<2, 0>;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn codes(&self, index: usize) -> Planes<2, 0> {
        Planes(bytes(two_bits(&self.codes, index)))
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 16] {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        self.groups.map(|byte| Group { scale: scale * f32::from(byte & 15), min: -min * f32::from(byte >> 4) })
    }

    fn bounds(&self) -> [f32; 2] {
        [&self.scale, &self.min].map(|scale| scale.to_f32().abs() * 15.0)
    }
}

/// The 2-bit codes of weights `32 * index..` of Q2_K and Q3_K. Each half of the block has 32 bytes, and each pair of bits in
/// them belongs to another 32 weights.
#[inline(always)]
fn two_bits(codes: &[[u8; 32]; 2], index: usize) -> Words {
    words(&codes[index / 4]).map(|word| word >> (2 * (index % 4)) & in_all(3))
}

/// `scale * (group scale - 32) * (code - 4)`, codes of 3 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q3K {
    /// Bit `index` of byte `i` is the third bit of weight `32 * index + i`.
    third: [u8; 32],
    low: [[u8; 32]; 2],
    /// The lower 4 bits of 16 scales: low nibbles, then high nibbles.
    low_scales: [u8; 8],
    /// The upper 2 bits: the lowest pairs of the 4 bytes, then the next ones.
    high_scales: [u8; 4],
    scale: Half,
}

impl Block for Q3K {
    const LAYOUT: Layout = Layout::scaled(Code::Int3, 16);
    type Codes = Planes<2, 1>;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn codes(&self, index: usize) -> Planes<2, 1> {
        let (low, third) = (two_bits(&self.low, index), words(&self.third));
        Planes(bytes(from_fn(|i| low[i] | (third[i] >> index & in_all(1)) << 2)))
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 16] {
        let scale = self.scale.to_f32();
        from_fn(|i| {
            let low = self.low_scales[i % 8] >> (4 * (i / 8)) & 15;
            let high = self.high_scales[i % 4] >> (2 * (i / 4)) & 3;
            Group::scaled(scale * (f32::from(low | high << 4) - 32.0))
        })
    }

    fn bounds(&self) -> [f32; 2] {
        [self.scale.to_f32().abs() * 32.0, 0.0]
    }
}

/// The scale and the minimum of each group of 32 in Q4_K and Q5_K, 6 bits each.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct SixBits {
    scale: Half,
    min: Half,
    /// Bytes 0..4 and 4..8 hold scales and minimums of groups 0..4 in their lower 6 bits. Those of groups 4..8 are split:
    /// 4 bits in bytes 8..12, scales in the low nibbles and minimums in the high ones, and 2 bits at the top of bytes 0..8.
    packed: [u8; 12],
}

impl Scales for SixBits {
    const MIN: bool = true;
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 8] {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        let s = &self.packed;
        from_fn(|i| {
            let [group_scale, group_min] = match i {
                0..4 => [s[i] & 63, s[i + 4] & 63],
                _ => [s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4],
            };
            Group { scale: scale * f32::from(group_scale), min: -min * f32::from(group_min) }
        })
    }

    fn bounds(&self) -> [f32; 2] {
        [&self.scale, &self.min].map(|scale| scale.to_f32().abs() * 63.0)
    }
}

/// The 4-bit codes of weights `32 * index..` of Q4_K and Q5_K: each 32 bytes hold 32 weights in their low nibbles and the
/// next 32 in their high ones.
#[inline(always)]
fn four_bits(codes: &[[u8; 32]; 4], index: usize) -> Words {
    words(&codes[index / 2]).map(|word| word >> (4 * (index % 2)) & in_all(15))
}

/// `scale * code - min`, codes of 4 bits
pub(super) type Q4K = Sequential<SixBits, FourBits>;
/// `scale * code - min`, codes of 5 bits
pub(super) type Q5K = Sequential<SixBits, FiveBits>;
/// `scale * (group scale - 32) * IQ4_VALUES[code]`
pub(super) type Iq4Xs = Sequential<SignedSixBits, Iq4<8>>;

/// The codes of Q4_K.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct FourBits([[u8; 32]; 4]);

impl Stored for FourBits {
    const CODE: Code = Code::Int4;
    type Codes = Nibbles;

    #[inline(always)]
    fn get(&self, index: usize) -> Nibbles {
        nibbles_of(four_bits(&self.0, index))
    }
}

/// The codes of Q5_K.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct FiveBits {
    /// Bit `index` of byte `i` is the fifth bit of weight `32 * index + i`.
    fifth: [u8; 32],
    low: [[u8; 32]; 4],
}

impl Stored for FiveBits {
    const CODE: Code = Code::Int5;
    type Codes = Planes<4, 1>;

    #[inline(always)]
    fn get(&self, index: usize) -> Planes<4, 1> {
        let (low, fifth) = (four_bits(&self.low, index), words(&self.fifth));
        Planes(bytes(from_fn(|i| low[i] | (fifth[i] >> index & in_all(1)) << 4)))
    }
}

/// `scale * group scale * (code - 32)`, codes of 6 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q6K {
    /// Each half of the block has 64 bytes: 64 weights in their low nibbles, the next 64 in their high ones.
    low: [[[u8; 32]; 2]; 2],
    /// Each half of the block has 32 bytes, and each pair of bits in them belongs to another 32 weights.
    high: [[u8; 32]; 2],
    groups: [i8; 16],
    scale: Half,
}

impl Block for Q6K {
    const LAYOUT: Layout = Layout::scaled(Code::Int6, 16);
    type Codes = Planes<4, 2>;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn codes(&self, index: usize) -> Planes<4, 2> {
        let (half, quarter) = (index / 4, index % 4);
        let (low, high) = (words(&self.low[half][quarter % 2]), two_bits(&self.high, index));
        Planes(bytes(from_fn(|i| low[i] >> (4 * (quarter / 2)) & in_all(15) | high[i] << 4)))
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 16] {
        let scale = self.scale.to_f32();
        self.groups.map(|group| Group::scaled(scale * f32::from(group)))
    }

    fn bounds(&self) -> [f32; 2] {
        [self.scale.to_f32().abs() * 128.0, 0.0]
    }
}

/// The scales of IQ4_XS: 6 bits for each group of 32, 32 too high.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct SignedSixBits {
    scale: Half,
    /// The upper 2 bits of 8 scales, the first in the lowest bits.
    high_scales: [u8; 2],
    /// The lower 4 bits, the first in the lowest bits.
    low_scales: [u8; 4],
}

impl Scales for SignedSixBits {
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 8] {
        let (scale, high) = (self.scale.to_f32(), u16::from_le_bytes(self.high_scales));
        let low = u32::from_le_bytes(self.low_scales);
        from_fn(|i| {
            let group_scale = low >> (4 * i) & 15 | u32::from(high >> (2 * i) & 3) << 4;
            Group::scaled(scale * (group_scale as f32 - 32.0))
        })
    }

    fn bounds(&self) -> [f32; 2] {
        [self.scale.to_f32().abs() * 32.0, 0.0]
    }
}
