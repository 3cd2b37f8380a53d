//! The part of a model that a process holds: all of it, the layers of a stage, or none.

use std::ops::Range;

use crate::model::weights::loader::layer_of;

/// What of a model is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) struct Held {
    /// Its layers.
    pub(in crate::model) layers: Range<usize>,
    /// Whether it turns tokens into the stream that the first layer reads.
    pub(in crate::model) embedding: bool,
    /// Whether it turns the stream after the last layer into logits.
    pub(in crate::model) head: bool,
}

impl Held {
    /// A model of `layers` layers as a whole.
    pub(in crate::model) fn whole(layers: usize) -> Held {
        Held { layers: 0..layers, embedding: true, head: true }
    }

    /// Nothing of a model: the driver of a pipeline only counts.
    pub(in crate::model) fn nothing() -> Held {
        Held { layers: 0..0, embedding: false, head: false }
    }

    /// The units of a model of `layers` layers: its layers, and the output as the last one.
    pub(in crate::model) fn units(units: &Range<usize>, layers: usize) -> Held {
        let own = units.start.min(layers)..units.end.min(layers);
        Held { layers: own, embedding: units.start == 0, head: units.end > layers }
    }

    /// Whether a tensor may belong to what is held: one of its layers, or one outside of them.
    pub(in crate::model) fn may_need(&self, tensor: &str) -> bool {
        match layer_of(tensor) {
            Some(layer) => self.layers.contains(&layer),
            None => self.embedding || self.head,
        }
    }

    /// Whether nothing is held.
    pub(in crate::model) fn is_nothing(&self) -> bool {
        self.layers.is_empty() && !self.embedding && !self.head
    }

    /// Whether the model is held as a whole.
    pub(in crate::model) fn is_whole(&self) -> bool {
        self.embedding && self.head
    }
}
