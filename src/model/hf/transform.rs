//! The rows of a GGUF tensor, taken from the tensors of a checkpoint.

use super::entry::Transform;
use super::sizes::{LayerSizes, Sizes};
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// The row of the checkpoint that each row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
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
    /// The row of the same number, with 1 added to every value.
    AddOne,
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
}

impl RowOrder {
    /// The order of the rows of a tensor of `dims`, the fastest-varying first, in `layer`.
    pub(super) fn new(transform: Transform, sizes: &Sizes, layer: Option<usize>, dims: &[usize]) -> RowOrder {
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
            Transform::Copy | Transform::Stack | Transform::Squeeze => RowOrder::Same,
            Transform::PairNeighbors => RowOrder::PairNeighbors { head_dim, rotary },
            Transform::Ungroup => RowOrder::Ungroup { heads, kv_heads, head_dim },
            Transform::Skip(rows) => RowOrder::Skip(rows),
            Transform::SkipPadding => RowOrder::Skip(sizes.padding),
            Transform::Transpose => RowOrder::Transpose,
            Transform::AddOne => RowOrder::AddOne,
        }
    }

    /// The row of the checkpoint that becomes row `index`.
    pub(super) fn source(self, index: usize) -> usize {
        match self {
            RowOrder::Same | RowOrder::Transpose | RowOrder::AddOne | RowOrder::Columns { .. } => index,
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

/// The rows of a tensor whose parts have the shapes that its dimensions imply.
pub(super) struct Arranged<'a> {
    /// The type of the checkpoint's values.
    pub(super) block_type: BlockType,
    /// The bytes of tensors of equal shape.
    pub(super) parts: Vec<&'a [u8]>,
    pub(super) order: RowOrder,
    /// Values in a row.
    pub(super) columns: usize,
    /// Whether there is one row, whose values are ordered like the rows of a matrix.
    pub(super) is_vector: bool,
}

impl Arranged<'_> {
    /// Piece `index` of `length` bytes, counted through all parts.
    fn piece(&self, index: usize, length: usize) -> &[u8] {
        let per_part = self.parts[0].len() / length;
        &self.parts[index / per_part][index % per_part * length..][..length]
    }
}

impl Rows for Arranged<'_> {
    fn block_type(&self) -> BlockType {
        if self.order == RowOrder::AddOne { BlockType::F32 } else { self.block_type }
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let value = self.block_type.block_bytes();
        let row = self.columns * value;
        scratch.clear();
        match self.order {
            RowOrder::Same => return self.piece(index, row),
            RowOrder::AddOne => {
                let mut values = vec![0.0; self.columns];
                // It fails only for lengths that do not match.
                let _ = self.block_type.decode(self.piece(index, row), &mut values);
                scratch.extend(values.iter().flat_map(|value| (value + 1.0).to_le_bytes()));
            }
            RowOrder::Transpose => {
                let rows = self.parts[0].len() / row;
                scratch.extend((0..self.columns).flat_map(|column| self.piece(column * rows + index, value)));
            }
            RowOrder::Columns { rows, first_row, columns, len, start, step } => {
                let (matrix, at) = (index / len, start + index % len * step);
                let of = |column: usize| (matrix * rows + first_row + column) * columns + at;
                scratch.extend((0..self.columns).flat_map(|column| self.piece(of(column), value)));
            }
            RowOrder::EveryNth { start, step } => {
                let first = index * self.columns * step;
                scratch.extend((0..self.columns).flat_map(|column| self.piece(first + column * step + start, value)));
            }
            order if self.is_vector => {
                scratch.extend((0..self.columns).flat_map(|column| self.piece(order.source(column), value)));
            }
            order => return self.piece(order.source(index), row),
        }
        scratch
    }
}

/// Values that are computed from the configuration instead of stored.
pub(super) struct Computed<'a>(pub(super) &'a [f32]);

impl Rows for Computed<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, _index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        scratch.clear();
        scratch.extend(self.0.iter().flat_map(|value| value.to_le_bytes()));
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of `columns` values, of parts whose values count up.
    fn rows(order: RowOrder, parts: usize, per_part: usize, rows: usize, columns: usize) -> Vec<Vec<f32>> {
        let bytes: Vec<Vec<u8>> = (0..parts)
            .map(|part| (0..per_part).flat_map(|i| ((part * per_part + i) as f32).to_le_bytes()).collect())
            .collect();
        let arranged = Arranged {
            block_type: BlockType::F32,
            parts: bytes.iter().map(Vec::as_slice).collect(),
            order,
            columns,
            is_vector: rows == 1,
        };
        let mut scratch = Vec::new();
        let floats = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (0..rows).map(|row| floats(arranged.row(row, &mut scratch))).collect()
    }

    #[test]
    fn pairs_of_a_head_become_neighbors_in_matrices_and_biases() {
        let order = RowOrder::PairNeighbors { head_dim: 4, rotary: 4 };
        let found = rows(order, 1, 8 * 2, 8, 2);
        let first: Vec<f32> = found.iter().map(|row| row[0] / 2.0).collect();
        assert_eq!(first, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(rows(order, 1, 8, 1, 8), [[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]]);
    }

    #[test]
    fn dimensions_that_are_not_rotated_keep_their_place() {
        let order = RowOrder::PairNeighbors { head_dim: 6, rotary: 4 };
        assert_eq!(rows(order, 1, 6, 1, 6), [[0.0, 2.0, 1.0, 3.0, 4.0, 5.0]]);
    }

    #[test]
    fn rows_grouped_by_head_become_queries_keys_values() {
        // [head][q, k, v] of 3 heads of 2 dimensions.
        let order = RowOrder::Ungroup { heads: 3, kv_heads: 3, head_dim: 2 };
        let expected = [0, 1, 6, 7, 12, 13, 2, 3, 8, 9, 14, 15, 4, 5, 10, 11, 16, 17].map(|i| i as f32);
        assert_eq!(rows(order, 1, 18, 1, 18), [expected]);
    }

    #[test]
    fn rows_grouped_by_kv_head_become_queries_keys_values() {
        // [kv head][q, q, k, v] of 2 kv heads of 1 dimension.
        let order = RowOrder::Ungroup { heads: 4, kv_heads: 2, head_dim: 1 };
        let found = rows(order, 1, 8 * 3, 8, 3);
        let first: Vec<f32> = found.iter().map(|row| row[0] / 3.0).collect();
        assert_eq!(first, [0.0, 1.0, 4.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
    }

    #[test]
    fn one_kv_head_keeps_the_order() {
        let order = RowOrder::Ungroup { heads: 4, kv_heads: 1, head_dim: 2 };
        assert!((0..12).all(|row| order.source(row) == row));
    }

    #[test]
    fn columns_become_rows() {
        // 2 x 3 in the checkpoint, 3 rows of 2 in GGUF.
        assert_eq!(rows(RowOrder::Transpose, 1, 6, 3, 2), [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]);
    }

    #[test]
    fn one_is_added_to_every_value() {
        assert_eq!(rows(RowOrder::AddOne, 1, 3, 1, 3), [[1.0, 2.0, 3.0]]);
    }

    #[test]
    fn experts_follow_one_another() {
        assert_eq!(rows(RowOrder::Same, 2, 4, 4, 2), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]);
    }

    #[test]
    fn the_first_rows_are_left_out() {
        assert_eq!(rows(RowOrder::Skip(2), 1, 8, 2, 2), [[4.0, 5.0], [6.0, 7.0]]);
    }
}
