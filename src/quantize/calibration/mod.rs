//! Calibration: the windows of a text pass through the model layer by layer, and the inputs of every linear layer are measured.

mod calibrate;
mod moments;
mod patched_checkpoint;
mod spill_buffer;
mod visitor;

pub(super) use calibrate::{Calibration, check_windows};
pub(super) use moments::{MIN_TOKENS, Moments};
pub(super) use patched_checkpoint::{PatchedCheckpoint, read_rows};
pub(super) use visitor::{PassThrough, Visitor};
