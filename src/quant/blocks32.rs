//! Blocks of 32 weights.

use bytemuck::AnyBitPattern;
use half::f16;

use super::decoder::{Block, Codes, Group};
use super::layout::{Code, Layout};
use super::panel::{Bytes, Nibbles};

/// The values of the codes of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// The values of the codes of MXFP4: E2M1 floats, doubled to be integers.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A little-endian F16.
#[derive(Clone, Copy, AnyBitPattern)]
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

/// `scale * (code - 8)`
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q4_0 {
    scale: Half,
    codes: Nibbles,
}

impl Block for Q4_0 {
    const LAYOUT: Layout = Layout::scaled(Code::Int4, 32);
    type Codes = Nibbles;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Nibbles {
        self.codes
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group::scaled(self.scale.get())]
    }
}

/// `scale * code + min`
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q4_1 {
    scale: Half,
    min: Half,
    codes: Nibbles,
}

impl Block for Q4_1 {
    const LAYOUT: Layout = Layout::with_min(Code::Int4, 32);
    type Codes = Nibbles;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Nibbles {
        self.codes
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group { scale: self.scale.get(), min: self.min.get() }]
    }
}

/// `scale * (code - 16)`, codes of 5 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q5_0 {
    scale: Half,
    fifth: [u8; 4],
    low: Nibbles,
}

impl Block for Q5_0 {
    const LAYOUT: Layout = Layout::scaled(Code::Int8, 32);
    type Codes = Bytes;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Bytes {
        five_bits(self.low, self.fifth).map(|code| code - 16)
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group::scaled(self.scale.get())]
    }
}

/// `scale * code + min`, codes of 5 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q5_1 {
    scale: Half,
    min: Half,
    fifth: [u8; 4],
    low: Nibbles,
}

impl Block for Q5_1 {
    const LAYOUT: Layout = Layout::with_min(Code::Int8, 32);
    type Codes = Bytes;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Bytes {
        five_bits(self.low, self.fifth)
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group { scale: self.scale.get(), min: self.min.get() }]
    }
}

/// Codes 0..32: bit `i` of `fifth` is the highest bit of code `i`.
#[inline(always)]
fn five_bits(low: Nibbles, fifth: [u8; 4]) -> Bytes {
    let fifth = u32::from_le_bytes(fifth);
    let mut codes = low.unpack();
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((fifth >> i & 1) << 4) as i8;
    }
    codes
}

/// `scale * code`, signed codes of 8 bits
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Q8_0 {
    scale: Half,
    codes: Bytes,
}

impl Block for Q8_0 {
    const LAYOUT: Layout = Layout::scaled(Code::Int8, 32);
    type Codes = Bytes;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Bytes {
        self.codes
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group::scaled(self.scale.get())]
    }
}

/// `scale * IQ4_VALUES[code]`
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Iq4Nl {
    scale: Half,
    codes: Nibbles,
}

impl Block for Iq4Nl {
    const LAYOUT: Layout = Layout::scaled(Code::Table4(IQ4_VALUES), 32);
    type Codes = Nibbles;
    type Groups = [Group<f16>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Nibbles {
        self.codes
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f16>; 1] {
        [Group::scaled(self.scale.get())]
    }
}

/// `2^(exponent - 128) * MXFP4_VALUES[code]`
///
/// The OCP specification reserves exponent 255 for NaN. ggml computes with it as with any other, and so does nybble.
#[derive(Clone, Copy, AnyBitPattern)]
#[repr(C)]
pub(super) struct Mxfp4 {
    exponent: u8,
    codes: Nibbles,
}

impl Mxfp4 {
    /// The scale of the doubled values, half of what the E8M0 byte stands for.
    #[inline(always)]
    fn scale(&self) -> f32 {
        let e = u32::from(self.exponent);
        // Below 2 the power is smaller than the smallest normal F32.
        f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
    }
}

impl Block for Mxfp4 {
    const LAYOUT: Layout = Layout::scaled(Code::Table4(MXFP4_VALUES), 32);
    type Codes = Nibbles;
    type Groups = [Group<f32>; 1];

    #[inline(always)]
    fn codes(&self, _index: usize) -> Nibbles {
        self.codes
    }

    #[inline(always)]
    fn groups(&self) -> [Group<f32>; 1] {
        [Group::scaled(self.scale())]
    }

    fn bounds(&self) -> [f32; 2] {
        [self.scale(), 0.0]
    }
}
