//! One linear layer as a recipe receives it, and the quantized layer that the recipe returns.

use half::f16;

use super::format::{Format, GroupedFormat};
use super::sparsity::Sparsity;
use crate::error::{Error, Result};

/// A linear layer to quantize: its weights and the second moments of its inputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerProblem<'a> {
    /// `(rows, columns)`
    pub weights: &'a [f32],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `(columns, columns)`: the mean over tokens of `x x^T`, symmetric. Empty without calibration.
    pub hessian: &'a [f32],
    /// `(columns)`: the mean over tokens of `|x|`. Empty without calibration.
    pub magnitude: &'a [f32],
    /// `(columns)`: the mean square of each input where only that is known. Otherwise empty.
    pub squares: &'a [f32],
    /// How many weights become zero; `None` prunes none.
    pub sparsity: Option<Sparsity>,
}

impl<'a> LayerProblem<'a> {
    /// Checks that the lengths agree and that all numbers are finite.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the buffer.
    pub(super) fn new(
        weights: &'a [f32],
        rows: usize,
        columns: usize,
        hessian: &'a [f32],
        magnitude: &'a [f32],
    ) -> Result<LayerProblem<'a>> {
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
                let found = format!("{} at index {at}", numbers[at]);
                return Err(Error::argument(name, found, "finite numbers"));
            }
        }
        Ok(LayerProblem { weights, rows, columns, hessian, magnitude, squares: &[], sparsity: None })
    }

    /// Whether nothing is known about the inputs.
    pub(super) fn is_blind(&self) -> bool {
        self.hessian.is_empty() && self.squares.is_empty()
    }

    /// `(columns)`: the weight of a squared error in each column: the mean square of its input, or 1 without calibration.
    pub(super) fn importance(&self) -> Vec<f32> {
        if self.is_blind() {
            return vec![1.0; self.columns];
        }
        let diagonal: Vec<f32> = match self.hessian {
            [] => self.squares.to_vec(),
            hessian => hessian.iter().step_by(self.columns + 1).copied().collect(),
        };
        // A column whose input was always 0 still needs a defined result.
        let mean = diagonal.iter().sum::<f32>() / self.columns as f32;
        let least = if mean > 0.0 { mean * 1e-4 } else { 1.0 };
        diagonal.into_iter().map(|x| x.max(least)).collect()
    }
}

/// A quantized layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Solution {
    /// `(rows, columns)`
    pub codes: Vec<u8>,
    /// `(rows, groups)`, representable in F16.
    pub scales: Vec<f32>,
    /// `(rows, groups)`, or empty for formats without minimum.
    pub mins: Vec<f32>,
}

impl Solution {
    /// A layer of `rows` x `columns` zero codes.
    pub(super) fn zeroed(grouped: &GroupedFormat, rows: usize, columns: usize) -> Solution {
        let groups = rows * grouped.groups(columns);
        let mins = if grouped.format.has_min() { vec![0.0; groups] } else { Vec::new() };
        Solution { codes: vec![0; rows * columns], scales: vec![0.0; groups], mins }
    }

    /// The weights `(rows, columns)`, bit-identical to decoding the encoded blocks.
    pub(super) fn decode(&self, grouped: &GroupedFormat, columns: usize) -> Vec<f32> {
        debug_assert_eq!(self.scales.len() * grouped.group, self.codes.len(), "groups of {columns} columns");
        let groups = self.codes.chunks(grouped.group).enumerate();
        let values = groups.flat_map(|(group, codes)| {
            let (scale, min) = (self.scales[group], self.mins.get(group).copied().unwrap_or(0.0));
            codes.iter().map(move |code| grouped.format.value(*code, scale, min))
        });
        values.collect()
    }

    /// The blocks of a GGUF file, row by row. A group of several blocks repeats its scale in each.
    pub(super) fn encode(&self, grouped: &GroupedFormat, columns: usize) -> Vec<u8> {
        let block_bytes = grouped.format.block_type().block_bytes();
        let block = grouped.format.block();
        debug_assert!(columns.is_multiple_of(grouped.group));
        let mut out = Vec::with_capacity(self.codes.len() / block * block_bytes);
        for (index, codes) in self.codes.chunks_exact(block).enumerate() {
            let group = index * block / grouped.group;
            out.extend(f16::from_f32(self.scales[group]).to_le_bytes());
            if let Some(min) = self.mins.get(group) {
                out.extend(f16::from_f32(*min).to_le_bytes());
            }
            match grouped.format {
                Format::Q8_0 => out.extend(codes),
                Format::Q2_0 => {
                    let quads = codes.as_chunks::<4>().0.iter();
                    out.extend(quads.map(|codes| codes.iter().rev().fold(0, |byte, code| byte << 2 | code)));
                }
                Format::Q5_0 => {
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

/// The relative squared error of a layer's output: `tr((W - Q) H (W - Q)^T) / tr(W H W^T)`, where H is the identity without
/// calibration. 0 for a layer of zeros.
pub(super) fn error(problem: &LayerProblem<'_>, decoded: &[f32]) -> f64 {
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

/// `x H x^T`, or `x x^T` if H is empty.
fn energy(hessian: &[f32], x: &[f32]) -> f64 {
    if hessian.is_empty() {
        return x.iter().map(|x| f64::from(*x).powi(2)).sum();
    }
    let product = |row: &[f32]| row.iter().zip(x).map(|(h, x)| f64::from(*h) * f64::from(*x)).sum::<f64>();
    hessian.chunks(x.len()).zip(x).map(|(row, x)| f64::from(*x) * product(row)).sum()
}

#[cfg(test)]
mod tests {
    use super::super::format::{rounded, tests::codes};
    use super::*;

    #[test]
    fn encoded_blocks_decode_to_the_values_of_the_solution() {
        for format in Format::ALL {
            for group in [32, 64, 96].into_iter().filter(|group| group % format.block() == 0) {
                let grouped = GroupedFormat { format, group };
                let mut solution = Solution::zeroed(&grouped, 5, 192);
                let known = codes(format);
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
                format.block_type().decode(&solution.encode(&grouped, 192), &mut decoded).unwrap();
                assert_eq!(solution.decode(&grouped, 192), decoded, "{grouped:?}");
            }
        }
    }

    #[test]
    fn the_error_is_the_relative_error_of_the_outputs() {
        let weights = [1.0, 2.0, 3.0, -1.0];
        // Inputs (1, 1) and (2, 0), equally often.
        let hessian = [2.5, 0.5, 0.5, 0.5];
        let problem = LayerProblem::new(&weights, 2, 2, &hessian, &[1.5, 0.5]).unwrap();
        let decoded = [1.0, 1.0, 2.0, -1.0];
        // Output errors: (1, 0) for the first row, (1, 2) for the second. Outputs: (3, 2) and (2, 6).
        assert!((error(&problem, &decoded) - (1.0 + 1.0 + 4.0) / (9.0 + 4.0 + 4.0 + 36.0)).abs() < 1e-12);
        let plain = LayerProblem { hessian: &[], ..problem };
        assert!((error(&plain, &decoded) - 2.0 / 15.0).abs() < 1e-12);
        assert_eq!(error(&LayerProblem { weights: &[0.0; 4], ..problem }, &[0.0; 4]), 0.0);
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_with_their_index() {
        let error = LayerProblem::new(&[0.0, f32::NAN], 1, 2, &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "weights: found NaN at index 1, expected finite numbers");
        assert!(LayerProblem::new(&[0.0; 2], 1, 2, &[0.0; 3], &[]).is_err());
        assert!(LayerProblem::new(&[0.0; 3], 1, 2, &[], &[]).is_err());
    }
}
