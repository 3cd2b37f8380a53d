//! The automatic INT4 flow for Python.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use numpy::PyReadonlyArray2;
use pyo3::prelude::*;

use super::detached;
use crate::Error;
use crate::quant::block::BlockType;
use crate::quantize::problem::Grid;
use crate::quantize::{Options, Policy, Recipe, gptq, quantize as run, signround};

fn block_type(name: &'static str, text: &str) -> crate::Result<BlockType> {
    let known =
        || Error::argument(name, format_args!("{text:?}"), "a type such as q4_0, q4_1, iq4_nl, q8_0, f16 or f32");
    BlockType::from_name(text).ok_or_else(known)
}

/// Quantizes a checkpoint into a GGUF file and returns a report as JSON. `windows (n, window)` are token ids of a text;
/// `progress` is called with what is being done, how much is done and how much there is.
#[pyfunction]
#[pyo3(signature = (
    source, out, *, recipe="gptq", grid="q4_0", group=32, windows=None, output_type="q8_0", keep=vec![], search=true,
    threads=None, force=false, progress=None
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
    output_type: &str,
    keep: Vec<(String, String)>,
    search: bool,
    threads: Option<usize>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let recipe = match recipe {
        "rtn" => Recipe::Rtn { search },
        "gptq" => Recipe::Gptq(gptq::Options { search, ..gptq::Options::default() }),
        "awq" => Recipe::Awq(None),
        "awq+gptq" => Recipe::Awq(Some(gptq::Options { search, ..gptq::Options::default() })),
        "signround" => Recipe::Signround(signround::Options { search, ..signround::Options::default() }),
        other => {
            return Err(
                Error::argument("recipe", format_args!("{other:?}"), "rtn, gptq, awq, awq+gptq or signround").into()
            );
        }
    };
    let grid = Grid::of(block_type("format", grid)?)
        .ok_or_else(|| Error::argument("format", format_args!("{grid:?}"), "q4_0, q4_1, iq4_nl or q8_0"))?;
    let keep = keep.into_iter().map(|(pattern, text)| Ok((pattern, block_type("keep", &text)?)));
    let policy = Policy {
        grid,
        group,
        output_type: block_type("output_type", output_type)?,
        keep: keep.collect::<crate::Result<_>>()?,
    };
    let options = Options { recipe, policy, threads, force };
    let id = |id: &i32| u32::try_from(*id).map_err(|_| Error::argument("token", id, "an id of the vocabulary"));
    let windows = match &windows {
        Some(windows) => {
            let rows = windows.as_array();
            rows.rows().into_iter().map(|row| row.iter().map(id).collect()).collect::<crate::Result<Vec<Vec<u32>>>>()?
        }
        None => Vec::new(),
    };
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
        run(&source, &out, &options, &windows, &report, &stop)
    });
    match raised.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exception) => Err(exception),
        None => Ok(report?.to_json().to_string()),
    }
}
