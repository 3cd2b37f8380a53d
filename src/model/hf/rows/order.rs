//! The order of the rows of a GGUF tensor in the tensors of a checkpoint.

use crate::model::hf::entry::{TiledRows, Transform};
use crate::model::hf::sizes::{LayerSizes, Sizes};

/// The row of the checkpoint that each row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model::hf) enum RowOrder {
    /// The row of the same number, counted through all parts.
    Same,
    /// See [`Transform::PairNeighbors`].
    PairNeighbors { head_dim: usize, rotary: usize },
    /// See [`Transform::Ungroup`].
    Ungroup { heads: usize, kv_heads: usize, head_dim: usize },
    /// The row that comes this many rows later.
    Skip(usize),
    /// The column of the same number.
    Transpose,
    /// The row of the same number, counted through parts of different heights.
    Concat,
    /// Of matrices of `of` rows one after the other, `len` rows from `start` on.
    Slice { of: usize, len: usize, start: usize },
    /// Of matrices of `rows` rows of `columns` values one after the other, `len` columns of each: values `start`, `start +
    /// step`, ... of the rows from `first_row` on.
    Columns { rows: usize, first_row: usize, columns: usize, len: usize, start: usize, step: usize },
    /// Of a vector, numbers `start`, `start + step`, ...
    EveryNth { start: usize, step: usize },
    /// The row of the same number, but for these, which come from the first.
    Placeholders([usize; 2]),
    /// The row of the same number up to this, then the first.
    Padded(usize),
    /// Of heads of `plain + rope` rows, or of `plain` rows once: as `PairNeighbors` for the last `rope`.
    LatentPairs { plain: usize, rope: usize, interleaved: bool },
    /// The first `skip` rows, then the heads of values in another order.
    TiledHeads { skip: usize, heads: HeadOrder },
    /// Of groups of `key` rows of a query, `key` of a key, `values` of values and `values` of their gates: all queries, all keys
    /// and all values, or all gates.
    DeltaGroups { groups: usize, key: usize, values: usize, gate: bool },
}

/// The heads of values of a delta rule. In the checkpoint those of a key head are adjacent; in GGUF the first heads of all key
/// heads come first, then the second ones, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model::hf) struct HeadOrder {
    key_heads: usize,
    /// Heads of values for each key head.
    per_key: usize,
    /// Values of a head.
    pub(super) head: usize,
}

impl HeadOrder {
    /// The order of heads of this many values.
    pub(in crate::model::hf) fn new(sizes: &Sizes, head: usize) -> HeadOrder {
        let key_heads = sizes.recurrent.groups.max(1);
        HeadOrder::of(key_heads, (sizes.recurrent.heads / key_heads).max(1), head.max(1))
    }

    /// The order of `per_key` heads of `head` values for each of `key_heads` heads.
    pub(super) fn of(key_heads: usize, per_key: usize, head: usize) -> HeadOrder {
        HeadOrder { key_heads, per_key, head }
    }

    /// The head of the checkpoint that becomes head `index`.
    pub(super) fn source_head(self, index: usize) -> usize {
        index % self.key_heads * self.per_key + index / self.key_heads
    }

    /// The value of the checkpoint that becomes value `index`.
    pub(super) fn source(self, index: usize) -> usize {
        self.source_head(index / self.head) * self.head + index % self.head
    }
}

impl RowOrder {
    /// The order of the rows of a tensor of `dims`, the fastest-varying first, in `layer`.
    pub(in crate::model::hf) fn new(
        transform: Transform,
        sizes: &Sizes,
        layer: Option<usize>,
        dims: &[usize],
    ) -> RowOrder {
        let LayerSizes { heads, kv_heads, head_dim, .. } = sizes.of_layer(layer);
        let (rotary, latent) = (sizes.rotary, sizes.latent);
        let (columns, rows) = (dims.first().copied().unwrap_or(1), dims.get(1).copied().unwrap_or(1));
        match transform {
            Transform::RowsOfPart { part, parts } => {
                RowOrder::Slice { of: parts * rows, len: rows, start: part * rows }
            }
            Transform::ColumnsOfPart { part, parts, alternate } => RowOrder::Columns {
                rows: columns,
                first_row: 0,
                columns: parts * rows,
                len: rows,
                start: if alternate { part } else { part * rows },
                step: if alternate { parts } else { 1 },
            },
            Transform::EveryNth { part, parts } => RowOrder::EveryNth { start: part, step: parts },
            Transform::LatentKeys => RowOrder::Columns {
                rows: latent.plain + latent.value,
                first_row: 0,
                columns: latent.kv_rank,
                len: latent.kv_rank,
                start: 0,
                step: 1,
            },
            Transform::LatentValues => {
                let of = latent.plain + latent.value;
                RowOrder::Slice { of, len: latent.value, start: latent.plain }
            }
            Transform::PadRows => RowOrder::Padded(sizes.input_vocabulary),
            Transform::Placeholders => RowOrder::Placeholders(sizes.placeholders),
            Transform::LatentPairs => {
                let plain = if rows == latent.kv_rank + latent.rope { latent.kv_rank } else { latent.plain };
                RowOrder::LatentPairs { plain, rope: latent.rope, interleaved: sizes.interleaved }
            }
            Transform::Copy | Transform::Stack | Transform::Squeeze | Transform::Unflatten | Transform::TileColumns => {
                RowOrder::Same
            }
            Transform::Concat => RowOrder::Concat,
            Transform::TileHeads(rows) => {
                let recurrent = sizes.recurrent;
                let (skip, head) = match rows {
                    TiledRows::All => (2 * recurrent.groups * recurrent.state, recurrent.head_width()),
                    TiledRows::Values => (0, recurrent.head_width()),
                    TiledRows::Heads => (0, 1),
                };
                RowOrder::TiledHeads { skip, heads: HeadOrder::new(sizes, head) }
            }
            Transform::DeltaGroups { gate } => {
                let recurrent = sizes.recurrent;
                let groups = recurrent.groups.max(1);
                RowOrder::DeltaGroups { groups, key: recurrent.state, values: recurrent.inner / groups, gate }
            }
            Transform::PairNeighbors => RowOrder::PairNeighbors { head_dim, rotary },
            Transform::PairHeads => RowOrder::PairNeighbors { head_dim, rotary: head_dim },
            Transform::Ungroup => RowOrder::Ungroup { heads, kv_heads, head_dim },
            Transform::Skip(rows) => RowOrder::Skip(rows),
            Transform::SkipPadding => RowOrder::Skip(sizes.padding),
            Transform::Transpose => RowOrder::Transpose,
        }
    }

    /// The row of the checkpoint that becomes row `index`.
    pub(in crate::model::hf) fn source(self, index: usize) -> usize {
        match self {
            RowOrder::Same | RowOrder::Concat | RowOrder::Transpose | RowOrder::Columns { .. } => index,
            RowOrder::Slice { of, len, start } => index / len * of + start + index % len,
            RowOrder::EveryNth { start, step } => index * step + start,
            RowOrder::Placeholders(tokens) => {
                if tokens.contains(&index) {
                    0
                } else {
                    index
                }
            }
            RowOrder::Padded(rows) => {
                if index < rows {
                    index
                } else {
                    0
                }
            }
            RowOrder::LatentPairs { plain, rope, interleaved } => {
                let (head, i) = (index / (plain + rope) * (plain + rope), index % (plain + rope));
                match i.checked_sub(plain) {
                    Some(i) if !interleaved => head + plain + i % 2 * (rope / 2) + i / 2,
                    _ => index,
                }
            }
            RowOrder::TiledHeads { skip, heads } => match index.checked_sub(skip) {
                Some(index) => skip + heads.source(index),
                None => index,
            },
            RowOrder::DeltaGroups { groups, key, values, gate } => {
                let group = 2 * (key + values);
                let keys = groups * key;
                let (width, before, at) = match index {
                    _ if gate => (values, 2 * key + values, index),
                    _ if index < keys => (key, 0, index),
                    _ if index < 2 * keys => (key, key, index - keys),
                    _ => (values, 2 * key, index - 2 * keys),
                };
                at / width * group + before + at % width
            }
            RowOrder::Skip(rows) => rows + index,
            RowOrder::PairNeighbors { head_dim, rotary } => {
                let (head, i) = (index / head_dim * head_dim, index % head_dim);
                if i < rotary { head + i % 2 * (rotary / 2) + i / 2 } else { index }
            }
            RowOrder::Ungroup { heads, kv_heads, head_dim } => {
                let (head, i) = (index / head_dim, index % head_dim);
                // A group is the queries that share a key and a value, then the key, then the value.
                let queries = heads / kv_heads;
                let (group, member) = match head.checked_sub(heads) {
                    None => (head / queries, head % queries),
                    Some(kv) => (kv % kv_heads, queries + kv / kv_heads),
                };
                (group * (queries + 2) + member) * head_dim + i
            }
        }
    }
}
