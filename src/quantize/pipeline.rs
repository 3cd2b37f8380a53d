//! The pipeline: from a checkpoint to a GGUF file with quantized linear layers.
//!
//! Linear layers are quantized in the order in which tokens pass through them. Finished tensors go to a log next to the output.
//! When all are done the file is written under a temporary name and renamed.

pub(super) mod exceptions;
mod options;
mod quantizer;
mod report;
mod writer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use options::QuantizeOptions;
use quantizer::Quantizer;
pub use report::{ExpertCounts, Report, TensorReport};

use super::calibration::{Calibration, check_windows, read_rows};
use super::context::{OpenRun, RunContext};
use super::overrides::TensorFormats;
use super::pruning::Pruning;
use super::resume::{ResumeFiles, ResumeLog, SnapshotFile, run_key};
use super::tuning;
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::gguf::Metadata;
use crate::model::hf::HfFolder;
use crate::model::layerwise::Layerwise;

/// Quantizes the checkpoint `context.source` into the GGUF file `context.out`.
///
/// A run that is killed or interrupted leaves its work next to the output, in files with suffixes that begin with `.resume`.
/// The next run with the same source, options and windows continues from there and writes the same bytes.
///
/// # Errors
/// [`Error::InvalidArgument`] for options, if the output exists and `force` is not set, and for too little text;
/// [`Error::Malformed`] for tensors with numbers that are not finite; [`Error::Interrupted`]; those of
/// [`Gguf::open`](crate::format::gguf::Gguf::open),
/// [`HfFolder::open`], [`HfFolder::tokenizer`], [`Model::load`](crate::model::Model::load), and of writing.
pub fn quantize(context: &RunContext<'_>, options: &QuantizeOptions) -> Result<Report> {
    options.check()?;
    let files = ResumeFiles::next_to(context.out);
    context.check_out(std::slice::from_ref(&files))?;
    let report = run(context, &files, options)?;
    files.remove()?;
    Ok(report)
}

/// [`quantize`] without its checks, with unfinished work in `files`, which are left for the caller to remove.
pub(super) fn run(context: &RunContext<'_>, files: &ResumeFiles, options: &QuantizeOptions) -> Result<Report> {
    // Signals can be checked on this thread only. Once the answer was yes it stays yes, on every thread.
    let (this, stopped) = (std::thread::current().id(), AtomicBool::new(false));
    let interrupted = || {
        let is_stopped = || stopped.load(Ordering::Relaxed);
        if !is_stopped() && std::thread::current().id() == this && (context.interrupted)() {
            stopped.store(true, Ordering::Relaxed);
        }
        is_stopped()
    };
    let context = &RunContext { interrupted: &interrupted, ..*context };
    let metadata = match context.source.is_dir() {
        true => HfFolder::open(context.source)?.tokenizer()?,
        false => Metadata::new(),
    };
    context.with_checkpoint(|checkpoint| run_on(checkpoint, &metadata, context, files, options))
}

/// Whether a checkpoint can be tuned.
///
/// # Errors
/// [`Error::InvalidArgument`] for overrides that match no tensor; those of [`Gguf::open`](crate::format::gguf::Gguf::open), [`HfFolder::open`] and
/// [`Model::load`](crate::model::Model::load).
pub(super) fn can_tune(context: &RunContext<'_>, formats: &TensorFormats) -> Result<bool> {
    let check = |checkpoint: &dyn Checkpoint| {
        formats.check_names(checkpoint)?;
        let layers = Layerwise::load(checkpoint, &context.load_options())?;
        Ok(tuning::supports(checkpoint, layers.config()).is_ok())
    };
    context.with_checkpoint(check)
}

/// Quantizes an open checkpoint. `metadata` is added to its own.
fn run_on(
    checkpoint: &dyn Checkpoint,
    metadata: &Metadata,
    context: &RunContext<'_>,
    files: &ResumeFiles,
    options: &QuantizeOptions,
) -> Result<Report> {
    let started = Instant::now();
    options.formats.check_names(checkpoint)?;
    check_vectors(checkpoint)?;
    let layers = &Layerwise::load(checkpoint, &context.load_options())?;
    let run = OpenRun { context: *context, checkpoint, layers, formats: &options.formats, files };
    let (formats, exceptions) = exceptions::without_f16_scales(&run)?;
    let windows = if options.recipe.needs_text() { context.windows } else { &[] };
    let importance = context.importance.map(|importance| importance.check(checkpoint).map(|()| importance.digest()));
    let key = run_key(checkpoint, (&options.recipe, &formats, options.sparsity, importance.transpose()?), windows);
    let key = key ^ context.pruning.map_or(0, Pruning::digest);
    let mut log = ResumeLog::open(&files.log(), context.out, key)?;
    let run = OpenRun { formats: &formats, ..run };
    if options.tuning.is_some() {
        tuning::supports(checkpoint, layers.config())
            .map_err(|found| Error::argument("tune", found, "a model of plain decoder blocks, such as Llama's"))?;
    }
    if options.needs_text() {
        check_windows(layers, context.windows)?;
    }
    let mut quantizer = Quantizer::new(run, options, &mut log);
    if options.recipe.needs_text() {
        calibrate(&mut quantizer, &run, windows, key)?;
    }
    quantizer.solve_rest()?;
    // Scales and norms of a model whose weights are exact are the best already.
    let tuning = options.tuning.filter(|_| !quantizer::is_exact(&run, &log));
    if let Some(tuning) = &tuning {
        tuning::tune(&run, tuning, key, &mut log)?;
    }
    let mut report = writer::write(&run, options, tuning.is_some(), &log, metadata)?;
    report.add_notes(exceptions);
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Passes the windows through all layers, from the snapshot of an interrupted run if there is one.
fn calibrate(quantizer: &mut Quantizer<'_, '_>, run: &OpenRun<'_>, windows: &[Vec<u32>], key: u64) -> Result<()> {
    let (layers, folder) = (run.layers, run.files.folder());
    let snapshots = SnapshotFile { path: run.files.state(), key };
    let found = Calibration::resume(layers, windows, folder, &snapshots)?;
    let (mut calibration, first) = match found.filter(|(_, layer)| (0..*layer).all(|layer| quantizer.is_done(layer))) {
        Some(found) => found,
        None => (Calibration::start(layers, windows, folder)?, 0),
    };
    for index in first..layers.config().layers.len() {
        calibration.layer(index, quantizer)?;
        quantizer.finish_layer(index);
        calibration.save(&snapshots, index + 1)?;
    }
    quantizer.solve_output(&mut calibration)
}

/// Checks vectors for NaN and infinities. They go into the file unchanged, so nothing else checks them.
fn check_vectors(checkpoint: &dyn Checkpoint) -> Result<()> {
    for name in checkpoint.names() {
        let Some(tensor) = checkpoint.tensor(name).filter(|tensor| tensor.dims.len() == 1) else { continue };
        if !tensor.rows.block_type().is_supported() {
            continue;
        }
        let values = read_rows(&tensor, 0, 1)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("{} at index {at}", values[at]);
            return Err(Error::malformed(checkpoint.path(), Place::Tensor(name.to_owned()), found, "finite numbers"));
        }
    }
    Ok(())
}
