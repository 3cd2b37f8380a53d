//! Norms: their weights, and their application to a row.

use super::arch::NormKind;
use super::config::Config;
use crate::kernels::Kernel;

/// Weight and bias of a norm, whose kind is that of the family.
#[derive(Debug)]
pub(super) struct Norm {
    /// `(width)`
    pub(super) weight: Vec<f32>,
    /// `(width)`, or empty.
    pub(super) bias: Vec<f32>,
    /// Added to the variance under the square root.
    pub(super) eps: f32,
}

/// A norm of queries or keys.
#[derive(Debug)]
pub(super) struct HeadNorm {
    /// Weights of one width, or of that width for each head.
    pub(super) norm: Norm,
    /// The numbers that are normalized together: those of a head, or of all heads.
    pub(super) width: usize,
}

impl Norm {
    /// `out = norm(x)`, one row.
    pub(super) fn apply(&self, config: &Config, kernel: &Kernel, x: &[f32], out: &mut [f32]) {
        row(config, kernel, x, [&self.weight, &self.bias], self.eps, out);
    }
}

impl Norm {
    /// A norm of `width` numbers without weights.
    pub(super) fn unweighted(width: usize, eps: f32) -> Norm {
        Norm { weight: vec![1.0; width], bias: Vec::new(), eps }
    }
}

impl HeadNorm {
    /// A norm of heads of `width` numbers without weights.
    pub(super) fn unweighted(width: usize, eps: f32) -> HeadNorm {
        HeadNorm { norm: Norm::unweighted(width, eps), width }
    }

    /// The norm for heads whose number `i` comes from number `order(i)` of the file's.
    pub(super) fn reordered(mut self, dim: usize, order: impl Fn(usize) -> usize) -> HeadNorm {
        for numbers in [&mut self.norm.weight, &mut self.norm.bias] {
            *numbers = (0..numbers.len()).map(|i| numbers[i / dim * dim + order(i % dim)]).collect();
        }
        self
    }

    /// Normalizes `heads` in place, head by head or all heads as one row. `buffer` has at least the norm's width.
    pub(super) fn apply(&self, config: &Config, kernel: &Kernel, heads: &mut [f32], buffer: &mut [f32]) {
        let (width, Norm { weight, bias, eps }) = (self.width, &self.norm);
        let out = &mut buffer[..width];
        for (i, head) in heads.chunks_exact_mut(width).enumerate() {
            let own = if weight.len() == width { 0..width } else { i * width..(i + 1) * width };
            row(config, kernel, head, [&weight[own.clone()], bias.get(own).unwrap_or(&[])], *eps, out);
            head.copy_from_slice(out);
        }
    }
}

fn row(config: &Config, kernel: &Kernel, x: &[f32], [weight, bias]: [&[f32]; 2], eps: f32, out: &mut [f32]) {
    match config.family.norm {
        NormKind::Rms => kernel.rms_norm(x, weight, eps, out),
        NormKind::Layer => kernel.layer_norm(x, weight, bias, eps, out),
    }
}
