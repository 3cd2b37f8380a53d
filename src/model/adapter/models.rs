//! Loads adapters for a model and makes sessions with them.

use std::path::Path;
use std::sync::Arc;

use super::bind;
use super::low_rank::Adapter;
use crate::error::{Error, Result};
use crate::model::hf::HfFolder;
use crate::model::hf::placement::placements_of;
use crate::model::model::Model;
use crate::model::state::session::Session;

/// The largest number of characters of a name.
const MAX_NAME: usize = 128;

impl Model {
    /// The model with an adapter that applies to everything: to every session and every text.
    ///
    /// `path` is a folder that PEFT has saved, or a GGUF file. Returns the model and what the adapter's files say that has no
    /// influence, a line each.
    ///
    /// # Errors
    /// Those of [`Model::load_adapter`]; [`Error::InvalidArgument`] for a model that has adapters.
    pub fn with_adapter(self, path: impl AsRef<Path>) -> Result<(Model, Vec<String>)> {
        let notes = self.set_adapter(path.as_ref())?;
        Ok((self, notes))
    }

    /// As [`Model::with_adapter`], before the model is used.
    pub(crate) fn set_adapter(&self, path: &Path) -> Result<Vec<String>> {
        self.check_whole("adapter")?;
        let (adapter, notes) = self.read_adapter("", path)?;
        if self.adapter_names().is_empty() && self.adapters.set_default(adapter) {
            return Ok(notes);
        }
        let expected = "one adapter for everything, or adapters that are chosen by name";
        Err(Error::argument("adapter", "a model that has adapters", expected))
    }

    /// Loads an adapter under a name, with which [`Model::session_with_adapter`] chooses it. The base's weights stay as they are:
    /// rows of different adapters, and of none, share a step.
    ///
    /// `path` is a folder that PEFT has saved, or a GGUF file. An adapter that has this name is replaced for new sessions; sessions
    /// that have it keep it. Returns what the adapter's files say that has no influence, a line each.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name with other characters than `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`, or for a model with an
    /// adapter that applies to everything; [`Error::Io`], [`Error::Malformed`] and [`Error::Missing`] for the files;
    /// [`Error::Unsupported`] with the setting or the tensor for what is not computed: nothing is applied in part;
    /// [`Error::OutOfMemory`].
    pub fn load_adapter(&self, name: &str, path: impl AsRef<Path>) -> Result<Vec<String>> {
        self.check_whole("adapter")?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_plain) {
            let expected = format!("1 to {MAX_NAME} characters of A-Z, a-z, 0-9, '.', '_' and '-'");
            return Err(Error::argument("adapter", format_args!("the name {name:?}"), expected));
        }
        if self.adapters.default_adapter().is_some() {
            let expected = "a model without one, whose adapters are chosen by name";
            return Err(Error::argument("adapter", "a model with an adapter that applies to everything", expected));
        }
        let (adapter, notes) = self.read_adapter(name, path.as_ref())?;
        self.adapters.named().insert(name.to_owned(), Arc::new(adapter));
        Ok(notes)
    }

    /// Removes the adapter called `name`. Sessions that have it keep it. Returns whether there was one.
    pub fn unload_adapter(&self, name: &str) -> bool {
        self.adapters.named().remove(name).is_some()
    }

    /// The names of the adapters that can be chosen, sorted.
    pub fn adapter_names(&self) -> Vec<String> {
        self.adapters.named().keys().cloned().collect()
    }

    /// Bytes of the matrices of all adapters.
    pub fn adapter_bytes(&self) -> usize {
        self.adapters.all().iter().map(|adapter| adapter.bytes()).sum()
    }

    /// An empty session with the adapter called `name`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that no adapter has.
    pub fn session_with_adapter(&self, name: &str) -> Result<Session> {
        match self.adapters.find(name).filter(|_| !name.is_empty()) {
            Some(adapter) => Ok(self.session().with_adapter(Some(adapter))),
            None => {
                let names = self.adapter_names();
                let expected = match names.as_slice() {
                    [] => "no name: the model has no adapters that are chosen by name".to_owned(),
                    names => format!("one of {}", names.join(", ")),
                };
                Err(Error::argument("adapter", format_args!("{name:?}"), expected))
            }
        }
    }

    /// As [`Model::session_with_adapter`], or [`Model::session`] without a name.
    ///
    /// # Errors
    /// Those of [`Model::session_with_adapter`].
    pub(crate) fn session_with(&self, adapter: Option<&str>) -> Result<Session> {
        adapter.map_or_else(|| Ok(self.session()), |name| self.session_with_adapter(name))
    }

    fn read_adapter(&self, name: &str, path: &Path) -> Result<(Adapter, Vec<String>)> {
        let (config, weights) = (self.config(), &self.transformer.weights);
        let dims = |name: &str| bind::dims(weights, name);
        let placements = || match self.path().is_dir() {
            true => Ok(vec![HfFolder::open(self.path())?.placements()]),
            false => Ok(placements_of(config, &dims)),
        };
        bind::load(self.pool(), name, path, config, weights, &placements)
    }
}
