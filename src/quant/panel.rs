//! One panel of a packed matrix: 16 rows. The [packed](super::packed) module describes the bytes.

use half::{bf16, f16};

use super::layout::{BLOCK, Code, Layout, PANEL};
use crate::system::aligned_buf::CacheLine;

/// 32 codes of 4 bits: byte `j` holds code `j` in its low nibble and code `j + 16` in its high nibble.
pub(super) type Nibbles = [u8; BLOCK / 2];
/// 32 signed codes of 8 bits.
pub(super) type Bytes = [i8; BLOCK];
/// 32 unsigned codes, which panels hold in a plane of `LOW` and one of `HIGH` bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes<const LOW: usize, const HIGH: usize>(pub(super) [u8; BLOCK]);

/// [`Nibbles`] of codes that are given one by one.
#[inline(always)]
pub(super) fn nibbles(code: impl Fn(usize) -> u8) -> Nibbles {
    std::array::from_fn(|j| code(j) | code(j + 16) << 4)
}

/// 32 bytes as four words, which are shifted and masked at once. In each word, the first byte is the lowest.
pub(super) type Words = [u64; BLOCK / 8];

/// `byte` in all bytes of a word.
#[inline(always)]
pub(super) const fn in_all(byte: u8) -> u64 {
    byte as u64 * 0x0101_0101_0101_0101
}

/// The words of 32 bytes.
#[inline(always)]
pub(super) fn words(bytes: &[u8; BLOCK]) -> Words {
    let words: &[[u8; 8]; BLOCK / 8] = bytemuck::cast_ref(bytes);
    words.map(u64::from_le_bytes)
}

/// The bytes of four words.
#[inline(always)]
pub(super) fn bytes(words: Words) -> [u8; BLOCK] {
    bytemuck::cast(words.map(u64::to_le_bytes))
}

/// Words whose bytes are the bits of a number, the lowest first.
#[inline(always)]
pub(super) fn words_of_bits(bits: u32) -> Words {
    // Each byte of a product keeps another bit, which carries into the highest one of its byte.
    let spread = |byte: u8| ((in_all(byte) & 0x8040_2010_0804_0201) + in_all(0x7f)) >> 7 & in_all(1);
    bits.to_le_bytes().map(spread)
}

/// The 4-bit codes of [`Nibbles`], one in a byte.
#[inline(always)]
pub(super) fn words_of_nibbles(nibbles: &Nibbles) -> Words {
    let words: &[[u8; 8]; 2] = bytemuck::cast_ref(nibbles);
    let [a, b] = words.map(u64::from_le_bytes);
    [a, b, a >> 4, b >> 4].map(|word| word & in_all(15))
}

/// [`Nibbles`] of the 4-bit codes in the bytes of these words.
#[inline(always)]
pub(super) fn nibbles_of([a, b, c, d]: Words) -> Nibbles {
    bytemuck::cast([a | c << 4, b | d << 4].map(u64::to_le_bytes))
}

/// The word of line `line` of a plane of `bits` bits for one row: the bits of its columns from bit `from` of their codes on. `codes` are
/// the row's codes, four in a word.
#[inline(always)]
fn plane_word(codes: &[u32; BLOCK / 4], bits: usize, from: usize, line: usize) -> u32 {
    let (per_byte, mask) = (8 / bits, (255 >> (8 - bits)) * 0x0101_0101);
    let words = &codes[line * per_byte..][..per_byte];
    words.iter().enumerate().fold(0, |all, (q, word)| all | (word >> from & mask) << (bits * q))
}

/// The bits of `column` in one row of a plane of `bits` bits.
#[inline(always)]
fn plane_bits(lines: &[CacheLine], bits: usize, lane: usize, column: usize) -> u8 {
    let columns = BLOCK / bits;
    let byte = lines[column / columns].0[4 * lane + column % 4];
    byte >> (bits * (column % columns / 4)) & (255 >> (8 - bits)) as u8
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
    /// The integer at (`lane`, `column`): signed, or the code if codes are [unsigned](Code::zero).
    ///
    /// # Panics
    /// If `code` is a float.
    #[inline]
    pub fn integer(&self, code: Code, lane: usize, column: usize) -> i32 {
        let stored = i32::from(self.stored(code.planes(), lane, column));
        code.integer(if code == Code::Int8 { stored - 128 } else { stored })
    }

    /// The bits at (`lane`, `column`) of planes of these numbers of bits.
    #[inline(always)]
    fn stored(&self, [low, high]: [usize; 2], lane: usize, column: usize) -> u8 {
        let (block, column) = (column / BLOCK, column % BLOCK);
        let (lower, upper) = self.codes[block * (low + high)..][..low + high].split_at(low);
        let bits = plane_bits(lower, low, lane, column);
        if high == 0 { bits } else { bits | plane_bits(upper, high, lane, column) << low }
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
            _ => unreachable!("integers have scales"),
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
            _ => {
                mark(bytemuck::cast_slice::<_, u16>(self.scales), 0x7c00, &mut bad);
                mark(bytemuck::cast_slice::<_, u16>(self.mins), 0x7c00, &mut bad);
            }
        }
        bad.iter().position(|bad| *bad)
    }

    /// Stores the codes of block `block` of row `lane`: -128..=127 for 8-bit codes, the lower bits of others.
    ///
    /// # Panics
    /// If `code` is a float.
    #[inline]
    pub fn set_codes(&mut self, code: Code, lane: usize, block: usize, codes: &[i8; BLOCK]) {
        let [low, high] = code.planes();
        let sign = if code == Code::Int8 { 0x80 } else { 0 };
        self.set_planes(lane, block, low, high, &codes.map(|code| code as u8 ^ sign));
    }

    /// Stores codes in a plane of `low` and one of `high` bits.
    #[inline(always)]
    pub(super) fn set_planes(&mut self, lane: usize, block: usize, low: usize, high: usize, codes: &[u8; BLOCK]) {
        let codes: &[[u8; 4]; BLOCK / 4] = bytemuck::cast_ref(codes);
        let words = codes.map(u32::from_le_bytes);
        let (lower, upper) = self.codes[block * (low + high)..][..low + high].split_at_mut(low);
        for (lines, bits, from) in [(lower, low, 0), (upper, high, low)] {
            for (i, line) in lines.iter_mut().enumerate() {
                line.0[4 * lane..][..4].copy_from_slice(&plane_word(&words, bits, from, i).to_le_bytes());
            }
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
            _ => unreachable!("integers have scales"),
        }
    }
}
