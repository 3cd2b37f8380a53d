//! `nybble._native.Vocabulary` and `Constraint`: `crate::engine::constraint` for Python.

use pyo3::prelude::*;

use super::detach::guarded;
use crate::Error;
use crate::engine::constraint::{self, Grammar};

/// A vocabulary in the form that grammars need.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Vocabulary(pub(super) constraint::Vocabulary);

#[pymethods]
impl Vocabulary {
    /// `tokens` are the bytes of each token, empty for special tokens; `ends` the ids that end a completion.
    #[new]
    fn new(py: Python<'_>, tokens: Vec<Vec<u8>>, ends: Vec<u32>) -> PyResult<Vocabulary> {
        guarded(py, || constraint::Vocabulary::new(tokens, &ends)).map(Vocabulary)
    }

    /// The constraint of an empty completion. `kind` says how to read `text`: "schema", "regex" or "grammar".
    fn constraint(&self, py: Python<'_>, kind: &str, text: String) -> PyResult<Constraint> {
        let grammar = match kind {
            "schema" => Grammar::JsonSchema(text),
            "regex" => Grammar::Regex(text),
            "grammar" => Grammar::Lark(text),
            _ => return Err(Error::argument("kind", format_args!("{kind:?}"), "schema, regex or grammar").into()),
        };
        guarded(py, || self.0.constraint(&grammar)).map(Constraint)
    }
}

/// The constraint of an empty completion. Each sequence gets a copy.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Constraint(pub(super) constraint::Constraint);
