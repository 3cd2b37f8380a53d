//! Blocks of 32 weights, and the parts that blocks are made of.

use bytemuck::AnyBitPattern;
use half::f16;

use super::decoder::{Block, Codes, Group, Groups};
use super::layout::{Code, Layout};
use super::panel::{Bytes, Nibbles, Planes, bytes, words_of_bits, words_of_nibbles};

/// The values of the codes of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// The values of the codes of MXFP4: E2M1 floats, doubled to be integers.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A block whose codes follow all of its scales.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Sequential<S, C> {
    scales: S,
    codes: C,
}

impl<S: Scales, C: Stored> Block for Sequential<S, C> {
    const LAYOUT: Layout = Layout { code: C::CODE, group: 32, min: S::MIN };
    type Codes = C::Codes;
    type Groups = S::Groups;

    #[inline(always)]
    fn codes(&self, index: usize) -> C::Codes {
        self.codes.get(index)
    }

    #[inline(always)]
    fn groups(&self) -> S::Groups {
        self.scales.groups()
    }

    fn bounds(&self) -> [f32; 2] {
        self.scales.bounds()
    }
}

/// The scales of a block, one per 32 weights, and its minimums, as a file holds them.
pub(super) trait Scales: AnyBitPattern {
    /// Whether there are minimums.
    const MIN: bool = false;
    /// As [`Block::Groups`].
    type Groups: Groups;

    /// As [`Block::groups`].
    fn groups(&self) -> Self::Groups;

    /// As [`Block::bounds`].
    fn bounds(&self) -> [f32; 2] {
        [0.0; 2]
    }
}

/// The codes of a block as a file holds them.
pub(super) trait Stored: AnyBitPattern {
    /// What the codes mean.
    const CODE: Code;
    /// As [`Block::Codes`].
    type Codes: Codes;

    /// The codes of weights `32 * index..32 * (index + 1)`.
    fn get(&self, index: usize) -> Self::Codes;
}

/// `scale * (code - 8)`
pub(super) type Q4_0 = Sequential<Half, FourBits>;
/// `scale * code + min`
pub(super) type Q4_1 = Sequential<HalfWithMin, FourBits>;
/// `scale * (code - 16)`, codes of 5 bits
pub(super) type Q5_0 = Sequential<Half, FiveBits>;
/// `scale * code + min`, codes of 5 bits
pub(super) type Q5_1 = Sequential<HalfWithMin, FiveBits>;
/// `scale * code`, signed codes of 8 bits
pub(super) type Q8_0 = Sequential<Half, EightBits>;
/// `scale * IQ4_VALUES[code]`
pub(super) type Iq4Nl = Sequential<Half, Iq4<1>>;
/// `2^(exponent - 128) * MXFP4_VALUES[code]`
pub(super) type Mxfp4 = Sequential<Exponent, E2m1>;

/// A little-endian F16.
#[derive(Clone, Copy, Default, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct Half([u8; 2]);

impl Half {
    #[inline(always)]
    pub(super) fn get(self) -> f16 {
        f16::from_le_bytes(self.0)
    }

    #[inline(always)]
    pub(super) fn to_f32(self) -> f32 {
        self.get().to_f32()
    }
}

impl Scales for Half {
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group::scaled(self.get())]
    }
}

/// A scale and a minimum.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct HalfWithMin {
    scale: Half,
    min: Half,
}

impl Scales for HalfWithMin {
    const MIN: bool = true;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group { scale: self.scale.get(), min: self.min.get() }]
    }
}

/// A scale in E8M0, a power of two.
///
/// The OCP specification reserves exponent 255 for NaN. ggml computes with it as with any other, and so does nybble.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct Exponent(u8);

impl Exponent {
    /// The scale of the doubled values, half of what the E8M0 byte stands for.
    #[inline(always)]
    fn scale(&self) -> f32 {
        let e = u32::from(self.0);
        // Below 2 the power is smaller than the smallest normal F32.
        f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
    }
}

impl Scales for Exponent {
    type Groups = [Group<f32>; 1];

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 1] {
        [Group::scaled(self.scale())]
    }

    fn bounds(&self) -> [f32; 2] {
        [self.scale(), 0.0]
    }
}

/// Codes that panels hold as the file does.
macro_rules! stored {
    ($($(#[$doc:meta])* $name:ident($codes:ident) = $code:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, AnyBitPattern)]
            #[repr(transparent)]
            pub(super) struct $name($codes);

            impl Stored for $name {
                const CODE: Code = $code;
                type Codes = $codes;

                #[inline(always)]
                fn get(&self, _index: usize) -> $codes {
                    self.0
                }
            }
        )*
    };
}
stored! {
    /// Codes of 4 bits.
    FourBits(Nibbles) = Code::Int4;
    /// Signed codes of 8 bits.
    EightBits(Bytes) = Code::Int8;
    /// Indices of [`MXFP4_VALUES`].
    E2m1(Nibbles) = Code::Table4(MXFP4_VALUES);
}

/// Codes of 5 bits.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct FiveBits {
    /// Bit `i` is the highest bit of code `i`.
    fifth: [u8; 4],
    low: Nibbles,
}

impl Stored for FiveBits {
    const CODE: Code = Code::Int5;
    type Codes = Planes<4, 1>;

    #[inline(always)]
    fn get(&self, _index: usize) -> Planes<4, 1> {
        let (low, fifth) = (words_of_nibbles(&self.low), words_of_bits(u32::from_le_bytes(self.fifth)));
        Planes(bytes(std::array::from_fn(|i| low[i] | fifth[i] << 4)))
    }
}

/// Indices of [`IQ4_VALUES`] in a block of `32 * N` weights.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(transparent)]
pub(super) struct Iq4<const N: usize>([Nibbles; N]);

impl<const N: usize> Stored for Iq4<N> {
    const CODE: Code = Code::Table4(IQ4_VALUES);
    type Codes = Nibbles;

    #[inline(always)]
    fn get(&self, index: usize) -> Nibbles {
        self.0[index]
    }
}
