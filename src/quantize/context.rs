//! The shared context of a run: source and output, the calibration text, progress and cancellation.

use std::fmt;
use std::path::{Path, PathBuf};

use super::compute::Compute;
use super::importance::Importance;
use super::overrides::TensorFormats;
use super::pruning::Pruning;
use super::resume::ResumeFiles;
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::format::gguf::Gguf;
use crate::format::output::Sources;
use crate::model::LoadOptions;
use crate::model::hf::HfFolder;
use crate::model::layerwise::Layerwise;

/// Called with the name of a stage, the number of its units that are done and their total. Units differ between stages.
pub type StageProgress<'a> = &'a dyn Fn(&str, usize, usize);

/// Called often, and from one thread only. True stops the run with [`Error::Interrupted`].
pub type Interrupted<'a> = &'a (dyn Fn() -> bool + Sync);

/// Source, output, calibration text, progress and cancellation of a run.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct RunContext<'a> {
    /// A GGUF file, or a Hugging Face folder with its tokenizer.
    pub source: &'a Path,
    /// The GGUF file to write. The files of an interrupted run are in the same folder.
    pub out: &'a Path,
    /// Other files that were read for the run, such as documents. Like the source, they are never overwritten.
    pub read: &'a [PathBuf],
    /// Token ids of the calibration text, each window a separate sequence. Recipes that need no text ignore them.
    pub windows: &'a [Vec<u32>],
    /// Threads to compute with; `None` takes the default. The result does not depend on it.
    pub threads: Option<usize>,
    /// Whether an existing output is replaced.
    pub force: bool,
    /// The importance of columns for tensors that are rounded without calibration.
    pub importance: Option<&'a Importance>,
    /// The experts that stay, if some are left out.
    #[doc(hidden)]
    pub pruning: Option<&'a Pruning>,
    /// Called as the run proceeds.
    pub progress: StageProgress<'a>,
    /// Whether to stop.
    pub interrupted: Interrupted<'a>,
}

setters!(RunContext<'a> {
    with_threads(threads: impl Into<Option<usize>>),
    with_force(force: bool),
    with_progress(progress: StageProgress<'a>),
    with_interrupted(interrupted: Interrupted<'a>),
});

impl<'a> RunContext<'a> {
    /// A run with the default threads, without progress, that is never interrupted and never replaces a file.
    pub fn new(source: &'a Path, out: &'a Path, windows: &'a [Vec<u32>]) -> RunContext<'a> {
        let (progress, interrupted): (StageProgress<'_>, Interrupted<'_>) = (&|_, _, _| {}, &|| false);
        RunContext {
            source,
            out,
            read: &[],
            windows,
            threads: None,
            force: false,
            importance: None,
            pruning: None,
            progress,
            interrupted,
        }
    }

    /// How to load the model.
    pub(super) fn load_options(&self) -> LoadOptions {
        LoadOptions { threads: self.threads, ..LoadOptions::default() }
    }

    /// Opens the source and hands it to `act`.
    ///
    /// # Errors
    /// Those of `act`, [`Gguf::open`] and [`HfFolder::open`].
    pub(super) fn with_checkpoint<T>(&self, act: impl FnOnce(&dyn Checkpoint) -> Result<T>) -> Result<T> {
        self.with_source(|source| match self.pruning {
            Some(pruning) => act(pruning.apply(source)?.as_ref()),
            None => act(source),
        })
    }

    /// As [`RunContext::with_checkpoint`], with all experts.
    pub(super) fn with_source<T>(&self, act: impl FnOnce(&dyn Checkpoint) -> Result<T>) -> Result<T> {
        if self.source.is_dir() { act(&HfFolder::open(self.source)?) } else { act(&Gguf::open(self.source)?) }
    }

    /// Whether the output may be written, and the files of unfinished work.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if one of them is read, if the output is not a regular file, or exists and `force` is not set.
    pub(super) fn check_out(&self, files: &[ResumeFiles]) -> Result<()> {
        let sources = self.sources();
        sources.check("out", self.out)?;
        files.iter().flat_map(ResumeFiles::all).try_for_each(|file| sources.check_working_file("out", &file))?;
        if self.out.exists() && !self.force {
            remove_leftovers(self.out)?;
            let found = format!("{}, which exists", self.out.display());
            return Err(Error::argument("out", found, "a new file, or force"));
        }
        Ok(())
    }

    /// Everything that is read.
    pub(super) fn sources(&self) -> Sources {
        Sources::new(self.read.iter().map(PathBuf::as_path).chain([self.source]))
    }
}

impl fmt::Debug for RunContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunContext")
            .field("source", &self.source)
            .field("out", &self.out)
            .field("windows", &self.windows.len())
            .field("threads", &self.threads)
            .field("force", &self.force)
            .finish_non_exhaustive()
    }
}

/// Removes what a run has left that was killed when its output at `out` was complete.
///
/// # Errors
/// [`Error::Io`]
pub fn remove_leftovers(out: &Path) -> Result<()> {
    ResumeFiles::next_to(out).remove_if_done()
}

/// A run whose checkpoint is open.
#[derive(Clone, Copy)]
pub(super) struct OpenRun<'a> {
    pub(super) context: RunContext<'a>,
    pub(super) checkpoint: &'a dyn Checkpoint,
    pub(super) layers: &'a Layerwise,
    pub(super) formats: &'a TensorFormats,
    /// Where unfinished work is kept.
    pub(super) files: &'a ResumeFiles,
}

impl<'a> OpenRun<'a> {
    /// The threads and kernel of the model. Computations end early when the run is interrupted.
    pub(super) fn compute(&self) -> Compute<'a> {
        Compute::new(self.layers.pool(), self.layers.kernel()).until(self.context.interrupted)
    }

    /// Reports progress.
    pub(super) fn report(&self, stage: &str, done: usize, total: usize) {
        (self.context.progress)(stage, done, total);
    }

    /// Reports the layer that the stage begins.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    pub(super) fn enter_layer(&self, stage: &str, layer: usize) -> Result<()> {
        self.check()?;
        self.report(stage, layer, self.layers.config().layers.len());
        Ok(())
    }

    /// Whether the run may continue.
    ///
    /// # Errors
    /// [`Error::Interrupted`]
    pub(super) fn check(&self) -> Result<()> {
        if (self.context.interrupted)() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Releases the memory of a layer's tensors.
    pub(super) fn release_layer(&self, layer: usize) {
        let prefix = format!("blk.{layer}.");
        let names = self.checkpoint.names();
        names.iter().filter(|name| name.starts_with(&prefix)).for_each(|name| self.checkpoint.release(name));
    }
}
