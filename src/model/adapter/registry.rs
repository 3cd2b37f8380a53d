//! The adapters of a model.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::low_rank::Adapter;

/// The adapters of a model: one that applies to everything, and those that are chosen by name.
#[derive(Debug, Default)]
pub(in crate::model) struct Adapters {
    default: OnceLock<Arc<Adapter>>,
    named: Mutex<BTreeMap<String, Arc<Adapter>>>,
}

impl Adapters {
    /// The adapter that applies to everything, if there is one.
    pub(in crate::model) fn default_adapter(&self) -> Option<Arc<Adapter>> {
        self.default.get().cloned()
    }

    /// Makes `adapter` the one that applies to everything. Returns false if there is one.
    pub(super) fn set_default(&self, adapter: Adapter) -> bool {
        self.default.set(Arc::new(adapter)).is_ok()
    }

    /// The adapters that are chosen by name.
    pub(in crate::model) fn named(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Adapter>>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter called `name`; of an empty name the one that applies to everything.
    pub(in crate::model) fn find(&self, name: &str) -> Option<Arc<Adapter>> {
        if name.is_empty() { self.default_adapter() } else { self.named().get(name).cloned() }
    }

    /// The adapter whose weights have this hash, the one called `name` if there are several.
    pub(in crate::model) fn with_hash(&self, name: &str, hash: &blake3::Hash) -> Option<Arc<Adapter>> {
        let is_same = |adapter: &Arc<Adapter>| adapter.hash() == hash;
        self.find(name).filter(is_same).or_else(|| self.all().into_iter().find(is_same))
    }

    /// All adapters.
    pub(super) fn all(&self) -> Vec<Arc<Adapter>> {
        self.default.get().into_iter().chain(self.named().values()).cloned().collect()
    }
}
