//! The layout of matrices of 4-bit codes with many zeros: a mask says where the other codes are, and only these are stored.
//!
//! ```text
//! masks: line per block of a panel, 8 words of 64 bits. Bit 4 * row + i of word j: whether the weight in column 4 * j + i is not zero
//! codes: 4 bits for each bit that is set, in the order of the bits, the low nibble of a byte first. Each word's begin at a byte
//! ```
//!
//! A word with its codes becomes one register of the integer product: 4 columns of each of 16 rows. All masks of a matrix lie before all
//! codes, so that a product reads both, and the scales, in order. Where the codes of every [`CHUNK`] blocks begin is listed, so that
//! products of many rows can begin at any chunk.
//!
//! Half of the weights being zero, a weight takes about 3.03 bits instead of 4, besides its scale.

use half::f16;

use super::{BLOCK, Code, Layout, PANEL, Packed};
use crate::error::{Error, Result};
use crate::quant::panel::Panel;
use crate::system::aligned_buf::{AlignedBuf, CacheLine};
use crate::system::arena::{Arena, ForEach};
use crate::threads::Scope;

/// Blocks whose codes can be found without reading the masks before them.
pub const CHUNK: usize = 16;
/// Words of a block's mask: registers of the integer product.
pub const WORDS: usize = BLOCK / 4;
/// The code of zero.
const ZERO: u8 = 8;
/// Two of them.
const ZEROS: u8 = ZERO | ZERO << 4;
/// Lines of a block of 4-bit codes.
const LINES: usize = 4;

/// The mask of a block of a panel.
pub type Mask = [u64; WORDS];
/// The 4-bit codes of a block of a panel, as [`Code::Int4`] has them.
pub type Int4Block = [CacheLine; LINES];

/// Blocks of a panel of a sparse matrix, from the first block of a chunk on.
#[derive(Debug, Clone, Copy)]
pub struct SparseBlocks<'a> {
    /// `(blocks)`, and those of the panels that follow.
    pub masks: &'a [Mask],
    /// The codes, and after them whatever follows: at least 64 bytes.
    pub codes: &'a [u8],
}

/// Bytes of the codes of a word.
#[inline(always)]
pub fn code_bytes(word: u64) -> usize {
    (word.count_ones() as usize).div_ceil(2)
}

impl Packed {
    /// Whether most codes are zero and not stored.
    #[inline]
    pub fn is_sparse(&self) -> bool {
        self.layout.code == Code::SparseInt4
    }

    /// The blocks of a panel from chunk `chunk` on.
    ///
    /// # Panics
    /// If the matrix is not sparse, or has no such chunk.
    #[inline]
    pub fn sparse_blocks(&self, panel: usize, chunk: usize) -> SparseBlocks<'_> {
        let blocks = self.blocks();
        assert!(self.is_sparse() && chunk * CHUNK < blocks, "chunk {chunk} of a sparse matrix");
        let (masks, codes) = self.memory.split_at(self.panels() * blocks);
        let masks: &[Mask] = bytemuck::cast_slice(&masks[panel * blocks + chunk * CHUNK..]);
        let start = self.starts[panel * blocks.div_ceil(CHUNK) + chunk];
        SparseBlocks { masks, codes: &bytemuck::cast_slice(codes)[start..] }
    }

    /// The codes of chunk `chunk` of a panel, in whole lines: for prefetching.
    ///
    /// # Panics
    /// As [`sparse_blocks`](Self::sparse_blocks).
    pub fn sparse_lines(&self, panel: usize, chunk: usize) -> &[CacheLine] {
        let (masks, chunks) = (self.panels() * self.blocks(), self.blocks().div_ceil(CHUNK));
        let at = panel * chunks + chunk;
        let start = self.starts[at] / size_of::<CacheLine>();
        let end = self.starts.get(at + 1).map_or(self.code_lines() - masks, |end| end / size_of::<CacheLine>());
        &self.memory[masks + start..masks + end]
    }

    /// The codes of panels `panel..`, in whole lines.
    ///
    /// # Panics
    /// If `panel > self.panels()`.
    pub(super) fn sparse_lines_from(&self, panel: usize) -> &[CacheLine] {
        assert!(panel <= self.panels(), "panel {panel} of {}", self.panels());
        let masks = self.panels() * self.blocks();
        let codes = &self.memory[masks..self.code_lines()];
        let start = self.starts.get(panel * self.blocks().div_ceil(CHUNK));
        &codes[start.map_or(codes.len(), |start| start / size_of::<CacheLine>())..]
    }

    /// The same matrix without its zeros, if that saves a tenth of its bytes. Only matrices of [`Code::Int4`] without minimums have such a
    /// form.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(in crate::quant) fn sparse_in(&self, arena: &Arena, scope: &Scope<'_>) -> Result<Option<Packed>> {
        let for_each: ForEach<'_> = &|count, item| scope.for_each(count, item);
        self.sparse_with(scope, |lines, purpose| arena.take(lines, purpose, for_each))
    }

    /// As [`sparse_in`](Self::sparse_in), in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn try_sparse(&self, scope: &Scope<'_>) -> Result<Option<Packed>> {
        self.sparse_with(scope, AlignedBuf::try_zeroed)
    }

    fn sparse_with(
        &self,
        scope: &Scope<'_>,
        memory: impl Fn(usize, &'static str) -> Result<AlignedBuf>,
    ) -> Result<Option<Packed>> {
        let layout = Layout { code: Code::SparseInt4, ..self.layout };
        if self.layout.code != Code::Int4 || !layout.is_known() || self.blocks() == 0 || self.panels() == 0 {
            return Ok(None);
        }
        let (blocks, panels, scale_lines) = (self.blocks(), self.panels(), self.scale_lines());
        let chunks = blocks.div_ceil(CHUNK);
        let mut starts = vec![];
        let bytes = panels.saturating_mul(chunks).saturating_mul(size_of::<usize>());
        let refused = |_| Error::OutOfMemory { what: super::PURPOSE, bytes, left: None };
        starts.try_reserve_exact(panels * chunks).map_err(refused)?;
        starts.resize(panels * chunks, 0usize);
        scope.for_each_chunk(&mut starts, chunks, |index, lengths| {
            for (length, codes) in lengths.iter_mut().zip(self.int4_blocks(index).chunks(CHUNK)) {
                *length = codes
                    .iter()
                    .map(|block| mask_of(block, self.lanes(index)).map(code_bytes).iter().sum::<usize>())
                    .sum();
            }
        });
        let total = starts.iter_mut().fold(0, |total, length| total + std::mem::replace(length, total));
        let lines = panels * (blocks + scale_lines) + total.div_ceil(size_of::<CacheLine>());
        if 10 * lines > 9 * self.memory.len() {
            return Ok(None);
        }
        let mut memory = memory(lines, super::PURPOSE)?;
        let (masks, rest) = memory.split_at_mut(panels * blocks);
        let (codes, scales) = rest.split_at_mut(rest.len() - panels * scale_lines);
        scales.copy_from_slice(self.lines()[1]);
        let mut codes: &mut [u8] = &mut bytemuck::cast_slice_mut(codes)[..total];
        let mut parts = vec![];
        let mut ends = starts.iter().step_by(chunks).skip(1).copied().chain([total]);
        let mut start = 0;
        for masks in bytemuck::cast_slice_mut::<CacheLine, Mask>(masks).chunks_mut(blocks) {
            let end = ends.next().unwrap_or(total);
            let (own, rest) = std::mem::take(&mut codes).split_at_mut(end - start);
            parts.push((masks, own));
            (codes, start) = (rest, end);
        }
        scope.for_each_chunk(&mut parts, 1, |index, part| {
            let [(masks, codes)] = part else { return };
            let mut at = 0;
            for (mask, block) in masks.iter_mut().zip(self.int4_blocks(index)) {
                *mask = mask_of(block, self.lanes(index));
                for (j, word) in mask.iter().enumerate() {
                    store_codes(block, j, *word, &mut codes[at..]);
                    at += code_bytes(*word);
                }
            }
        });
        drop(parts);
        let Packed { rows, columns, output_scale, .. } = *self;
        Ok(Some(Packed { rows, columns, layout, output_scale, memory, starts }))
    }

    /// Rows of a panel that are not padding.
    fn lanes(&self, panel: usize) -> usize {
        PANEL.min(self.rows - panel * PANEL)
    }

    fn int4_blocks(&self, panel: usize) -> &[Int4Block] {
        self.panel(panel).codes.as_chunks().0
    }

    /// The 4-bit codes of 32 columns of a row of a sparse matrix, for each block in order.
    pub(super) fn for_each_sparse_block(&self, row: usize, mut take: impl FnMut(usize, [u8; BLOCK])) {
        let lane = row % PANEL;
        let SparseBlocks { masks, codes } = self.sparse_blocks(row / PANEL, 0);
        let mut at = 0;
        for (b, mask) in masks[..self.blocks()].iter().enumerate() {
            let mut block = [ZERO; BLOCK];
            for (j, word) in mask.iter().enumerate() {
                let mut before = (word & ((1 << (4 * lane)) - 1)).count_ones() as usize;
                for i in 0..4 {
                    if word >> (4 * lane + i) & 1 == 1 {
                        block[4 * j + i] = codes[at + before / 2] >> (4 * (before % 2)) & 15;
                        before += 1;
                    }
                }
                at += code_bytes(*word);
            }
            take(b, block);
        }
    }

    /// Calls `take` with each block of the panel as 4-bit codes: those of [`Code::Int4`] from which the matrix was made.
    pub(super) fn for_each_int4_block(&self, panel: usize, mut take: impl FnMut(&Int4Block)) {
        let mut blocks = [[CacheLine([0; 64]); LINES]; CHUNK];
        for (chunk, first) in (0..self.blocks()).step_by(CHUNK).enumerate() {
            let count = CHUNK.min(self.blocks() - first);
            expand(self.sparse_blocks(panel, chunk), &mut blocks[..count]);
            for block in &mut blocks[..count] {
                // Rows of padding are zero bytes.
                block.iter_mut().for_each(|line| line.0[4 * self.lanes(panel)..].fill(0));
                take(block);
            }
        }
    }
}

/// Where a block's codes are not zero, in its first `lanes` rows.
fn mask_of(block: &Int4Block, lanes: usize) -> Mask {
    let mut mask = [0; WORDS];
    let rows = u64::MAX >> (64 - 4 * lanes);
    for (line, words) in block.iter().zip(mask.as_chunks_mut::<2>().0) {
        for (bit, byte) in line.0.iter().enumerate() {
            words[0] |= u64::from(byte & 15 != ZERO) << bit;
            words[1] |= u64::from(byte >> 4 != ZERO) << bit;
        }
    }
    mask.map(|word| word & rows)
}

/// Stores the codes of word `j`.
fn store_codes(block: &Int4Block, j: usize, mut word: u64, codes: &mut [u8]) {
    let mut count = 0;
    while word != 0 {
        let code = block[j / 2].0[word.trailing_zeros() as usize] >> (4 * (j % 2)) & 15;
        codes[count / 2] |= code << (4 * (count % 2));
        word &= word - 1;
        count += 1;
    }
}

/// The blocks with all their codes, as [`Code::Int4`] has them. Rows of padding are zeros.
///
/// This function defines what other implementations compute.
pub fn expand(blocks: SparseBlocks<'_>, out: &mut [Int4Block]) {
    let SparseBlocks { masks, mut codes } = blocks;
    for (mask, out) in masks.iter().zip(out) {
        *out = [CacheLine([ZEROS; 64]); LINES];
        for (j, word) in mask.iter().enumerate() {
            let (line, shift) = (&mut out[j / 2].0, 4 * (j % 2));
            let (mut rest, mut count) = (*word, 0);
            while rest != 0 {
                let code = codes[count / 2] >> (4 * (count % 2)) & 15;
                line[rest.trailing_zeros() as usize] ^= (code ^ ZERO) << shift;
                rest &= rest - 1;
                count += 1;
            }
            codes = &codes[code_bytes(*word)..];
        }
    }
}

/// The scales of the groups of `blocks`, which begin with a chunk, of a panel whose codes are `codes`.
#[inline]
pub fn chunk_of<'a>(
    panel: &Panel<'a>,
    layout: Layout,
    blocks: std::ops::Range<usize>,
    codes: &'a [CacheLine],
) -> Panel<'a> {
    let groups = blocks.start * BLOCK / layout.group..(blocks.end * BLOCK).div_ceil(layout.group);
    let scales: &'a [[f16; PANEL]] = &panel.scales[groups];
    Panel { codes, scales, mins: &[] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::ThreadPool;

    #[test]
    fn lines_from_a_panel_on_are_those_of_its_chunks_and_of_all_later_ones() {
        let columns = (CHUNK + 3) * BLOCK;
        let mut dense = Packed::zeroed(40, columns, Layout { code: Code::Int4, group: 32, min: false }, 1.0);
        for (p, mut panel) in dense.panels_mut().into_iter().enumerate() {
            for (lane, block) in (0..PANEL).flat_map(|lane| (0..columns / BLOCK).map(move |block| (lane, block))) {
                let code = |i: usize| if (i + p * lane).is_multiple_of(4) { 3 } else { 8 };
                panel.set_codes(Code::Int4, lane, block, &std::array::from_fn(code));
            }
        }
        let sparse = ThreadPool::new(1).unwrap().run(|scope| dense.try_sparse(scope)).unwrap().unwrap();
        for panel in 0..=sparse.panels() {
            let chunks = (panel..sparse.panels())
                .flat_map(|panel| [sparse.sparse_lines(panel, 0), sparse.sparse_lines(panel, 1)]);
            assert_eq!(sparse.codes_from(panel), chunks.collect::<Vec<_>>().concat(), "panel {panel}");
        }
        // What some panels read: together all that the matrix has, once.
        for matrix in [&dense, &sparse] {
            let read = [0..1, 1..matrix.panels()].map(|panels| matrix.parts_of(panels));
            let lines: usize = read.iter().flatten().map(|part| part.len()).sum();
            assert_eq!(lines * size_of::<CacheLine>(), matrix.bytes());
            assert_eq!(read[0][1].as_ptr_range().end, read[1][1].as_ptr());
        }
    }

    #[test]
    fn the_wide_form_is_that_of_the_dense_matrix() {
        for (rows, columns, group) in [(37, 20 * BLOCK, 32), (16, 64, 64), (5, 17 * BLOCK, 128)] {
            let mut dense = Packed::zeroed(rows, columns, Layout { code: Code::Int4, group, min: false }, 1.0);
            for (p, mut panel) in dense.panels_mut().into_iter().enumerate() {
                for lane in 0..PANEL.min(rows - p * PANEL) {
                    for block in 0..columns / BLOCK {
                        let code =
                            |i: usize| if (i * 7 + lane + block) % 5 < 3 { 8 } else { ((i + 3 * lane) % 16) as i8 };
                        panel.set_codes(Code::Int4, lane, block, &std::array::from_fn(code));
                    }
                    panel.scales.iter_mut().for_each(|scales| scales[lane] = f16::from_f32(lane as f32 + 0.5));
                }
            }
            let pool = ThreadPool::new(2).unwrap();
            let sparse = pool.run(|scope| dense.try_sparse(scope)).unwrap().unwrap();
            assert_eq!(sparse.wide_layout(), dense.wide_layout());
            let wide = |packed: &Packed| {
                let mut parts = vec![];
                packed.for_each_wide(|length, each| {
                    let mut all = vec![];
                    each(&mut |bytes| all.extend_from_slice(bytes));
                    assert_eq!(all.len(), length);
                    parts.push(all);
                });
                parts
            };
            assert!(wide(&sparse) == wide(&dense), "{rows} x {columns}");
        }
    }
}
