//! The layout that kernels read: rows in panels of 16, so that one output row is one SIMD lane.
//!
//! A matrix of `rows x columns` weights is cut into panels of [`PANEL`] rows and, along the row, blocks of [`BLOCK`]
//! columns. The codes of a panel's block fill cache lines of 64 bytes:
//!
//! ```text
//! plane of 4 bits: line j (0..4), byte 4 * row + i (row 0..16, i 0..4)
//!                    low nibble: column 8 * j + i      high nibble: column 8 * j + 4 + i
//! plane of 2 bits: line j (0..2), the pairs of byte 4 * row + i from the lowest on
//!                    column 16 * j + i, 16 * j + 4 + i, 16 * j + 8 + i, 16 * j + 12 + i
//! plane of 1 bit:  one line, the bits of byte 4 * row + i from the lowest on
//!                    column i, 4 + i, ..., 28 + i
//! 8-bit:           line j (0..8), byte 4 * row + i: column 4 * j + i
//! float:           line per column (F32) or per two columns (F16, BF16): 16 rows side by side
//! ```
//!
//! Codes of 2 and 4 bits are one plane. Codes of 3 bits are a plane with their lower 2 bits, then one with the highest bit; codes of 5 and
//! 6 bits are a plane with their lower 4 bits, then one with the others.
//!
//! One 64-byte load thus holds 4 weights of each of 16 rows, the operand of a `vpdpbusd` against four broadcast activations.
//! Nothing is summed across lanes: AVX-512 takes 16 rows at once, AVX2 twice 8, NEON four times 4, from the same bytes. Each
//! group has 16 F16 scales, one per row, and perhaps 16 minimums. The last panel is padded with zero rows, the last block
//! with zero columns.

pub mod sparse;
mod wide;

use std::ops::Range;

use half::f16;

pub use super::layout::{BLOCK, Code, LONGEST_RUN, Layout, PANEL};
pub use super::panel::{Panel, PanelMut};
use crate::error::Result;
use crate::system::aligned_buf::AlignedBuf;
pub use crate::system::aligned_buf::CacheLine;
use crate::system::arena::{Arena, ForEach};

/// The purpose in out-of-memory errors.
const PURPOSE: &str = "packed weights";

/// A weight matrix in panels. See the [module](self) for the bytes.
#[derive(Debug, Clone)]
pub struct Packed {
    rows: usize,
    columns: usize,
    layout: Layout,
    output_scale: f32,
    /// Codes `(panels, blocks, lines_per_block)`; scales `(panels, scale_lines)`, each panel `(groups, PANEL)` F16 and padding to
    /// a line; minimums as scales, if there are any.
    memory: AlignedBuf,
    /// `(panels, chunks)`: the byte of the codes at which those of each [chunk](sparse::CHUNK) of a sparse matrix begin. Empty for others.
    starts: Vec<usize>,
}

impl Packed {
    /// A matrix whose codes, scales and minimums are all zero bytes.
    ///
    /// Every output is multiplied with `output_scale`. A power of two brings scales into the range of F16.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    ///
    /// # Panics
    /// If no kernel [knows](Layout::is_known) the layout, or it is [sparse](sparse), which is made from another one.
    pub fn try_zeroed(rows: usize, columns: usize, layout: Layout, output_scale: f32) -> Result<Self> {
        Packed::with_memory(rows, columns, layout, output_scale, |lines| AlignedBuf::try_zeroed(lines, PURPOSE))
    }

    /// As [`try_zeroed`](Self::try_zeroed), in an arena.
    pub(super) fn try_zeroed_in(
        arena: &Arena,
        for_each: ForEach<'_>,
        [rows, columns]: [usize; 2],
        layout: Layout,
    ) -> Result<Self> {
        Packed::with_memory(rows, columns, layout, 1.0, |lines| arena.take(lines, PURPOSE, for_each))
    }

    /// As [`try_zeroed`](Self::try_zeroed), for callers that cannot handle an error.
    ///
    /// # Panics
    /// If there is no memory, or no kernel [knows](Layout::is_known) the layout.
    pub fn zeroed(rows: usize, columns: usize, layout: Layout, output_scale: f32) -> Self {
        let packed = Packed::with_memory(rows, columns, layout, output_scale, |lines| Ok(AlignedBuf::zeroed(lines)));
        packed.unwrap_or_else(|error| panic!("{error}"))
    }

    /// The shape of a matrix, without memory for its weights.
    pub(crate) fn hollow(rows: usize, columns: usize) -> Self {
        let layout = Layout::float(Code::F32);
        Packed { rows, columns, layout, output_scale: 1.0, memory: AlignedBuf::default(), starts: vec![] }
    }

    fn with_memory(
        rows: usize,
        columns: usize,
        layout: Layout,
        output_scale: f32,
        memory: impl Fn(usize) -> Result<AlignedBuf>,
    ) -> Result<Self> {
        let is_known = !layout.is_integer() || layout.is_known();
        assert!(is_known && layout.code != Code::SparseInt4, "{layout:?}");
        let mut packed = Packed { rows, columns, layout, output_scale, memory: AlignedBuf::default(), starts: vec![] };
        packed.memory = memory(Packed::bytes_needed(rows, columns, layout) / size_of::<CacheLine>())?;
        Ok(packed)
    }

    /// Bytes that a matrix of this shape takes, saturating.
    pub fn bytes_needed(rows: usize, columns: usize, layout: Layout) -> usize {
        let (panels, blocks) = (rows.div_ceil(PANEL), columns.div_ceil(BLOCK));
        let groups = if layout.is_integer() { blocks.saturating_mul(BLOCK).div_ceil(layout.group) } else { 0 };
        let scales = groups.div_ceil(2).saturating_mul(if layout.min { 2 } else { 1 });
        let lines = blocks.saturating_mul(layout.lines_per_block()).saturating_add(scales);
        lines.saturating_mul(panels).saturating_mul(size_of::<CacheLine>())
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The meaning of codes, the size of groups, and whether they have minimums.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What every output is multiplied with at the end: a power of two, or the only scale of the matrix.
    pub fn output_scale(&self) -> f32 {
        self.output_scale
    }

    pub(super) fn set_output_scale(&mut self, output_scale: f32) {
        self.output_scale = output_scale;
    }

    /// The former name of [`output_scale`](Self::output_scale).
    #[deprecated(note = "use `output_scale`")]
    pub fn gain(&self) -> f32 {
        self.output_scale
    }

    /// Panels of 16 rows, the last one padded.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Blocks of 32 columns, the last one padded.
    pub fn blocks(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// Groups of columns, the number of scales per row. 0 for floats.
    pub fn groups(&self) -> usize {
        if !self.layout.is_integer() {
            return 0;
        }
        // A group is a power of two. A division would take as long as several blocks of a product.
        (self.blocks() * BLOCK + self.layout.group - 1) >> self.layout.group.trailing_zeros()
    }

    /// Bytes of codes, scales and minimums, which a product reads.
    pub fn bytes(&self) -> usize {
        self.memory.len() * size_of::<CacheLine>()
    }

    /// All memory: codes, scales and minimums.
    pub fn lines(&self) -> [&[CacheLine]; 3] {
        let (codes, rest) = self.memory.split_at(self.code_lines());
        let (scales, mins) = rest.split_at(self.panels() * self.scale_lines());
        [codes, scales, mins]
    }

    /// Lines of all codes. 0 without memory for weights.
    fn code_lines(&self) -> usize {
        if self.is_sparse() {
            return self.memory.len() - self.panels() * self.scale_lines();
        }
        (self.panels() * self.panel_lines()).min(self.memory.len())
    }

    fn panel_lines(&self) -> usize {
        self.blocks() * self.layout.lines_per_block()
    }

    fn scale_lines(&self) -> usize {
        self.groups().div_ceil(2)
    }

    /// Merges groups of 32 columns into larger ones where their scales and minimums are equal.
    ///
    /// A file whose block type has smaller groups than its quantization repeats scales.
    pub fn merge_groups(&mut self) {
        let groups = self.layout.merged_groups();
        if let Some(group) = groups.iter().find(|group| self.runs_are_equal(**group / BLOCK)) {
            self.set_group(*group);
        }
    }

    /// Keeps the first scale and minimum of every `group` columns. They move towards the codes.
    fn set_group(&mut self, group: usize) {
        let groups = (self.blocks() * BLOCK).div_ceil(group);
        let [lines, old_lines] = [groups.div_ceil(2), self.scale_lines()];
        let (start, panels, run) = (self.code_lines(), self.panels(), group / BLOCK);
        let tables = if self.layout.min { 2 * panels } else { panels };
        let numbers: &mut [[f16; PANEL]] = bytemuck::cast_slice_mut(&mut self.memory[start..]);
        // Every number moves to a place that was read before.
        for table in 0..tables {
            let [to, from] = [2 * table * lines, 2 * table * old_lines];
            (0..groups).for_each(|group| numbers[to + group] = numbers[from + group * run]);
            numbers[to + groups..to + 2 * lines].fill([f16::ZERO; PANEL]);
        }
        self.memory.truncate(start + tables * lines);
        self.layout.group = group;
    }

    /// Returns memory that [`merge_groups`](Self::merge_groups) has freed to the arena that the matrix lies in.
    pub(super) fn shorten_in(&mut self, arena: &Arena) {
        let lines = self.memory.len();
        arena.shorten(&mut self.memory, lines);
    }

    /// The memory of the matrix.
    pub(crate) fn into_memory(self) -> AlignedBuf {
        self.memory
    }

    /// Whether the scales and minimums of every `run` groups are bit-identical.
    fn runs_are_equal(&self, run: usize) -> bool {
        let bits = |numbers: &[f16; PANEL]| numbers.map(f16::to_bits);
        (0..self.panels()).map(|index| self.panel(index)).all(|panel| {
            let mut runs = panel.scales.chunks(run).chain(panel.mins.chunks(run));
            runs.all(|run| run.iter().all(|numbers| bits(numbers) == bits(&run[0])))
        })
    }

    /// The panel of rows `16 * index ..`. That of a sparse matrix has no codes, which [`sparse_blocks`](Self::sparse_blocks) returns.
    ///
    /// # Panics
    /// If `index >= self.panels()`.
    #[inline]
    pub fn panel(&self, index: usize) -> Panel<'_> {
        let (groups, panels) = (self.groups(), self.panels());
        let scale_lines = groups.div_ceil(2);
        let (lines, codes) = match self.is_sparse() {
            true => (0, self.code_lines()),
            false => (self.panel_lines(), panels * self.panel_lines()),
        };
        let scales = codes + index * scale_lines;
        let mins = if self.layout.min { scales + panels * scale_lines } else { 0 };
        Panel {
            codes: &self.memory[index * lines..][..lines],
            scales: numbers(&self.memory[scales..][..scale_lines], groups),
            mins: numbers(&self.memory[mins..][..scale_lines], if self.layout.min { groups } else { 0 }),
        }
    }

    /// What products of some panels read: codes, scales, and minimums or the masks of sparse codes.
    pub(crate) fn parts_of(&self, panels: Range<usize>) -> [&[CacheLine]; 3] {
        let (codes, behind) = (self.codes_from(panels.start), self.codes_from(panels.end));
        let part = |start: usize, lines: usize| &self.memory[start + panels.start * lines..start + panels.end * lines];
        let scales = self.code_lines();
        let others = match (self.is_sparse(), self.layout.min) {
            (true, _) => part(0, self.blocks()),
            (false, true) => part(scales + self.panels() * self.scale_lines(), self.scale_lines()),
            (false, false) => &[],
        };
        [&codes[..codes.len() - behind.len()], part(scales, self.scale_lines()), others]
    }

    /// The codes of panels `index..`, for prefetching: `(panels, blocks, lines_per_block)`, or what [`sparse_lines`](Self::sparse_lines)
    /// returns for all their chunks.
    ///
    /// # Panics
    /// If `index > self.panels()`.
    #[inline]
    pub fn codes_from(&self, index: usize) -> &[CacheLine] {
        if self.is_sparse() {
            return self.sparse_lines_from(index);
        }
        &self.memory[index * self.panel_lines()..self.code_lines()]
    }

    /// All panels, to be filled in parallel.
    ///
    /// # Panics
    /// If the matrix is sparse.
    pub fn panels_mut(&mut self) -> Vec<PanelMut<'_>> {
        assert!(!self.is_sparse(), "the panels of a sparse matrix cannot be changed");
        let (lines, scale_lines, groups) = (self.panel_lines(), self.scale_lines(), self.groups());
        let (code_lines, all_scales) = (self.code_lines(), self.panels() * scale_lines);
        let (codes, rest) = self.memory.split_at_mut(code_lines);
        let (scales, mins) = rest.split_at_mut(all_scales);
        let mut scales = scales.chunks_mut(scale_lines.max(1));
        let mut mins = mins.chunks_mut(scale_lines.max(1));
        codes
            .chunks_mut(lines.max(1))
            .map(|codes| PanelMut {
                codes,
                scales: scales.next().map_or(&mut [], |lines| numbers_mut(lines, groups)),
                mins: mins.next().map_or(&mut [], |lines| numbers_mut(lines, groups)),
            })
            .collect()
    }

    /// Writes row `row` as F32: the weights that products compute with, or an embedding.
    ///
    /// # Panics
    /// If `row >= self.rows()` or `out.len() != self.columns()`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.columns, "length of the row");
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        if self.is_sparse() {
            return self.for_each_sparse_block(row, |b, codes| {
                let scale = panel.scales[b * BLOCK / self.layout.group][lane].to_f32();
                for (out, code) in out[b * BLOCK..].iter_mut().zip(codes) {
                    *out = self.layout.weight(i32::from(code), scale, 0.0) * self.output_scale;
                }
            });
        }
        for (column, out) in out.iter_mut().enumerate() {
            *out = panel.weight(self.layout, lane, column) * self.output_scale;
        }
    }
}

fn numbers(lines: &[CacheLine], groups: usize) -> &[[f16; PANEL]] {
    &bytemuck::cast_slice(lines)[..groups]
}

fn numbers_mut(lines: &mut [CacheLine], groups: usize) -> &mut [[f16; PANEL]] {
    &mut bytemuck::cast_slice_mut(lines)[..groups]
}
