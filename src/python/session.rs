//! `nybble._native.Session`: the keys and values of a text for Python, which keeps the text.

use std::path::PathBuf;

use pyo3::prelude::*;

use super::constraint::Constraint;
use super::{Model, Options, Sequence, TokenIds, guarded, token_ids};
use crate::{Error, engine, model};

/// The keys and values of the tokens seen so far. It does not change: a sequence goes on from a copy, which shares its memory.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Session(model::Session);

#[pymethods]
impl Session {
    /// One that has seen nothing.
    #[new]
    fn new(model: &Model) -> Session {
        Session(model.0.session())
    }

    /// What a sequence has seen so far.
    #[staticmethod]
    fn of(sequence: &Sequence) -> PyResult<Session> {
        let busy = || Error::argument("sequence", "one that is in a step", "one that nobody computes");
        let sequence = sequence.0.try_lock().map_err(|_| busy())?;
        Ok(Session(sequence.as_ref().ok_or_else(busy)?.session().fork()))
    }

    /// Reads a file that `save` wrote: the session, and the tokens of its text.
    #[staticmethod]
    fn load(py: Python<'_>, model: &Model, path: PathBuf) -> PyResult<(Session, Vec<u32>)> {
        let (session, tokens) = guarded(py, || model::Session::load(&model.0, path))?;
        Ok((Session(session), tokens))
    }

    /// Writes it to a file, with the tokens of the text that it has seen a beginning of.
    fn save(&self, py: Python<'_>, model: &Model, tokens: TokenIds, path: PathBuf) -> PyResult<()> {
        let tokens = token_ids(tokens)?;
        guarded(py, || self.0.save(&model.0, &tokens, path))
    }

    /// A session that has seen the first `len` tokens only.
    fn prefix(&self, len: usize) -> Session {
        let mut session = self.0.fork();
        session.truncate(len);
        Session(session)
    }

    /// A sequence that goes on with `tokens`: the text that the session has seen, and more.
    #[pyo3(signature = (model, tokens, options, constraint=None))]
    fn resume(
        &self,
        py: Python<'_>,
        model: &Model,
        tokens: TokenIds,
        options: Options,
        constraint: Option<Bound<'_, Constraint>>,
    ) -> PyResult<Sequence> {
        let tokens = token_ids(tokens)?;
        let sequence = guarded(py, || engine::Sequence::resume(&model.0, self.0.fork(), &tokens, options.into()))?;
        Ok(Sequence::of(sequence, constraint))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }
}
