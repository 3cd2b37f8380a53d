//! Rows of another source with other values, or with their columns in another order.

use super::order::HeadOrder;
use crate::model::hf::entry::Segment;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// What is done with the values of a tensor. The result is in F32.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model::hf) enum Mapping {
    /// 1 is added.
    AddOne,
    /// The negative exponential.
    NegExp,
    /// Each row is multiplied by the factors of its segment.
    Scale(Vec<Segment>),
}

/// Rows whose values are mapped.
pub(in crate::model::hf) struct Mapped<'a> {
    pub(in crate::model::hf) rows: Box<dyn Rows + 'a>,
    pub(in crate::model::hf) mapping: &'a Mapping,
    /// Values in a row.
    pub(in crate::model::hf) columns: usize,
    /// Whether there is one row, whose values belong to the segments.
    pub(in crate::model::hf) is_vector: bool,
}

impl Rows for Mapped<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let mut values = decoded(self.rows.as_ref(), index, self.columns, scratch);
        match self.mapping {
            Mapping::AddOne => values.iter_mut().for_each(|value| *value += 1.0),
            Mapping::NegExp => values.iter_mut().for_each(|value| *value = -(libm::exp(f64::from(*value)) as f32)),
            Mapping::Scale(segments) if self.is_vector => {
                let factors = segments.iter().flat_map(|segment| std::iter::repeat_n(segment.factors, segment.rows));
                values.iter_mut().zip(factors).for_each(|(value, factors)| *value = scaled(*value, factors));
            }
            Mapping::Scale(segments) => {
                let mut end = 0;
                let own = segments.iter().find(|segment| {
                    end += segment.rows;
                    index < end
                });
                let factors = own.map_or([1.0; 2], |segment| segment.factors);
                values.iter_mut().for_each(|value| *value = scaled(*value, factors));
            }
        }
        write(&values, scratch)
    }
}

fn scaled(value: f32, [first, second]: [f32; 2]) -> f32 {
    value * first * second
}

/// Rows whose columns belong to heads in another order. They keep their type where blocks lie within heads.
pub(in crate::model::hf) struct TiledColumns<'a> {
    pub(in crate::model::hf) rows: Box<dyn Rows + 'a>,
    pub(in crate::model::hf) order: HeadOrder,
    /// Values in a row.
    pub(in crate::model::hf) columns: usize,
}

impl TiledColumns<'_> {
    fn keeps_blocks(&self) -> bool {
        self.order.head.is_multiple_of(self.rows.block_type().block_len())
    }
}

impl Rows for TiledColumns<'_> {
    fn block_type(&self) -> BlockType {
        if self.keeps_blocks() { self.rows.block_type() } else { BlockType::F32 }
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        if !self.keeps_blocks() {
            let values = decoded(self.rows.as_ref(), index, self.columns, scratch);
            let source = (0..self.columns).map(|column| values[self.order.source(column)]);
            return write(&source.collect::<Vec<_>>(), scratch);
        }
        let mut inner = Vec::new();
        let bytes = self.rows.row(index, &mut inner);
        let heads = self.columns / self.order.head;
        let head = bytes.len() / heads.max(1);
        scratch.clear();
        for index in 0..heads {
            scratch.extend_from_slice(&bytes[self.order.source_head(index) * head..][..head]);
        }
        scratch
    }
}

/// The values of row `index` of `rows`.
fn decoded(rows: &dyn Rows, index: usize, columns: usize, scratch: &mut Vec<u8>) -> Vec<f32> {
    let mut values = vec![0.0; columns];
    // It fails only for lengths that do not match.
    let _ = rows.block_type().decode(rows.row(index, scratch), &mut values);
    values
}

fn write<'a>(values: &[f32], scratch: &'a mut Vec<u8>) -> &'a [u8] {
    scratch.clear();
    scratch.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    scratch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::hf::rows::Computed;

    fn mapped(values: &[f32], columns: usize, mapping: &Mapping) -> Vec<f32> {
        let mut found = Vec::new();
        for (index, row) in values.chunks(columns).enumerate() {
            let is_vector = columns == values.len();
            // Every row of the source is this one.
            let rows = Mapped { rows: Box::new(Computed(row)), mapping, columns, is_vector };
            let mut scratch = Vec::new();
            let bytes = rows.row(index, &mut scratch);
            found.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        found
    }

    /// One row of `bytes` blocks of a type.
    struct Blocks(BlockType, Vec<u8>);

    impl Rows for Blocks {
        fn block_type(&self) -> BlockType {
            self.0
        }

        fn row<'a>(&'a self, _index: usize, _scratch: &'a mut Vec<u8>) -> &'a [u8] {
            &self.1
        }
    }

    #[test]
    fn heads_of_columns_change_places() {
        // Two heads of keys with three heads of values each.
        let order = |head| HeadOrder::of(2, 3, head);
        let expected = [0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 9.0, 4.0, 5.0, 10.0, 11.0];
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let rows = TiledColumns { rows: Box::new(Computed(&values)), order: order(2), columns: 12 };
        let mut scratch = Vec::new();
        let bytes = rows.row(0, &mut scratch);
        let found: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(found, expected);
        // Blocks within a head move as they are; heads that share a block become floats.
        let blocks: Vec<u8> = (0..6u8).flat_map(|block| [0, 60].into_iter().chain([block; 16])).collect();
        let packed = |head| TiledColumns {
            rows: Box::new(Blocks(BlockType::Q4_0, blocks.clone())),
            order: order(head),
            columns: 6 * 32,
        };
        let whole = packed(32);
        assert_eq!(whole.block_type(), BlockType::Q4_0);
        let moved: Vec<u8> = whole.row(0, &mut scratch).chunks(18).map(|block| block[2]).collect();
        assert_eq!(moved, [0, 3, 1, 4, 2, 5]);
        assert_eq!(packed(16).block_type(), BlockType::F32);
    }

    #[test]
    fn values_are_mapped() {
        assert_eq!(mapped(&[0.0, 1.0, 2.0], 3, &Mapping::AddOne), [1.0, 2.0, 3.0]);
        assert_eq!(mapped(&[0.0, 1.0], 2, &Mapping::NegExp), [-1.0, -std::f32::consts::E]);
        let segments = [(1, [2.0, 1.0]), (2, [3.0, 0.5])].map(|(rows, factors)| Segment { rows, factors });
        let scale = Mapping::Scale(segments.to_vec());
        assert_eq!(mapped(&[1.0, 2.0, 3.0], 3, &scale), [2.0, 3.0, 4.5]);
        assert_eq!(mapped(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &scale), [2.0, 4.0, 4.5, 6.0, 7.5, 9.0]);
    }
}
