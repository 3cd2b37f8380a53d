//! What happens to the sessions and shared pages of a pipeline between steps.
//!
//! The driver of a pipeline has sessions without memory, each stage has the same sessions with the memory of its layers. Sessions
//! decide the same from the same calls, so the driver records the calls, and each stage repeats them in order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

/// A call, with the ids of sessions and pages. A result that the caller depends on is part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::model) enum Change {
    /// `Session::fork`
    Fork { from: u64, to: u64 },
    /// `Session::truncate`, after which `len` tokens are left.
    Truncate { session: u64, len: usize },
    /// `Session::attach`
    Attach { session: u64, page: u64, tokens: usize },
    /// `Session::free_unseen`
    FreeUnseen { session: u64 },
    /// `Session::page`
    Share { session: u64, index: usize, page: u64 },
    /// `Session::replace_page`
    Replace { session: u64, index: usize, page: u64 },
    /// `Session::forget_snapshot`
    ForgetSnapshot { session: u64, index: usize },
    /// `SharedPage::complete_from`
    Complete { page: u64, from: u64 },
    /// `SharedPage::free_unshared`, which has freed these parts, and the snapshot if `snapshot`.
    Free { page: u64, parts: Vec<usize>, snapshot: bool },
    /// The end of a session.
    DropSession { session: u64 },
    /// The end of a shared page.
    DropPage { page: u64 },
}

/// The calls since the latest step.
#[derive(Debug, Default)]
pub(in crate::model) struct Journal(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    changes: Vec<Change>,
    /// The latest id.
    last: u64,
    /// How often the stages have lost their sessions.
    epoch: u64,
}

impl Journal {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the calls that no step has taken.
    pub(in crate::model) fn take(&self) -> Vec<Change> {
        std::mem::take(&mut self.entries().changes)
    }

    /// How often the stages have lost their sessions.
    pub(in crate::model) fn epoch(&self) -> u64 {
        self.entries().epoch
    }

    /// Records that the stages have lost all sessions and pages.
    pub(in crate::model) fn forget(&self) {
        let mut entries = self.entries();
        entries.changes.clear();
        entries.epoch += 1;
    }
}

/// A session or a shared page of the driver, as the stages know it. Its end is recorded, too.
#[derive(Debug)]
pub(in crate::model) struct Mirror {
    id: u64,
    epoch: u64,
    is_page: bool,
    journal: Arc<Journal>,
}

impl Mirror {
    /// A new session.
    pub(in crate::model) fn session(journal: &Arc<Journal>) -> Mirror {
        Mirror::new(journal, false)
    }

    fn new(journal: &Arc<Journal>, is_page: bool) -> Mirror {
        let mut entries = journal.entries();
        entries.last += 1;
        Mirror { id: entries.last, epoch: entries.epoch, is_page, journal: journal.clone() }
    }

    /// Its id.
    pub(in crate::model) fn id(&self) -> u64 {
        self.id
    }

    /// Whether the stages have lost it.
    pub(in crate::model) fn is_lost(&self) -> bool {
        self.epoch != self.journal.epoch()
    }

    /// A new session in place of one that is lost.
    pub(super) fn renewed(&self) -> Mirror {
        Mirror::session(&self.journal)
    }

    /// Records a fork of the session.
    pub(super) fn fork(&self) -> Mirror {
        let mut fork = Mirror::session(&self.journal);
        // That of a lost session is lost, too.
        fork.epoch = self.epoch;
        self.record(Change::Fork { from: self.id, to: fork.id });
        fork
    }

    /// Records that page `index` of the session is shared.
    pub(super) fn share(&self, index: usize) -> Mirror {
        let mut page = Mirror::new(&self.journal, true);
        page.epoch = self.epoch;
        self.record(Change::Share { session: self.id, index, page: page.id });
        page
    }

    /// Records a call, unless the stages have lost what it is about.
    pub(super) fn record(&self, change: Change) {
        let mut entries = self.journal.entries();
        if entries.epoch == self.epoch {
            entries.changes.push(change);
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let id = self.id;
        self.record(if self.is_page { Change::DropPage { page: id } } else { Change::DropSession { session: id } });
    }
}
