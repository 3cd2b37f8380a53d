//! The inputs that all mixers share.

use super::positions::Positions;
use crate::model::batch::{Batch, Input};
use crate::model::pass::Pass;

/// What a mixer reads besides its input: the rows of a pass, and the states of their sequences.
pub(in crate::model) struct MixerContext<'a, 'i> {
    pub(in crate::model) pass: &'a Pass<'a>,
    pub(in crate::model) positions: &'a Positions,
    pub(in crate::model) batch: &'a Batch,
    /// The inputs that the rows come from, with their sessions.
    pub(in crate::model) inputs: &'a mut [Input<'i>],
    /// Index of the layer.
    pub(in crate::model) layer: usize,
}
