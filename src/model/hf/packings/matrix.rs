//! A packed matrix: where its codes, scales and zero points are, and its rows as blocks.

use half::f16;

use super::layout::Layout;
use super::parts::Parts;
use crate::error::Result;
use crate::format::safetensors::SafeTensors;
use crate::model::hf::rows::RowOrder;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// Values in a block.
const BLOCK: usize = 32;
/// The nibble of a word of AWQ that holds row `i` of eight.
const AWQ_NIBBLES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A packed matrix `(rows, columns)`. All shapes are checked.
#[derive(Debug)]
pub(in super::super) struct Matrix {
    layout: Layout,
    rows: usize,
    columns: usize,
    groups: usize,
    /// Columns of a group, where they are adjacent.
    pub(super) group: usize,
    /// `(columns)`: the group of each column, where they are not.
    order: Option<Vec<u32>>,
    /// Indices among the tensors of the checkpoint: codes, scales, zero points, and those that were only checked.
    codes: usize,
    scales: usize,
    zeros: Option<usize>,
    checked: Vec<usize>,
    scale_type: BlockType,
    /// The smallest type whose blocks represent this matrix exactly, if the columns of each group are adjacent.
    in_groups: BlockType,
}

impl Matrix {
    pub(super) fn new(
        layout: Layout,
        [rows, columns]: [usize; 2],
        groups: usize,
        codes: usize,
        zeros: Option<usize>,
        scales: usize,
        scale_type: BlockType,
    ) -> Matrix {
        let (group, order, checked, in_groups) = (columns, None, Vec::new(), BlockType::F32);
        Matrix { layout, rows, columns, groups, group, order, codes, scales, zeros, checked, scale_type, in_groups }
    }

    /// Adds the index of a tensor that belongs to the matrix and was only checked.
    pub(super) fn add_checked(&mut self, at: usize) {
        self.checked.push(at);
    }

    /// Sets the group of each column.
    pub(super) fn order(&mut self, groups: Vec<u32>) {
        let is_plain = groups.iter().enumerate().all(|(column, group)| column / self.group == *group as usize);
        self.order = (!is_plain).then_some(groups);
    }

    /// Finds the block type, from all scales and zero points.
    ///
    /// # Errors
    /// [`Error::Malformed`](crate::Error::Malformed) for a scale that is not finite.
    pub(super) fn classified(mut self, files: &SafeTensors, parts: &Parts<'_>) -> Result<Matrix> {
        let view = self.view(files);
        let is_blocky = self.columns.is_multiple_of(BLOCK) && (self.groups == 1 || self.group.is_multiple_of(BLOCK));
        let mut in_groups = if is_blocky { BlockType::Q4_0 } else { BlockType::F32 };
        for row in 0..self.rows {
            for group in 0..self.groups {
                let (scale, zero) = (view.scale(row, group), view.zero(row, group));
                if !scale.is_finite() {
                    let end =
                        if matches!(self.layout, Layout::Compressed { .. }) { ".weight_scale" } else { ".scales" };
                    return Err(parts.malformed(end, format_args!("{scale} for row {row}"), "finite numbers"));
                }
                let needed = match is_f16(scale) {
                    false => BlockType::F32,
                    true if zero == 8 => BlockType::Q4_0,
                    true if is_f16(scale * f32::from(zero)) => BlockType::Q4_1,
                    true => BlockType::Q5_0,
                };
                in_groups = wider(in_groups, needed);
            }
        }
        self.in_groups = in_groups;
        Ok(self)
    }

    /// The smallest type whose blocks represent this matrix exactly.
    fn block_type(&self) -> BlockType {
        if self.order.is_none() { self.in_groups } else { BlockType::F32 }
    }

    /// The columns of the first group, then those of the second, and so on. `None` where the columns have that order, or groups
    /// differ in size.
    fn sequence(&self) -> Option<Vec<u32>> {
        let order = self.order.as_deref()?;
        let mut sequence: Vec<u32> = (0..order.len() as u32).collect();
        sequence.sort_by_key(|column| order.get(*column as usize));
        let is_whole =
            |(at, column): (usize, &u32)| order.get(*column as usize).is_some_and(|g| *g as usize == at / self.group);
        sequence.iter().enumerate().all(is_whole).then_some(sequence)
    }

    /// The indices of all its tensors.
    pub(in super::super) fn tensors(&self) -> impl Iterator<Item = usize> {
        let own = [Some(self.codes), Some(self.scales), self.zeros].into_iter().flatten();
        own.chain(self.checked.iter().copied())
    }

    fn view<'a>(&'a self, files: &'a SafeTensors) -> View<'a> {
        let data = |at: usize| files.tensors().get(at).map_or(&[][..], |tensor| files.data(tensor));
        View {
            matrix: self,
            codes: data(self.codes),
            scales: data(self.scales),
            zeros: self.zeros.map_or(&[][..], data),
        }
    }
}

/// The one of two types that represents the numbers of both.
pub(in super::super) fn wider(one: BlockType, other: BlockType) -> BlockType {
    let rank = |block_type| match block_type {
        BlockType::Q4_0 => 0,
        BlockType::Q4_1 => 1,
        BlockType::Q5_0 => 2,
        _ => 3,
    };
    if rank(one) < rank(other) { other } else { one }
}

fn is_f16(value: f32) -> bool {
    f16::from_f32(value).to_f32() == value
}

/// A matrix and its bytes.
struct View<'a> {
    matrix: &'a Matrix,
    codes: &'a [u8],
    scales: &'a [u8],
    zeros: &'a [u8],
}

/// Nibble `nibble` of word `at`. All shapes are checked, so every word exists.
fn nibble(bytes: &[u8], at: usize, nibble: u32) -> u8 {
    let word = bytes.as_chunks::<4>().0.get(at).copied().unwrap_or_default();
    (u32::from_le_bytes(word) >> (4 * nibble) & 15) as u8
}

impl View<'_> {
    fn code(&self, row: usize, column: usize) -> u8 {
        let Matrix { rows, columns, .. } = *self.matrix;
        match self.matrix.layout {
            Layout::Gptq { .. } => nibble(self.codes, column / 8 * rows + row, (column % 8) as u32),
            Layout::Awq => nibble(self.codes, column * (rows / 8) + row / 8, AWQ_NIBBLES[row % 8]),
            Layout::Compressed { .. } => {
                nibble(self.codes, row * columns.div_ceil(8) + column / 8, (column % 8) as u32)
            }
        }
    }

    /// The zero point, 0 to 15.
    fn zero(&self, row: usize, group: usize) -> u8 {
        let Matrix { rows, groups, .. } = *self.matrix;
        let word = group * (rows / 8) + row / 8;
        match self.matrix.layout {
            Layout::Gptq { one_less } => {
                let stored = nibble(self.zeros, word, (row % 8) as u32);
                // A stored 15 stands for -1.
                if one_less { (stored + 1) & 15 } else { stored }
            }
            Layout::Awq => nibble(self.zeros, word, AWQ_NIBBLES[row % 8]),
            Layout::Compressed { symmetric: true } => 8,
            Layout::Compressed { symmetric: false } => nibble(self.zeros, row / 8 * groups + group, (row % 8) as u32),
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let Matrix { rows, groups, scale_type, .. } = *self.matrix;
        let at = match self.matrix.layout {
            Layout::Gptq { .. } | Layout::Awq => group * rows + row,
            Layout::Compressed { .. } => row * groups + group,
        };
        let (size, mut value) = (scale_type.block_bytes(), [0.0]);
        let bytes = self.scales.get(at * size..(at + 1) * size).unwrap_or_default();
        // It fails only for lengths that do not match.
        let _ = scale_type.decode(bytes, &mut value);
        value[0]
    }

    /// Appends row `row` in blocks of `block_type`, which [`wider`] chose, with its columns in this sequence, if there is one.
    fn encode(&self, row: usize, block_type: BlockType, sequence: Option<&[u32]>, out: &mut Vec<u8>) {
        let Matrix { columns, group, .. } = *self.matrix;
        if block_type == BlockType::F32 {
            let value = |column: usize| {
                let group = match &self.matrix.order {
                    Some(order) => order.get(column).map_or(0, |group| *group as usize),
                    None => column / group,
                };
                let steps = i16::from(self.code(row, column)) - i16::from(self.zero(row, group));
                self.scale(row, group) * f32::from(steps)
            };
            out.extend((0..columns).flat_map(|column| value(column).to_le_bytes()));
            return;
        }
        for first in (0..columns).step_by(BLOCK) {
            let (scale, zero) = (self.scale(row, first / group), self.zero(row, first / group));
            let mut codes = [0; BLOCK];
            for (i, code) in codes.iter_mut().enumerate() {
                let column = sequence.map_or(Some(first + i), |all| all.get(first + i).map(|column| *column as usize));
                *code = column.map_or(0, |column| self.code(row, column));
            }
            out.extend(f16::from_f32(scale).to_le_bytes());
            match block_type {
                BlockType::Q4_1 => out.extend(f16::from_f32(-scale * f32::from(zero)).to_le_bytes()),
                BlockType::Q5_0 => {
                    // Q5_0's zero point is 16. The fifth bits of all codes come before the other bits.
                    codes.iter_mut().for_each(|code| *code += 16 - zero);
                    let high = codes.iter().enumerate().fold(0, |high, (i, code)| high | u32::from(code >> 4) << i);
                    out.extend(high.to_le_bytes());
                }
                _ => {}
            }
            let (low, high) = codes.split_at(BLOCK / 2);
            out.extend(low.iter().zip(high).map(|(low, high)| low & 15 | high << 4));
        }
    }
}

/// The rows of a GGUF tensor whose parts are packed.
pub(in super::super) struct PackedRows<'a> {
    views: Vec<View<'a>>,
    order: RowOrder,
    /// Rows of each part.
    rows: usize,
    block_type: BlockType,
}

impl<'a> PackedRows<'a> {
    /// The rows of matrices of equal shape, one after the other, in the given order.
    pub(in super::super) fn new(files: &'a SafeTensors, matrices: &'a [Matrix], order: RowOrder) -> PackedRows<'a> {
        let block_type = matrices.iter().map(Matrix::block_type).fold(BlockType::Q4_0, wider);
        let rows = matrices.first().map_or(1, |matrix| matrix.rows.max(1));
        PackedRows { views: matrices.iter().map(|matrix| matrix.view(files)).collect(), order, rows, block_type }
    }
}

impl PackedRows<'_> {
    fn encode(&self, index: usize, block_type: BlockType, sequence: Option<&[u32]>, out: &mut Vec<u8>) {
        let source = self.order.source(index);
        out.clear();
        if let Some(view) = self.views.get(source / self.rows) {
            view.encode(source % self.rows, block_type, sequence, out);
        }
    }
}

impl Rows for PackedRows<'_> {
    fn block_type(&self) -> BlockType {
        self.block_type
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        self.encode(index, self.block_type, None, scratch);
        scratch
    }

    fn reordered(&self) -> Option<(Vec<u32>, Box<dyn Rows + '_>)> {
        let sequence = self.views.first()?.matrix.sequence()?;
        let matrices = || self.views.iter().map(|view| view.matrix);
        let is_common = matrices().skip(1).all(|matrix| matrix.sequence().as_ref() == Some(&sequence));
        let block_type = matrices().map(|matrix| matrix.in_groups).fold(BlockType::Q4_0, wider);
        if !is_common || block_type == BlockType::F32 {
            return None;
        }
        let rows = Reordered { rows: self, sequence: sequence.clone(), block_type };
        Some((sequence, Box::new(rows)))
    }
}

/// Packed rows whose columns are reordered so that those of a group are adjacent.
struct Reordered<'a> {
    rows: &'a PackedRows<'a>,
    sequence: Vec<u32>,
    block_type: BlockType,
}

impl Rows for Reordered<'_> {
    fn block_type(&self) -> BlockType {
        self.block_type
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        self.rows.encode(index, self.block_type, Some(&self.sequence), scratch);
        scratch
    }
}
