//! An adapter in memory: pairs of narrow matrices that add to the products of a model's linear layers.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::quant::packed::{PANEL, Packed};

/// An adapter of one model. It does not change.
pub(in crate::model) struct Adapter {
    /// Distinguishes the adapter from all others, those of the same name included. Never 0.
    id: u64,
    name: String,
    path: PathBuf,
    hash: blake3::Hash,
    /// By the id of the layer.
    linears: HashMap<u64, LowRankLinear>,
    embedding: Option<LowRankTable>,
}

/// What an adapter adds to a linear layer.
pub(in crate::model) struct LowRankLinear {
    /// `(parts of the layer)`
    pub(super) parts: Vec<Option<LowRank>>,
}

/// What an adapter adds to the product of a matrix: `up * down * x`. The adapter's scale is part of `up`.
pub(in crate::model) struct LowRank {
    /// `(rank, columns)`
    pub(super) down: Packed,
    /// `(rows, rank)`
    pub(super) up: Packed,
}

/// What an adapter adds to the rows of an embedding.
pub(in crate::model) struct LowRankTable {
    /// `(tokens, rank)`, the adapter's scale included.
    pub(super) weights: Vec<f32>,
    /// `(rank, columns)`
    pub(super) directions: Vec<f32>,
    pub(super) rank: usize,
}

impl LowRankLinear {
    /// Numbers of a row between the two matrices, for all parts.
    pub(super) fn width(&self) -> usize {
        self.parts.iter().flatten().map(LowRank::width).sum()
    }

    fn bytes(&self) -> usize {
        self.parts.iter().flatten().map(|part| part.down.bytes() + part.up.bytes()).sum()
    }
}

impl LowRank {
    /// Numbers of a row between the two matrices: the rank, in whole panels.
    pub(super) fn width(&self) -> usize {
        self.down.panels() * PANEL
    }
}

impl Adapter {
    /// An adapter called `name`, from the file or folder at `path`, whose weights have this hash.
    pub(super) fn new(
        name: &str,
        path: &Path,
        hash: blake3::Hash,
        linears: HashMap<u64, LowRankLinear>,
        embedding: Option<LowRankTable>,
    ) -> Adapter {
        static ADAPTERS: AtomicU64 = AtomicU64::new(1);
        let id = ADAPTERS.fetch_add(1, Ordering::Relaxed);
        Adapter { id, name: name.to_owned(), path: path.to_path_buf(), hash, linears, embedding }
    }

    pub(in crate::model) fn id(&self) -> u64 {
        self.id
    }

    pub(in crate::model) fn name(&self) -> &str {
        &self.name
    }

    /// The file or folder.
    pub(in crate::model) fn path(&self) -> &Path {
        &self.path
    }

    /// A hash of the weights. Adapters with the same one give the same bits.
    pub(in crate::model) fn hash(&self) -> &blake3::Hash {
        &self.hash
    }

    /// What it adds to the layer with this id.
    pub(super) fn linear(&self, id: u64) -> Option<&LowRankLinear> {
        self.linears.get(&id)
    }

    /// What it adds to the embedding.
    pub(super) fn embedding(&self) -> Option<&LowRankTable> {
        self.embedding.as_ref()
    }

    /// The largest [width](LowRankLinear::width) of all layers.
    pub(super) fn width(&self) -> usize {
        self.linears.values().map(LowRankLinear::width).max().unwrap_or(0)
    }

    /// Bytes of its matrices.
    pub(in crate::model) fn bytes(&self) -> usize {
        let table = |table: &LowRankTable| size_of::<f32>() * (table.weights.len() + table.directions.len());
        self.linears.values().map(LowRankLinear::bytes).sum::<usize>() + self.embedding.as_ref().map_or(0, table)
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("name", &self.name).field("path", &self.path).finish_non_exhaustive()
    }
}
