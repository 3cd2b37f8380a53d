//! The whole way: a checkpoint in, a GGUF file of INT4 layers out.
//!
//! Linear layers are quantized in the order in which tokens go through them, and what is done is kept in a journal beside
//! the output. When all is done the file is written, under another name until it is whole.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use super::calibrate::{Calibration, Moments, Visitor};
use super::compute::Compute;
use super::fold;
use super::journal::{Journal, key};
use super::overlay::{Overlay, read_rows};
use super::policy::{Policy, Stored, is_linear};
use super::problem::{Format, Problem, Solution};
use super::report::{Report, TensorReport};
use super::tune::{self, Tuning};
use super::{awq, gptq, rtn, signround};
use crate::error::{Error, Place, Result};
use crate::format::gguf::{Gguf, Metadata};
use crate::format::{Checkpoint, Tensor};
use crate::model::LoadOptions;
use crate::model::convert::Job;
use crate::model::hf::HfFolder;
use crate::model::layerwise::{Layerwise, Site};

/// Tokens below which the moments of a layer's inputs say nothing: its weights are rounded then.
pub(super) const FEWEST_TOKENS: usize = 64;
/// Tokens below which a text is no calibration.
const LEAST_TEXT: usize = 512;
/// The ends of all files in which a run keeps what is done, the journal's first.
const WORK: [&str; 6] =
    [".resume", ".resume-state", ".resume-reference", ".resume-tuning", ".resume-new", ".bits.resume"];
/// Units of progress of one layer.
const UNITS: usize = 1000;

/// How a layer's codes are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Recipe {
    /// Rounding to the nearest code.
    Rtn {
        /// Whether the scale is searched.
        search: bool,
    },
    /// Rounding column by column, errors made up for by later columns, and then codes and scales fitted to each other.
    Gptq(gptq::Options),
    /// Columns scaled by their inputs before rounding, with clipped ranges, or with GPTQ where options for it are given.
    Awq(Option<gptq::Options>),
    /// Rounding learned by signed steps.
    Signround(signround::Options),
}

impl Recipe {
    /// The name by which users know it.
    pub fn name(&self) -> &'static str {
        match self {
            Recipe::Rtn { .. } => "rtn",
            Recipe::Gptq(_) => "gptq",
            Recipe::Awq(None) => "awq",
            Recipe::Awq(Some(_)) => "awq+gptq",
            Recipe::Signround(_) => "signround",
        }
    }

    /// Whether it looks at the inputs of layers, so that a text is needed.
    pub fn needs_text(&self) -> bool {
        !matches!(self, Recipe::Rtn { .. })
    }

    /// Whether columns are scaled before rounding.
    fn folds(&self) -> bool {
        matches!(self, Recipe::Awq(_))
    }

    fn solve(&self, problem: &Problem<'_>, format: &Format, compute: &Compute<'_>) -> Solution {
        match self {
            Recipe::Rtn { search } => rtn::solve(problem, format, *search, compute),
            Recipe::Gptq(options) | Recipe::Awq(Some(options)) => gptq::solve(problem, format, options, compute),
            Recipe::Awq(None) => awq::solve(problem, format, compute),
            Recipe::Signround(options) => signround::solve(problem, format, options, compute),
        }
    }
}

/// What to make of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// How codes are found.
    pub recipe: Recipe,
    /// How scales and norms are tuned in the end, if they are.
    pub tune: Option<tune::Options>,
    /// Which tensor becomes what.
    pub policy: Policy,
    /// Threads; otherwise as many as pay off. The result does not depend on them.
    pub threads: Option<usize>,
    /// Whether a file that is there is replaced.
    pub force: bool,
}

impl Options {
    /// The name by which users know the way.
    pub fn name(&self) -> String {
        format!("{}{}", self.recipe.name(), if self.tune.is_some() { "+tune" } else { "" })
    }

    /// Whether a text is needed.
    pub fn needs_text(&self) -> bool {
        self.recipe.needs_text() || self.tune.is_some()
    }
}

/// Told what is being done, how much is done and how much there is, in units of no meaning.
pub type Progress<'a> = &'a dyn Fn(&str, usize, usize);

/// Quantizes the checkpoint at `source`, a GGUF file or a folder of Hugging Face with its tokenizer, into a GGUF file at
/// `out`. `windows` are token ids of a text, each window a sequence of its own; recipes that need no text ignore them.
///
/// When a run is killed, or `interrupted` says yes, what is done stays beside `out` in files whose ends begin with
/// `.resume`, and the next run with the same source, options and windows goes on there, to the same bytes.
///
/// # Errors
/// [`Error::InvalidArgument`] for options, when `out` is there and `force` is not set, and for too little text;
/// [`Error::Malformed`] for tensors with numbers that are not finite; [`Error::Interrupted`]; those of [`Gguf::open`],
/// [`HfFolder::open`], [`HfFolder::tokenizer`], [`Model::load`](crate::model::Model::load), and of writing.
pub fn quantize(
    source: &Path,
    out: &Path,
    options: &Options,
    windows: &[Vec<u32>],
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Report> {
    options.policy.check()?;
    check_out(source, out, options.force)?;
    let report = make(source, out, out, options, windows, progress, interrupted)?;
    remove(&work(out))?;
    Ok(report)
}

/// Whether a file may be written as `out`.
///
/// # Errors
/// [`Error::InvalidArgument`]
pub(super) fn check_out(source: &Path, out: &Path, force: bool) -> Result<()> {
    let whole = |path: &Path| path.canonicalize().ok();
    let refused =
        |what, expected: &str| Err(Error::argument("out", format_args!("{}, which {what}", out.display()), expected));
    match whole(out) {
        Some(there) if whole(source).is_some_and(|source| source == there) => refused("is the source", "another file"),
        Some(_) if !force => refused("exists", "a new file, or force"),
        _ => Ok(()),
    }
}

/// The files in which what is done may be kept beside `out`.
pub(super) fn work(out: &Path) -> Vec<PathBuf> {
    WORK.map(|more| beside(out, more)).to_vec()
}

/// [`quantize`] without the checks, with what is done beside `work` instead of `out`. It stays there, in [`work`].
pub(super) fn make(
    source: &Path,
    out: &Path,
    work: &Path,
    options: &Options,
    windows: &[Vec<u32>],
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Report> {
    // Asked on this thread alone, as signals are; and an answer is not forgotten, whoever asks next.
    let (this, stopped) = (std::thread::current().id(), AtomicBool::new(false));
    let interrupted = || {
        let is_stopped = || stopped.load(Ordering::Relaxed);
        if !is_stopped() && std::thread::current().id() == this && interrupted() {
            stopped.store(true, Ordering::Relaxed);
        }
        is_stopped()
    };
    let files = (out, work);
    if source.is_dir() {
        let folder = HfFolder::open(source)?;
        let more = folder.tokenizer()?;
        quantize_checkpoint(&folder, &more, files, options, windows, progress, &interrupted)
    } else {
        quantize_checkpoint(&Gguf::open(source)?, &Metadata::new(), files, options, windows, progress, &interrupted)
    }
}

/// Whether a checkpoint can be tuned.
///
/// # Errors
/// [`Error::InvalidArgument`] for a policy of another checkpoint; those of [`Gguf::open`], [`HfFolder::open`] and
/// [`Model::load`](crate::model::Model::load).
pub(super) fn can_tune(source: &Path, policy: &Policy, load: &LoadOptions) -> Result<bool> {
    let of = |checkpoint: &dyn Checkpoint| {
        policy.check_names(checkpoint)?;
        let layers = Layerwise::load(checkpoint, load)?;
        Ok(tune::supports(checkpoint, layers.config()).is_ok())
    };
    if source.is_dir() { of(&HfFolder::open(source)?) } else { of(&Gguf::open(source)?) }
}

/// Removes files of which those that are not there are none.
pub(super) fn remove(files: &[PathBuf]) -> Result<()> {
    for file in files.iter().filter(|file| file.exists()) {
        std::fs::remove_file(file).map_err(|source| Error::io(file, source))?;
    }
    Ok(())
}

fn quantize_checkpoint(
    checkpoint: &dyn Checkpoint,
    more: &Metadata,
    (out, work): (&Path, &Path),
    options: &Options,
    windows: &[Vec<u32>],
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Report> {
    let started = Instant::now();
    options.policy.check_names(checkpoint)?;
    check_vectors(checkpoint)?;
    let all_windows = windows;
    let windows = if options.recipe.needs_text() { windows } else { &[] };
    let key = key(checkpoint, format!("{:?}", (&options.recipe, &options.policy)), windows);
    let journal = Journal::open(work, key)?;
    let layers = Layerwise::load(checkpoint, &LoadOptions { threads: options.threads, ..LoadOptions::default() })?;
    let compute = Compute::new(layers.pool(), layers.kernel()).until(interrupted);
    let mut run = Run {
        checkpoint,
        overlay: Overlay::new(checkpoint),
        options,
        journal,
        compute,
        progress,
        interrupted,
        windows: windows.len(),
        layers: layers.config().layers.len(),
    };
    let folder = match work.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if options.tune.is_some() {
        tune::supports(checkpoint, layers.config())
            .map_err(|found| Error::argument("tune", found, "a model of plain decoder blocks, such as Llama's"))?;
    }
    if options.needs_text() {
        check_windows(&layers, all_windows)?;
    }
    if options.recipe.needs_text() {
        let state = beside(work, ".resume-state");
        let found = Calibration::resume(&layers, windows, folder, &state, key)?;
        let (mut calibration, first) = match found.filter(|(_, layer)| (0..*layer).all(|layer| run.is_done(layer))) {
            Some(found) => found,
            None => (Calibration::start(&layers, windows, folder)?, 0),
        };
        for index in first..run.layers {
            calibration.layer(index, &mut run)?;
            run.overlay.clear();
            run.release(index);
            calibration.save(&state, key, index + 1)?;
        }
    }
    run.rest()?;
    if let Some(options) = &options.tune {
        let policy = &run.options.policy;
        let tuning =
            Tuning { checkpoint, layers: &layers, policy, windows: all_windows, work, folder, progress, interrupted };
        tuning.run(options, key, &mut run.journal)?;
    }
    let mut report = run.write(more, out)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// A file beside `out` with more after its name.
pub(super) fn beside(out: &Path, more: &str) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(more);
    out.with_file_name(name)
}

/// Vectors go into the file as they are, so nothing else would find out about them.
fn check_vectors(checkpoint: &dyn Checkpoint) -> Result<()> {
    for name in checkpoint.names() {
        let Some(tensor) = checkpoint.tensor(name).filter(|tensor| tensor.dims.len() == 1) else { continue };
        if !tensor.rows.block_type().is_supported() {
            continue;
        }
        let values = read_rows(&tensor, 0, 1)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let found = format_args!("{} at index {at}", values[at]).to_string();
            return Err(Error::malformed(checkpoint.path(), Place::Tensor(name.to_owned()), found, "finite numbers"));
        }
    }
    Ok(())
}

pub(super) fn check_windows(layers: &Layerwise, windows: &[Vec<u32>]) -> Result<()> {
    let tokens: usize = windows.iter().map(Vec::len).sum();
    if tokens < LEAST_TEXT {
        let expected = format_args!("at least {LEAST_TEXT}, better 50000").to_string();
        return Err(Error::argument("calibration", format_args!("{tokens} tokens"), expected));
    }
    let (longest, context) = (windows.iter().map(Vec::len).max().unwrap_or(0), layers.context());
    if longest > context {
        return Err(Error::argument("window", format_args!("{longest} tokens"), format_args!("at most {context}")));
    }
    match windows.iter().flatten().find(|token| **token as usize >= layers.vocabulary()) {
        Some(token) => Err(Error::argument("token", token, format_args!("an id below {}", layers.vocabulary()))),
        None => Ok(()),
    }
}

/// A run in progress.
struct Run<'a> {
    checkpoint: &'a dyn Checkpoint,
    overlay: Overlay<'a>,
    options: &'a Options,
    journal: Journal,
    compute: Compute<'a>,
    progress: Progress<'a>,
    interrupted: &'a (dyn Fn() -> bool + Sync),
    windows: usize,
    layers: usize,
}

/// Rows of a tensor that are solved together: all of it, or an expert's.
struct Piece {
    name: String,
    /// Number of the expert, or 0.
    part: usize,
    first: usize,
    rows: usize,
    columns: usize,
    stored: Stored,
}

impl Run<'_> {
    /// Whether all of a layer is in the journal.
    fn is_done(&self, layer: usize) -> bool {
        let prefix = format!("blk.{layer}.");
        let names = self.checkpoint.names().into_iter().filter(|name| name.starts_with(&prefix));
        names.filter_map(|name| Some((name, self.checkpoint.tensor(name)?.dims))).all(|(name, dims)| {
            let mut parts = 0..dims.iter().skip(2).product();
            let is_solved = matches!(self.options.policy.stored(name, &dims), Stored::Solved(_));
            !is_solved || parts.all(|part| self.journal.description(name, part).is_some())
        })
    }

    /// The pieces of tensors at a site.
    fn pieces(&self, layer: usize, site: Site) -> Vec<Piece> {
        let names = site.tensors().into_iter().map(|name| format!("blk.{layer}.{name}"));
        let piece = |name: String| {
            let tensor = self.checkpoint.tensor(&name)?;
            let part = site.expert().unwrap_or(0);
            let stored = self.options.policy.stored(&name, &tensor.dims);
            let (columns, rows) = (*tensor.dims.first()?, *tensor.dims.get(1)?);
            Some(Piece { name, part, first: part * rows, rows, columns, stored })
        };
        names.filter_map(piece).collect()
    }

    /// Finds the codes of a piece, with its columns times `factors` if there are any, and adds them to the journal.
    fn solve(
        &mut self,
        piece: &Piece,
        format: &Format,
        tensor: &Tensor<'_>,
        moments: Option<&Moments>,
        factors: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let started = Instant::now();
        let fault = |error: Error| match error {
            Error::InvalidArgument { name, found, expected } => {
                let what = if name == "weights" { found } else { format!("{found} among the moments of its inputs") };
                Error::malformed(self.checkpoint.path(), Place::Tensor(piece.name.clone()), what, expected)
            }
            other => other,
        };
        let weights = read_rows(tensor, piece.first, piece.rows)?;
        let known = moments.filter(|moments| moments.tokens >= FEWEST_TOKENS);
        let (hessian, magnitude) = known.map_or((&[][..], &[][..]), |known| (&known.hessian, &known.magnitude));
        let plain = Problem::new(&weights, piece.rows, piece.columns, hessian, magnitude).map_err(fault)?;
        let scaled =
            factors.map(|factors| (awq::scale_columns(&weights, factors), awq::scale_moments(&plain, factors)));
        let problem = match &scaled {
            Some((weights, (hessian, magnitude))) => Problem { weights, hessian, magnitude, ..plain },
            None => plain,
        };
        let recipe = &self.options.recipe;
        let name = match moments {
            Some(moments) if known.is_none() => format!("rtn ({} tokens of the text came here)", moments.tokens),
            None if recipe.needs_text() => "rtn".to_owned(),
            _ => recipe.name().to_owned(),
        };
        let solution = recipe.solve(&problem, format, &self.compute);
        let decoded = solution.decode(format, piece.columns);
        let error = self.compute.error(&problem, &decoded);
        // What was computed after that is no solution.
        self.check()?;
        let description = json!({
            "name": piece.name,
            "part": piece.part,
            "recipe": name,
            "relative_error": error,
            "seconds": started.elapsed().as_secs_f64(),
        });
        self.journal.add(&piece.name, piece.part, description, &solution.encode(format, piece.columns))?;
        Ok(decoded)
    }

    fn check(&self) -> Result<()> {
        if (self.interrupted)() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// The factors of a site's columns, found if they are not in the journal; `None` where the recipe or the model has none.
    fn factors(
        &mut self,
        layer: usize,
        site: Site,
        pieces: &[Piece],
        moments: Option<&Moments>,
    ) -> Result<Option<Vec<f32>>> {
        let Some(norm) = fold::norm(self.checkpoint, layer, site).filter(|_| self.options.recipe.folds()) else {
            return Ok(None);
        };
        if let Some(moments) = moments.filter(|_| self.journal.description(&format!("{norm}.weight"), 0).is_none()) {
            let mut layers = Vec::new();
            for piece in pieces {
                if let (Stored::Solved(format), Some(tensor)) = (piece.stored, self.checkpoint.tensor(&piece.name)) {
                    layers.push((read_rows(&tensor, piece.first, piece.rows)?, format));
                }
            }
            fold::fold(self.checkpoint, &norm, &layers, moments, &mut self.journal, &self.compute)?;
        }
        fold::factors(self.checkpoint, &norm, &self.journal)
    }

    /// What no token went through, such as an embedding that is wanted in four bits.
    fn rest(&mut self) -> Result<()> {
        let names: Vec<String> = self.checkpoint.names().into_iter().map(str::to_owned).collect();
        for (done, name) in names.iter().enumerate() {
            let Some(tensor) = self.checkpoint.tensor(name) else { continue };
            let Stored::Solved(format) = self.options.policy.stored(name, &tensor.dims) else { continue };
            let (columns, rows) = (tensor.dims[0], tensor.dims[1]);
            for part in 0..tensor.dims.iter().skip(2).product() {
                self.check()?;
                (self.progress)("quantize", done, names.len());
                if self.journal.description(name, part).is_none() {
                    let stored = Stored::Solved(format);
                    let piece = Piece { name: name.clone(), part, first: part * rows, rows, columns, stored };
                    self.solve(&piece, &format, &tensor, None, None)?;
                }
            }
            self.checkpoint.release(name);
        }
        Ok(())
    }

    /// Gives back the memory of a layer that is done.
    fn release(&self, layer: usize) {
        let prefix = format!("blk.{layer}.");
        self.checkpoint
            .names()
            .iter()
            .filter(|name| name.starts_with(&prefix))
            .for_each(|name| self.checkpoint.release(name));
    }

    /// Writes the file and reports on its tensors.
    fn write(&self, more: &Metadata, out: &Path) -> Result<Report> {
        let stored = |name: &str, tensor: &Tensor<'_>| self.options.policy.stored(name, &tensor.dims).block_type();
        let made = |name: &str| {
            if self.options.tune.is_some()
                && let Some(bytes) = self.journal.blocks(&tune::tuned(name), 0)?
            {
                return Ok(Some(bytes));
            }
            let mut bytes = self.journal.blocks(name, 0)?;
            for part in 1.. {
                let Some(more) = self.journal.blocks(name, part)? else { break };
                bytes.get_or_insert_default().extend(more);
            }
            Ok(bytes)
        };
        let file_type = self.options.policy.grid.block_type();
        let job =
            Job { checkpoint: self.checkpoint, more, file_type, stored: &stored, made: &made, pool: self.compute.pool };
        job.write(out, None)?;
        let size = out.metadata().map_err(|source| Error::io(out, source))?.len();
        let mut report = Report::new(self.checkpoint.path(), out, &self.options.name(), size);
        for name in self.checkpoint.names() {
            if let Some(tensor) = self.checkpoint.tensor(name).filter(|tensor| tensor.dims.len() > 1) {
                report.add(self.tensor_report(name, &tensor));
            }
        }
        Ok(report)
    }

    fn tensor_report(&self, name: &str, tensor: &Tensor<'_>) -> TensorReport {
        let stored = self.options.policy.stored(name, &tensor.dims);
        let parts: Vec<_> = (0..).map_while(|part| self.journal.description(name, part)).collect();
        let number = |key: &str| parts.iter().filter_map(|part| part[key].as_f64()).sum::<f64>();
        let mut recipes: Vec<String> =
            parts.iter().filter_map(|part| Some(part["recipe"].as_str()?.to_owned())).collect();
        recipes.dedup();
        TensorReport {
            name: name.to_owned(),
            block_type: stored.block_type(),
            group: if let Stored::Solved(format) = stored { format.group } else { stored.block_type().block_len() },
            recipe: if recipes.is_empty() { "encoded".to_owned() } else { recipes.join(", ") },
            relative_error: (!parts.is_empty()).then(|| number("relative_error") / parts.len() as f64),
            seconds: number("seconds"),
            weights: tensor.dims.iter().product(),
            linear: is_linear(name.strip_suffix(".weight").unwrap_or(name)),
        }
    }
}

impl Visitor for Run<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        let open = |piece: &Piece| {
            matches!(piece.stored, Stored::Solved(_)) && self.journal.description(&piece.name, piece.part).is_none()
        };
        self.pieces(layer, site).iter().any(open)
    }

    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()> {
        let pieces = self.pieces(layer, site);
        let factors = self.factors(layer, site, &pieces, moments.as_ref())?;
        let factors = factors.as_deref();
        for piece in pieces {
            self.check()?;
            let Some(tensor) = self.checkpoint.tensor(&piece.name) else { continue };
            let mut values = match (piece.stored, self.journal.blocks(&piece.name, piece.part)?) {
                (stored, Some(blocks)) => {
                    let mut values = vec![0.0; piece.rows * piece.columns];
                    stored.block_type().decode(&blocks, &mut values)?;
                    values
                }
                (Stored::Solved(format), None) => self.solve(&piece, &format, &tensor, moments.as_ref(), factors)?,
                (Stored::Encoded(block_type), None) => {
                    let mut values = read_rows(&tensor, piece.first, piece.rows)?;
                    if let Some(factors) = factors {
                        values = awq::scale_columns(&values, factors);
                    }
                    let mut blocks = Vec::new();
                    block_type.encode(&values, &mut blocks)?;
                    block_type.decode(&blocks, &mut values)?;
                    if factors.is_some() {
                        let description = json!({ "name": piece.name, "part": piece.part, "recipe": "encoded" });
                        self.journal.add(&piece.name, piece.part, description, &blocks)?;
                    }
                    values
                }
            };
            // The calibration goes on with the norm as it was.
            for row in values.chunks_mut(piece.columns).filter(|_| factors.is_some()) {
                row.iter_mut().zip(factors.unwrap_or_default()).for_each(|(value, factor)| *value /= factor);
            }
            self.overlay.replace(&piece.name, piece.first, values);
        }
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        &self.overlay
    }

    fn step(&self, layer: usize, site: Site, window: usize) -> Result<()> {
        self.check()?;
        let (sites, at) = match site {
            Site::Qkv => (4, 0),
            Site::AttentionOutput => (4, 1),
            Site::Up(_) => (4, 2),
            Site::Down(_) => (4, 3),
        };
        let within = (at * self.windows + window) * UNITS / (sites * self.windows.max(1));
        (self.progress)(&format!("layer {}", layer + 1), layer * UNITS + within, self.layers * UNITS);
        Ok(())
    }
}
