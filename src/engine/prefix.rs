//! The prefix cache: KV cache pages of earlier sequences, so that a common prefix is computed once.
//!
//! A block is 64 tokens, the page with their keys and values, and the block before it. A page depends on all tokens before
//! it, so a block is looked up by the id of its parent and its own tokens. Blocks form a tree. Tokens are compared in full:
//! a hash collision cannot mix up two sequences. `persistence` keeps blocks on disk, too.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Instant;

use super::disk_cache::{DiskCache, Prefix};
use crate::kernels::PAGE;
use crate::model::{Session, SharedPage};

mod persistence;

/// The tokens of a page.
pub(super) type Tokens = [u32; PAGE];

/// The id of the parent of a first block of sequences with the adapter of `session`. It is not the id of a block: those count
/// from 1, and ids of adapters have the highest bit set.
pub(super) fn root(session: &Session) -> u64 {
    match session.adapter_id() {
        0 => 0,
        adapter => 1 << 63 | adapter,
    }
}

/// Smallest number of tokens for which copying a page is faster than computing them.
const MIN_COPIED_TOKENS: usize = 8;

/// The key of a block: the id of its parent, and its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) parent: u64,
    pub(super) tokens: Tokens,
}

#[derive(Debug)]
struct Block {
    key: Key,
    page: SharedPage,
    /// Number of blocks before it.
    depth: usize,
    /// When a sequence last used it.
    used: u64,
    /// Sequences that have used it.
    users: usize,
    /// The id of the parent of the first block before it.
    root: u64,
    /// The hash of all tokens up to its last, for the file on disk.
    prefix: Prefix,
    /// Whether the page was handed to the disk cache, and whether it had recurrent states then.
    saved: Option<bool>,
    /// When the time of its file was last set.
    marked: Option<Instant>,
}

/// The tree of blocks. It keeps their pages until they are evicted.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    blocks: HashMap<u64, Block>,
    numbers: HashMap<Key, u64>,
    children: HashMap<u64, Vec<u64>>,
    last: u64,
    clock: u64,
    /// Bytes of all pages.
    bytes: usize,
    /// Where pages are kept, too.
    disk: Option<DiskCache>,
    /// Reports that nobody has taken yet.
    reports: Vec<String>,
    /// The prefixes of first blocks by their parents' ids, and the hashes of adapters, where pages are kept on disk.
    roots: HashMap<u64, (Prefix, Option<[u8; 32]>)>,
}

impl Prefixes {
    /// Number of pages.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes of all pages.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that sequences use, too. Evicting them would free no memory.
    pub(super) fn bytes_in_use(&self) -> usize {
        self.blocks.values().map(|block| block.page.shared_bytes()).sum()
    }

    /// Forgets all blocks in memory.
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.numbers.clear();
        self.children.clear();
        self.bytes = 0;
    }

    /// Whether block `number` is in memory.
    pub(super) fn has(&self, number: u64) -> bool {
        self.blocks.contains_key(&number)
    }

    /// The id and page of the block with this key.
    pub(super) fn find(&self, key: &Key) -> Option<(u64, SharedPage)> {
        let number = *self.numbers.get(key)?;
        Some((number, self.blocks.get(&number)?.page.clone()))
    }

    /// The page of the child of `parent` with the longest common prefix with `tokens`, and the length of that prefix. `None`
    /// if it is too short to be worth a copy of the page.
    pub(super) fn find_beginning(&self, parent: u64, tokens: &[u32]) -> Option<(SharedPage, usize)> {
        let blocks = self.children.get(&parent)?.iter().filter_map(|number| self.blocks.get(number));
        let shared = |block: &Block| block.key.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let (count, block) = blocks.map(|block| (shared(block), block)).max_by_key(|(count, _)| *count)?;
        (count >= MIN_COPIED_TOKENS).then(|| (block.page.clone(), count))
    }

    /// Adds a block, or what the block with this key lacks. Returns the id and page of the block in the cache.
    pub(super) fn insert(&mut self, key: Key, page: SharedPage) -> (u64, SharedPage) {
        if let Some(number) = self.numbers.get(&key)
            && let Some(block) = self.blocks.get_mut(number)
        {
            self.bytes -= block.page.bytes();
            block.page.complete_from(&page);
            self.bytes += block.page.bytes();
            return (*number, block.page.clone());
        }
        self.last += 1;
        self.bytes += page.bytes();
        let parent = self.blocks.get(&key.parent);
        let (depth, root) = parent.map_or((0, key.parent), |parent| (parent.depth + 1, parent.root));
        let prefix = self.prefix_after(key.parent, &key.tokens).unwrap_or_default();
        self.numbers.insert(key, self.last);
        self.children.entry(key.parent).or_default().push(self.last);
        let block = Block {
            key,
            page: page.clone(),
            depth,
            used: self.clock,
            users: 0,
            root,
            prefix,
            saved: None,
            marked: None,
        };
        self.blocks.insert(self.last, block);
        (self.last, page)
    }

    /// Records that a sequence that has used block `number` and all blocks before it leaves.
    pub(super) fn touch(&mut self, number: u64) {
        self.refresh(number);
        let mut next = number;
        while let Some(block) = self.blocks.get_mut(&next) {
            block.users += 1;
            next = block.key.parent;
        }
        self.save_chain(number);
    }

    /// Records that block `number` and all blocks before it are used now.
    pub(super) fn refresh(&mut self, mut number: u64) {
        self.clock += 1;
        while let Some(block) = self.blocks.get_mut(&number) {
            block.used = self.clock;
            number = block.key.parent;
        }
    }

    /// Frees at least `bytes`, as far as sequences do not use them, and returns how many: blocks that no sequence uses, the
    /// least recently used first, and of these the deepest, so that a block never loses its parent; then what the others hold
    /// alone, the deepest last.
    pub(super) fn evict(&mut self, bytes: usize) -> usize {
        let mut freed = self.free(bytes);
        self.bytes -= freed;
        if freed < bytes && self.disk.is_some() {
            // A page that the disk cache is copying counts as used.
            let disk = self.disk.take();
            let held = disk.as_ref().map(DiskCache::hold_writer);
            let more = self.free(bytes - freed);
            drop(held);
            self.disk = disk;
            self.bytes -= more;
            freed += more;
        }
        freed
    }

    /// Forgets the recurrent states of all blocks, also those that a sequence holds, and returns whether there were any.
    pub(super) fn forget_states(&mut self) -> bool {
        let freed: usize = self.blocks.values_mut().map(|block| block.page.forget_snapshot()).sum();
        self.bytes -= freed;
        freed > 0
    }

    fn free(&mut self, bytes: usize) -> usize {
        let mut freed = 0;
        let unused = self.blocks.iter().filter(|(_, block)| !block.page.is_shared());
        let mut unused: Vec<_> = unused.map(|(number, b)| (b.used, Reverse(b.depth), *number)).collect();
        unused.sort_unstable();
        for (_, _, number) in &unused {
            if freed >= bytes {
                return freed;
            }
            let Some(block) = self.blocks.remove(number) else { continue };
            freed += block.page.bytes();
            self.numbers.remove(&block.key);
            if let Some(siblings) = self.children.get_mut(&block.key.parent) {
                siblings.retain(|sibling| sibling != number);
                if siblings.is_empty() {
                    self.children.remove(&block.key.parent);
                }
            }
        }
        let mut used: Vec<_> = self.blocks.values_mut().collect();
        used.sort_unstable_by_key(|block| (block.used, block.depth));
        for block in used {
            if freed >= bytes {
                break;
            }
            freed += block.page.free_unshared();
        }
        freed
    }
}
