//! The interface that calibration calls where a linear layer reads its input.

use super::moments::Moments;
use crate::error::Result;
use crate::format::Checkpoint;
use crate::model::layerwise::Site;

/// Receives the moments of a site's inputs and provides the weights with which the windows continue.
pub(in crate::quantize) trait Visitor {
    /// Whether the moments of the site's inputs are needed.
    fn wants(&self, layer: usize, site: Site) -> bool;

    /// Quantizes the site's tensors. `moments` is `None` if they were not wanted.
    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()>;

    /// The checkpoint, with quantized weights where there are any.
    fn checkpoint(&self) -> &dyn Checkpoint;

    /// Called before each window of a site. An error ends the calibration.
    fn step(&self, layer: usize, site: Site, window: usize) -> Result<()>;
}

/// A visitor that changes nothing: the windows pass through the checkpoint as it is.
pub(in crate::quantize) struct PassThrough<'a>(pub(in crate::quantize) &'a dyn Checkpoint);

impl Visitor for PassThrough<'_> {
    fn wants(&self, _: usize, _: Site) -> bool {
        false
    }

    fn visit(&mut self, _: usize, _: Site, _: Option<Moments>) -> Result<()> {
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        self.0
    }

    fn step(&self, _: usize, _: Site, _: usize) -> Result<()> {
        Ok(())
    }
}
