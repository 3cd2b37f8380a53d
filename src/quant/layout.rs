//! The meaning of the codes of a packed matrix.

/// Output rows in a panel. Each row is one SIMD lane.
pub const PANEL: usize = 16;
/// Columns in a block, the unit in which activations are quantized.
pub const BLOCK: usize = 32;

/// Columns that products sum before they multiply with a scale that these share. Larger groups are summed in parts of this length.
pub const LONGEST_RUN: usize = 128;

/// How a code becomes a weight.
///
/// Codes of 2 to 6 bits are unsigned. Without a minimum, a weight is `scale * (code - zero)`, with one it is `scale * code + min`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Code {
    /// 2 bits, `zero` is 1: ternary weights, and one value more.
    Int2,
    /// 3 bits, `zero` is 4.
    Int3,
    /// 4 bits, `zero` is 8.
    Int4,
    /// As [`Code::Int4`], but zeros are not stored. See [`sparse`](super::packed::sparse).
    SparseInt4,
    /// 5 bits, `zero` is 16.
    Int5,
    /// 6 bits, `zero` is 32.
    Int6,
    /// 4 bits that index a table of 16 signed values: `scale * table[code]`.
    Table4([i8; 16]),
    /// 8 bits, -128..=127, stored as `code + 128`: `scale * code (+ min)`.
    Int8,
    /// IEEE single precision, multiplied with F32 activations.
    F32,
    /// IEEE half precision, multiplied with F32 activations.
    F16,
    /// The upper half of an F32, multiplied with F32 activations.
    BF16,
}

impl Code {
    /// The code of 0 in layouts without minimums. `None` for codes that are signed, or no integers.
    pub fn zero(self) -> Option<i32> {
        Some(match self {
            Code::Int2 => 1,
            Code::Int3 => 4,
            Code::Int4 | Code::SparseInt4 => 8,
            Code::Int5 => 16,
            Code::Int6 => 32,
            Code::Table4(_) | Code::Int8 | Code::F32 | Code::F16 | Code::BF16 => return None,
        })
    }

    /// The bits of the two planes that hold a code: its lower bits, and its upper ones. See [`packed`](super::packed).
    ///
    /// # Panics
    /// If this is a float.
    #[inline(always)]
    pub(super) fn planes(self) -> [usize; 2] {
        match self {
            Code::Int2 => [2, 0],
            Code::Int3 => [2, 1],
            Code::Int4 | Code::SparseInt4 | Code::Table4(_) => [4, 0],
            Code::Int5 => [4, 1],
            Code::Int6 => [4, 2],
            Code::Int8 => [8, 0],
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
        }
    }

    /// The integer that a code stands for, the code itself unless it is an index.
    ///
    /// # Panics
    /// If this is a float, or `code` is outside the table.
    #[inline(always)]
    pub(super) fn integer(self, code: i32) -> i32 {
        match self {
            Code::Table4(table) => i32::from(table[code as usize]),
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
            _ => code,
        }
    }
}

/// The layout of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// How a code becomes a weight.
    pub code: Code,
    /// Columns that share a scale; [`is_known`](Self::is_known) lists them. Ignored for floats.
    pub group: usize,
    /// Whether each group has a minimum in addition to its scale.
    pub min: bool,
}

impl Layout {
    /// A layout of integer codes without minimums.
    pub(super) const fn scaled(code: Code, group: usize) -> Self {
        Layout { code, group, min: false }
    }

    /// A layout of integer codes with minimums.
    pub(super) const fn with_min(code: Code, group: usize) -> Self {
        Layout { code, group, min: true }
    }

    /// A float layout.
    pub const fn float(code: Code) -> Self {
        Layout { code, group: BLOCK, min: false }
    }

    /// Whether kernels multiply the layout: those of block types, and the layouts that these become when groups with equal scales
    /// are merged.
    pub fn is_known(&self) -> bool {
        match (self.code, self.min) {
            (Code::Int2, false) => matches!(self.group, 32 | 64 | 128 | 256),
            (Code::Int2, true) | (Code::Int3 | Code::Int6, false) => self.group == 16,
            (Code::Int4, _) => matches!(self.group, 16 | 32 | 64 | 128),
            (Code::SparseInt4, min) => !min && matches!(self.group, 32 | 64 | 128),
            (Code::Int5, _) => self.group == 32,
            (Code::Int3 | Code::Int6, true) => false,
            _ => matches!(self.group, 16 | 32),
        }
    }

    /// The sizes, in columns, to which groups of [`BLOCK`] columns with equal scales are merged, the largest first.
    pub(super) fn merged_groups(&self) -> &'static [usize] {
        match self.code {
            Code::Int2 if self.group == BLOCK => &[256, 128, 64],
            Code::Int4 if self.group == BLOCK => &[128, 64],
            _ => &[],
        }
    }

    /// Whether weights are integers times scales, multiplied with quantized activations.
    pub fn is_integer(&self) -> bool {
        !matches!(self.code, Code::F32 | Code::F16 | Code::BF16)
    }

    /// Cache lines of codes in one block of a panel.
    #[inline]
    pub fn lines_per_block(&self) -> usize {
        match self.code {
            Code::F16 | Code::BF16 => 16,
            Code::F32 => 32,
            // A plane takes as many lines as it has bits.
            code => code.planes().iter().sum(),
        }
    }

    /// The weight of an integer, which is [`Code::integer`] of a code.
    #[inline(always)]
    pub(super) fn weight(&self, integer: i32, scale: f32, min: f32) -> f32 {
        let zero = if self.min { 0 } else { self.code.zero().unwrap_or(0) };
        let product = scale * (integer - zero) as f32;
        if self.min { product + min } else { product }
    }
}
