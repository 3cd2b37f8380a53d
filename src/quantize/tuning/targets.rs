//! The activations of the full-precision model that the quantized one is compared with.

use crate::error::{Error, Result};
use crate::quantize::calibration::{Calibration, PassThrough};
use crate::quantize::context::OpenRun;
use crate::quantize::resume::{SavePace, Snapshot, SnapshotFile};

/// The residual stream of all windows after the last layer, in a file: one step needs few windows.
pub(super) struct Targets {
    snapshot: Snapshot,
    /// Where each window ends, in numbers.
    ends: Vec<usize>,
}

impl Targets {
    /// Passes all windows through the full-precision model, or continues from the snapshot of the run with that `key`.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; those of the forward pass and of the file.
    pub(super) fn compute(run: &OpenRun<'_>, key: u64) -> Result<Targets> {
        let (windows, folder) = (run.context.windows, run.files.folder());
        let (file, mut pace) = (SnapshotFile { path: run.files.reference(), key }, SavePace::new());
        let count = run.layers.config().layers.len();
        let found = Calibration::resume(run.layers, windows, folder, &file)?;
        let (mut calibration, first) = match found.filter(|(_, layer)| *layer <= count) {
            Some(found) => found,
            None => (Calibration::start(run.layers, windows, folder)?, 0),
        };
        for index in first..count {
            run.check()?;
            run.report("tuning: full precision", index, count);
            calibration.layer(index, &mut PassThrough(run.checkpoint))?;
            run.release_layer(index);
            if pace.is_due() || index + 1 == count {
                pace.save(|| calibration.save(&file, index + 1))?;
            }
        }
        drop(calibration);
        let width = run.layers.config().hidden;
        let ends = windows.iter().scan(0, |end, window| {
            *end += window.len() * width;
            Some(*end)
        });
        let ends: Vec<usize> = ends.collect();
        match file.open(ends.last().copied().unwrap_or(0))? {
            Some(snapshot) => Ok(Targets { snapshot, ends }),
            None => {
                let found = format!("{}, which has changed", file.path.display());
                Err(Error::argument("out", found, "files that no other process writes"))
            }
        }
    }

    /// Appends the residual stream `(tokens, hidden)` of a window to `out`.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn read(&self, window: usize, out: &mut Vec<f32>) -> Result<()> {
        let (start, at) = (if window == 0 { 0 } else { self.ends[window - 1] }, out.len());
        out.resize(at + self.ends[window] - start, 0.0);
        self.snapshot.read(start, &mut out[at..])
    }
}
