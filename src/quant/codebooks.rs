//! Super-blocks of 256 weights whose codes index a codebook of vectors: the types IQ1, IQ2 and IQ3.
//!
//! An entry of the [codebooks](super::grids) gives the absolute values of 8 or 4 weights, or in IQ1 their signed values. Signs
//! are 8 bits, or 7 bits where the eighth makes their number even. Each type has at most 16 different values, so panels hold their
//! indices in a table.

use std::array::from_fn;

use bytemuck::AnyBitPattern;
use half::f16;

use super::blocks32::Half;
use super::decoder::{Block, Group, Groups};
use super::grids;
use super::layout::{Code, Layout};
use super::panel::{Nibbles, nibbles};

/// The values of IQ2: four absolute values, and from [`NEGATIVE`] on the same with the other sign.
const IQ2_VALUES: [i8; 16] = both_signs([8, 25, 43, 0, 0, 0, 0, 0]);
/// The values of IQ3_XXS.
const IQ3_XXS_VALUES: [i8; 16] = both_signs([4, 12, 20, 28, 36, 44, 52, 62]);
/// The values of IQ3_S.
const IQ3_S_VALUES: [i8; 16] = both_signs([1, 3, 5, 7, 9, 11, 13, 15]);
/// The values of IQ1: eight times -1, 0 and 1, plus 1, and from [`NEGATIVE`] on minus 1.
const IQ1_VALUES: [i8; 16] = [-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0];

/// The bit of an index that stands for a negative value, or in IQ1 a negative shift.
const NEGATIVE: u8 = 8;

/// Absolute values, then the negative ones.
const fn both_signs(values: [i8; 8]) -> [i8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 8 {
        table[i] = values[i];
        table[i + 8] = -values[i];
        i += 1;
    }
    table
}

/// A little-endian `u16`.
type Two = [u8; 2];

/// The signs in 7 bits: the eighth makes the number of negative weights even.
#[inline(always)]
fn even_signs(bits: u32) -> u8 {
    let bits = bits as u8 & 127;
    bits | (bits.count_ones() as u8 & 1) << 7
}

/// The index of a value from that of its absolute value. It is negative if bit `bit` of `signs` is set.
#[inline(always)]
fn signed(index: u16, signs: u8, bit: usize) -> u8 {
    index as u8 | ((signs >> bit & 1) * NEGATIVE)
}

/// The codes of four vectors of 8. `vector` gives the entry and the signs.
#[inline(always)]
fn eights(vector: impl Fn(usize) -> (u16, u8)) -> Nibbles {
    let mut codes = [0; 32];
    for (k, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (entry, signs) = vector(k);
        *codes = from_fn(|i| signed(entry >> (2 * i) & 3, signs, i));
    }
    nibbles(|i| codes[i])
}

/// The codes of four pairs of vectors of 4. `vector` gives entry `0..8`, and `signs` those of pair `0..4`.
#[inline(always)]
fn fours(vector: impl Fn(usize) -> u16, signs: impl Fn(usize) -> u8) -> Nibbles {
    let mut codes = [0; 32];
    for (k, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (signs, entries) = (signs(k), [vector(2 * k), vector(2 * k + 1)]);
        *codes = from_fn(|i| signed(entries[i / 4] >> (4 * (i % 4)) & 7, signs, i));
    }
    nibbles(|i| codes[i])
}

/// The codes of four vectors of IQ1. `vector` gives the entry and whether the shift is negative.
#[inline(always)]
fn thirds(vector: impl Fn(usize) -> (u16, bool)) -> Nibbles {
    let mut codes = [0; 32];
    for (k, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (entry, is_negative) = vector(k);
        *codes = from_fn(|i| signed(entry >> (2 * i) & 3, u8::from(is_negative), 0));
    }
    nibbles(|i| codes[i])
}

/// Scale `index` of 4-bit scales, the first of a pair in the low nibble.
#[inline(always)]
fn nibble(scales: &[u8], index: usize) -> f32 {
    f32::from(scales[index / 2] >> (4 * (index % 2)) & 15)
}

/// A super-block as a file holds it. Its weights are `scale * factor * VALUES[code]`.
pub(super) trait Codebook: AnyBitPattern {
    /// The values of codes.
    const VALUES: [i8; 16];
    /// The largest factor.
    const MOST: f32;
    /// An array of the 8 or 16 groups.
    type Groups: Groups<Scale = f32>;

    /// The scale of the block.
    fn scale(&self) -> f32;

    /// The factors of all groups, times the scale.
    fn groups(&self, scale: f32) -> Self::Groups;

    /// The codes of weights `32 * index..32 * (index + 1)`.
    fn codes(&self, index: usize) -> Nibbles;
}

/// The [`Block`] of a [`Codebook`].
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct Vectors<C>(C);

impl<C: Codebook> Block for Vectors<C> {
    const LAYOUT: Layout = Layout::scaled(Code::Table4(C::VALUES), 256 / C::Groups::COUNT);
    type Codes = Nibbles;
    type Groups = C::Groups;

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        self.0.codes(index)
    }

    #[inline(always)]
    fn groups(&self) -> C::Groups {
        self.0.groups(self.0.scale())
    }

    fn bounds(&self) -> [f32; 2] {
        [self.0.scale().abs() * C::MOST, 0.0]
    }
}

/// Groups of 16 whose scales in 4 bits count halves of `1/4`: the factors of IQ2_XS and IQ2_S.
#[inline(always)]
fn groups_of_16(scale: f32, groups: &[u8; 8]) -> [Group<f32>; 16] {
    from_fn(|i| Group::scaled(scale * (0.5 + nibble(groups, i)) * 0.25))
}

/// `scale * (group scale + 1/2) / 4 * value`, 2.06 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq2Xxs {
    scale: Half,
    /// For each 32 weights: 4 entries, then a word of 4 times 7 signs and a scale of 4 bits.
    parts: [[[u8; 4]; 2]; 8],
}

impl Codebook for Iq2Xxs {
    const VALUES: [i8; 16] = IQ2_VALUES;
    const MOST: f32 = 3.875;
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 8] {
        self.parts.map(|[_, word]| Group::scaled(scale * (0.5 + f32::from(word[3] >> 4)) * 0.25))
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let [entries, signs] = self.parts[index];
        let signs = u32::from_le_bytes(signs);
        eights(|k| (grids::IQ2_XXS[usize::from(entries[k])], even_signs(signs >> (7 * k))))
    }
}

/// `scale * (group scale + 1/2) / 4 * value`, 2.31 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq2Xs {
    scale: Half,
    /// For each 8 weights: an entry in the lower 9 bits, and 7 signs.
    vectors: [[Two; 4]; 8],
    groups: [u8; 8],
}

impl Codebook for Iq2Xs {
    const VALUES: [i8; 16] = IQ2_VALUES;
    const MOST: f32 = 3.875;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 16] {
        groups_of_16(scale, &self.groups)
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let vectors = self.vectors[index].map(u16::from_le_bytes);
        eights(|k| (grids::IQ2_XS[usize::from(vectors[k] & 511)], even_signs(u32::from(vectors[k] >> 9))))
    }
}

/// `scale * (group scale + 1/2) / 4 * value`, 2.56 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq2S {
    scale: Half,
    /// The lower 8 bits of the entries.
    low: [[u8; 4]; 8],
    signs: [[u8; 4]; 8],
    /// The upper 2 bits of 4 entries, the first in the lowest bits.
    high: [u8; 8],
    groups: [u8; 8],
}

impl Codebook for Iq2S {
    const VALUES: [i8; 16] = IQ2_VALUES;
    const MOST: f32 = 3.875;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 16] {
        groups_of_16(scale, &self.groups)
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let high = u16::from(self.high[index]);
        eights(|k| {
            let entry = u16::from(self.low[index][k]) | (high >> (2 * k) & 3) << 8;
            (grids::IQ2_S[usize::from(entry)], self.signs[index][k])
        })
    }
}

/// `scale * (group scale + 1/2) / 2 * value`, 3.06 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq3Xxs {
    scale: Half,
    entries: [[u8; 8]; 8],
    /// For each 32 weights: a word of 4 times 7 signs and a scale of 4 bits.
    words: [[u8; 4]; 8],
}

impl Codebook for Iq3Xxs {
    const VALUES: [i8; 16] = IQ3_XXS_VALUES;
    const MOST: f32 = 7.75;
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 8] {
        self.words.map(|word| Group::scaled(scale * (0.5 + f32::from(word[3] >> 4)) * 0.5))
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let signs = u32::from_le_bytes(self.words[index]);
        fours(|k| grids::IQ3_XXS[usize::from(self.entries[index][k])], |k| even_signs(signs >> (7 * k)))
    }
}

/// `scale * (2 * group scale + 1) * value`, 3.44 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq3S {
    scale: Half,
    /// The lower 8 bits of the entries.
    low: [[u8; 8]; 8],
    /// The ninth bits.
    high: [u8; 8],
    signs: [[u8; 4]; 8],
    groups: [u8; 4],
}

impl Codebook for Iq3S {
    const VALUES: [i8; 16] = IQ3_S_VALUES;
    const MOST: f32 = 31.0;
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 8] {
        from_fn(|i| Group::scaled(scale * (1.0 + 2.0 * nibble(&self.groups, i))))
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let high = u16::from(self.high[index]);
        fours(
            |k| grids::IQ3_S[usize::from(u16::from(self.low[index][k]) | (high >> k & 1) << 8)],
            |k| self.signs[index][k],
        )
    }
}

/// `scale * (2 * group scale + 1) * (value ± 1/8)`, 1.56 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq1S {
    scale: Half,
    /// The lower 8 bits of the entries.
    low: [[u8; 4]; 8],
    /// For each 32 weights, from the lowest bit: 4 times the upper 3 bits of an entry, the scale in 3 bits, and the sign of
    /// the shift.
    words: [Two; 8],
}

impl Codebook for Iq1S {
    const VALUES: [i8; 16] = IQ1_VALUES;
    const MOST: f32 = 1.875;
    type Groups = [Group<f32>; 8];

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.scale.to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 8] {
        // Codes are eight times the values.
        self.words.map(|word| Group::scaled(scale * f32::from(2 * (word[1] >> 4 & 7) + 1) * 0.125))
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        let word = u16::from_le_bytes(self.words[index]);
        thirds(|k| {
            let entry = u16::from(self.low[index][k]) | (word >> (3 * k) & 7) << 8;
            (grids::IQ1[usize::from(entry)], word >> 15 == 1)
        })
    }
}

/// `scale * (2 * group scale + 1) * (value ± 1/8)`, 1.75 bits per weight
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq1M {
    /// The lower 8 bits of the entries.
    low: [[u8; 4]; 8],
    /// For each 8 weights, two in a byte: the upper 3 bits of the entry, and the sign of the shift.
    high: [[u8; 2]; 8],
    /// Each holds 4 scales of 3 bits, and in its upper 4 bits a part of the block's scale, the lowest first.
    scales: [Two; 4],
}

impl Codebook for Iq1M {
    const VALUES: [i8; 16] = IQ1_VALUES;
    const MOST: f32 = 1.875;
    type Groups = [Group<f32>; 16];

    #[inline(always)]
    fn scale(&self) -> f32 {
        let parts = self.scales.map(|word| u16::from(word[1] >> 4));
        f16::from_bits(parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12).to_f32()
    }

    #[inline(always)]
    fn groups(&self, scale: f32) -> [Group<f32>; 16] {
        from_fn(|i| {
            let group_scale = u16::from_le_bytes(self.scales[i / 4]) >> (3 * (i % 4)) & 7;
            Group::scaled(scale * f32::from(2 * group_scale + 1) * 0.125)
        })
    }

    #[inline(always)]
    fn codes(&self, index: usize) -> Nibbles {
        thirds(|k| {
            let high = self.high[index][k / 2] >> (4 * (k % 2)) & 15;
            let entry = u16::from(self.low[index][k]) | u16::from(high & 7) << 8;
            (grids::IQ1[usize::from(entry)], high >> 3 == 1)
        })
    }
}
