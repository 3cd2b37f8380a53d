//! `nybble._native.GgufFile`: metadata and tensors of GGUF files, and conversion to GGUF.

use std::io::Write;
use std::path::PathBuf;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use super::detach::{guarded, with_progress};
use crate::format::atomic_file::AtomicFile;
use crate::format::gguf::{self, Array, Gguf, Value};
use crate::format::output::Sources;
use crate::quant::block::BlockType;
use crate::{Error, model};

/// Converts a GGUF file or a Hugging Face folder to a GGUF file with matrices of `type`. The adapter at `adapter` is merged first.
/// Returns what the adapter's files say that has no influence, a line each.
#[pyfunction]
#[pyo3(signature = (source, out, r#type, progress=None, adapter=None))]
pub(super) fn convert(
    py: Python<'_>,
    source: PathBuf,
    out: PathBuf,
    r#type: &str,
    progress: Option<Py<PyAny>>,
    adapter: Option<PathBuf>,
) -> PyResult<Vec<String>> {
    let names = || Error::argument("type", format_args!("{type:?}"), "f32, f16, bf16, q8_0, q4_0 or q4_1");
    let wanted = BlockType::from_name(r#type).ok_or_else(names)?;
    with_progress(py, progress, |report| match &adapter {
        Some(adapter) => model::convert::convert_with_adapter(&source, adapter, &out, wanted, Some(report)),
        None => model::convert::convert_path(&source, &out, wanted, Some(report)).map(|()| Vec::new()),
    })
}

/// Checks that the file at `path` may be created or replaced: nothing is there, or a regular file that is none of `sources` (files
/// with all shards, folders with all files). A file for unfinished work, `is_working`, may be in a folder that is read.
#[pyfunction]
#[pyo3(signature = (path, sources, is_working=false))]
pub(super) fn check_output(path: PathBuf, sources: Vec<PathBuf>, is_working: bool) -> PyResult<()> {
    let sources = Sources::new(sources);
    Ok(if is_working { sources.check_working_file("out", &path) } else { sources.check("out", &path) }?)
}

/// Writes `data` to the file at `path`, which appears when it is complete, after [`check_output`].
#[pyfunction]
pub(super) fn write_file(py: Python<'_>, path: PathBuf, data: &[u8], sources: Vec<PathBuf>) -> PyResult<()> {
    guarded(py, || {
        Sources::new(sources).check("path", &path)?;
        let mut file = AtomicFile::create(&path, false)?;
        file.write_all(data).map_err(|source| Error::io(&path, source))?;
        file.finish()
    })
}

/// A tensor's entry in a file.
#[pyclass(frozen, get_all, module = "nybble._native")]
pub(super) struct TensorInfo {
    name: String,
    r#type: &'static str,
    /// The contiguous dimension first.
    shape: Py<PyTuple>,
    offset: u64,
    nbytes: usize,
}

/// An open GGUF file, or the shards of one model.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct GgufFile(Gguf);

#[pymethods]
impl GgufFile {
    #[new]
    #[pyo3(signature = (path, mmap=true))]
    fn new(py: Python<'_>, path: PathBuf, mmap: bool) -> PyResult<GgufFile> {
        guarded(py, || Gguf::open_with(path, &gguf::OpenOptions { mmap })).map(GgufFile)
    }

    /// All keys and values, in a new dict at each access. Invalid UTF-8 becomes lone surrogates.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.0.metadata().iter() {
            dict.set_item(key, to_python(py, value)?)?;
        }
        Ok(dict)
    }

    /// The tensors, in the order of the file.
    #[getter]
    fn tensors(&self, py: Python<'_>) -> PyResult<Vec<TensorInfo>> {
        let info = |tensor: &gguf::TensorInfo| {
            Ok(TensorInfo {
                name: tensor.name().to_owned(),
                r#type: tensor.block_type().name(),
                shape: PyTuple::new(py, tensor.dims())?.unbind(),
                offset: tensor.offset(),
                nbytes: tensor.nbytes(),
            })
        };
        self.0.tensors().iter().map(info).collect()
    }
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::U8(v) => v.into_bound_py_any(py)?,
        Value::I8(v) => v.into_bound_py_any(py)?,
        Value::U16(v) => v.into_bound_py_any(py)?,
        Value::I16(v) => v.into_bound_py_any(py)?,
        Value::U32(v) => v.into_bound_py_any(py)?,
        Value::I32(v) => v.into_bound_py_any(py)?,
        Value::F32(v) => v.into_bound_py_any(py)?,
        Value::Bool(v) => v.into_bound_py_any(py)?,
        Value::U64(v) => v.into_bound_py_any(py)?,
        Value::I64(v) => v.into_bound_py_any(py)?,
        Value::F64(v) => v.into_bound_py_any(py)?,
        Value::String(bytes) => text(py, bytes)?,
        Value::Array(array) => match array {
            // A list of bytes must not become a `bytes`.
            Array::U8(v) => PyList::new(py, v)?.into_any(),
            Array::I8(v) => PyList::new(py, v)?.into_any(),
            Array::U16(v) => PyList::new(py, v)?.into_any(),
            Array::I16(v) => PyList::new(py, v)?.into_any(),
            Array::U32(v) => PyList::new(py, v)?.into_any(),
            Array::I32(v) => PyList::new(py, v)?.into_any(),
            Array::F32(v) => PyList::new(py, v)?.into_any(),
            Array::Bool(v) => PyList::new(py, v)?.into_any(),
            Array::U64(v) => PyList::new(py, v)?.into_any(),
            Array::I64(v) => PyList::new(py, v)?.into_any(),
            Array::F64(v) => PyList::new(py, v)?.into_any(),
            Array::String(v) => {
                let strings: PyResult<Vec<_>> = v.iter().map(|bytes| text(py, bytes)).collect();
                PyList::new(py, strings?)?.into_any()
            }
        },
    })
}

pub(super) fn text<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    match str::from_utf8(bytes) {
        Ok(text) => Ok(PyString::new(py, text).into_any()),
        Err(_) => PyBytes::new(py, bytes).call_method1("decode", ("utf-8", "surrogateescape")),
    }
}
