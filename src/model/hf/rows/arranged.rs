//! The rows of a GGUF tensor, taken from the tensors of a checkpoint.

use super::order::RowOrder;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// The rows of a tensor whose parts have the shapes that its dimensions imply.
pub(in crate::model::hf) struct Arranged<'a> {
    /// The type of the checkpoint's values.
    pub(in crate::model::hf) block_type: BlockType,
    /// The bytes of tensors of equal shape.
    pub(in crate::model::hf) parts: Vec<&'a [u8]>,
    pub(in crate::model::hf) order: RowOrder,
    /// Values in a row.
    pub(in crate::model::hf) columns: usize,
    /// Whether there is one row, whose values are ordered like the rows of a matrix.
    pub(in crate::model::hf) is_vector: bool,
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
        self.block_type
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let value = self.block_type.block_bytes();
        let row = self.columns * value;
        scratch.clear();
        match self.order {
            RowOrder::Same => return self.piece(index, row),
            RowOrder::Concat => {
                let mut at = index * row;
                for part in &self.parts {
                    match at.checked_sub(part.len()) {
                        Some(rest) => at = rest,
                        None => return &part[at..][..row],
                    }
                }
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
pub(in crate::model::hf) struct Computed<'a>(pub(in crate::model::hf) &'a [f32]);

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
    fn experts_follow_one_another() {
        assert_eq!(rows(RowOrder::Same, 2, 4, 4, 2), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]);
    }

    #[test]
    fn parts_of_different_heights_follow_one_another() {
        let bytes: Vec<Vec<u8>> = [&[0.0f32, 1.0][..], &[2.0, 3.0, 4.0, 5.0]]
            .iter()
            .map(|part| part.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let parts = bytes.iter().map(Vec::as_slice).collect();
        let (block_type, order) = (BlockType::F32, RowOrder::Concat);
        let arranged = Arranged { block_type, parts, order, columns: 2, is_vector: false };
        let mut scratch = Vec::new();
        let rows: Vec<Vec<u8>> = (0..3).map(|row| arranged.row(row, &mut scratch).to_vec()).collect();
        assert_eq!(rows.concat(), bytes.concat());
    }

    #[test]
    fn groups_of_a_delta_rule_become_queries_keys_values_and_gates() {
        // [group][q q k k v z] of 2 groups of keys of width 2 and values of width 1.
        let rows = RowOrder::DeltaGroups { groups: 2, key: 2, values: 1, gate: false };
        let found: Vec<usize> = (0..10).map(|row| rows.source(row)).collect();
        assert_eq!(found, [0, 1, 6, 7, 2, 3, 8, 9, 4, 10]);
        let gates = RowOrder::DeltaGroups { groups: 2, key: 2, values: 1, gate: true };
        assert_eq!([gates.source(0), gates.source(1)], [5, 11]);
    }

    #[test]
    fn the_first_rows_are_left_out() {
        assert_eq!(rows(RowOrder::Skip(2), 1, 8, 2, 2), [[4.0, 5.0], [6.0, 7.0]]);
    }
}
