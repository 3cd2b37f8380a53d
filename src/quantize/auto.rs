//! The search for a recipe: candidates are quantized and measured against the full-precision model until one meets the target.

mod search;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use search::search;
pub use search::{Figures, Outcome, Target};
use serde_json::json;

use super::context::RunContext;
use super::eval::{Divergence, Evaluation, Reference};
use super::format::Format;
use super::overrides::TensorFormats;
use super::pipeline::{self, QuantizeOptions, Report};
use super::recipes::{GptqOptions, Recipe};
use super::resume::{ResumeFiles, candidate_path};
use super::sparsity::Sparsity;
use super::tuning::TuningOptions;
use crate::error::{Error, Result};
use crate::model::{LoadOptions, Model, Quantize};

/// How to quantize a checkpoint, and when the search ends.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AutoOptions {
    /// How each tensor is stored.
    pub formats: TensorFormats,
    /// The target that ends the search.
    pub target: Target,
    /// The time after which no other candidate is tried.
    pub budget: Option<Duration>,
    /// Seed of the order of windows in tuning.
    pub seed: u64,
    /// How many weights of linear layers become zero; `None` prunes none.
    #[doc(hidden)]
    pub sparsity: Option<Sparsity>,
}

impl AutoOptions {
    /// A search for the default target, without a limit of time.
    pub fn new(formats: TensorFormats) -> AutoOptions {
        AutoOptions { formats, target: Target::default(), budget: None, seed: 0, sparsity: None }
    }

    /// Makes `share` of the weights of each row zero, by the pattern called `unstructured` or `2:4`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a share outside of 0 to 0.95, other names, and 2:4 with another share than a half.
    pub fn with_sparsity(self, share: f32, pattern: &str) -> Result<AutoOptions> {
        Ok(AutoOptions { sparsity: Some(Sparsity::new(share, pattern)?), ..self })
    }
}

setters!(AutoOptions {
    with_formats(formats: TensorFormats),
    with_target(target: Target),
    with_budget(budget: impl Into<Option<Duration>>),
    with_seed(seed: u64),
});

/// The result of a search.
#[derive(Debug)]
#[non_exhaustive]
pub struct AutoReport {
    /// The report of the chosen candidate.
    pub report: Report,
    /// The names of all candidates, cheapest first. The first ones were tried: see `outcome`.
    pub names: Vec<String>,
    /// The figures of the candidates that were tried, and the choice.
    #[doc(hidden)]
    pub outcome: Outcome,
    /// The full-precision model on the same text.
    pub reference: Evaluation,
    /// The format and the group of all candidates.
    pub format: (Format, usize),
    /// The mean divergence of the chosen candidate at each scored position of a window.
    pub kl_by_position: Vec<f64>,
}

/// [`quantize`](super::quantize) with the first recipe that meets a target. Candidates are measured on `evaluation`, windows of
/// one length that should not be among those of the context.
///
/// The files of candidates are hidden files next to the output. An interrupted search leaves the candidates' unfinished work there.
/// The next search with the same arguments measures finished candidates again, but does not quantize them again.
///
/// # Errors
/// Those of [`quantize`](super::quantize) and of [`Reference`].
pub fn auto(context: &RunContext<'_>, options: &AutoOptions, evaluation: &[Vec<u32>]) -> Result<AutoReport> {
    let started = Instant::now();
    let AutoOptions { formats, sparsity, .. } = options;
    let plain = QuantizeOptions::new(Recipe::Rtn { search: true }, formats.clone());
    QuantizeOptions { sparsity: *sparsity, ..plain }.check()?;
    context.check_out(&[ResumeFiles::next_to(context.out)])?;
    let can_tune = pipeline::can_tune(context, &options.formats)?;
    let mut search = Search::begin(context, options, evaluation, can_tune, started)?;
    let result = search.run();
    search.remove_candidates()?;
    let (report, outcome, measured) = result?;
    search.remove_resume_files()?;
    Ok(AutoReport {
        report,
        names: search.names,
        outcome,
        reference: search.reference.evaluation().clone(),
        format: (options.formats.format, options.formats.group),
        kl_by_position: measured.divergence.map(|divergence| divergence.kl_by_position).unwrap_or_default(),
    })
}

/// A search in progress.
struct Search<'a> {
    context: &'a RunContext<'a>,
    options: &'a AutoOptions,
    started: Instant,
    reference: Reference,
    candidates: Vec<QuantizeOptions>,
    names: Vec<String>,
    /// The output of each candidate.
    paths: Vec<PathBuf>,
    /// Finished candidates.
    made: Vec<(Report, Evaluation)>,
    resume_files: Vec<ResumeFiles>,
}

impl<'a> Search<'a> {
    /// Records the full-precision model.
    fn begin(
        context: &'a RunContext<'a>,
        options: &'a AutoOptions,
        evaluation: &[Vec<u32>],
        can_tune: bool,
        started: Instant,
    ) -> Result<Search<'a>> {
        let measuring = |done, total| {
            (context.progress)("measuring the source", done, total);
            Ok(())
        };
        measuring(0, evaluation.len())?;
        let floats = LoadOptions { quantize: Quantize::Stored, ..context.load_options() };
        let model = Model::load(context.source, &floats)?;
        let reference = Reference::record(&model, evaluation, &measuring, context.interrupted)?;
        let candidates = candidates(options, can_tune);
        let names: Vec<String> = candidates.iter().map(QuantizeOptions::name).collect();
        let paths: Vec<_> = names.iter().map(|name| candidate_path(context.out, name)).collect();
        let own =
            |candidate: &QuantizeOptions| ResumeFiles::next_to(&candidate_path(context.out, candidate.recipe.name()));
        context.check_out(&candidates.iter().map(own).collect::<Vec<_>>())?;
        let sources = context.sources();
        paths.iter().try_for_each(|path| sources.check_working_file("out", path))?;
        let resume_files = Vec::new();
        Ok(Search { context, options, started, reference, candidates, names, paths, made: Vec::new(), resume_files })
    }

    /// Tries candidates and renames the chosen one to the output.
    fn run(&mut self) -> Result<(Report, Outcome, Evaluation)> {
        let (names, started) = (self.names.clone(), self.started);
        let perplexity = self.reference.evaluation().perplexity.value;
        let clock = || started.elapsed();
        let (target, budget) = (self.options.target, self.options.budget);
        let outcome = search(&names, perplexity, target, budget, &clock, &mut |number| self.evaluate(number))?;
        let (chosen, out) = (&self.paths[outcome.chosen], self.context.out);
        ResumeFiles::next_to(out).mark_done(chosen)?;
        std::fs::rename(chosen, out).map_err(|source| Error::io(chosen, source))?;
        let (mut report, measured) = self.made.swap_remove(outcome.chosen);
        report.out = out.to_path_buf();
        report.seconds = started.elapsed().as_secs_f64();
        Ok((report, outcome, measured))
    }

    /// Quantizes and measures a candidate; `None` if the budget is used up meanwhile.
    fn evaluate(&mut self, number: usize) -> Result<Option<Figures>> {
        let (context, name) = (self.context, &self.names[number]);
        let report = |stage: &str, done: usize, total: usize| {
            (context.progress)(&format!("{name}: {stage}"), done, total);
        };
        // A candidate with tuning starts with the codes of the same recipe without, so that they share a log.
        let files = ResumeFiles::next_to(&candidate_path(context.out, self.candidates[number].recipe.name()));
        self.resume_files.push(files.clone());
        let (late, budget, started) = (AtomicBool::new(false), self.options.budget, self.started);
        let stop = || {
            // The first candidate is always finished: a search must have a result.
            let is_over = number > 0 && budget.is_some_and(|budget| started.elapsed() > budget);
            late.fetch_or(is_over, Ordering::Relaxed);
            is_over || (context.interrupted)()
        };
        let candidate =
            RunContext { out: &self.paths[number], force: true, progress: &report, interrupted: &stop, ..*context };
        let made = match pipeline::run(&candidate, &files, &self.candidates[number]) {
            Err(Error::Interrupted) if late.load(Ordering::Relaxed) => return Ok(None),
            made => made?,
        };
        let measuring = |done, total| {
            report("measuring the file", done, total);
            Ok(())
        };
        let model = Model::load(&self.paths[number], &context.load_options())?;
        let measured = self.reference.compare(&model, &measuring, context.interrupted)?;
        let figures = figures(&made, &measured);
        self.made.push((made, measured));
        Ok(Some(figures))
    }

    /// Removes the files of candidates that were not chosen.
    fn remove_candidates(&self) -> Result<()> {
        for path in self.paths.iter().filter(|path| path.exists()) {
            std::fs::remove_file(path).map_err(|source| Error::io(path, source))?;
        }
        Ok(())
    }

    /// Removes the files of the candidates first: those of the output say that the search is done.
    fn remove_resume_files(&self) -> Result<()> {
        self.resume_files.iter().try_for_each(ResumeFiles::remove)?;
        ResumeFiles::next_to(self.context.out).remove()
    }
}

/// The candidates, cheapest first.
fn candidates(options: &AutoOptions, can_tune: bool) -> Vec<QuantizeOptions> {
    let gptq = GptqOptions::default();
    let last = match can_tune {
        true => (Recipe::Gptq(gptq), Some(TuningOptions { seed: options.seed, ..TuningOptions::default() })),
        false => (Recipe::Awq(Some(gptq)), None),
    };
    let all = [(Recipe::Rtn { search: true }, None), (Recipe::Gptq(gptq), None), last];
    let AutoOptions { formats, sparsity, .. } = options;
    all.map(|(recipe, tuning)| QuantizeOptions { recipe, tuning, formats: formats.clone(), sparsity: *sparsity })
        .to_vec()
}

fn figures(report: &Report, measured: &Evaluation) -> Figures {
    let divergence = measured.divergence.as_ref();
    let of = |number: fn(&Divergence) -> f64| divergence.map_or(f64::NAN, number);
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
    /// The report of the chosen candidate as JSON, with all candidates and the reason for the choice.
    pub fn to_json(&self) -> String {
        let mut json = self.report.to_value();
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
        json.to_string()
    }
}
