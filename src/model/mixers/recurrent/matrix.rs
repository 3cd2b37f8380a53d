//! Recurrences whose state is a matrix per head: every position multiplies it with a gate and adds the product of a key and a
//! vector of columns, and reads it with a query.
//!
//! With the gated delta rule (Yang et al. 2024, arXiv 2412.06464) the vector is `beta (v - S^T k)`; with Mamba-2 (Dao and Gu
//! 2024, arXiv 2405.21060) it is `dt x`. The output `S'^T q` after the position is `gate S^T q + (k q) vector`, so a position
//! reads the state once, in the same pass that applies the position before it.

use std::cell::RefCell;

use super::{Run, panels_of_task, run_of};
use crate::kernels::{Kernel, StateUpdate};
use crate::model::batch::Input;
use crate::model::pass::Pass;
use crate::model::state::recurrent::{LayerStep, LogRows};
use crate::quant::packed::PANEL;

/// The sizes of a recurrence, and where its operands are in a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Heads of keys and queries.
    pub(super) groups: usize,
    /// Heads of values.
    pub(super) heads: usize,
    /// Width of a key.
    pub(super) rows: usize,
    /// Width of a value.
    pub(super) columns: usize,
    /// Gates of a head: one, or one per number of a key.
    pub(super) gates: usize,
    /// Whether consecutive heads share a head of keys; otherwise every nth does.
    pub(super) grouped: bool,
    /// Whether the state's answer to the key is subtracted from the value.
    pub(super) delta_rule: bool,
}

impl Shape {
    /// Panels of a head.
    pub(super) fn panels(&self) -> usize {
        self.columns.div_ceil(PANEL)
    }

    /// Width of a head's value in whole panels.
    pub(super) fn padded(&self) -> usize {
        self.panels() * PANEL
    }

    /// The parts of a row, in order: `(groups, rows)` keys, `(heads, gates)`; `(groups, rows)` queries; keys and queries times
    /// gates where a head has several; `(heads, padded columns)` values; `(heads)` factors of what is written; `(groups)`
    /// products of key and query. Returns where each starts, and the width.
    pub(super) fn parts(&self) -> Parts {
        let keys = self.groups * self.rows;
        let gate = keys;
        let query = gate + self.heads * self.gates;
        let gated = query + keys;
        let value = gated + if self.gates > 1 { 2 * keys } else { 0 };
        let beta = value + self.heads * self.padded();
        let product = beta + self.heads;
        Parts { gate, query, gated, value, beta, product, width: (product + self.groups).next_multiple_of(PANEL) }
    }

    /// The head of keys that a head of values reads.
    fn group(&self, head: usize) -> usize {
        if self.grouped { head / (self.heads / self.groups) } else { head % self.groups }
    }
}

/// Where the parts of a row start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    pub(super) gate: usize,
    pub(super) query: usize,
    pub(super) gated: usize,
    pub(super) value: usize,
    pub(super) beta: usize,
    pub(super) product: usize,
    pub(super) width: usize,
}

/// The workspace of one task, kept by the thread.
#[derive(Debug, Default)]
struct TaskWorkspace {
    /// A panel of the state, where the one in memory stays.
    panel: Vec<f32>,
    /// `(rows)`: a head's gate, in every row.
    gate: Vec<f32>,
}

thread_local! {
    static WORKSPACE: RefCell<TaskWorkspace> = RefCell::default();
}

/// Takes the panels of a layer's state through the rows of a run, `mixed (len, width)`. Writes to `columns (panels, 2, len,
/// 16)` what each row adds, and its output; `skip (heads)` times the value is added to the output.
pub(super) fn advance(
    pass: &Pass<'_>,
    shape: &Shape,
    step: &mut LayerStep<'_>,
    mixed: &[f32],
    len: usize,
    skip: &[f32],
    columns: &mut Vec<f32>,
) {
    let panel = shape.rows * PANEL;
    let count = panels_of_task(shape.heads * shape.panels(), pass.threads);
    let LayerStep { matrix, source, pending, log, .. } = step;
    let rows = Rows { shape, parts: shape.parts(), mixed, len, skip, records: log.is_some(), pending };
    let source = source.as_ref().map(|[_, matrix]| *matrix);
    pass.scope.for_each_chunk_with(matrix, count * panel, columns, count * 2 * len * PANEL, |i, matrix, columns| {
        WORKSPACE.with_borrow_mut(|work| {
            for (j, state) in matrix.chunks_exact_mut(panel).enumerate() {
                let index = i * count + j;
                if let Some(source) = source {
                    state.copy_from_slice(&source[index * panel..][..panel]);
                }
                rows.panel(pass.kernel, index, state, &mut columns[j * 2 * len * PANEL..][..2 * len * PANEL], work);
            }
        });
    });
    if let Some(log) = log {
        let Parts { query, width, .. } = rows.parts;
        for (vectors, row) in log.vectors.chunks_exact_mut(query).zip(mixed.chunks_exact(width)) {
            vectors.copy_from_slice(&row[..query]);
        }
        let size = len * PANEL;
        for (log, columns) in log.columns.chunks_exact_mut(size).zip(columns.chunks_exact(2 * size)) {
            log.copy_from_slice(&columns[..size]);
        }
    }
}

/// Applies the rows that are recorded to a layer's matrix, by one thread.
pub(super) fn settle(kernel: &Kernel, shape: &Shape, step: &mut LayerStep<'_>) {
    let pending = &step.pending;
    let rows = Rows { shape, parts: shape.parts(), mixed: &[], len: 0, skip: &[], records: false, pending };
    WORKSPACE.with_borrow_mut(|work| {
        for (index, state) in step.matrix.chunks_exact_mut(shape.rows * PANEL).enumerate() {
            rows.panel(kernel, index, state, &mut [], work);
        }
    });
}

/// The rows that a panel goes through.
struct Rows<'a> {
    shape: &'a Shape,
    parts: Parts,
    /// `(len, width)`
    mixed: &'a [f32],
    len: usize,
    /// `(heads)`, or empty.
    skip: &'a [f32],
    /// Whether the rows are recorded instead of applied.
    records: bool,
    pending: &'a LogRows<'a>,
}

impl Rows<'_> {
    fn panel(&self, kernel: &Kernel, index: usize, state: &mut [f32], columns: &mut [f32], work: &mut TaskWorkspace) {
        let (shape, parts, len) = (self.shape, &self.parts, self.len);
        let Shape { rows, gates, .. } = *shape;
        let (head, first) = (index / shape.panels(), index % shape.panels() * PANEL);
        let group = shape.group(head);
        let TaskWorkspace { panel, gate } = work;
        gate.resize(rows, 0.0);
        let (deltas, outputs) = columns.split_at_mut(len * PANEL);
        let (deltas, outputs) = (deltas.as_chunks_mut::<PANEL>().0, outputs.as_chunks_mut::<PANEL>().0);

        // The row before the current one, which is applied in the pass that reads the state for it: its vectors `(keys,
        // gates)`, and what it adds.
        let mut last: Option<(&[f32], [f32; PANEL])> = None;
        let recorded = &self.pending.columns[index * self.pending.rows * PANEL..][..self.pending.rows * PANEL];
        let recorded = recorded.as_chunks::<PANEL>().0;
        let update = |vectors: &[f32], state: &mut [f32], delta: &[f32; PANEL], reads, gate: &mut [f32]| {
            let mut sums = [[0.0; PANEL]; 2];
            let [a, b] = &mut sums;
            let own = &vectors[parts.gate + head * gates..][..gates];
            if gates == 1 {
                gate.fill(own[0]);
            } else {
                gate.copy_from_slice(own);
            }
            let update = StateUpdate { gate, key: &vectors[group * rows..][..rows], delta };
            kernel.advance_state(state, Some(update), reads, [a, b]);
            sums
        };
        for (vectors, delta) in self.pending.vectors.chunks_exact(parts.query).zip(recorded).take(self.pending.count) {
            if let Some((vectors, delta)) = last.replace((vectors, *delta)) {
                update(vectors, state, &delta, [&[], &[]], gate);
            }
        }
        for row in 0..len {
            let mixed = &self.mixed[row * parts.width..][..parts.width];
            // From the second recorded row on, a copy of the state continues.
            let state = match (self.records, row) {
                (false, _) | (true, 0) => &mut *state,
                (true, 1) => {
                    panel.clear();
                    panel.extend_from_slice(state);
                    panel.as_mut_slice()
                }
                (true, _) => panel.as_mut_slice(),
            };
            let (from_key, from_query) = match gates {
                1 => (group * rows, parts.query + group * rows),
                _ => (parts.gated + group * rows, parts.gated + (shape.groups + group) * rows),
            };
            let key = if shape.delta_rule { &mixed[from_key..][..rows] } else { &[] };
            let reads = [key, &mixed[from_query..][..rows]];
            let sums = match last {
                Some((vectors, delta)) => update(vectors, state, &delta, reads, gate),
                None => {
                    let mut sums = [[0.0; PANEL]; 2];
                    let [a, b] = &mut sums;
                    kernel.advance_state(state, None, reads, [a, b]);
                    sums
                }
            };
            let decay = if gates == 1 { mixed[parts.gate + head] } else { 1.0 };
            let (beta, product) = (mixed[parts.beta + head], mixed[parts.product + group]);
            let values = &mixed[parts.value + head * shape.padded() + first..][..PANEL];
            let (delta, output) = (&mut deltas[row], &mut outputs[row]);
            for lane in 0..PANEL {
                delta[lane] = match shape.delta_rule {
                    true => beta * (values[lane] - decay * sums[0][lane]),
                    false => beta * values[lane],
                };
                output[lane] = decay * sums[1][lane] + product * delta[lane];
                if let Some(skip) = self.skip.get(head) {
                    output[lane] += skip * values[lane];
                }
            }
            last = Some((mixed, *delta));
        }
        // The last row, unless it is recorded.
        if let Some((vectors, delta)) = last.filter(|_| !self.records) {
            update(vectors, state, &delta, [&[], &[]], gate);
        }
    }
}

/// Copies the output of head `head` in row `row` of the batch to `out (columns)`.
pub(super) fn output(shape: &Shape, runs: &[Run], columns: &[Vec<f32>], row: usize, head: usize, out: &mut [f32]) {
    let index = run_of(runs, row);
    let (run, panels) = (runs[index], shape.panels());
    for (panel, out) in out.chunks_mut(PANEL).enumerate() {
        let at = ((head * panels + panel) * 2 + 1) * run.len + row - run.row;
        out.copy_from_slice(&columns[index][at * PANEL..][..out.len()]);
    }
}

/// Takes the states of all sessions through their rows of `mixed (rows, width)`, into the runs' `columns`; `tail` replaces what
/// each remembers of earlier inputs.
pub(super) fn advance_all(
    context_parts: (&Pass<'_>, &mut [Input<'_>], usize),
    shape: &Shape,
    runs: &[Run],
    mixed: &[f32],
    skip: &[f32],
    columns: &mut [Vec<f32>],
    mut tail: impl FnMut(&mut LayerStep<'_>, &Run),
) {
    let (pass, inputs, layer) = context_parts;
    let width = shape.parts().width;
    for (run, columns) in runs.iter().zip(columns) {
        let Some(state) = inputs[run.input].session.state_mut() else { continue };
        let Some(mut step) = state.step(layer) else { continue };
        let own = &mixed[run.row * width..][..run.len * width];
        advance(pass, shape, &mut step, own, run.len, skip, columns);
        tail(&mut step, run);
        state.end_layer(layer);
    }
}
