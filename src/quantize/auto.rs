//! The recipe `auto`: candidates are made and measured against the full-precision model until one is good enough.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::eval::{Baseline, Evaluation};
use super::flow::{self, Options, Progress, Recipe};
use super::journal::{Journal, key};
use super::policy::Policy;
use super::problem::Grid;
use super::report::Report;
use super::search::{Figures, Outcome, Target, search};
use super::sensitivity;
use super::{gptq, tune};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::format::gguf::Gguf;
use crate::model::hf::HfFolder;
use crate::model::layerwise::Layerwise;
use crate::model::{LoadOptions, Model, Quantize};

/// Tokens on which sensitivity is measured: windows, and tokens of each.
const SENSITIVITY: (usize, usize) = (2, 128);

/// What is known of sensitivity is kept beside the output under its name with this end.
const PLAN: &str = ".bits";

/// What to make of a checkpoint, and what is good enough.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoOptions {
    /// Which tensor becomes what.
    pub policy: Policy,
    /// What is good enough.
    pub target: Target,
    /// How long the search may last.
    pub budget: Option<Duration>,
    /// Threads; otherwise as many as pay off.
    pub threads: Option<usize>,
    /// Whether a file that is there is replaced.
    pub force: bool,
}

/// What a search made.
#[derive(Debug)]
pub struct AutoReport {
    /// The chosen file.
    pub report: Report,
    /// All candidates' names, the cheapest first; those that were tried are in `outcome`.
    pub names: Vec<String>,
    /// Their figures, and why one was chosen.
    pub outcome: Outcome,
    /// The full-precision model on the same text.
    pub reference: Evaluation,
    /// The grid and the group of all of them.
    pub format: (Grid, usize),
    /// Mean divergence of the chosen one at each scored position of a window.
    pub kl_by_position: Vec<f64>,
}

/// As [`quantize`](flow::quantize), with the recipe that the search finds: see [`search`]. `windows` are for calibration;
/// figures are measured on `evaluation`, windows of one length that should not be among them.
///
/// Candidates lie beside `out` while they are measured. What is done of them stays there when the search is interrupted, and
/// the next search with the same arguments measures them again, but does not make them again.
///
/// # Errors
/// Those of [`quantize`](flow::quantize), and of [`Baseline`]; [`Error::InvalidArgument`] for too few bits a weight.
pub fn auto(
    source: &Path,
    out: &Path,
    options: &AutoOptions,
    windows: &[Vec<u32>],
    evaluation: &[Vec<u32>],
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<AutoReport> {
    let started = Instant::now();
    options.policy.check()?;
    flow::check_out(source, out, options.force)?;
    let load = LoadOptions { threads: options.threads, ..LoadOptions::default() };
    let floats = LoadOptions { quantize: Quantize::Stored, ..load.clone() };
    let can_tune = flow::can_tune(source, &options.policy, &load)?;
    let measuring = |done, total| {
        progress("measuring the source", done, total);
        Ok(())
    };
    measuring(0, evaluation.len())?;
    let mut baseline = Baseline::record(&Model::load(source, &floats)?, evaluation, &measuring, interrupted)?;
    let reference = baseline.evaluation().clone();

    let runs: Vec<Options> = recipes(can_tune)
        .into_iter()
        .map(|(recipe, tune)| Options {
            recipe,
            tune,
            policy: options.policy.clone(),
            threads: options.threads,
            force: true,
        })
        .collect();
    let names: Vec<String> = runs.iter().map(Options::name).collect();
    let paths: Vec<PathBuf> = names.iter().map(|name| beside(out, name)).collect();
    let mut made: Vec<(Report, Evaluation)> = Vec::new();
    let mut journals: Vec<PathBuf> = vec![flow::beside(&flow::beside(out, PLAN), ".resume")];
    let late = AtomicBool::new(false);
    let mut evaluate = |number: usize| {
        let told = |stage: &str, done: usize, total: usize| {
            progress(&format!("{}: {stage}", names[number]), done, total);
        };
        // Tuning begins with the codes of its recipe, which need not be found twice.
        let work = beside(out, runs[number].recipe.name());
        journals.extend(flow::work(&work));
        let stop = || {
            // The first candidate is made whatever the time: something has to come out.
            let is_over = number > 0 && options.budget.is_some_and(|budget| started.elapsed() > budget);
            late.fetch_or(is_over, Ordering::Relaxed);
            is_over || interrupted()
        };
        let report = match flow::make(source, &paths[number], &work, &runs[number], windows, &told, &stop) {
            Err(Error::Interrupted) if late.load(Ordering::Relaxed) => return Ok(None),
            made => made?,
        };
        let measuring = |done, total| {
            told("measuring the file", done, total);
            Ok(())
        };
        let measured = baseline.compare(&Model::load(&paths[number], &load)?, &measuring, interrupted)?;
        let figures = figures(&report, &measured);
        made.push((report, measured));
        Ok(Some(figures))
    };
    let outcome = search(
        &names,
        reference.perplexity.value,
        options.target,
        options.budget,
        &|| started.elapsed(),
        &mut evaluate,
    );
    let moved = outcome.and_then(|outcome| {
        let chosen = &paths[outcome.chosen];
        std::fs::rename(chosen, out).map_err(|source| Error::io(chosen, source))?;
        Ok(outcome)
    });
    flow::remove(&paths)?;
    let outcome = moved?;
    flow::remove(&journals)?;
    let (mut report, measured) = made.swap_remove(outcome.chosen);
    report.out = out.to_path_buf();
    report.seconds = started.elapsed().as_secs_f64();
    let kl_by_position = measured.divergence.map(|divergence| divergence.kl_by_position).unwrap_or_default();
    let format = (options.policy.grid, options.policy.group);
    Ok(AutoReport { report, names, outcome, reference, format, kl_by_position })
}

/// From cheap to dear.
fn recipes(can_tune: bool) -> [(Recipe, Option<tune::Options>); 3] {
    let gptq = gptq::Options::default();
    let last = match can_tune {
        true => (Recipe::Gptq(gptq), Some(tune::Options::default())),
        false => (Recipe::Awq(Some(gptq)), None),
    };
    [(Recipe::Rtn { search: true }, None), (Recipe::Gptq(gptq), None), last]
}

/// The name of a candidate while it is measured.
fn beside(out: &Path, recipe: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(out.file_name().unwrap_or_default());
    name.push(format!(".{recipe}.gguf"));
    out.with_file_name(name)
}

/// `policy` with finer formats for the most sensitive linear layers, so that all have `bits` a weight on average at most,
/// scales included. Sensitivity is measured on the first of `windows`; what is known of it stays beside `out` until that is
/// made, so that an interrupted run goes on there.
///
/// # Errors
/// [`Error::InvalidArgument`] when the usual format takes more bits than that, and for too little text; those of
/// [`quantize`](flow::quantize).
#[allow(clippy::too_many_arguments, reason = "those of the run that follows, and the bits")]
pub fn spend_bits(
    source: &Path,
    out: &Path,
    policy: &Policy,
    bits: f64,
    windows: &[Vec<u32>],
    threads: Option<usize>,
    progress: Progress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Policy> {
    policy.check()?;
    let sample: Vec<Vec<u32>> =
        windows.iter().take(SENSITIVITY.0).map(|window| window[..window.len().min(SENSITIVITY.1)].to_vec()).collect();
    if sample.iter().all(Vec::is_empty) {
        return Err(Error::argument("calibration", "no text", "a text on which sensitivity is measured"));
    }
    let plan = |checkpoint: &dyn Checkpoint| {
        let layers = Layerwise::load(checkpoint, &LoadOptions { threads, ..LoadOptions::default() })?;
        flow::check_windows(&layers, windows)?;
        policy.check_names(checkpoint)?;
        let key = key(checkpoint, format!("{policy:?}"), &sample);
        let mut journal = Journal::open(&flow::beside(out, PLAN), key)?;
        sensitivity::plan(checkpoint, &layers, policy, bits, &sample, &mut journal, progress, interrupted)
    };
    let finer = if source.is_dir() { plan(&HfFolder::open(source)?)? } else { plan(&Gguf::open(source)?)? };
    let mut policy = policy.clone();
    policy.keep.extend(finer);
    Ok(policy)
}

fn figures(report: &Report, measured: &Evaluation) -> Figures {
    let divergence = measured.divergence.as_ref();
    let of = |number: fn(&super::eval::Divergence) -> f64| divergence.map_or(f64::NAN, number);
    Figures {
        size_bytes: report.size_bytes,
        perplexity: measured.perplexity.value,
        kl_mean: of(|divergence| divergence.kl_mean.value),
        kl_median: of(|divergence| divergence.kl_median),
        kl_p99: of(|divergence| divergence.kl_p99),
        top_agreement: of(|divergence| divergence.top_agreement.value),
    }
}

impl AutoReport {
    /// The report of the chosen file as JSON, with the candidates and the reason.
    pub fn to_json(&self) -> Value {
        let mut json = self.report.to_json();
        let candidate = |(number, (figures, duration)): (usize, &(Figures, Duration))| {
            json!({
                "recipe": self.names[number],
                "format": self.format.0.block_type().name(),
                "group": self.format.1,
                "size_bytes": figures.size_bytes,
                "perplexity": figures.perplexity,
                "kl_mean": figures.kl_mean,
                "kl_median": figures.kl_median,
                "kl_p99": figures.kl_p99,
                "top_agreement": figures.top_agreement,
                "seconds": duration.as_secs_f64(),
                "chosen": number == self.outcome.chosen,
            })
        };
        json["candidates"] = self.outcome.tried.iter().enumerate().map(candidate).collect();
        json["chosen_because"] = self.outcome.because.clone().into();
        json["reference"] = json!({ "perplexity": self.reference.perplexity.value });
        json["kl_by_position"] = self.kl_by_position.clone().into();
        json
    }
}
