//! The 2-, 4-, 5- and 8-bit formats that recipes write: the values of their codes, and how many weights share a scale.

use half::f16;

use crate::quant::block::BlockType;
use crate::quant::pack::IQ4_VALUES;

/// Weights per block of most formats in a GGUF file.
pub(super) const BLOCK: usize = 32;

/// The value of each code. Every format is a block type of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// `scale * (code - 1)`, codes 0 to 3.
    Q2_0,
    /// `scale * (code - 8)`, codes 0 to 15.
    Q4_0,
    /// `scale * code + min`, codes 0 to 15.
    Q4_1,
    /// `scale * table[code]`, codes 0 to 15, denser around zero.
    Iq4Nl,
    /// `scale * (code - 16)`, codes 0 to 31.
    Q5_0,
    /// `scale * code`, codes -127 to 127 stored as the byte of an `i8`.
    Q8_0,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 6] = [Format::Q2_0, Format::Q4_0, Format::Q4_1, Format::Iq4Nl, Format::Q5_0, Format::Q8_0];

    /// The format of a block type; `None` for block types that recipes do not write.
    pub fn of(block_type: BlockType) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.block_type() == block_type)
    }

    /// The block type that stores this format.
    pub fn block_type(self) -> BlockType {
        match self {
            Format::Q2_0 => BlockType::Q2_0,
            Format::Q4_0 => BlockType::Q4_0,
            Format::Q4_1 => BlockType::Q4_1,
            Format::Iq4Nl => BlockType::IQ4_NL,
            Format::Q5_0 => BlockType::Q5_0,
            Format::Q8_0 => BlockType::Q8_0,
        }
    }

    /// Weights per block: the smallest group.
    pub(super) fn block(self) -> usize {
        self.block_type().block_len()
    }

    /// Whether each group has a minimum as well as a scale.
    pub fn has_min(self) -> bool {
        self == Format::Q4_1
    }

    /// The level of a code: its value in units of the scale, without the minimum.
    #[inline]
    #[doc(hidden)]
    pub fn level(self, code: u8) -> f32 {
        match self {
            Format::Q2_0 => f32::from(code) - 1.0,
            Format::Q4_0 => f32::from(code) - 8.0,
            Format::Q4_1 => f32::from(code),
            Format::Iq4Nl => f32::from(IQ4_VALUES[usize::from(code & 15)]),
            Format::Q5_0 => f32::from(code) - 16.0,
            Format::Q8_0 => f32::from(code as i8),
        }
    }

    /// The lowest and the highest level.
    #[doc(hidden)]
    pub fn range(self) -> (f32, f32) {
        match self {
            Format::Q2_0 => (-1.0, 2.0),
            Format::Q4_0 => (-8.0, 7.0),
            Format::Q4_1 => (0.0, 15.0),
            Format::Iq4Nl => (-127.0, 113.0),
            Format::Q5_0 => (-16.0, 15.0),
            Format::Q8_0 => (-127.0, 127.0),
        }
    }

    /// The mean distance between neighboring levels.
    #[doc(hidden)]
    pub fn spacing(self) -> f32 {
        if self == Format::Iq4Nl { 16.0 } else { 1.0 }
    }

    /// The code with the level nearest to `x`, a value in units of the scale with the minimum subtracted.
    #[inline]
    #[doc(hidden)]
    pub fn nearest(self, x: f32) -> u8 {
        match self {
            // A cast saturates, maps NaN to 0 and is one instruction; `round` is a call.
            Format::Q2_0 => ((x + 1.5) as u8).min(3),
            Format::Q4_0 => ((x + 8.5) as u8).min(15),
            Format::Q4_1 => ((x + 0.5) as u8).min(15),
            Format::Iq4Nl => IQ4_CODES[usize::from(((x + 128.0) * 2.0) as u16).min(511)],
            Format::Q5_0 => ((x + 16.5) as u8).min(31),
            Format::Q8_0 => ((x + 127.5) as u8).min(254).wrapping_sub(127),
        }
    }

    /// The code nearest to a weight of a group with this scale and minimum. A scale of 0 maps every weight to level 0.
    #[inline]
    #[doc(hidden)]
    pub fn code(self, value: f32, scale: f32, min: f32) -> u8 {
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        self.nearest((value - min) * inverse)
    }

    /// The value of a code, bit-identical to [`BlockType::decode`].
    #[inline]
    #[doc(hidden)]
    pub fn value(self, code: u8, scale: f32, min: f32) -> f32 {
        let value = scale * self.level(code);
        if self.has_min() { value + min } else { value }
    }
}

/// IQ4_NL codes, indexed by twice the value plus 256. All midpoints between levels are whole numbers on that axis.
static IQ4_CODES: [u8; 512] = {
    let mut codes = [0; 512];
    let mut i = 0;
    while i < 512 {
        // The interval [x, x + 1/2) with x = i / 2 - 128, doubled.
        let doubled = i as i32 - 256;
        let mut code = 0;
        while code < 15 && doubled >= IQ4_VALUES[code] as i32 + IQ4_VALUES[code + 1] as i32 {
            code += 1;
        }
        codes[i] = code as u8;
        i += 1;
    }
    codes
};

/// A format and the number of weights that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GroupedFormat {
    /// The values of the codes.
    pub format: Format,
    /// Columns that share a scale (and minimum): a multiple of the block that divides the row.
    pub group: usize,
}

impl GroupedFormat {
    /// The format for rows of `columns` weights with `group` columns per scale, 0 for the whole row. The group is halved
    /// until it divides the row. `None` if the row does not consist of whole blocks of the format.
    pub fn fitting(format: Format, group: usize, columns: usize) -> Option<GroupedFormat> {
        let block = format.block();
        if columns == 0 || !columns.is_multiple_of(block) {
            return None;
        }
        let mut fitting = if group == 0 { columns } else { group.next_multiple_of(block) };
        while !columns.is_multiple_of(fitting) {
            fitting = (fitting / 2).next_multiple_of(block).max(block);
        }
        Some(GroupedFormat { format, group: fitting })
    }

    /// Groups per row.
    pub fn groups(&self, columns: usize) -> usize {
        columns / self.group
    }

    /// Bits per weight in a file, scales included.
    pub fn bits_stored(&self) -> f64 {
        self.format.block_type().block_bytes() as f64 * 8.0 / self.format.block() as f64
    }
}

/// A scale or minimum rounded to F16. Values beyond the range of F16 become its largest number, so that no block decodes
/// to an infinity.
#[inline]
pub(super) fn rounded(value: f32) -> f32 {
    f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f32()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Every code of a format.
    pub(in crate::quantize) fn codes(format: Format) -> Vec<u8> {
        match format {
            Format::Q8_0 => (-127i8..=127).map(|code| code as u8).collect(),
            Format::Q5_0 => (0..32).collect(),
            Format::Q2_0 => (0..4).collect(),
            _ => (0..16).collect(),
        }
    }

    #[test]
    fn nearest_returns_the_code_with_the_least_distance() {
        for format in Format::ALL {
            for x in (-6000..6000).map(|i| i as f32 * 0.037) {
                let distance = |code: u8| (format.level(code) - x).abs();
                let least = codes(format).into_iter().map(distance).fold(f32::INFINITY, f32::min);
                let found = format.nearest(x);
                assert!(distance(found) <= least + 1e-4, "{format:?} at {x}: {found}");
            }
            let (low, high) = format.range();
            assert_eq!(format.level(format.nearest(-1e30)), low);
            assert_eq!(format.level(format.nearest(1e30)), high);
            assert_eq!(format.level(format.nearest(f32::NEG_INFINITY)), low);
        }
    }

    #[test]
    fn a_group_that_does_not_divide_the_row_is_halved_until_it_does() {
        let group = |group, columns| GroupedFormat::fitting(Format::Q4_0, group, columns).map(|fitting| fitting.group);
        assert_eq!(group(128, 576), Some(64));
        assert_eq!(group(128, 1536), Some(128));
        assert_eq!(group(0, 576), Some(576));
        assert_eq!(group(32, 32), Some(32));
        assert_eq!(group(96, 64), Some(64));
        assert_eq!(group(128, 96), Some(32));
        assert_eq!(group(32, 40), None);
        assert_eq!(group(32, 0), None);
        let group = |group, columns| GroupedFormat::fitting(Format::Q2_0, group, columns).map(|fitting| fitting.group);
        assert_eq!(group(32, 576), Some(64));
        assert_eq!(group(128, 576), Some(64));
        assert_eq!(group(128, 1536), Some(128));
        assert_eq!(group(64, 96), None);
    }

    #[test]
    fn scales_beyond_f16_become_its_largest_number() {
        assert_eq!(rounded(1e9), 65504.0);
        assert_eq!(rounded(-1e9), -65504.0);
    }
}
