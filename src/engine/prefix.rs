//! Keys and values of texts seen before, page by page, so that texts that begin alike are computed once.
//!
//! A block is 64 tokens, the page with their keys and values, and the block before it. Since a page depends on all tokens
//! before it, a block is looked up by its parent's number together with its own tokens, which are compared in full: blocks
//! form a tree, and no chance of a hash can mix two texts.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::kernels::PAGE;
use crate::model::SharedPage;

/// The tokens of a page.
pub(super) type Tokens = [u32; PAGE];

/// The number of the block before the first one.
pub(super) const ROOT: u64 = 0;

/// Fewer tokens of a page are computed again rather than copied with it.
const WORTH_A_COPY: usize = 8;

/// What a block is found by: the number of the block before it, and its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) parent: u64,
    pub(super) tokens: Tokens,
}

#[derive(Debug)]
struct Block {
    key: Key,
    page: SharedPage,
    /// Blocks before it.
    depth: usize,
    /// When a sequence last used it.
    used: u64,
}

/// The tree of blocks. It holds their pages until it is told to give some up.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    blocks: HashMap<u64, Block>,
    numbers: HashMap<Key, u64>,
    children: HashMap<u64, Vec<u64>>,
    last: u64,
    clock: u64,
}

impl Prefixes {
    /// Pages held.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Pages that sequences use, too, so that giving them up would free nothing.
    pub(super) fn in_use(&self) -> usize {
        self.blocks.values().filter(|block| block.page.is_shared()).count()
    }

    /// The block with this key: its number and page.
    pub(super) fn find(&self, key: &Key) -> Option<(u64, SharedPage)> {
        let number = *self.numbers.get(key)?;
        Some((number, self.blocks.get(&number)?.page.clone()))
    }

    /// Of the blocks after `parent` the one that begins with the most of `tokens`: its page, and how many. `None` when there
    /// are too few to be worth a copy of the page.
    pub(super) fn find_beginning(&self, parent: u64, tokens: &[u32]) -> Option<(SharedPage, usize)> {
        let blocks = self.children.get(&parent)?.iter().filter_map(|number| self.blocks.get(number));
        let shared = |block: &Block| block.key.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let (count, block) = blocks.map(|block| (shared(block), block)).max_by_key(|(count, _)| *count)?;
        (count >= WORTH_A_COPY).then(|| (block.page.clone(), count))
    }

    /// Keeps `page` under `key`, unless there is such a block. Returns the block's number and page, which is the one to use.
    pub(super) fn insert(&mut self, key: Key, page: SharedPage) -> (u64, SharedPage) {
        if let Some(found) = self.find(&key) {
            return found;
        }
        self.last += 1;
        let depth = self.blocks.get(&key.parent).map_or(0, |parent| parent.depth + 1);
        self.numbers.insert(key, self.last);
        self.children.entry(key.parent).or_default().push(self.last);
        self.blocks.insert(self.last, Block { key, page: page.clone(), depth, used: self.clock });
        (self.last, page)
    }

    /// Notes that block `number`, and with it all before it, was used just now.
    pub(super) fn touch(&mut self, mut number: u64) {
        self.clock += 1;
        while let Some(block) = self.blocks.get_mut(&number) {
            block.used = self.clock;
            number = block.key.parent;
        }
    }

    /// Gives up to `count` pages back that no sequence uses: the least recently used, of these the last of their text first, so
    /// that no block loses the ones before it. Returns how many.
    pub(super) fn evict(&mut self, count: usize) -> usize {
        let unused = self.blocks.iter().filter(|(_, block)| !block.page.is_shared());
        let mut unused: Vec<_> = unused.map(|(number, b)| (b.used, Reverse(b.depth), *number)).collect();
        unused.sort_unstable();
        unused.truncate(count);
        for (_, _, number) in &unused {
            let Some(block) = self.blocks.remove(number) else { continue };
            self.numbers.remove(&block.key);
            if let Some(siblings) = self.children.get_mut(&block.key.parent) {
                siblings.retain(|sibling| sibling != number);
                if siblings.is_empty() {
                    self.children.remove(&block.key.parent);
                }
            }
        }
        unused.len()
    }
}
