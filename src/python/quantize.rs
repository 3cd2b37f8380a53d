//! `quantize` for Python.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use numpy::PyReadonlyArray2;
use pyo3::prelude::*;
use pyo3::types::PyMapping;

use super::detach::detached;
use super::evaluate::token_windows;
use crate::Error;
use crate::quant::block::BlockType;
use crate::quantize::{
    AutoOptions, Format, GptqOptions, Importance, Pruning, QuantizeOptions, Recipe, RunContext, SignroundOptions,
    Sparsity, Target, TensorFormats, TuningOptions, auto, choose_formats, quantize as run, write_importance,
};

/// The attributes of Python's `QuantizeOptions` that are used here.
#[derive(FromPyObject)]
pub(super) struct Options {
    recipe: String,
    search: bool,
    block_format: String,
    #[pyo3(default)]
    chooses_format: bool,
    group_size: usize,
    bits_per_weight: Option<f64>,
    #[pyo3(default)]
    sparsity: Option<f32>,
    #[pyo3(default)]
    sparsity_pattern: Option<String>,
    output_type: Option<String>,
    #[pyo3(default)]
    chooses_output: bool,
    #[pyo3(from_py_with = pairs)]
    keep: Vec<(String, String)>,
    target: Option<f64>,
    /// In minutes.
    budget: Option<f64>,
    seed: u64,
    threads: Option<usize>,
    #[pyo3(default)]
    imatrix: Option<PathBuf>,
    #[pyo3(default)]
    prune_experts: Option<usize>,
    force: bool,
}

/// The items of a mapping, in its order; none for `None`.
fn pairs(mapping: &Bound<'_, PyAny>) -> PyResult<Vec<(String, String)>> {
    if mapping.is_none() {
        return Ok(Vec::new());
    }
    mapping.cast::<PyMapping>()?.items()?.extract()
}

impl Options {
    /// The recipe and whether scales are tuned afterwards; `None` for `auto`.
    fn recipe(&self) -> crate::Result<Option<(Recipe, Option<TuningOptions>)>> {
        let search = self.search;
        let gptq = GptqOptions { search, ..GptqOptions::default() };
        let (name, tuning) = match self.recipe.strip_suffix("+tune") {
            Some(name) => (name, Some(TuningOptions { seed: self.seed, ..TuningOptions::default() })),
            None => (self.recipe.as_str(), None),
        };
        let recipe = match name {
            "auto" if tuning.is_none() => return Ok(None),
            "rtn" => Recipe::Rtn { search },
            "gptq" => Recipe::Gptq(gptq),
            "awq" => Recipe::Awq(None),
            "awq+gptq" => Recipe::Awq(Some(gptq)),
            "signround" => Recipe::Signround(SignroundOptions { search, ..SignroundOptions::default() }),
            other => {
                let expected = "auto, rtn, gptq, awq, awq+gptq or signround; all but auto also with +tune";
                return Err(Error::argument("recipe", format_args!("{other:?}"), expected));
            }
        };
        Ok(Some((recipe, tuning)))
    }

    fn formats(&self) -> crate::Result<TensorFormats> {
        let name = &self.block_format;
        let format = Format::of(block_type("format", name)?).ok_or_else(|| {
            Error::argument("format", format_args!("{name:?}"), "q2_0, q4_0, q4_1, iq4_nl, q5_0 or q8_0")
        })?;
        let overrides = self.keep.iter().map(|(pattern, name)| Ok((pattern.clone(), block_type("keep", name)?)));
        Ok(TensorFormats {
            format,
            group: self.group_size,
            output_type: block_type("output_type", self.output_type.as_deref().unwrap_or("q8_0"))?,
            overrides: overrides.collect::<crate::Result<_>>()?,
        })
    }

    fn sparsity(&self) -> crate::Result<Option<Sparsity>> {
        let pattern = self.sparsity_pattern.as_deref().unwrap_or("unstructured");
        self.sparsity.map(|share| Sparsity::new(share, pattern)).transpose()
    }

    fn budget(&self) -> crate::Result<Option<Duration>> {
        let Some(minutes) = self.budget else { return Ok(None) };
        let wrong = |_| Error::argument("budget", minutes, "a number of minutes");
        Ok(Some(Duration::try_from_secs_f64(60.0 * minutes).map_err(wrong)?))
    }
}

fn block_type(argument: &'static str, name: &str) -> crate::Result<BlockType> {
    let known =
        || Error::argument(argument, format_args!("{name:?}"), "a type such as q4_0, q4_1, iq4_nl, q8_0, f16 or f32");
    BlockType::from_name(name).ok_or_else(known)
}

/// Quantizes the checkpoint `source` into the GGUF file `out` and returns a report as JSON. `windows (n, window)` are the token
/// ids to calibrate on, `evaluation (n, window)` those on which `auto` measures. `progress` is called with the name of a stage,
/// how much of it is done, and the total. `read` are other files that must not be overwritten.
#[pyfunction]
#[pyo3(signature = (source, out, options, *, windows=None, evaluation=None, progress=None, read=Vec::new()))]
#[allow(clippy::too_many_arguments, reason = "Python passes them by name")]
pub(super) fn quantize(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    options: Options,
    windows: Option<PyReadonlyArray2<'_, i32>>,
    evaluation: Option<PyReadonlyArray2<'_, i32>>,
    progress: Option<Py<PyAny>>,
    read: Vec<PathBuf>,
) -> PyResult<String> {
    let (recipe, mut formats, budget) = (options.recipe()?, options.formats()?, options.budget()?);
    let sparsity = options.sparsity()?;
    let ids = |windows: Option<PyReadonlyArray2<'_, i32>>| windows.as_ref().map_or(Ok(Vec::new()), token_windows);
    let (windows, evaluation) = (ids(windows)?, ids(evaluation)?);
    let raised = Mutex::new(None);
    let report = detached(py, |interrupted| {
        let stop = || interrupted() || raised.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        let report = |stage: &str, done: usize, total: usize| {
            let Some(progress) = &progress else { return };
            let called = Python::attach(|py| progress.call1(py, (stage, done, total)).map(drop));
            if let Err(exception) = called {
                raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exception);
            }
        };
        let read: Vec<_> = read.iter().chain(&options.imatrix).cloned().collect();
        let context = RunContext {
            read: &read,
            threads: options.threads,
            force: options.force,
            progress: &report,
            interrupted: &stop,
            ..RunContext::new(&source, &out, &windows)
        };
        let pruning = options.prune_experts.map(|count| Pruning::choose(&context, count)).transpose()?;
        let context = RunContext { pruning: pruning.as_ref(), ..context };
        let importance = match &options.imatrix {
            Some(path) => {
                if !path.exists() {
                    write_importance(&context, path)?;
                }
                Some(Importance::read(path)?)
            }
            None => None,
        };
        let context = RunContext { importance: importance.as_ref(), ..context };
        if options.chooses_format {
            let weigh = recipe.is_none() && options.bits_per_weight.is_none();
            formats = choose_formats(&context, &formats, weigh)?;
        }
        formats = match options.bits_per_weight {
            bits if options.chooses_output => formats.spend_all_bits(&context, bits)?,
            Some(bits) => formats.spend_bits(&context, bits)?,
            None => formats,
        };
        let done = match recipe {
            Some((recipe, tuning)) => run(&context, &QuantizeOptions { recipe, tuning, formats, sparsity })?.to_json(),
            None => {
                let target = options.target.map_or_else(Target::default, Target::Perplexity);
                let options = AutoOptions { formats, target, budget, seed: options.seed, sparsity };
                auto(&context, &options, &evaluation)?.to_json()
            }
        };
        Ok(match &pruning {
            Some(pruning) => with_pruning(&done, pruning),
            None => done,
        })
    });
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => Ok(report?),
    }
}

/// A report with what was left out.
fn with_pruning(report: &str, pruning: &Pruning) -> String {
    let mut report: serde_json::Value = serde_json::from_str(report).unwrap_or_default();
    report["pruning"] = pruning.to_value();
    report.to_string()
}

/// Removes what a run has left that was killed when its output at `out` was complete.
#[pyfunction]
pub(super) fn remove_leftovers(out: PathBuf) -> PyResult<()> {
    Ok(crate::quantize::remove_leftovers(&out)?)
}
