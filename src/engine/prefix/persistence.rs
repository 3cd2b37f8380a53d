//! Which blocks of the prefix cache are kept on disk, and which are read from there.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::super::disk_cache::{DiskCache, LONG, Prefix};
use super::{Prefixes, Tokens, root};
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::{Model, PageId, Session, next_prefix};

/// How often the time of a file is set, at most.
const MARK_EVERY: Duration = Duration::from_secs(10);

impl Prefixes {
    /// An empty cache for `model`, whose blocks are kept in a folder, too, if there is one. Where the system refuses the folder, they
    /// are not, and a report says so.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a folder that is not one, or to which others may write.
    pub(in crate::engine) fn open(model: &Arc<Model>, folder: Option<&Path>, bytes: u64) -> Result<Prefixes> {
        let mut prefixes = Prefixes::default();
        match folder.map(|folder| DiskCache::open(model, folder, bytes)) {
            Some(Ok(disk)) => prefixes.disk = Some(disk),
            Some(Err(error @ Error::Io { .. })) => {
                prefixes.reports.push(format!("{error}: the prefix cache is not kept on disk"));
            }
            Some(Err(error)) => return Err(error),
            None => {}
        }
        Ok(prefixes)
    }

    /// What has failed since the last call, once for each kind of failure.
    pub(in crate::engine) fn take_reports(&mut self) -> Vec<String> {
        self.reports.extend(self.disk.iter().flat_map(DiskCache::take_reports));
        std::mem::take(&mut self.reports)
    }

    /// Where blocks are kept, too.
    pub(in crate::engine) fn disk(&self) -> Option<&DiskCache> {
        self.disk.as_ref()
    }

    /// Prepares for blocks of sequences with the adapter of `session`.
    pub(in crate::engine) fn add_root(&mut self, session: &Session) {
        if let Some(disk) = &self.disk {
            let hash = session.adapter_hash();
            self.roots.entry(root(session)).or_insert_with(|| (disk.first_prefix(hash), hash));
        }
    }

    /// The prefix that ends with `tokens` after block `parent`. `None` where no blocks are kept on disk.
    pub(super) fn prefix_after(&self, parent: u64, tokens: &Tokens) -> Option<Prefix> {
        self.disk.as_ref()?;
        let block = self.blocks.get(&parent).map(|block| &block.prefix);
        let before = block.or_else(|| self.roots.get(&parent).map(|(prefix, _)| prefix))?;
        Some(next_prefix(before, tokens))
    }

    /// The blocks of `tokens` after block `parent` that are on disk and not in memory, up to the first that is in neither. Returns
    /// the last block in memory, too. For a model with recurrent states, up to the last block that has them.
    ///
    /// `index` is the number of blocks up to `parent`.
    pub(in crate::engine) fn on_disk(
        &mut self,
        session: &Session,
        mut parent: u64,
        mut index: usize,
        tokens: &[u32],
    ) -> Option<(u64, Vec<PageId>)> {
        let disk = self.disk.as_ref()?;
        let (mut blocks, mut before) = (tokens.as_chunks::<PAGE>().0.iter().peekable(), None);
        while let Some(tokens) = blocks.peek() {
            let key = super::Key { parent, tokens: **tokens };
            let known = self.numbers.get(&key).and_then(|number| Some((*number, self.blocks.get(number)?)));
            let is_complete = |(_, block): &(u64, &super::Block)| {
                // The file may have recurrent states that the block lacks.
                let more = || disk.stored(&block.prefix) == Some(true) && !block.page.has_snapshot();
                block.page.is_whole() && !more()
            };
            let Some((number, block)) = known.filter(is_complete) else { break };
            (parent, index, before) = (number, index + 1, Some(block.prefix));
            blocks.next();
        }
        let first = self.roots.get(&root(session)).map(|(prefix, _)| *prefix);
        let known = self.blocks.get(&parent).map(|block| block.prefix);
        let mut prefix = before.or(known).or(first.filter(|_| parent == root(session)))?;
        let (mut ids, mut restorable) = (Vec::new(), 0);
        for tokens in blocks {
            prefix = next_prefix(&prefix, tokens);
            let Some(has_states) = disk.stored(&prefix) else { break };
            let (adapter, adapter_hash) = (session.adapter_id(), session.adapter_hash());
            let at = index + ids.len();
            ids.push(PageId { prefix, index: at, tokens: *tokens, adapter, adapter_hash });
            if has_states || session.next_snapshot().is_none() {
                restorable = ids.len();
            }
        }
        ids.truncate(restorable);
        self.refresh(parent);
        (!ids.is_empty()).then_some((parent, ids))
    }

    /// Writes the blocks up to `number` to disk that are worth it: those that several sequences have used, or all of a long one.
    pub(super) fn save_chain(&mut self, mut number: u64) {
        if self.disk.is_none() {
            return;
        }
        let is_long = self.blocks.get(&number).is_some_and(|block| block.depth + 1 >= LONG);
        let (mut numbers, mut known) = (Vec::new(), Vec::new());
        while let Some(block) = self.blocks.get_mut(&number) {
            // A file system may take a while for each.
            if block.saved.is_some() && block.marked.is_none_or(|marked| marked.elapsed() > MARK_EVERY) {
                block.marked = Some(Instant::now());
                known.push(block.prefix);
            }
            if block.users > 1 || is_long {
                numbers.push(number);
            }
            number = block.key.parent;
        }
        let used = SystemTime::now();
        if let Some(disk) = self.disk.as_ref().filter(|_| !known.is_empty()) {
            disk.mark_used(known, used);
        }
        // A page is of no use without those before it.
        numbers.into_iter().rev().for_each(|number| self.save(number, used));
    }

    /// Hands a block to the disk cache, unless it has it.
    fn save(&mut self, number: u64, used: SystemTime) {
        let (Some(disk), Some(block)) = (&self.disk, self.blocks.get_mut(&number)) else { return };
        let has_states = block.page.has_snapshot();
        let is_new = block.saved.is_none_or(|had_states| has_states && !had_states);
        let Some((_, adapter_hash)) = self.roots.get(&block.root).filter(|_| is_new && block.page.is_whole()) else {
            return;
        };
        let (prefix, index, tokens) = (block.prefix, block.depth, block.key.tokens);
        let id = PageId { prefix, index, tokens, adapter: block.root & !(1 << 63), adapter_hash: *adapter_hash };
        if disk.save(id, &block.page, used) {
            (block.saved, block.marked) = (Some(has_states), Some(Instant::now()));
        }
    }

    /// Writes all blocks to disk, as far as that takes at most `limit`: the most recently used first.
    pub(in crate::engine) fn save_all(&mut self, limit: Duration) {
        if self.disk.is_none() {
            return;
        }
        let mut numbers: Vec<_> = self.blocks.iter().map(|(n, block)| ((!block.used, block.depth), *n)).collect();
        numbers.sort_unstable();
        let used = SystemTime::now();
        for (_, number) in numbers {
            // Also those whose files have been removed meanwhile.
            if let Some(block) = self.blocks.get_mut(&number)
                && self.disk.as_ref().is_some_and(|disk| disk.stored(&block.prefix).is_none())
            {
                block.saved = None;
            }
            self.save(number, used);
        }
        if let Some(disk) = &self.disk {
            disk.flush(limit);
        }
    }
}
