//! The rows that a stage hands to the next one: the residual stream, or all streams, and the vectors of the layers that follow.

use crate::model::buffer::Buffer;
use crate::model::config::Config;

/// The widths of what is handed over, in numbers.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Handover {
    hidden: usize,
    /// Residual streams.
    streams: usize,
    /// Numbers of the vector of each layer, or 0.
    per_layer: usize,
    layers: usize,
}

impl Handover {
    /// Of a model whose layers have vectors of `vectors` numbers together.
    pub(in crate::model) fn new(config: &Config, vectors: usize) -> Handover {
        let layers = config.layers.len();
        let streams = config.streams.map_or(1, |streams| streams.count);
        Handover { hidden: config.hidden, streams, per_layer: vectors / layers.max(1), layers }
    }

    /// Numbers of a row before layer `layer`.
    pub(in crate::model) fn width(&self, layer: usize) -> usize {
        self.hidden * self.streams + (self.layers - layer) * self.per_layer
    }

    /// Appends a row for each row of the stream `x (rows, hidden)`, or of `streams (streams, rows, hidden)` where there are several,
    /// with its vectors in `per_layer (rows, layers * per_layer)` from layer `layer` on.
    pub(in crate::model) fn pass_on(
        &self,
        layer: usize,
        [x, streams, per_layer]: [&[f32]; 3],
        rows: usize,
        out: &mut Vec<f32>,
    ) {
        let (hidden, vectors) = (self.hidden, self.layers * self.per_layer);
        let source = if self.streams > 1 { streams } else { x };
        for row in 0..rows {
            for stream in 0..self.streams {
                out.extend_from_slice(&source[(stream * rows + row) * hidden..][..hidden]);
            }
            if vectors > 0 {
                out.extend_from_slice(&per_layer[row * vectors..][layer * self.per_layer..vectors]);
            }
        }
    }

    /// The inverse of [`Handover::pass_on`] for `rows (rows, width)`.
    pub(in crate::model) fn receive(&self, layer: usize, rows: &[f32], [x, streams, per_layer]: [&mut Buffer; 3]) {
        let (hidden, vectors, width) = (self.hidden, self.layers * self.per_layer, self.width(layer));
        let count = rows.len() / width;
        x.resize(count * hidden);
        if self.streams > 1 {
            streams.resize(self.streams * count * hidden);
        }
        per_layer.resize(count * vectors);
        let target = if self.streams > 1 { streams } else { x };
        for (row, numbers) in rows.chunks_exact(width).enumerate() {
            let (own, rest) = numbers.split_at(self.streams * hidden);
            for (stream, own) in own.chunks_exact(hidden).enumerate() {
                target[(stream * count + row) * hidden..][..hidden].copy_from_slice(own);
            }
            // No layer of this stage reads the vectors of those before it.
            let vectors = &mut per_layer[row * vectors..][..vectors];
            vectors[layer * self.per_layer..].copy_from_slice(rest);
        }
    }
}
