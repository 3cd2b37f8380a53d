//! Logits processors that are callables of Python.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::engine::Sequence;

/// Lets `process` change the logits of a sequence. It is called with the tokens and the logits as NumPy arrays and returns logits of the
/// same shape, which the package has checked.
pub(super) fn with_python_processor(sequence: Sequence, process: Py<PyAny>) -> Sequence {
    sequence.with_logits_processor(move |tokens, logits| {
        let called = Python::attach(|py| {
            let tokens = PyArray1::from_iter(py, tokens.iter().map(|token| i64::from(*token)));
            let returned = process.bind(py).call1((tokens, PyArray1::from_slice(py, logits)))?;
            let returned: PyReadonlyArray1<'_, f32> = returned.extract()?;
            logits.iter_mut().zip(returned.as_array()).for_each(|(logit, new)| *logit = *new);
            Ok::<(), PyErr>(())
        });
        called.map_err(Into::into)
    })
}
