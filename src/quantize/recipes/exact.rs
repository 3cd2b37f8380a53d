//! Weights that are in few bits already, taken over as they are.

use half::f16;

use crate::format::Tensor;
use crate::quant::block::BlockType;
use crate::quantize::format::{BLOCK, Format, GroupedFormat, rounded};
use crate::quantize::layer::Solution;

/// A block of a source, or 32 weights of a larger one: `scale * level + min`.
struct SourceBlock {
    scale: f32,
    min: Option<f32>,
    levels: [f32; BLOCK],
}

/// The codes and scales with which a format holds every weight of the rows `first..first + rows` of a tensor exactly; `None`
/// if it does not, or if no recipe writes the source's type.
pub(in crate::quantize) fn exact(
    tensor: &Tensor<'_>,
    first: usize,
    rows: usize,
    grouped: &GroupedFormat,
) -> Option<Solution> {
    let (source, columns) = (Format::of(tensor.rows.block_type())?, *tensor.dims.first()?);
    let block_bytes = source.block_type().block_bytes();
    let per_group = grouped.group / BLOCK;
    let mut solution = Solution::zeroed(grouped, rows, columns);
    let mut scratch = Vec::new();
    for row in 0..rows {
        let bytes = tensor.rows.row(first + row, &mut scratch);
        let mut blocks = Vec::with_capacity(columns / BLOCK);
        for bytes in bytes.chunks_exact(block_bytes) {
            for first in (0..source.block()).step_by(BLOCK) {
                blocks.push(read(source, bytes, first)?);
            }
        }
        for (group, blocks) in blocks.chunks(per_group).enumerate() {
            let at = row * grouped.groups(columns) + group;
            let codes = &mut solution.codes[at * grouped.group..][..grouped.group];
            let (scale, min) = take(grouped.format, blocks, codes)?;
            solution.scales[at] = scale;
            if let Some(own) = solution.mins.get_mut(at) {
                *own = min;
            }
        }
    }
    Some(solution)
}

/// Whether a format holds the whole tensor exactly.
pub(in crate::quantize) fn is_exact(tensor: &Tensor<'_>, grouped: &GroupedFormat) -> bool {
    const ROWS: usize = 256;
    let rows: usize = tensor.dims.iter().skip(1).product();
    let mut pieces = (0..rows).step_by(ROWS);
    tensor.rows.block_type().block_len() > 1
        && pieces.all(|first| exact(tensor, first, ROWS.min(rows - first), grouped).is_some())
}

/// Whether a source is in blocks of at most 5 bits, which a recipe would round again.
pub(in crate::quantize) fn is_few_bits(tensor: &Tensor<'_>, is_packed: bool) -> bool {
    let block_type = tensor.rows.block_type();
    is_packed || matches!(block_type, BlockType::Q4_0 | BlockType::Q4_1 | BlockType::IQ4_NL)
}

/// Writes the codes of a group of blocks. Returns its scale and its minimum.
fn take(format: Format, blocks: &[SourceBlock], codes: &mut [u8]) -> Option<(f32, f32)> {
    let first = blocks.first()?;
    if blocks.iter().any(|block| (block.scale, block.min) != (first.scale, first.min)) {
        return None;
    }
    let levels = || blocks.iter().flat_map(|block| &block.levels);
    // The level that becomes code 0 of a format with minimum.
    let (shift, min) = match (format.has_min(), first.min) {
        (false, None) => (0.0, 0.0),
        (true, Some(min)) => (0.0, min),
        (true, None) => {
            let least = levels().fold(0.0f32, |least, level| least.min(*level)).min(-8.0);
            (least, first.scale * least)
        }
        (false, Some(_)) => return None,
    };
    if rounded(min) != min || !first.scale.is_finite() {
        return None;
    }
    for (code, level) in codes.iter_mut().zip(levels()) {
        *code = format.nearest(level - shift);
        if format.level(*code) != level - shift {
            return None;
        }
    }
    Some((first.scale, min))
}

/// The weights from number `first` on of the block of a source in `bytes`; `None` if there are too few.
fn read(format: Format, bytes: &[u8], first: usize) -> Option<SourceBlock> {
    let number = |at: usize| Some(f16::from_le_bytes(*bytes.get(at..)?.first_chunk()?).to_f32());
    let (scale, mut at) = (number(0)?, 2);
    let min = if format.has_min() { Some(number(2)?) } else { None };
    at += if min.is_some() { 2 } else { 0 };
    let mut fifth = 0;
    if format == Format::Q5_0 {
        fifth = u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
        at += 4;
    }
    let codes = bytes.get(at..)?;
    let mut levels = [0.0; BLOCK];
    for (i, level) in levels.iter_mut().enumerate() {
        let code = match format {
            Format::Q8_0 => *codes.get(i)?,
            Format::Q2_0 => codes.get((first + i) / 4)? >> (2 * (i % 4)) & 3,
            _ => {
                let byte = *codes.get(i % 16)?;
                let nibble = if i < 16 { byte & 15 } else { byte >> 4 };
                nibble | ((fifth >> i & 1) as u8) << 4
            }
        };
        *level = format.level(code);
    }
    Some(SourceBlock { scale, min, levels })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::pack::Rows;

    struct Encoded(BlockType, Vec<u8>, usize);

    impl Rows for Encoded {
        fn block_type(&self) -> BlockType {
            self.0
        }

        fn row<'a>(&'a self, index: usize, _: &'a mut Vec<u8>) -> &'a [u8] {
            &self.1[index * self.2..][..self.2]
        }
    }

    /// Two rows of 64 weights of a format with random codes, their decoded values, and the tensor.
    fn source(format: Format, same_scale: bool) -> (Vec<f32>, Tensor<'static>) {
        let grouped = GroupedFormat { format, group: format.block() };
        let mut solution = Solution::zeroed(&grouped, 2, 64);
        let few = |i: usize| (i * 7 + i / 5) % 16;
        for (i, code) in solution.codes.iter_mut().enumerate() {
            *code = match format {
                Format::Q8_0 => (few(i) as i8 - 8) as u8,
                Format::Q5_0 => few(i) as u8 + 8,
                Format::Q2_0 => few(i) as u8 % 4,
                _ => few(i) as u8,
            };
        }
        let number = |i: usize| rounded(if same_scale { -0.0123 } else { 0.0123 * (i as f32 + 1.0) });
        solution.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = number(i));
        solution.mins.iter_mut().for_each(|min| *min = rounded(-0.31));
        let (values, bytes) = (solution.decode(&grouped, 64), solution.encode(&grouped, 64));
        let row_bytes = bytes.len() / 2;
        let rows = Box::new(Encoded(format.block_type(), bytes, row_bytes));
        (values, Tensor { dims: vec![64, 2], rows })
    }

    #[test]
    fn a_format_takes_over_the_weights_that_it_holds() {
        use Format::*;
        let holds = [
            (Q2_0, vec![Q2_0, Q4_0, Q4_1, Q5_0, Q8_0]),
            (Q4_0, vec![Q4_0, Q4_1, Q5_0, Q8_0]),
            (Q4_1, vec![Q4_1]),
            (Iq4Nl, vec![Iq4Nl, Q8_0]),
            // Few codes of theirs are in use.
            (Q5_0, vec![Q4_0, Q4_1, Q5_0, Q8_0]),
            (Q8_0, vec![Q4_0, Q4_1, Q5_0, Q8_0]),
        ];
        for (format, holders) in holds {
            for same_scale in [false, true] {
                let (values, tensor) = source(format, same_scale);
                for target in Format::ALL {
                    for group in [32, 64].into_iter().filter(|group| group % target.block() == 0) {
                        let grouped = GroupedFormat { format: target, group };
                        let expected = holders.contains(&target) && (group <= format.block() || same_scale);
                        assert_eq!(is_exact(&tensor, &grouped), expected, "{format:?} in {target:?} by {group}");
                        if let Some(solution) = exact(&tensor, 0, 2, &grouped) {
                            assert_eq!(solution.decode(&grouped, 64), values, "{format:?} in {target:?} by {group}");
                        }
                    }
                }
            }
        }
    }
}
