//! `nybble._native.Session`: the KV cache of a sequence. The package keeps the tokens.

use pyo3::prelude::*;

use crate::model;

/// The keys and values of the tokens computed so far. Immutable: a sequence continues a fork, which shares its memory.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct Session(pub(super) model::Session);

#[pymethods]
impl Session {
    /// A session with only the first `len` tokens.
    fn prefix(&self, len: usize) -> Session {
        let mut session = self.0.fork();
        session.truncate(len);
        Session(session)
    }

    /// Number of tokens computed.
    fn __len__(&self) -> usize {
        self.0.len()
    }
}
