//! What measurements of all matrices share: their sizes, and the predictions of the model.

use crate::error::Result;
use crate::quant::block::BlockType;
use crate::quantize::calibration::Calibration;

/// The bytes of a number of weights.
pub(super) fn bytes(block_type: BlockType, weights: usize) -> u64 {
    (weights / block_type.block_len() * block_type.block_bytes()) as u64
}

/// The logits of all windows after the last layer `(tokens, vocabulary)`.
pub(super) fn logits(calibration: &mut Calibration<'_>, windows: usize) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for window in 0..windows {
        all.extend(calibration.logits(window)?);
    }
    Ok(all)
}

/// The mean over rows of the Kullback-Leibler divergence between the logits `reference` and `found`, both `(rows, vocabulary)`,
/// in nats.
pub(super) fn divergence(reference: &[f32], found: &[f32], vocabulary: usize) -> f64 {
    let normalizer = |row: &[f32]| {
        let most = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        f64::from(most) + row.iter().map(|x| f64::from((x - most).exp())).sum::<f64>().ln()
    };
    let rows = reference.chunks(vocabulary).zip(found.chunks(vocabulary));
    let each = rows.map(|(a, b)| {
        let (all_a, all_b) = (normalizer(a), normalizer(b));
        a.iter()
            .zip(b)
            .map(|(a, b)| {
                let (a, b) = (f64::from(*a) - all_a, f64::from(*b) - all_b);
                a.exp() * (a - b)
            })
            .sum::<f64>()
    });
    each.sum::<f64>() / (reference.len() / vocabulary).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_that_of_the_distributions() {
        // (1/2, 1/2) against (1/4, 3/4), with constants added to the logits; the second rows are equal.
        let reference = [0.0, 0.0, 5.0, 1.0];
        let found = [7.0, 7.0 + 3f32.ln(), -5.0, -9.0];
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((divergence(&reference, &found, 2) - expected / 2.0).abs() < 1e-6);
    }
}
