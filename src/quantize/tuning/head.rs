//! The embedding, the output matrix, and the gradient of the loss at the last layer.

use super::backprop::Backprop;
use super::weights::untuned;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::model::layerwise::Layerwise;
use crate::quant::packed::Packed;
use crate::quantize::compute::packed_of;
use crate::quantize::context::OpenRun;
use crate::quantize::resume::ResumeLog;

/// Logits in memory at a time.
const LOGITS: usize = 1 << 22;

/// The matrices before the first block and after the last.
pub(super) struct Head {
    /// `(vocabulary, hidden)`
    pub(super) embedding: Packed,
    /// `(vocabulary, hidden)`; `None` if the model uses the embedding.
    output: Option<Packed>,
    /// `(hidden, vocabulary)`: the output matrix.
    transposed: Packed,
}

impl Head {
    /// # Errors
    /// Those of [`untuned`].
    pub(super) fn new(run: &OpenRun<'_>, log: &ResumeLog) -> Result<Head> {
        let hidden = run.layers.config().hidden;
        let matrix = |name: &str| {
            let rows = untuned(run, log, name)?;
            run.checkpoint.release(name);
            Ok::<_, Error>(rows)
        };
        let by_rows = |x: &[f32]| packed_of(x.len() / hidden, hidden, |row, column| x[row * hidden + column]);
        let by_columns = |x: &[f32]| packed_of(hidden, x.len() / hidden, |row, column| x[column * hidden + row]);
        let embedding = matrix("token_embd.weight")?;
        if run.checkpoint.tensor("output.weight").is_none() {
            return Ok(Head { embedding: by_rows(&embedding), output: None, transposed: by_columns(&embedding) });
        }
        let embedding = by_rows(&embedding);
        let output = matrix("output.weight")?;
        Ok(Head { embedding, output: Some(by_rows(&output)), transposed: by_columns(&output) })
    }

    /// The gradient of the mean divergence between the predictions from `wanted`, the residual stream of the full-precision
    /// model, and those from `x`, both `(tokens, hidden)`. Returns the gradient at the weights `norm` of the last norm
    /// `(hidden)` and at `x`.
    pub(super) fn gradients(
        &self,
        layers: &Layerwise,
        backprop: &Backprop<'_>,
        norm: &[f32],
        x: &[f32],
        wanted: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (compute, hidden) = (&backprop.compute, backprop.hidden);
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        let (vocabulary, tokens) = (output.rows(), x.len() / hidden);
        let normed = backprop.norm(x, norm);
        let mut of_normed = vec![0.0; x.len()];
        let rows = (LOGITS / vocabulary).max(1) * hidden;
        for ((normed, wanted), out) in normed.chunks(rows).zip(wanted.chunks(rows)).zip(of_normed.chunks_mut(rows)) {
            let mut wanted = layers.logits(wanted.to_vec());
            let mut found = vec![0.0; wanted.len()];
            compute.for_each_product(normed, output, &mut found, vocabulary, |product, out| {
                out.copy_from_slice(product);
            });
            let logits = wanted.chunks_mut(vocabulary).zip(found.chunks_mut(vocabulary));
            let mut tasks: Vec<_> = logits.collect();
            compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
                tasks.iter_mut().for_each(|(wanted, found)| gradient_of_row(compute.kernel, wanted, found, tokens));
            });
            compute.for_each_product(&found, &self.transposed, out, hidden, |product, out| {
                out.copy_from_slice(product);
            });
        }
        let mut gradient = vec![0.0; x.len()];
        let of_norm = backprop.norm_back(x, norm, &of_normed, &mut gradient);
        (of_norm, gradient)
    }
}

/// Replaces the logits `found` by the gradient of their divergence from the logits `wanted`, which become probabilities. The
/// gradient is the difference of both models' probabilities, divided by the number of tokens.
fn gradient_of_row(kernel: &Kernel, wanted: &mut [f32], found: &mut [f32], tokens: usize) {
    let ((_, sum_wanted), (_, sum_found)) = (kernel.exp_segment(wanted), kernel.exp_segment(found));
    for (wanted, found) in wanted.iter_mut().zip(found) {
        *wanted /= sum_wanted;
        *found = (*found / sum_found - *wanted) / tokens as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_the_divergence_agrees_with_finite_differences() {
        let (wanted, found) = ([1.0f32, -0.5, 2.0, 0.3], [0.2f32, 0.4, 1.0, -1.0]);
        let divergence = |found: [f32; 4]| -> f64 {
            let sum = |x: [f32; 4]| x.iter().map(|x| f64::from(*x).exp()).sum::<f64>();
            let probability = |x: [f32; 4], i: usize| f64::from(x[i]).exp() / sum(x);
            (0..4).map(|i| probability(wanted, i) * (probability(wanted, i) / probability(found, i)).ln()).sum()
        };
        let (mut probabilities, mut gradient) = (wanted, found);
        gradient_of_row(crate::kernels::choose(None).unwrap(), &mut probabilities, &mut gradient, 2);
        assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        for i in 0..4 {
            let [up, down] = [0.01, -0.01].map(|step| {
                let mut found = found;
                found[i] += step;
                divergence(found)
            });
            assert!((2.0 * f64::from(gradient[i]) - (up - down) / 0.02).abs() < 1e-4, "{i}: {}", gradient[i]);
        }
    }
}
