//! What ties the files of sessions to a model: its fingerprint.

use std::path::Path;

use super::session::Session;
use super::session_file::{self, Owner};
use crate::error::Result;
use crate::model::model::Model;

impl Model {
    /// A hash of the configuration and of the packed weights. Models with the same one give the same bits, regardless of
    /// file names, kernel and cache type.
    ///
    /// It is computed on first use, in about a second per 2 GB of weights.
    ///
    /// # Panics
    /// If experts are not in memory and their file cannot be read: see [`Model::try_fingerprint`].
    pub fn fingerprint(&self) -> &[u8; 32] {
        self.try_fingerprint().unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`Model::fingerprint`].
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) and [`Error::Malformed`](crate::Error::Malformed) if experts are not in memory and their file cannot be read or has changed.
    pub fn try_fingerprint(&self) -> Result<&[u8; 32]> {
        if let Some(fingerprint) = self.fingerprint.get() {
            return Ok(fingerprint.as_bytes());
        }
        let fingerprint = self.transformer.fingerprint()?;
        Ok(self.fingerprint.get_or_init(|| fingerprint).as_bytes())
    }

    /// Computes the fingerprint, where that may fail. Later calls of [`Model::fingerprint`] return it.
    ///
    /// # Errors
    /// Those of [`Model::try_fingerprint`].
    pub(crate) fn prepare_fingerprint(&self) -> Result<()> {
        if self.experts.is_some() { self.try_fingerprint().map(drop) } else { Ok(()) }
    }

    /// Calls `run` with the model and limits with which a session file must agree.
    pub(in crate::model) fn with_owner<R>(&self, run: impl FnOnce(&Owner<'_>) -> R) -> R {
        run(&Owner {
            id: self.id,
            path: &self.path,
            fingerprint: &|| (*self.fingerprint()).into(),
            shape: self.shape.clone(),
            kernel: self.kernel(),
            context: self.context(),
            vocabulary: self.vocabulary(),
            adapters: &self.adapters,
        })
    }
}

impl Session {
    /// Whether it is a session of `model`.
    pub fn is_of(&self, model: &Model) -> bool {
        self.model == model.id
    }

    /// Writes the session to a file, which appears under its name when it is complete and replaces an older one. Only the
    /// user may read it, because it contains the conversation.
    ///
    /// `tokens` are those that the session has computed, followed by any that it has not computed yet.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when the system refuses; [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a session of another model, or fewer tokens than
    /// the session has computed; [`Error::OutOfMemory`](crate::Error::OutOfMemory) for a copy of recurrent states.
    pub fn save(&self, model: &Model, tokens: &[u32], path: impl AsRef<Path>) -> Result<()> {
        model.check_whole("session")?;
        model.prepare_fingerprint()?;
        if !self.has_recorded_rows() {
            return model.with_owner(|owner| session_file::save(self, owner, tokens, path.as_ref()));
        }
        let mut settled = self.fork();
        model.transformer.settle(&mut settled)?;
        model.with_owner(|owner| session_file::save(&settled, owner, tokens, path.as_ref()))
    }

    /// Reads a session that [`save`](Session::save) wrote, and its tokens. It continues bit-identically to the saved
    /// session, on any kernel and any number of threads. An INT8 session of a version that had one scale per head is converted;
    /// it continues with other bits.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when the system refuses; [`Error::Malformed`](crate::Error::Malformed) with the field when the file is not a session, is damaged,
    /// or belongs to another model, another cache type or a larger context; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn load(model: &Model, path: impl AsRef<Path>) -> Result<(Session, Vec<u32>)> {
        model.check_whole("session")?;
        model.prepare_fingerprint()?;
        model.with_owner(|owner| session_file::load(owner, path.as_ref()))
    }
}
