//! `nybble._native.Session`: the KV cache of a sequence. The package keeps the tokens.

use pyo3::prelude::*;

use crate::{Error, model};

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

    /// The name of its adapter; None without one, and "" for the one that applies to everything.
    #[getter]
    fn adapter(&self) -> Option<&str> {
        self.0.adapter_name()
    }

    /// Number of tokens computed.
    fn __len__(&self) -> usize {
        self.0.len()
    }
}

impl Session {
    /// The session, which has the adapter called `name`, if one is named.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for the name of another adapter.
    pub(super) fn with_adapter(&self, name: Option<&str>) -> crate::Result<&model::Session> {
        let own = self.0.adapter_name();
        match name {
            Some(name) if own != Some(name) => {
                let expected =
                    own.map_or("None, as the session has".to_owned(), |own| format!("{own:?}, as the session has"));
                Err(Error::argument("adapter", format_args!("{name:?}"), expected))
            }
            _ => Ok(&self.0),
        }
    }
}
