//! The shared context of a forward pass, and the steps that several parts take: norms, products, joins.

use super::adapter::rows::AdapterRows;
use super::buffer::Buffer;
use super::config::Config;
use super::linear::{Linear, LinearInput};
use super::norm::Norm;
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;
use crate::threads::Scope;

/// Tasks per thread, so that a thread that is interrupted does not delay the others.
pub(super) const TASKS: usize = 4;
/// Rows that a task of elementwise work takes together.
pub(super) const TASK_ROWS: usize = 8;

/// One pass through the layers: the hyperparameters, the kernel and the threads.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) config: &'a Config,
    pub(super) kernel: &'static Kernel,
    pub(super) scope: &'a Scope<'a>,
    pub(super) threads: usize,
    /// The adapters of the rows.
    pub(super) adapters: AdapterRows<'a>,
}

impl Pass<'_> {
    /// `input (rows, hidden) = norm(x)`, row by row, or `x` where there is no norm.
    pub(super) fn norm(&self, x: &[f32], norm: Option<&Norm>, input: &mut LinearInput) {
        let (config, kernel, hidden) = (self.config, self.kernel, self.config.hidden);
        input.resize(x.len() / hidden, hidden);
        self.scope.for_each_chunk(&mut input.values, TASK_ROWS * hidden, |i, out| {
            for (x, out) in x[i * TASK_ROWS * hidden..].chunks(hidden).zip(out.chunks_mut(hidden)) {
                match norm {
                    Some(norm) => norm.apply(config, kernel, x, out),
                    None => out.copy_from_slice(x),
                }
            }
        });
    }

    /// `x (rows, hidden) = norm(x)`, where there is a norm. `buffer` is overwritten.
    pub(super) fn norm_stream(&self, x: &mut [f32], norm: Option<&Norm>, buffer: &mut LinearInput) {
        if norm.is_some() {
            self.norm(x, norm, buffer);
            x.copy_from_slice(&buffer.values);
        }
    }

    /// `branch (rows, hidden rounded up to panels) = norm(branch)`, where there is a norm. `rows` is overwritten.
    pub(super) fn norm_branch(&self, branch: &mut [f32], norm: Option<&Norm>, rows: &mut Vec<f32>) {
        let Some(norm) = norm else { return };
        let (config, kernel, hidden) = (self.config, self.kernel, self.config.hidden);
        let width = hidden.next_multiple_of(PANEL);
        self.scope.for_each_chunk_with(branch, TASK_ROWS * width, rows, hidden, |_, chunk, out| {
            for row in chunk.chunks_mut(width) {
                norm.apply(config, kernel, &row[..hidden], out);
                row[..hidden].copy_from_slice(out);
            }
        });
    }

    /// `x (rows, width of the norm) = norm(x)`. `rows` is overwritten.
    pub(super) fn norm_rows(&self, x: &mut [f32], norm: &Norm, rows: &mut Vec<f32>) {
        let (config, kernel, width) = (self.config, self.kernel, norm.weight.len());
        self.scope.for_each_chunk_with(x, TASK_ROWS * width, rows, width, |_, chunk, out| {
            for row in chunk.chunks_mut(width) {
                let out = &mut out[..width];
                norm.apply(config, kernel, row, out);
                row.copy_from_slice(out);
            }
        });
    }

    /// The same pass for the base of the model: rows without adapters.
    pub(super) fn without_adapters(&self) -> Pass<'_> {
        Pass { adapters: AdapterRows::default(), ..*self }
    }

    /// `out (rows, layer.width()) = layer(input)`, and what the adapters of the rows add.
    pub(super) fn linear(&self, layer: &Linear, input: &mut LinearInput, out: &mut Buffer) {
        input.prepare(self.scope, self.kernel, layer.columns(), layer);
        layer.apply(self.scope, self.threads, self.kernel, input, out);
        self.adapters.add(self.scope, self.threads, self.kernel, layer, &input.values, out);
    }

    /// `x (rows, hidden) += residual_scale * branch (rows, hidden rounded up to panels)`
    pub(super) fn join(&self, x: &mut [f32], branch: &[f32]) {
        let (kernel, hidden, scale) = (self.kernel, self.config.hidden, self.config.residual_scale);
        let width = hidden.next_multiple_of(PANEL);
        self.scope.for_each_chunk(x, TASK_ROWS * hidden, |i, chunk| {
            for (x, branch) in chunk.chunks_mut(hidden).zip(branch[i * TASK_ROWS * width..].chunks(width)) {
                kernel.add_scaled(x, &branch[..hidden], scale);
            }
        });
    }
}
