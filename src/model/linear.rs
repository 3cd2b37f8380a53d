//! A linear layer: packed weights in parts that share an input, and their bias.

use std::collections::TryReserveError;

use crate::kernels::{Activations, Kernel, MAX_TILE_ROWS};
use crate::quant::packed::{PANEL, Packed};
use crate::threads::{Columns, Scope};

/// Weights that are multiplied with the same input, such as query, key and value, side by side in one output row.
#[derive(Debug)]
pub(crate) struct Linear {
    parts: Vec<Packed>,
    /// `(width)`, or empty.
    bias: Vec<f32>,
    /// Output column at which each part starts, a multiple of 16.
    starts: Vec<usize>,
    width: usize,
    /// Which input each column of the integer parts is multiplied with, where that is not the one of its number.
    order: Option<Vec<u32>>,
}

/// The input of linear layers: F32, and INT8 for weights that are integers.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    /// `(rows, columns)`
    pub(crate) values: Vec<f32>,
    codes: Activations,
}

impl Rows {
    /// `(rows, columns)`, of unspecified values.
    pub(crate) fn resize(&mut self, rows: usize, columns: usize) {
        // Growing alone would do, but a buffer of the very size catches mistakes.
        self.values.resize(rows * columns, 0.0);
    }

    /// Makes room for `(rows, columns)`, values and codes.
    pub(super) fn try_reserve(&mut self, rows: usize, columns: usize) -> Result<(), TryReserveError> {
        let more = (rows * columns).saturating_sub(self.values.len());
        self.values.try_reserve_exact(more)?;
        self.codes.try_reserve(rows, columns)
    }

    /// Quantizes the values if one of the layers wants them so.
    pub(crate) fn prepare(&mut self, scope: &Scope<'_>, kernel: &Kernel, columns: usize, layer: &Linear) {
        if !layer.parts.iter().any(|part| part.layout().is_integer()) {
            return;
        }
        let rows = self.values.len() / columns;
        self.codes.resize(rows, columns);
        let (lines, blocks, values) = (self.codes.row_lines(), self.codes.blocks(), &self.values);
        scope.for_each_chunk(self.codes.lines_mut(), MAX_TILE_ROWS * lines, |i, chunk| {
            let first = i * MAX_TILE_ROWS;
            let count = MAX_TILE_ROWS.min(rows - first);
            let own = &values[first * columns..][..count * columns];
            let gathered: Vec<f32>;
            let own = match &layer.order {
                None => own,
                Some(order) => {
                    let gather = |row: &'_ [f32]| order.iter().map(|column| row[*column as usize]).collect::<Vec<_>>();
                    gathered = own.chunks_exact(columns).flat_map(gather).collect();
                    &gathered
                }
            };
            Activations::fill(kernel, chunk, blocks, count, |row| &own[row * columns..][..columns]);
        });
    }
}

impl Linear {
    /// Parts with their biases (empty for none), in the order of the output.
    pub(crate) fn new(parts: Vec<(Packed, Vec<f32>)>) -> Linear {
        let mut linear = Linear { parts: vec![], bias: vec![], starts: vec![], width: 0, order: None };
        let biased = parts.iter().any(|(_, bias)| !bias.is_empty());
        for (part, bias) in parts {
            linear.starts.push(linear.width);
            linear.width += part.panels() * PANEL;
            if biased {
                linear.bias.extend(bias);
                linear.bias.resize(linear.width, 0.0);
            }
            linear.parts.push(part);
        }
        linear
    }

    /// With columns that are multiplied with the inputs of these numbers, each below the number of columns.
    pub(crate) fn with_order(self, order: Option<Vec<u32>>) -> Linear {
        Linear { order, ..self }
    }

    /// Width of an output row: every part rounded up to whole panels.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Output column at which part `part` starts.
    pub(crate) fn start(&self, part: usize) -> usize {
        self.starts[part]
    }

    /// The parts.
    pub(crate) fn parts(&self) -> &[Packed] {
        &self.parts
    }

    /// `(width)`, or empty.
    pub(super) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Which input each column is multiplied with, where that is not the one of its number.
    pub(super) fn order(&self) -> Option<&Vec<u32>> {
        self.order.as_ref()
    }

    /// Bytes that a product reads.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(Packed::bytes).sum()
    }

    /// `out (rows, width) = x * weights^T + bias`, panels spread over the pool.
    pub(crate) fn apply(&self, scope: &Scope<'_>, threads: usize, kernel: &Kernel, x: &Rows, out: &mut Vec<f32>) {
        let columns = self.parts.first().map_or(1, Packed::columns);
        let rows = x.values.len() / columns;
        out.resize(rows * self.width, 0.0);
        // Several pieces a thread, so that one that is held up by a neighbour does not hold up the others, of whole pairs of
        // panels, as kernels take them.
        let step = (self.width / PANEL).div_ceil(threads * 4).next_multiple_of(2) * PANEL;
        let mut all = Columns::whole(out, rows, self.width);
        scope.for_each_columns(&mut all, step, |range, out| {
            for (part, start) in self.parts.iter().zip(&self.starts) {
                let first = range.start.max(*start);
                let last = range.end.min(start + part.panels() * PANEL);
                if first >= last {
                    continue;
                }
                let panels = (first - start) / PANEL..(last - start) / PANEL;
                let mut out = out.narrow(first..last);
                if part.layout().is_integer() {
                    kernel.product(part, panels, &x.codes, &mut out);
                } else {
                    kernel.product_float(part, panels, &x.values, columns, &mut out);
                }
            }
            if !self.bias.is_empty() {
                for row in 0..rows {
                    kernel.add_scaled(out.row_mut(row), &self.bias[range.clone()], 1.0);
                }
            }
        });
    }
}
