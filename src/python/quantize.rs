//! The automatic INT4 flow for Python.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use numpy::PyReadonlyArray2;
use pyo3::prelude::*;

use super::detach::detached;
use crate::Error;
use crate::quant::block::BlockType;
use crate::quantize::problem::Grid;
use crate::quantize::search::Target;
use crate::quantize::{AutoOptions, Options, Policy, Recipe, auto, gptq, quantize as run, signround, spend_bits, tune};

fn block_type(name: &'static str, text: &str) -> crate::Result<BlockType> {
    let known =
        || Error::argument(name, format_args!("{text:?}"), "a type such as q4_0, q4_1, iq4_nl, q8_0, f16 or f32");
    BlockType::from_name(text).ok_or_else(known)
}

/// The recipe called `name`; `None` for `auto`.
fn recipe(name: &str, search: bool) -> crate::Result<Option<Recipe>> {
    let gptq = gptq::Options { search, ..gptq::Options::default() };
    Ok(Some(match name {
        "auto" => return Ok(None),
        "rtn" => Recipe::Rtn { search },
        "gptq" => Recipe::Gptq(gptq),
        "awq" => Recipe::Awq(None),
        "awq+gptq" => Recipe::Awq(Some(gptq)),
        "signround" => Recipe::Signround(signround::Options { search, ..signround::Options::default() }),
        other => {
            let expected = "auto, rtn, gptq, awq, awq+gptq or signround, all but auto also with +tune";
            return Err(Error::argument("recipe", format_args!("{other:?}"), expected));
        }
    }))
}

/// Token ids `(windows, window)`; none for `None`.
fn windows(rows: Option<PyReadonlyArray2<'_, i32>>) -> crate::Result<Vec<Vec<u32>>> {
    let id = |id: &i32| u32::try_from(*id).map_err(|_| Error::argument("token", id, "an id of the vocabulary"));
    let Some(rows) = rows else { return Ok(Vec::new()) };
    rows.as_array().rows().into_iter().map(|row| row.iter().map(id).collect()).collect()
}

/// Quantizes a checkpoint into a GGUF file and returns a report as JSON. `windows (n, window)` are token ids of a text, and
/// `evaluation` those on which `auto` measures; `target` is a share of the perplexity. `progress` is called with what is
/// being done, how much is done and how much there is. No recipe draws anything at random: `seed` changes nothing.
#[pyfunction]
#[pyo3(signature = (
    source, out, *, recipe="gptq", grid="q4_0", group=32, windows=None, evaluation=None, output_type="q8_0", keep=vec![],
    bits_per_weight=None, target=None, budget_seconds=None, search=true, seed=0, threads=None, force=false, progress=None
))]
#[allow(clippy::too_many_arguments, reason = "keywords of a Python function")]
pub(super) fn quantize(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    recipe: &str,
    grid: &str,
    group: usize,
    windows: Option<PyReadonlyArray2<'_, i32>>,
    evaluation: Option<PyReadonlyArray2<'_, i32>>,
    output_type: &str,
    keep: Vec<(String, String)>,
    bits_per_weight: Option<f64>,
    target: Option<f64>,
    budget_seconds: Option<f64>,
    search: bool,
    seed: u64,
    threads: Option<usize>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let _ = seed;
    let (recipe, tune) = match recipe.strip_suffix("+tune") {
        Some(recipe) => (recipe, Some(tune::Options::default())),
        None => (recipe, None),
    };
    let recipe = self::recipe(recipe, search)?;
    let grid = Grid::of(block_type("format", grid)?)
        .ok_or_else(|| Error::argument("format", format_args!("{grid:?}"), "q4_0, q4_1, iq4_nl, q5_0 or q8_0"))?;
    let keep = keep.into_iter().map(|(pattern, text)| Ok((pattern, block_type("keep", &text)?)));
    let mut policy = Policy {
        grid,
        group,
        output_type: block_type("output_type", output_type)?,
        keep: keep.collect::<crate::Result<_>>()?,
    };
    let budget = match budget_seconds.map(Duration::try_from_secs_f64) {
        Some(Err(_)) => return Err(Error::argument("budget", format_args!("{budget_seconds:?}"), "a time").into()),
        Some(Ok(budget)) => Some(budget),
        None => None,
    };
    let (windows, evaluation) = (self::windows(windows)?, self::windows(evaluation)?);
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
        if let Some(bits) = bits_per_weight {
            policy = spend_bits(&source, &out, &policy, bits, &windows, threads, &report, &stop)?;
        }
        match recipe {
            Some(recipe) => {
                let options = Options { recipe, tune, policy, threads, force };
                Ok(run(&source, &out, &options, &windows, &report, &stop)?.to_json())
            }
            None => {
                let target = target.map_or_else(Target::default, Target::Perplexity);
                let options = AutoOptions { policy, target, budget, threads, force };
                Ok(auto(&source, &out, &options, &windows, &evaluation, &report, &stop)?.to_json())
            }
        }
    });
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => Ok(report?.to_string()),
    }
}
