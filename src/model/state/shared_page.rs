//! Pages that sessions share.

use std::sync::Arc;

use super::cache::Page;
use super::head::HeadPage;
use super::journal::{Change, Mirror};

/// Keys and values of 64 positions that sessions of one model may share. They stay in memory while it exists.
#[derive(Debug, Clone)]
pub struct SharedPage {
    pub(super) page: Page,
    /// What belongs to the head for multi-token prediction.
    pub(super) head: Option<HeadPage>,
    pub(super) model: u64,
    /// The id of the adapter that it was computed with, or 0.
    pub(super) adapter: u64,
    /// Whether the model has recurrent states.
    pub(super) is_recurrent: bool,
    /// The page in the stages of a pipeline.
    pub(super) mirror: Option<Arc<Mirror>>,
}

impl SharedPage {
    /// Whether a session or another `SharedPage` holds this page, or a part of it, too.
    pub fn is_shared(&self) -> bool {
        self.shared_bytes() > 0
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.page.len() + self.head.as_ref().map_or(0, HeadPage::bytes)
    }

    /// Bytes that a session or another `SharedPage` holds, too.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.page.shared_len_with_snapshot() + self.head.as_ref().map_or(0, HeadPage::shared_bytes)
    }

    /// Frees what nothing else holds, and returns how many bytes that was.
    pub(crate) fn free_unshared(&mut self) -> usize {
        let all = 0..self.page.count();
        let present = self.mirror.as_ref().map(|_| all.filter(|part| self.page.has(*part)).collect::<Vec<_>>());
        let had_snapshot = self.page.snapshot.is_some();
        let freed = self.page.free_unshared() + self.head.as_mut().map_or(0, HeadPage::free_unshared);
        if let (Some(mirror), Some(mut parts)) = (&self.mirror, present) {
            parts.retain(|part| !self.page.has(*part));
            let snapshot = had_snapshot && self.page.snapshot.is_none();
            mirror.record(Change::Free { page: mirror.id(), parts, snapshot });
        }
        freed
    }

    /// Forgets the recurrent states after the page, also where a session holds them, and returns how many bytes they count.
    pub(crate) fn forget_snapshot(&mut self) -> usize {
        let Some(snapshot) = self.page.snapshot.take() else { return 0 };
        self.mirror.iter().for_each(|mirror| {
            mirror.record(Change::Free { page: mirror.id(), parts: Vec::new(), snapshot: true });
        });
        snapshot.bytes()
    }

    /// Frees these parts, and the snapshot if `snapshot`.
    pub(in crate::model) fn free(&mut self, parts: &[usize], snapshot: bool) {
        let count = self.page.count();
        parts.iter().filter(|part| **part < count).for_each(|part| self.page.free(*part));
        self.page.snapshot.take_if(|_| snapshot);
    }

    /// Whether it has all of its parts.
    pub(crate) fn is_whole(&self) -> bool {
        self.page.is_whole()
    }

    /// Whether it has recurrent states.
    pub(crate) fn has_snapshot(&self) -> bool {
        self.page.snapshot.is_some()
    }

    /// Whether a session can continue after it: it has the recurrent states there, if the model has any.
    pub(crate) fn has_state(&self) -> bool {
        !self.is_recurrent || self.page.snapshot.is_some()
    }

    /// Takes the parts of `other`, computed from the same tokens, that this page lacks.
    pub(crate) fn complete_from(&mut self, other: &SharedPage) {
        self.page.complete_from(&other.page);
        if self.head.as_ref().is_none_or(|head| !head.is_whole()) {
            self.head.clone_from(&other.head);
        }
        if let (Some(mirror), Some(other)) = (&self.mirror, &other.mirror) {
            mirror.record(Change::Complete { page: mirror.id(), from: other.id() });
        }
    }
}
