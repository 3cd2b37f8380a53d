//! The rows of a pass and their adapters: the low-rank products, which are added to the products of linear layers.
//!
//! Rows are grouped by adapter, in tiles of up to [`TILE_ROWS`] rows. A row's result has the same bits in any batch: each of
//! its sums is computed from that row and its adapter alone, in a fixed order. Rows without an adapter are not touched.

use std::sync::{Arc, Mutex, PoisonError};

use super::low_rank::{Adapter, LowRankLinear};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::model::buffer::Buffer;
use crate::model::linear::Linear;
use crate::quant::packed::PANEL;
use crate::threads::{Columns, Scope};

/// Rows that a task multiplies together.
const TILE_ROWS: usize = 8;
/// Panels that a task multiplies a tile with before it adds the result.
const TILE_PANELS: usize = 8;

/// Some rows of one adapter.
#[derive(Debug, Clone, Copy)]
struct Tile {
    /// Index of the adapter.
    adapter: usize,
    /// Index of the first row in the plan's list of rows.
    first: usize,
    count: usize,
}

/// The rows of a batch, or some of them, by adapter.
#[derive(Debug, Default)]
pub(in crate::model) struct RowPlan {
    /// `(rows)`: the number of each row's adapter, counted from 1, or 0.
    of_row: Vec<u32>,
    /// The rows that have an adapter, grouped by adapter.
    rows: Vec<u32>,
    tiles: Vec<Tile>,
}

impl RowPlan {
    /// Plans rows whose adapters have these numbers, counted from 1 up to `adapters`; 0 stands for none.
    fn fill(&mut self, adapters: usize, of_row: impl Iterator<Item = u32>) {
        self.of_row.clear();
        self.of_row.extend(of_row);
        self.rows.clear();
        self.tiles.clear();
        for adapter in 0..adapters {
            let start = self.rows.len();
            let own = self.of_row.iter().enumerate().filter(|(_, of)| **of as usize == adapter + 1);
            self.rows.extend(own.map(|(row, _)| row as u32));
            let end = self.rows.len();
            let firsts = (start..end).step_by(TILE_ROWS);
            self.tiles.extend(firsts.map(|first| Tile { adapter, first, count: TILE_ROWS.min(end - first) }));
        }
    }

    /// The rows of a tile.
    fn rows_of(&self, tile: &Tile) -> &[u32] {
        &self.rows[tile.first..][..tile.count]
    }
}

/// The workspace of a pass with adapters.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// The adapters of the step.
    adapters: Vec<Arc<Adapter>>,
    /// `(inputs)`: the number of each input's adapter, counted from 1, or 0.
    of_input: Vec<u32>,
    plan: RowPlan,
    /// The rows whose logits are wanted.
    wanted: RowPlan,
    /// `(tiles, TILE_ROWS, width)`: rows between the two matrices of an adapter.
    inner: Mutex<Buffer>,
}

impl Workspace {
    /// Prepares for a step whose inputs have these adapters.
    pub(in crate::model) fn start<'a>(&mut self, inputs: impl Iterator<Item = Option<&'a Arc<Adapter>>>) {
        self.adapters.clear();
        self.of_input.clear();
        for adapter in inputs {
            let number = adapter.map_or(0, |adapter| {
                let known = self.adapters.iter().position(|known| known.id() == adapter.id());
                1 + known.unwrap_or_else(|| {
                    self.adapters.push(adapter.clone());
                    self.adapters.len() - 1
                })
            });
            self.of_input.push(number as u32);
        }
    }

    /// Plans a batch whose rows come from these inputs, and says whether their logits are wanted. Allocates its memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(in crate::model) fn plan(&mut self, rows: impl Iterator<Item = (usize, bool)> + Clone) -> Result<()> {
        if self.adapters.is_empty() {
            return Ok(());
        }
        let of_input = &self.of_input;
        self.plan.fill(self.adapters.len(), rows.clone().map(|(input, _)| of_input[input]));
        let wanted = rows.filter(|(_, wanted)| *wanted);
        self.wanted.fill(self.adapters.len(), wanted.map(|(input, _)| of_input[input]));
        // Of some of the rows there are at most as many tiles: a whole one for every TILE_ROWS rows, and one per adapter.
        let rows = self.plan.rows.len();
        let tiles = rows.min(rows / TILE_ROWS + self.adapters.len());
        let width = self.adapters.iter().map(|adapter| adapter.width()).max().unwrap_or(0);
        self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).reserve(tiles * TILE_ROWS * width)
    }

    /// The adapters of the batch's rows.
    pub(in crate::model) fn rows(&self) -> AdapterRows<'_> {
        AdapterRows((!self.adapters.is_empty()).then_some(Active {
            adapters: &self.adapters,
            plan: &self.plan,
            wanted: &self.wanted,
            inner: &self.inner,
        }))
    }

    /// Releases the adapters after a step.
    pub(in crate::model) fn end(&mut self) {
        self.adapters.clear();
    }
}

/// The adapters of the rows of a pass. Without adapters it costs nothing.
#[derive(Clone, Copy, Default)]
pub(in crate::model) struct AdapterRows<'a>(Option<Active<'a>>);

#[derive(Clone, Copy)]
struct Active<'a> {
    adapters: &'a [Arc<Adapter>],
    plan: &'a RowPlan,
    wanted: &'a RowPlan,
    inner: &'a Mutex<Buffer>,
}

impl<'a> AdapterRows<'a> {
    /// The rows whose logits are wanted.
    pub(in crate::model) fn wanted(self) -> AdapterRows<'a> {
        AdapterRows(self.0.map(|active| Active { plan: active.wanted, ..active }))
    }

    /// Some of the rows, by their numbers. `plan` is overwritten.
    pub(in crate::model) fn select<'b>(
        self,
        rows: impl Iterator<Item = usize>,
        plan: &'b mut RowPlan,
    ) -> AdapterRows<'b>
    where
        'a: 'b,
    {
        AdapterRows(self.0.map(|active| {
            plan.fill(active.adapters.len(), rows.map(|row| active.plan.of_row[row]));
            Active { plan: &*plan, ..active }
        }))
    }

    /// Adds what the adapters of the rows add to the embedding of `token` in row `row`, to `x (columns)`.
    pub(in crate::model) fn embed(&self, kernel: &Kernel, row: usize, token: usize, x: &mut [f32]) {
        let Some(active) = self.0 else { return };
        let adapter = (active.plan.of_row[row] as usize).checked_sub(1).map(|number| &active.adapters[number]);
        let Some(table) = adapter.and_then(|adapter| adapter.embedding()) else { return };
        let weights = &table.weights[token * table.rank..][..table.rank];
        for (weight, direction) in weights.iter().zip(table.directions.chunks_exact(x.len())) {
            kernel.add_scaled(x, direction, *weight);
        }
    }

    /// Adds what the adapters add to the product of `layer` and `x (rows, columns)`, to `out (rows, layer.width())`.
    pub(in crate::model) fn add(
        &self,
        scope: &Scope<'_>,
        threads: usize,
        kernel: &Kernel,
        layer: &Linear,
        x: &[f32],
        out: &mut Buffer,
    ) {
        let (Some(active), Some(adaptable)) = (self.0, layer.adaptable()) else { return };
        let Active { adapters, plan, inner, .. } = active;
        let of_tile = |tile: &Tile| adapters[tile.adapter].linear(adaptable.id);
        let width = plan.tiles.iter().filter_map(of_tile).map(LowRankLinear::width).max().unwrap_or(0);
        if width == 0 {
            return;
        }
        // The narrow products.
        let size = TILE_ROWS * width;
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.resize(plan.tiles.len() * size);
        scope.for_each_chunk(&mut inner, size, |i, chunk| {
            let tile = &plan.tiles[i];
            if let Some(own) = of_tile(tile) {
                narrow(kernel, own, x, layer.columns(), plan.rows_of(tile), chunk);
            }
        });
        // The products with the second matrices, in columns as in the layer's own product.
        let inner = &**inner;
        let rows = out.len() / layer.width();
        let step = (layer.width() / PANEL).div_ceil(threads * 4).next_multiple_of(2) * PANEL;
        let mut all = Columns::whole(out, rows, layer.width());
        scope.for_each_columns(&mut all, step, |_, out| {
            for (tile, inner) in plan.tiles.iter().zip(inner.chunks_exact(size)) {
                if let Some(own) = of_tile(tile) {
                    widen(kernel, own, layer, inner, plan.rows_of(tile), out);
                }
            }
        });
    }
}

/// Writes the products of the first matrices and `rows` of `x (rows, columns)` to `out`: for each part `(TILE_ROWS, its width)`.
fn narrow(kernel: &Kernel, own: &LowRankLinear, x: &[f32], columns: usize, rows: &[u32], out: &mut [f32]) {
    let mut at = 0;
    for part in own.parts.iter().flatten() {
        let width = part.width();
        // Consecutive rows are multiplied together.
        let mut done = 0;
        for run in rows.chunk_by(|row, next| row + 1 == *next) {
            let x = &x[run[0] as usize * columns..][..run.len() * columns];
            let out = &mut out[at + done * width..][..run.len() * width];
            let mut out = Columns::whole(out, run.len(), width);
            kernel.product_float(&part.down, 0..part.down.panels(), x, columns, &mut out);
            done += run.len();
        }
        at += TILE_ROWS * width;
    }
}

/// Adds the products of the second matrices and `inner`, which [`narrow`] has written, to the columns of `out` in `rows`.
fn widen(kernel: &Kernel, own: &LowRankLinear, layer: &Linear, inner: &[f32], rows: &[u32], out: &mut Columns<'_>) {
    let (mut at, range) = (0, out.range());
    for (number, part) in own.parts.iter().enumerate() {
        let Some(part) = part else { continue };
        let x = &inner[at..][..TILE_ROWS * part.width()];
        at += TILE_ROWS * part.width();
        let start = layer.start(number);
        let (first, last) = (range.start.max(start), range.end.min(start + part.up.panels() * PANEL));
        for column in (first..last).step_by(TILE_PANELS * PANEL) {
            let columns = (TILE_PANELS * PANEL).min(last - column);
            let mut sums = [0.0; TILE_ROWS * TILE_PANELS * PANEL];
            let sums = &mut sums[..rows.len() * columns];
            let panels = (column - start) / PANEL..(column - start + columns) / PANEL;
            let mut tile = Columns::whole(sums, rows.len(), columns);
            kernel.product_float(&part.up, panels, x, part.width(), &mut tile);
            let mut out = out.narrow(column..column + columns);
            for (row, sums) in rows.iter().zip(sums.chunks_exact(columns)) {
                kernel.add_scaled(out.row_mut(*row as usize), sums, 1.0);
            }
        }
    }
}
