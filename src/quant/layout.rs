//! The meaning of the codes of a packed matrix.

/// Output rows in a panel. Each row is one SIMD lane.
pub const PANEL: usize = 16;
/// Columns in a block, the unit in which activations are quantized.
pub const BLOCK: usize = 32;

/// How a code becomes a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Code {
    /// 4 bits: `scale * (code - 8)` without a minimum, `scale * code + min` with one.
    Int4,
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
    /// The integer that a code stands for, 0..16 for [`Code::Int4`].
    ///
    /// # Panics
    /// If this is a float, or `code` is outside the table.
    #[inline(always)]
    pub(super) fn integer(self, code: i32) -> i32 {
        match self {
            Code::Int4 | Code::Int8 => code,
            Code::Table4(table) => i32::from(table[code as usize]),
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
        }
    }
}

/// The layout of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// How a code becomes a weight.
    pub code: Code,
    /// Columns that share a scale: 16 or 32, with [`Code::Int4`] also 64 or 128. Ignored for floats.
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

    /// Whether weights are integers times scales, multiplied with quantized activations.
    pub fn is_integer(&self) -> bool {
        matches!(self.code, Code::Int4 | Code::Table4(_) | Code::Int8)
    }

    /// Cache lines of codes in one block of a panel.
    pub fn lines_per_block(&self) -> usize {
        match self.code {
            Code::Int4 | Code::Table4(_) => 4,
            Code::Int8 => 8,
            Code::F16 | Code::BF16 => 16,
            Code::F32 => 32,
        }
    }

    /// The weight of an integer, which is [`Code::integer`] of a code.
    #[inline(always)]
    pub(super) fn weight(&self, integer: i32, scale: f32, min: f32) -> f32 {
        let integer = if self.code == Code::Int4 && !self.min { integer - 8 } else { integer };
        let product = scale * integer as f32;
        if self.min { product + min } else { product }
    }
}
