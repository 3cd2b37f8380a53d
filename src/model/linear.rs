//! Linear layers: packed weights in parts that share an input, and their biases.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::buffer::Buffer;
use crate::error::{Error, Result};
use crate::kernels::{Activations, Kernel, MAX_TILE_ROWS, cache};
use crate::quant::packed::{CacheLine, Code, PANEL, Packed};
use crate::threads::{Columns, Scope, Span};

/// Rows up to which a product waits for its weights. More rows compute for longer.
const READING: usize = 4 * MAX_TILE_ROWS;

/// Weights that are multiplied with the same input, such as query, key and value, side by side in one output row.
#[derive(Debug)]
pub(super) struct Linear {
    parts: Vec<Packed>,
    /// `(width)`, or empty.
    bias: Vec<f32>,
    /// `(parts)`: the output column at which each part starts, a multiple of 16.
    starts: Vec<usize>,
    width: usize,
    /// `(columns)`: the input column that each column of the integer parts is multiplied with, where it is not the one
    /// of the same number.
    order: Option<Vec<u32>>,
    /// Where the parts come from, if adapters may add to the product.
    adaptable: Option<Arc<Adaptable>>,
    /// Where the parts have no memory: whether their weights would be F32.
    hollow: Option<bool>,
}

/// The tensors of a layer to whose product adapters may add.
#[derive(Debug)]
pub(super) struct Adaptable {
    /// Distinguishes the layer from all others.
    pub(super) id: u64,
    /// `(parts)`
    pub(super) parts: Vec<PartSource>,
}

/// The rows of a tensor that a part consists of.
#[derive(Debug)]
pub(super) struct PartSource {
    /// The tensor's name without `.weight`.
    pub(super) name: String,
    /// The tensor's dimensions: columns, rows, and the number of matrices.
    pub(super) dims: [usize; 3],
    /// Rows of the part.
    pub(super) count: usize,
    /// The row of the tensor, counted through all matrices, that each row of the part comes from.
    pub(super) rows: RowSource,
}

/// The rows of a tensor, in the order of a part.
#[derive(Debug)]
pub(super) enum RowSource {
    /// The rows from this one on.
    From(usize),
    Listed(Vec<u32>),
}

impl RowSource {
    /// `count` rows in the order that `order` gives.
    pub(super) fn new(count: usize, order: impl Fn(usize) -> usize) -> RowSource {
        let first = order(0);
        match (0..count).all(|row| order(row) == first + row) {
            true => RowSource::From(first),
            false => RowSource::Listed((0..count).map(|row| order(row) as u32).collect()),
        }
    }

    /// The row of the tensor that becomes row `row`.
    pub(super) fn source(&self, row: usize) -> usize {
        match self {
            RowSource::From(first) => first + row,
            RowSource::Listed(rows) => rows[row] as usize,
        }
    }
}

/// The input of linear layers: F32, and INT8 for integer weights.
#[derive(Debug, Default)]
pub(super) struct LinearInput {
    /// `(rows, columns)`
    pub(super) values: Buffer,
    /// `(rows, columns)`
    codes: Activations,
    /// `(tiles, MAX_TILE_ROWS, columns)`: rows in the order of a layer whose columns have another one.
    reordered: Vec<f32>,
}

impl LinearInput {
    /// Makes the values `(rows, columns)`. They are unspecified.
    pub(super) fn resize(&mut self, rows: usize, columns: usize) {
        self.values.resize(rows * columns);
    }

    /// Allocates memory for `(rows, columns)` values and their codes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn reserve(&mut self, rows: usize, columns: usize) -> Result<()> {
        self.values.reserve(rows * columns)?;
        let out_of_memory =
            |_| Error::OutOfMemory { what: "the buffers of a pass", bytes: 2 * rows * columns, left: None };
        self.codes.try_reserve(rows, columns).map_err(out_of_memory)
    }

    /// Quantizes the values if `layer` has integer weights.
    pub(super) fn prepare(&mut self, scope: &Scope<'_>, kernel: &Kernel, columns: usize, layer: &Linear) {
        if !layer.parts.iter().any(|part| part.layout().is_integer()) {
            return;
        }
        let rows = self.values.len() / columns;
        self.codes.resize(rows, columns);
        let (lines, blocks, values) = (self.codes.row_lines(), self.codes.blocks(), &self.values);
        let size = if layer.order.is_some() { MAX_TILE_ROWS * columns } else { 0 };
        let chunk = MAX_TILE_ROWS * lines;
        scope.for_each_chunk_with(self.codes.lines_mut(), chunk, &mut self.reordered, size, |i, chunk, reordered| {
            fill_tile(kernel, layer, values, columns, i, (chunk, blocks), reordered);
        });
    }

    /// As [`LinearInput::prepare`], by one thread.
    pub(super) fn prepare_alone(&mut self, kernel: &Kernel, layer: &Linear) {
        if !layer.parts.iter().any(|part| part.layout().is_integer()) {
            return;
        }
        let columns = layer.columns();
        self.codes.resize(self.values.len() / columns, columns);
        let (lines, blocks, values) = (self.codes.row_lines(), self.codes.blocks(), &self.values);
        self.reordered.resize(if layer.order.is_some() { MAX_TILE_ROWS * columns } else { 0 }, 0.0);
        for (i, chunk) in self.codes.lines_mut().chunks_mut(MAX_TILE_ROWS * lines).enumerate() {
            fill_tile(kernel, layer, values, columns, i, (chunk, blocks), &mut self.reordered);
        }
    }
}

/// Quantizes tile `i` of `values (rows, columns)` into its cache lines, with this number of blocks a row, in the order of the layer's
/// columns.
fn fill_tile(
    kernel: &Kernel,
    layer: &Linear,
    values: &[f32],
    columns: usize,
    i: usize,
    (lines, blocks): (&mut [CacheLine], usize),
    reordered: &mut [f32],
) {
    let first = i * MAX_TILE_ROWS;
    let count = MAX_TILE_ROWS.min(values.len() / columns - first);
    let mut tile = &values[first * columns..][..count * columns];
    if let Some(order) = &layer.order {
        for (row, out) in tile.chunks_exact(columns).zip(reordered.chunks_exact_mut(columns)) {
            out.iter_mut().zip(order).for_each(|(out, column)| *out = row[*column as usize]);
        }
        tile = &*reordered;
    }
    Activations::fill(kernel, lines, blocks, count, |row| &tile[row * columns..][..columns]);
}

impl Linear {
    /// Parts with their biases (empty for none), in the order of the output.
    pub(super) fn new(parts: Vec<(Packed, Vec<f32>)>) -> Linear {
        let (parts_of, bias, starts) = (vec![], vec![], vec![]);
        let mut linear = Linear { parts: parts_of, bias, starts, width: 0, order: None, adaptable: None, hollow: None };
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

    /// The layer with columns that are multiplied with the inputs of these numbers, each below the number of columns.
    pub(super) fn with_order(self, order: Option<Vec<u32>>) -> Linear {
        Linear { order, ..self }
    }

    /// The layer with parts that come from these tensors, so that adapters may add to its product. The products of such a layer
    /// are those of [`Pass::linear`](super::pass::Pass::linear).
    pub(super) fn with_sources(self, parts: Vec<PartSource>) -> Linear {
        static LAYERS: AtomicU64 = AtomicU64::new(0);
        let adaptable = Adaptable { id: LAYERS.fetch_add(1, Ordering::Relaxed), parts };
        Linear { adaptable: Some(Arc::new(adaptable)), ..self }
    }

    /// The layer without the names of its tensors: no adapter adds to its product.
    pub(super) fn without_adapters(self) -> Linear {
        Linear { adaptable: None, ..self }
    }

    /// The layer, whose parts have no memory. `is_f32` says whether their weights would be F32.
    pub(super) fn hollow(self, is_f32: bool) -> Linear {
        Linear { hollow: Some(is_f32), ..self }
    }

    /// Takes the memory of the parts. The layer is as [`Linear::hollow`] makes it then.
    pub(super) fn take_parts(&mut self) -> Vec<Packed> {
        self.hollow = Some(self.is_f32());
        let hollow = self.parts.iter().map(|part| Packed::hollow(part.rows(), part.columns())).collect();
        std::mem::replace(&mut self.parts, hollow)
    }

    /// The layer with parts that have memory, in the shapes of its own.
    pub(super) fn with_parts(&self, parts: Vec<Packed>) -> Linear {
        let Linear { parts: _, bias, starts, width, order, adaptable, hollow: _ } = self;
        let (bias, starts, order) = (bias.clone(), starts.clone(), order.clone());
        Linear { parts, bias, starts, width: *width, order, adaptable: adaptable.clone(), hollow: None }
    }

    /// The parts.
    pub(super) fn into_parts(self) -> Vec<Packed> {
        self.parts
    }

    /// Whether the parts have no memory.
    pub(super) fn is_hollow(&self) -> bool {
        self.hollow.is_some()
    }

    /// Whether the weights are F32, or would be if they had memory.
    pub(super) fn is_f32(&self) -> bool {
        self.hollow.unwrap_or_else(|| self.parts.iter().all(|part| part.layout().code == Code::F32))
    }

    /// Where the parts come from, if adapters may add to the product.
    pub(super) fn adaptable(&self) -> Option<&Adaptable> {
        self.adaptable.as_deref()
    }

    /// Width of an output row: every part rounded up to whole panels.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Output column at which part `part` starts.
    pub(super) fn start(&self, part: usize) -> usize {
        self.starts[part]
    }

    /// The parts.
    pub(super) fn parts(&self) -> &[Packed] {
        &self.parts
    }

    /// `(width)`, or empty.
    pub(super) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// `(columns)`: the input that each column is multiplied with, where it is not the one of the same number.
    pub(super) fn order(&self) -> Option<&Vec<u32>> {
        self.order.as_ref()
    }

    /// Input features.
    pub(super) fn columns(&self) -> usize {
        self.parts.first().map_or(1, Packed::columns)
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(Packed::bytes).sum()
    }

    /// `out (rows, width) = x * weights^T + bias`, with the panels spread over the threads.
    pub(super) fn apply(&self, scope: &Scope<'_>, threads: usize, kernel: &Kernel, x: &LinearInput, out: &mut Buffer) {
        let columns = self.columns();
        let rows = x.values.len() / columns;
        out.resize(rows * self.width);
        // Several pieces per thread, so that a thread that is interrupted does not delay the others; of whole pairs of
        // panels, which kernels multiply together.
        let step = (self.width / PANEL).div_ceil(threads * 4).next_multiple_of(2) * PANEL;
        let mut all = Columns::whole(out, rows, self.width);
        if scope.nodes() == 1 {
            if rows <= READING {
                scope.reads(self.width.div_ceil(step), |item| self.codes_at(item * step), cache::prefetch);
            }
            scope.for_each_columns(&mut all, step, |range, out| self.columns_of(kernel, x, range, out));
            return;
        }
        // One part after the other: each NUMA node has the same part of every matrix in its memory.
        for (part, start) in self.parts.iter().zip(&self.starts) {
            let step = part.panels().div_ceil(threads * 4).next_multiple_of(2) * PANEL;
            let mut own = all.narrow(*start..self.width.min(start + part.panels() * PANEL));
            scope.for_each_columns(&mut own, step, |range, out| self.columns_of(kernel, x, range, out));
        }
    }

    /// As [`Linear::apply`], by one thread.
    pub(super) fn product_alone(&self, kernel: &Kernel, x: &LinearInput, out: &mut Buffer) {
        let rows = x.values.len() / self.columns();
        out.resize(rows * self.width);
        self.columns_of(kernel, x, 0..self.width, &mut Columns::whole(out, rows, self.width));
    }

    /// The packed weights of output column `column` and those after it, of the same part.
    fn codes_at(&self, column: usize) -> Span {
        let part = self.starts.partition_point(|start| *start <= column) - 1;
        let codes = self.parts[part].codes_from((column - self.starts[part]) / PANEL);
        // Half of the cache, since other data should stay there.
        Span { address: codes.as_ptr().addr(), bytes: size_of_val(codes).min(cache::second_level_bytes() / 2) }
    }

    /// Computes the columns of `range`, whole panels.
    fn columns_of(&self, kernel: &Kernel, x: &LinearInput, range: Range<usize>, out: &mut Columns<'_>) {
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
                kernel.product_float(part, panels, &x.values, self.columns(), &mut out);
            }
        }
        if !self.bias.is_empty() {
            for row in 0..out.rows() {
                kernel.add_scaled(out.row_mut(row), &self.bias[range.clone()], 1.0);
            }
        }
    }
}
