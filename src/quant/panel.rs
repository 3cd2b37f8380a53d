//! One panel of a packed matrix: 16 rows. The [packed](super::packed) module describes the bytes.

use half::{bf16, f16};

use super::layout::{BLOCK, Code, Layout, PANEL};
use crate::system::aligned_buf::CacheLine;

/// 32 codes of 4 bits: byte `j` holds code `j` in its low nibble and code `j + 16` in its high nibble.
pub(super) type Nibbles = [u8; BLOCK / 2];
/// 32 signed codes of 8 bits.
pub(super) type Bytes = [i8; BLOCK];

/// [`Nibbles`] of codes that are given one by one.
#[inline(always)]
pub(super) fn nibbles(code: impl Fn(usize) -> u8) -> Nibbles {
    std::array::from_fn(|j| code(j) | code(j + 16) << 4)
}

/// One panel of a [`Packed`](super::packed::Packed) matrix.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `(blocks, lines_per_block)`
    pub codes: &'a [CacheLine],
    /// `(groups)`: 16 scales, one per row. Empty for floats.
    pub scales: &'a [[f16; PANEL]],
    /// `(groups)`: 16 minimums, one per row. Empty in layouts without minimums.
    pub mins: &'a [[f16; PANEL]],
}

/// One panel of a [`Packed`](super::packed::Packed) matrix, to be filled.
#[derive(Debug)]
pub struct PanelMut<'a> {
    /// `(blocks, lines_per_block)`
    pub codes: &'a mut [CacheLine],
    /// `(groups)`: 16 scales, one per row. Empty for floats.
    pub scales: &'a mut [[f16; PANEL]],
    /// `(groups)`: 16 minimums, one per row. Empty in layouts without minimums.
    pub mins: &'a mut [[f16; PANEL]],
}

impl Panel<'_> {
    /// The integer at (`lane`, `column`), signed; 0..=15 for [`Code::Int4`].
    ///
    /// # Panics
    /// If `code` is a float.
    #[inline]
    pub fn integer(&self, code: Code, lane: usize, column: usize) -> i32 {
        let (block, column) = (column / BLOCK, column % BLOCK);
        code.integer(match code {
            Code::Int8 => i32::from(self.codes[block * 8 + column / 4].0[4 * lane + column % 4]) - 128,
            _ => {
                let byte = self.codes[block * 4 + column / 8].0[4 * lane + column % 4];
                i32::from(if column % 8 < 4 { byte & 15 } else { byte >> 4 })
            }
        })
    }

    /// The float at (`lane`, `column`).
    ///
    /// # Panics
    /// If `code` is not a float.
    #[inline]
    pub fn float(&self, code: Code, lane: usize, column: usize) -> f32 {
        match code {
            Code::F32 => bytemuck::cast_slice::<CacheLine, f32>(self.codes)[column * PANEL + lane],
            Code::F16 => bytemuck::cast_slice::<CacheLine, f16>(self.codes)[column * PANEL + lane].to_f32(),
            Code::BF16 => bytemuck::cast_slice::<CacheLine, bf16>(self.codes)[column * PANEL + lane].to_f32(),
            Code::Int4 | Code::Table4(_) | Code::Int8 => unreachable!("integers have scales"),
        }
    }

    /// The weight at (`lane`, `column`), not multiplied with the matrix's output scale.
    pub(super) fn weight(&self, layout: Layout, lane: usize, column: usize) -> f32 {
        if !layout.is_integer() {
            return self.float(layout.code, lane, column);
        }
        let group = column / layout.group;
        let min = if layout.min { self.mins[group][lane].to_f32() } else { 0.0 };
        layout.weight(self.integer(layout.code, lane, column), self.scales[group][lane].to_f32(), min)
    }
}

impl PanelMut<'_> {
    /// The first row with a scale, a minimum or a float that is NaN or infinite.
    pub(super) fn non_finite_row(&self, code: Code) -> Option<usize> {
        /// Marks the rows with a number that has all bits of `exponent` set. `numbers` is `(n, PANEL)`.
        fn mark<T: bytemuck::Pod + std::ops::BitAnd<Output = T> + PartialEq>(
            numbers: &[T],
            exponent: T,
            bad: &mut [bool; PANEL],
        ) {
            for numbers in numbers.as_chunks::<PANEL>().0 {
                for (bad, number) in bad.iter_mut().zip(numbers) {
                    *bad |= *number & exponent == exponent;
                }
            }
        }
        let mut bad = [false; PANEL];
        match code {
            Code::F32 => mark(bytemuck::cast_slice::<CacheLine, u32>(self.codes), 0x7f80_0000, &mut bad),
            Code::F16 => mark(bytemuck::cast_slice::<CacheLine, u16>(self.codes), 0x7c00, &mut bad),
            Code::BF16 => mark(bytemuck::cast_slice::<CacheLine, u16>(self.codes), 0x7f80, &mut bad),
            Code::Int4 | Code::Table4(_) | Code::Int8 => {
                mark(bytemuck::cast_slice::<_, u16>(self.scales), 0x7c00, &mut bad);
                mark(bytemuck::cast_slice::<_, u16>(self.mins), 0x7c00, &mut bad);
            }
        }
        bad.iter().position(|bad| *bad)
    }

    /// Stores the codes of block `block` of row `lane`: 0..=15 for 4-bit codes, -128..=127 for 8-bit ones.
    #[inline]
    pub fn set_codes(&mut self, code: Code, lane: usize, block: usize, codes: &[i8; BLOCK]) {
        match code {
            Code::Int4 | Code::Table4(_) => self.set_nibbles(lane, block, &nibbles(|i| (codes[i] & 15) as u8)),
            Code::Int8 => {
                let lines = &mut self.codes[block * 8..][..8];
                for (line, codes) in lines.iter_mut().zip(codes.as_chunks::<4>().0) {
                    let bytes = &mut line.0[4 * lane..][..4];
                    for i in 0..4 {
                        bytes[i] = (codes[i] as u8) ^ 0x80;
                    }
                }
            }
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
        }
    }

    /// Stores 4-bit codes from the bytes in which most files have them.
    #[inline]
    pub(super) fn set_nibbles(&mut self, lane: usize, block: usize, bytes: &Nibbles) {
        const LOW: u32 = 0x0f0f_0f0f;
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let (a, b, c, d) = (word(0), word(4), word(8), word(12));
        let words =
            [a & LOW | (b & LOW) << 4, c & LOW | (d & LOW) << 4, a >> 4 & LOW | b & !LOW, c >> 4 & LOW | d & !LOW];
        for (line, word) in self.codes[block * 4..][..4].iter_mut().zip(words) {
            line.0[4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Stores a float weight, rounded to the layout's type.
    #[inline]
    pub fn set_float(&mut self, code: Code, lane: usize, column: usize, value: f32) {
        let at = column * PANEL + lane;
        match code {
            Code::F32 => bytemuck::cast_slice_mut::<CacheLine, f32>(self.codes)[at] = value,
            Code::F16 => bytemuck::cast_slice_mut::<CacheLine, f16>(self.codes)[at] = f16::from_f32(value),
            Code::BF16 => {
                bytemuck::cast_slice_mut::<CacheLine, bf16>(self.codes)[at] = bf16::from_f32(value);
            }
            Code::Int4 | Code::Table4(_) | Code::Int8 => unreachable!("integers have scales"),
        }
    }
}
