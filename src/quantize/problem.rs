//! What a recipe is given and what it returns: one linear layer, and its weights on a grid.

use half::f16;

use crate::error::{Error, Result};
use crate::quant::block::BlockType;
use crate::quant::pack::IQ4_VALUES;

/// Values in a block of a file.
pub const BLOCK: usize = 32;

/// The values that a code may stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grid {
    /// `scale * (code - 8)`, codes 0 to 15.
    Q4_0,
    /// `scale * code + min`, codes 0 to 15.
    Q4_1,
    /// `scale * table[code]`, codes 0 to 15, denser around zero.
    Iq4Nl,
    /// `scale * (code - 16)`, codes 0 to 31.
    Q5_0,
    /// `scale * code`, codes -127 to 127 as the byte of an `i8`.
    Q8_0,
}

impl Grid {
    /// The grid of a file's block type, `None` for types without one.
    pub fn of(block_type: BlockType) -> Option<Grid> {
        Some(match block_type {
            BlockType::Q4_0 => Grid::Q4_0,
            BlockType::Q4_1 => Grid::Q4_1,
            BlockType::IQ4_NL => Grid::Iq4Nl,
            BlockType::Q5_0 => Grid::Q5_0,
            BlockType::Q8_0 => Grid::Q8_0,
            _ => return None,
        })
    }

    /// The block type in which it is stored.
    pub fn block_type(self) -> BlockType {
        match self {
            Grid::Q4_0 => BlockType::Q4_0,
            Grid::Q4_1 => BlockType::Q4_1,
            Grid::Iq4Nl => BlockType::IQ4_NL,
            Grid::Q5_0 => BlockType::Q5_0,
            Grid::Q8_0 => BlockType::Q8_0,
        }
    }

    /// Whether each group has a minimum beside its scale.
    pub fn has_min(self) -> bool {
        self == Grid::Q4_1
    }

    /// What the code stands for, in units of the scale.
    #[inline]
    pub fn level(self, code: u8) -> f32 {
        match self {
            Grid::Q4_0 => f32::from(code) - 8.0,
            Grid::Q4_1 => f32::from(code),
            Grid::Iq4Nl => f32::from(IQ4_VALUES[usize::from(code & 15)]),
            Grid::Q5_0 => f32::from(code) - 16.0,
            Grid::Q8_0 => f32::from(code as i8),
        }
    }

    /// The lowest and the highest level.
    pub fn range(self) -> (f32, f32) {
        match self {
            Grid::Q4_0 => (-8.0, 7.0),
            Grid::Q4_1 => (0.0, 15.0),
            Grid::Iq4Nl => (-127.0, 113.0),
            Grid::Q5_0 => (-16.0, 15.0),
            Grid::Q8_0 => (-127.0, 127.0),
        }
    }

    /// The mean distance of neighbouring levels.
    pub fn spacing(self) -> f32 {
        if self == Grid::Iq4Nl { 16.0 } else { 1.0 }
    }

    /// The code whose level is nearest to `x`, which is in units of the scale and counted from the minimum.
    #[inline]
    pub fn nearest(self, x: f32) -> u8 {
        match self {
            // A cast saturates, takes NaN to 0, and is one instruction where `round` is a call.
            Grid::Q4_0 => ((x + 8.5) as u8).min(15),
            Grid::Q4_1 => ((x + 0.5) as u8).min(15),
            Grid::Iq4Nl => IQ4_CODES[usize::from(((x + 128.0) * 2.0) as u16).min(511)],
            Grid::Q5_0 => ((x + 16.5) as u8).min(31),
            Grid::Q8_0 => ((x + 127.5) as u8).min(254).wrapping_sub(127),
        }
    }

    /// [`nearest`](Grid::nearest) of a group's value: what `scale` and `min` make of it. 0 scales take everything to 0.
    #[inline]
    pub fn code(self, value: f32, scale: f32, min: f32) -> u8 {
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        self.nearest((value - min) * inverse)
    }

    /// The value of a code, with the bits that [`BlockType::decode`] gives.
    #[inline]
    pub fn value(self, code: u8, scale: f32, min: f32) -> f32 {
        let value = scale * self.level(code);
        if self.has_min() { value + min } else { value }
    }
}

/// Code of IQ4_NL by the doubled value, counted from -128: all midpoints between its levels are whole numbers then.
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

/// A grid and how many weights of a row share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// Values of the codes.
    pub grid: Grid,
    /// Columns that share a scale (and minimum): a multiple of 32 that divides the row.
    pub group: usize,
}

impl Format {
    /// The format of rows of `columns` weights that comes closest to `group` columns a scale, 0 for the whole row: the
    /// group is halved until it divides the row. `None` when the row is not made of blocks of 32.
    pub fn fitting(grid: Grid, group: usize, columns: usize) -> Option<Format> {
        if columns == 0 || !columns.is_multiple_of(BLOCK) {
            return None;
        }
        let mut fitting = if group == 0 { columns } else { group.next_multiple_of(BLOCK) };
        while !columns.is_multiple_of(fitting) {
            fitting = (fitting / 2).next_multiple_of(BLOCK).max(BLOCK);
        }
        Some(Format { grid, group: fitting })
    }

    /// Groups in a row.
    pub fn groups(&self, columns: usize) -> usize {
        columns / self.group
    }

    /// Bits a weight, scales included, as a file stores them.
    pub fn bits_stored(&self) -> f64 {
        self.grid.block_type().block_bytes() as f64 * 8.0 / BLOCK as f64
    }
}

/// One linear layer to be quantized.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `(rows, columns)`
    pub weights: &'a [f32],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `(columns, columns)`: mean over tokens of `x x^T`, symmetric. Empty where no inputs are known.
    pub hessian: &'a [f32],
    /// `(columns)`: mean over tokens of `|x|`. Empty where no inputs are known.
    pub magnitude: &'a [f32],
}

impl<'a> Problem<'a> {
    /// Checks that the lengths belong together and all numbers are finite.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub fn new(
        weights: &'a [f32],
        rows: usize,
        columns: usize,
        hessian: &'a [f32],
        magnitude: &'a [f32],
    ) -> Result<Problem<'a>> {
        let wrong = |name, found: usize, expected: usize| {
            Err(Error::argument(name, format_args!("{found} numbers"), format_args!("{expected}")))
        };
        if weights.len() != rows * columns || columns == 0 {
            return wrong("weights", weights.len(), rows * columns);
        }
        if !hessian.is_empty() && hessian.len() != columns * columns {
            return wrong("hessian", hessian.len(), columns * columns);
        }
        if !magnitude.is_empty() && magnitude.len() != columns {
            return wrong("magnitude", magnitude.len(), columns);
        }
        for (name, numbers) in [("weights", weights), ("hessian", hessian), ("magnitude", magnitude)] {
            if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
                let found = format_args!("{} at index {at}", numbers[at]).to_string();
                return Err(Error::argument(name, found, "finite numbers"));
            }
        }
        Ok(Problem { weights, rows, columns, hessian, magnitude })
    }

    /// What an error in each column costs, up to a factor: the mean square of its input, or 1 where none are known.
    pub fn importance(&self) -> Vec<f32> {
        if self.hessian.is_empty() {
            return vec![1.0; self.columns];
        }
        let diagonal: Vec<f32> = self.hessian.iter().step_by(self.columns + 1).copied().collect();
        // Inputs that never occurred would leave their weights to chance.
        let mean = diagonal.iter().sum::<f32>() / self.columns as f32;
        let least = if mean > 0.0 { mean * 1e-4 } else { 1.0 };
        diagonal.into_iter().map(|x| x.max(least)).collect()
    }
}

/// A layer on the grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// `(rows, columns)`
    pub codes: Vec<u8>,
    /// `(rows, groups)`, numbers that F16 holds.
    pub scales: Vec<f32>,
    /// As `scales`, or empty.
    pub mins: Vec<f32>,
}

impl Solution {
    /// All codes 0, for rows of `columns` weights.
    pub fn zeroed(format: &Format, rows: usize, columns: usize) -> Solution {
        let groups = rows * format.groups(columns);
        let mins = if format.grid.has_min() { vec![0.0; groups] } else { Vec::new() };
        Solution { codes: vec![0; rows * columns], scales: vec![0.0; groups], mins }
    }

    /// The weights that it stands for `(rows, columns)`, with the bits that a reader of its blocks gets.
    pub fn decode(&self, format: &Format, columns: usize) -> Vec<f32> {
        debug_assert_eq!(self.scales.len() * format.group, self.codes.len(), "groups of {columns} columns");
        let groups = self.codes.chunks(format.group).enumerate();
        let values = groups.flat_map(|(group, codes)| {
            let (scale, min) = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            codes.iter().map(move |code| format.grid.value(*code, scale, min))
        });
        values.collect()
    }

    /// The blocks of a GGUF file, row after row; a group of several blocks repeats its scale in each.
    pub fn encode(&self, format: &Format, columns: usize) -> Vec<u8> {
        let block_bytes = format.grid.block_type().block_bytes();
        debug_assert!(columns.is_multiple_of(format.group));
        let mut out = Vec::with_capacity(self.codes.len() / BLOCK * block_bytes);
        for (index, codes) in self.codes.as_chunks::<BLOCK>().0.iter().enumerate() {
            let group = index * BLOCK / format.group;
            out.extend(f16::from_f32(self.scales[group]).to_le_bytes());
            if let Some(min) = self.mins.get(group) {
                out.extend(f16::from_f32(*min).to_le_bytes());
            }
            match format.grid {
                Grid::Q8_0 => out.extend(codes),
                Grid::Q5_0 => {
                    let fifth = codes.iter().enumerate().fold(0u32, |bits, (i, code)| bits | u32::from(code >> 4) << i);
                    out.extend(fifth.to_le_bytes());
                    out.extend((0..16).map(|i| codes[i] & 15 | codes[i + 16] << 4));
                }
                _ => out.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4)),
            }
        }
        out
    }
}

/// A scale or minimum as a file holds it.
///
/// Beyond the range of F16 it is the nearest number that F16 holds, so that no block becomes infinite.
#[inline]
pub fn rounded(value: f32) -> f32 {
    f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f32()
}

/// How far a layer's output is off, relative to the output: `tr((W - Q) H (W - Q)^T) / tr(W H W^T)`, and the same of the
/// weights alone where no inputs are known. 0 for a layer of zeros.
pub fn error(problem: &Problem<'_>, decoded: &[f32]) -> f64 {
    let columns = problem.columns;
    let (mut lost, mut all) = (0.0f64, 0.0f64);
    let mut difference = vec![0.0; columns];
    for (row, decoded) in problem.weights.chunks(columns).zip(decoded.chunks(columns)) {
        difference.iter_mut().zip(row.iter().zip(decoded)).for_each(|(d, (w, q))| *d = w - q);
        lost += energy(problem.hessian, &difference);
        all += energy(problem.hessian, row);
    }
    if all > 0.0 { lost / all } else { 0.0 }
}

/// `x H x^T`, or `x x^T` without H.
fn energy(hessian: &[f32], x: &[f32]) -> f64 {
    if hessian.is_empty() {
        return x.iter().map(|x| f64::from(*x).powi(2)).sum();
    }
    let product = |row: &[f32]| row.iter().zip(x).map(|(h, x)| f64::from(*h) * f64::from(*x)).sum::<f64>();
    hessian.chunks(x.len()).zip(x).map(|(row, x)| f64::from(*x) * product(row)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRIDS: [Grid; 5] = [Grid::Q4_0, Grid::Q4_1, Grid::Iq4Nl, Grid::Q5_0, Grid::Q8_0];

    fn codes(grid: Grid) -> Vec<u8> {
        match grid {
            Grid::Q8_0 => (-127i8..=127).map(|code| code as u8).collect(),
            Grid::Q5_0 => (0..32).collect(),
            _ => (0..16).collect(),
        }
    }

    #[test]
    fn the_nearest_code_is_the_one_of_least_distance() {
        for grid in GRIDS {
            for x in (-6000..6000).map(|i| i as f32 * 0.037) {
                let distance = |code: u8| (grid.level(code) - x).abs();
                let least = codes(grid).into_iter().map(distance).fold(f32::INFINITY, f32::min);
                let found = grid.nearest(x);
                assert!(distance(found) <= least + 1e-4, "{grid:?} at {x}: {found}");
            }
            let (low, high) = grid.range();
            assert_eq!(grid.level(grid.nearest(-1e30)), low);
            assert_eq!(grid.level(grid.nearest(1e30)), high);
            assert_eq!(grid.level(grid.nearest(f32::NEG_INFINITY)), low);
        }
    }

    #[test]
    fn the_blocks_of_a_solution_decode_to_its_values() {
        for grid in GRIDS {
            for group in [32, 64, 96] {
                let format = Format { grid, group };
                let mut solution = Solution::zeroed(&format, 5, 192);
                let known = codes(grid);
                for (i, code) in solution.codes.iter_mut().enumerate() {
                    *code = known[i * 7 % known.len()];
                }
                for (i, scale) in solution.scales.iter_mut().enumerate() {
                    *scale = rounded(0.37 * (i as f32 - 4.2));
                }
                for (i, min) in solution.mins.iter_mut().enumerate() {
                    *min = rounded(-0.93 * i as f32);
                }
                let mut decoded = vec![f32::NAN; 5 * 192];
                grid.block_type().decode(&solution.encode(&format, 192), &mut decoded).unwrap();
                assert_eq!(solution.decode(&format, 192), decoded, "{format:?}");
            }
        }
    }

    #[test]
    fn a_group_that_does_not_divide_the_row_is_halved_until_it_does() {
        let group = |group, columns| Format::fitting(Grid::Q4_0, group, columns).map(|format| format.group);
        assert_eq!(group(128, 576), Some(64));
        assert_eq!(group(128, 1536), Some(128));
        assert_eq!(group(0, 576), Some(576));
        assert_eq!(group(32, 32), Some(32));
        assert_eq!(group(96, 64), Some(64));
        assert_eq!(group(128, 96), Some(32));
        assert_eq!(group(32, 40), None);
        assert_eq!(group(32, 0), None);
    }

    #[test]
    fn the_error_is_that_of_the_outputs() {
        let weights = [1.0, 2.0, 3.0, -1.0];
        // Inputs (1, 1) and (2, 0), equally often.
        let hessian = [2.5, 0.5, 0.5, 0.5];
        let problem = Problem::new(&weights, 2, 2, &hessian, &[1.5, 0.5]).unwrap();
        let decoded = [1.0, 1.0, 2.0, -1.0];
        // Outputs off by (1, 0) for the first row and (1, 2) for the second; outputs (3, 2) and (2, 6).
        assert!((error(&problem, &decoded) - (1.0 + 1.0 + 4.0) / (9.0 + 4.0 + 4.0 + 36.0)).abs() < 1e-12);
        let plain = Problem { hessian: &[], ..problem };
        assert!((error(&plain, &decoded) - 2.0 / 15.0).abs() < 1e-12);
        assert_eq!(error(&Problem { weights: &[0.0; 4], ..problem }, &[0.0; 4]), 0.0);
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_with_their_place() {
        let error = Problem::new(&[0.0, f32::NAN], 1, 2, &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "weights: found NaN at index 1, expected finite numbers");
        assert!(Problem::new(&[0.0; 2], 1, 2, &[0.0; 3], &[]).is_err());
        assert!(Problem::new(&[0.0; 3], 1, 2, &[], &[]).is_err());
    }

    #[test]
    fn scales_beyond_f16_become_its_largest() {
        assert_eq!(rounded(1e9), 65504.0);
        assert_eq!(rounded(-1e9), -65504.0);
    }
}
