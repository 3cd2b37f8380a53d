//! Whether the F16 scales of a block type hold the weights of a matrix.

use half::f16;

use super::block::BlockType;

/// Weights of a group, which share a scale.
const BLOCK: usize = 32;
/// The smallest normal number of F16. Smaller ones lose bits.
const SMALLEST: f32 = 6.103_515_6e-5;
/// Half the distance between numbers of F16 below [`SMALLEST`].
const HALF_STEP: f32 = 2.980_232_2e-8;
/// The share of a row's energy that its scales may lose.
const ROW_LOSS: f64 = 1e-2;

/// What a block type does to the rows of a matrix that were added so far.
///
/// A scale that is too large becomes infinite or is clipped. One that is too small loses bits, or becomes zero. Small scales
/// in single rows are normal, so a matrix is only refused if they cost more than rounding does, over the whole matrix or in a
/// quarter of its rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScaleRange {
    block_type: BlockType,
    /// The sum of all squared weights, and the part that small scales lose.
    energy: f64,
    lost: f64,
    /// Rows that are not zero, and those that small scales damage.
    rows: usize,
    lost_rows: usize,
    /// The weight whose scale is too large.
    too_large: Option<f32>,
}

impl ScaleRange {
    /// A matrix without rows, in blocks of `block_type`.
    pub(crate) fn new(block_type: BlockType) -> ScaleRange {
        ScaleRange { block_type, energy: 0.0, lost: 0.0, rows: 0, lost_rows: 0, too_large: None }
    }

    /// Whether the type has F16 numbers at all.
    fn is_limited(&self) -> bool {
        !matches!(self.block_type, BlockType::F32 | BlockType::BF16)
    }

    /// The largest level of a code, whose product with the scale is the largest weight.
    fn top_level(&self) -> f32 {
        match self.block_type {
            BlockType::Q2_0 => 2.0,
            BlockType::Q4_0 => 8.0,
            BlockType::Q4_1 => 15.0,
            BlockType::Q5_0 => 16.0,
            BlockType::IQ4_NL | BlockType::Q8_0 => 127.0,
            _ => 1.0,
        }
    }

    /// Adds a row of finite weights.
    pub(crate) fn add_row(&mut self, row: &[f32]) {
        if !self.is_limited() {
            return;
        }
        let (mut energy, mut lost) = (0.0, 0.0);
        for block in row.chunks(BLOCK) {
            let own = f64::from(block.iter().map(|x| x * x).sum::<f32>());
            let own = if own.is_finite() { own } else { f64::from(f32::MAX) };
            energy += own;
            lost += match self.block_type {
                BlockType::F16 => self.values(block),
                BlockType::Q4_1 => self.scale_and_min(block, own),
                _ => self.scale(block.iter().fold(0.0f32, |most, x| most.max(x.abs())), own),
            };
        }
        self.energy += energy;
        self.lost += lost;
        let is_zero = row.iter().all(|x| *x == 0.0);
        self.rows += usize::from(!is_zero);
        self.lost_rows += usize::from(lost > ROW_LOSS * energy || (energy == 0.0 && !is_zero));
    }

    /// The energy that a block loses by the scale for its largest magnitude `top`.
    fn scale(&mut self, top: f32, energy: f64) -> f64 {
        let scale = top / self.top_level();
        // Searches choose scales of up to four thirds of the plain one.
        if scale > 0.75 * f16::MAX.to_f32() {
            self.too_large.get_or_insert(top);
        }
        let error = if scale < SMALLEST && top > 0.0 { (HALF_STEP / scale).min(1.0) } else { 0.0 };
        f64::from(error).powi(2) * energy
    }

    fn scale_and_min(&mut self, block: &[f32], energy: f64) -> f64 {
        let low = block.iter().fold(f32::INFINITY, |least, x| least.min(*x));
        let high = block.iter().fold(f32::NEG_INFINITY, |most, x| most.max(*x));
        if low.abs() > 0.75 * f16::MAX.to_f32() {
            self.too_large.get_or_insert(low);
        }
        let min =
            if low.abs() < SMALLEST { f64::from(low.abs().min(HALF_STEP)).powi(2) * block.len() as f64 } else { 0.0 };
        (self.scale(high - low, energy) + min).min(energy)
    }

    /// The energy that single weights in F16 lose.
    fn values(&mut self, block: &[f32]) -> f64 {
        let mut lost = 0.0;
        for x in block.iter().map(|x| x.abs()) {
            if x > f16::MAX.to_f32() {
                self.too_large.get_or_insert(x);
            } else if x < SMALLEST {
                lost += f64::from(x.min(HALF_STEP)).powi(2);
            }
        }
        lost
    }

    /// What is wrong with the matrix: what was found, and what the type needs.
    pub(crate) fn fault(&self) -> Option<(String, String)> {
        let tolerance = if matches!(self.block_type, BlockType::Q8_0 | BlockType::F16) { 1e-4 } else { 1e-3 };
        let kind = self.block_type;
        let what = if kind == BlockType::F16 { "that fit F16" } else { "whose scale fits F16" };
        let expected = format!("values {what}, as {kind} needs; BF16 and F32 hold all values");
        if let Some(large) = self.too_large {
            return Some((format!("values up to {large:e}"), expected));
        }
        if self.lost > tolerance * self.energy || 4 * self.lost_rows > self.rows {
            let mean = (self.energy / self.rows.max(1) as f64).sqrt();
            return Some((format!("rows of length {mean:.1e} on average, too small"), expected));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(block_type: BlockType, factor: f32) -> bool {
        let mut range = ScaleRange::new(block_type);
        for row in 0..8 {
            let values: Vec<f32> = (0..64).map(|i| ((i * 37 + row * 11) % 101) as f32 / 50.5 - 1.0).collect();
            range.add_row(&values.iter().map(|x| x * factor).collect::<Vec<f32>>());
        }
        range.fault().is_some()
    }

    #[test]
    fn each_type_has_limits_on_both_sides() {
        for (block_type, small, large) in [
            (BlockType::Q4_0, 1e-5, 3e5),
            (BlockType::Q4_1, 1e-5, 4e4),
            (BlockType::IQ4_NL, 2e-4, 6e6),
            (BlockType::Q8_0, 1e-3, 6e6),
            (BlockType::F16, 1e-5, 6e4),
        ] {
            assert!(!fault(block_type, 0.02) && !fault(block_type, small) && !fault(block_type, large), "{block_type}");
            assert!(fault(block_type, small * 1e-3), "{block_type}: too small");
            assert!(fault(block_type, large * 3.0), "{block_type}: too large");
        }
        for block_type in [BlockType::BF16, BlockType::F32] {
            assert!(!fault(block_type, 1e30) && !fault(block_type, 1e-30), "{block_type}");
        }
    }

    #[test]
    fn few_small_rows_are_normal_and_many_are_not() {
        let with_small = |count: usize| {
            let mut range = ScaleRange::new(BlockType::Q4_0);
            (0..100).for_each(|row| range.add_row(&[if row < count { 1e-9 } else { 0.1 }; 64]));
            range.fault().is_some()
        };
        assert!(!with_small(20));
        assert!(with_small(30));
        let mut zeros = ScaleRange::new(BlockType::Q4_0);
        zeros.add_row(&[0.0; 64]);
        assert!(zeros.fault().is_none());
    }
}
