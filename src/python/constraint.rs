//! `nybble._native.Vocabulary` and `Constraint`: what `crate::engine::constraint` offers, for Python.

use pyo3::prelude::*;

use crate::Error;
use crate::engine::constraint::{self, Grammar};

/// A vocabulary, as grammars look at it.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Vocabulary(constraint::Vocabulary);

#[pymethods]
impl Vocabulary {
    /// `tokens` are the bytes of each token, none for those that are no text; `ends` the ids that end a text.
    #[new]
    fn new(py: Python<'_>, tokens: Vec<Vec<u8>>, ends: Vec<u32>) -> PyResult<Vocabulary> {
        super::guarded(py, || constraint::Vocabulary::new(tokens, &ends)).map(Vocabulary)
    }

    /// What may follow in a text of the grammar `text`, which is a `kind`: "schema", "regex" or "grammar".
    fn constraint(&self, py: Python<'_>, kind: &str, text: String) -> PyResult<Constraint> {
        let grammar = match kind {
            "schema" => Grammar::JsonSchema(text),
            "regex" => Grammar::Regex(text),
            "grammar" => Grammar::Lark(text),
            _ => return Err(Error::argument("kind", format_args!("{kind:?}"), "schema, regex or grammar").into()),
        };
        super::guarded(py, || self.0.constraint(&grammar)).map(Constraint)
    }
}

/// What may follow in a text of which nothing is written yet.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Constraint(pub(super) constraint::Constraint);
