//! The layouts that kernels read: rows in panels of 16, so that one output row is one SIMD lane.
//!
//! A matrix of `rows x columns` weights is cut into panels of [`PANEL`] rows and, along the row, blocks of [`BLOCK`]
//! columns. Inside a panel's block the codes lie in lines of 64 bytes:
//!
//! ```text
//! 4-bit: line j (0..4), byte 4 * row + i (row 0..16, i 0..4)
//!          low nibble:  column 8 * j + i        high nibble: column 8 * j + 4 + i
//! 8-bit: line j (0..8), byte 4 * row + i:       column 4 * j + i
//! float: line per column (F32) or per two columns (F16, BF16): 16 rows side by side
//! ```
//!
//! One 64-byte load thus gives 16 rows times 4 weights, exactly what a `vpdpbusd` against four broadcast activations
//! takes, and nothing is ever summed across lanes: AVX-512 takes 16 rows, AVX2 twice 8, NEON four times 4, all over the
//! same bytes. Scales (and minimums) lie as 16 F16 numbers a group, one a row. The last panel is padded with zero rows,
//! the last block with zero columns.

use half::f16;

use crate::error::Error;
use crate::system::aligned_buf::AlignedBuf;
pub use crate::system::aligned_buf::CacheLine;
use crate::system::memory;

/// Output rows in a panel, one a SIMD lane.
pub const PANEL: usize = 16;
/// Columns in a block: the unit in which activations are quantized.
pub const BLOCK: usize = 32;

/// How a weight's code becomes a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Code {
    /// Four bits. Without a minimum `w = scale * (code - 8)`, with one `w = scale * code + min`.
    Int4,
    /// Four bits through a table of 16 signed values: `w = scale * table[code]`.
    Table4([i8; 16]),
    /// Eight bits, stored as `code + 128`: `w = scale * code (+ min)`, codes -128..=127.
    Int8,
    /// IEEE single precision, computed with F32 activations.
    F32,
    /// IEEE half precision, computed with F32 activations.
    F16,
    /// The upper half of an F32, computed with F32 activations.
    BF16,
}

/// The layout of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// What a code means.
    pub code: Code,
    /// Columns that share a scale: 16 or 32, with [`Code::Int4`] also 64 or 128. Without meaning for floats.
    pub group: usize,
    /// Whether each group has a minimum beside its scale.
    pub min: bool,
}

impl Layout {
    /// A float layout.
    pub const fn float(code: Code) -> Self {
        Layout { code, group: BLOCK, min: false }
    }

    /// Whether the weights are integers times scales, multiplied with quantized activations.
    pub fn is_integer(&self) -> bool {
        matches!(self.code, Code::Int4 | Code::Table4(_) | Code::Int8)
    }

    /// Lines of codes a block of a panel.
    pub fn lines_per_block(&self) -> usize {
        match self.code {
            Code::Int4 | Code::Table4(_) => 4,
            Code::Int8 => 8,
            Code::F16 | Code::BF16 => 16,
            Code::F32 => 32,
        }
    }
}

/// A weight matrix in panels. See the [module](self) for the bytes.
#[derive(Debug, Clone)]
pub struct Packed {
    rows: usize,
    columns: usize,
    layout: Layout,
    gain: f32,
    /// `(panels, blocks, lines_per_block)`
    codes: AlignedBuf,
    /// `(panels, scale_lines)`, each panel `(groups, PANEL)` F16 and padding to a line
    scales: AlignedBuf,
    /// As `scales`; empty without minimums.
    mins: AlignedBuf,
}

/// One panel of a [`Packed`] matrix.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `(blocks, lines_per_block)`
    pub codes: &'a [CacheLine],
    /// `(groups)`: 16 scales, one a row. Empty for floats.
    pub scales: &'a [[f16; PANEL]],
    /// `(groups)`: 16 minimums; empty where the layout has none.
    pub mins: &'a [[f16; PANEL]],
}

/// One panel of a [`Packed`] matrix, to be filled.
#[derive(Debug)]
pub struct PanelMut<'a> {
    /// `(blocks, lines_per_block)`
    pub codes: &'a mut [CacheLine],
    /// `(groups)`: 16 scales, one a row. Empty for floats.
    pub scales: &'a mut [[f16; PANEL]],
    /// `(groups)`: 16 minimums; empty where the layout has none.
    pub mins: &'a mut [[f16; PANEL]],
}

impl Packed {
    /// A matrix whose codes, scales and minimums are all zero bytes.
    ///
    /// `gain` multiplies every output; a power of two keeps scales that F16 could not hold in its range.
    pub fn zeroed(rows: usize, columns: usize, layout: Layout, gain: f32) -> Self {
        let wide = layout.code == Code::Int4 && matches!(layout.group, 64 | 128);
        assert!(wide || matches!(layout.group, 16 | 32), "groups of {} columns", layout.group);
        let none = || AlignedBuf::zeroed(0);
        let mut packed = Packed { rows, columns, layout, gain, codes: none(), scales: none(), mins: none() };
        let (panels, scale_lines) = (packed.panels(), packed.scale_lines());
        packed.codes = AlignedBuf::zeroed(panels * packed.panel_lines());
        packed.scales = AlignedBuf::zeroed(panels * scale_lines);
        packed.mins = AlignedBuf::zeroed(if layout.min { panels * scale_lines } else { 0 });
        packed
    }

    /// Bytes that a matrix of that shape takes, saturating.
    pub fn bytes_needed(rows: usize, columns: usize, layout: Layout) -> usize {
        let (panels, blocks) = (rows.div_ceil(PANEL), columns.div_ceil(BLOCK));
        let groups = if layout.is_integer() { blocks.saturating_mul(BLOCK).div_ceil(layout.group) } else { 0 };
        let scales = groups.div_ceil(2).saturating_mul(if layout.min { 2 } else { 1 });
        let lines = blocks.saturating_mul(layout.lines_per_block()).saturating_add(scales);
        lines.saturating_mul(panels).saturating_mul(size_of::<CacheLine>())
    }

    /// Whether that many bytes can be had now. Asked before [`zeroed`](Self::zeroed), which would end the process.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when they cannot.
    pub fn try_reserve(bytes: usize) -> Result<(), Error> {
        let what = "packed weights";
        memory::check(what, bytes)?;
        Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| Error::OutOfMemory { what, bytes, left: None })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What a code means, groups and minimums.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What every output is multiplied with at the end, a power of two.
    pub fn gain(&self) -> f32 {
        self.gain
    }

    /// Panels of 16 rows, the last one padded.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Blocks of 32 columns, the last one padded.
    pub fn blocks(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// Scales a row.
    pub fn groups(&self) -> usize {
        if self.layout.is_integer() { (self.blocks() * BLOCK).div_ceil(self.layout.group) } else { 0 }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        (self.codes.len() + self.scales.len() + self.mins.len()) * size_of::<CacheLine>()
    }

    /// Everything that is stored: codes, scales and minimums.
    pub fn lines(&self) -> [&[CacheLine]; 3] {
        [&self.codes, &self.scales, &self.mins]
    }

    fn panel_lines(&self) -> usize {
        self.blocks() * self.layout.lines_per_block()
    }

    fn scale_lines(&self) -> usize {
        self.groups().div_ceil(2)
    }

    /// Drops copies of scales and minimums: where all runs of 4 (or of 2) blocks have equal ones they become those of
    /// groups of 128 (or 64) columns. That is how files with larger groups than their type's look.
    pub fn merge_groups(&mut self) {
        for group in [128, 64] {
            if self.layout.code == Code::Int4 && self.layout.group == BLOCK && self.runs_are_equal(group / BLOCK) {
                let merged = Packed::zeroed(0, self.columns, Layout { group, ..self.layout }, 1.0);
                let (groups, lines) = (merged.groups(), merged.scale_lines());
                let merge = |of: fn(Panel<'_>) -> &[[f16; PANEL]]| {
                    let mut out = AlignedBuf::zeroed(self.panels() * lines);
                    for (index, out) in out.chunks_mut(lines.max(1)).enumerate() {
                        let numbers = of(self.panel(index)).iter().step_by(group / BLOCK);
                        numbers_mut(out, groups).iter_mut().zip(numbers).for_each(|(out, numbers)| *out = *numbers);
                    }
                    out
                };
                let scales = merge(|panel| panel.scales);
                self.mins = if self.layout.min { merge(|panel| panel.mins) } else { AlignedBuf::zeroed(0) };
                self.scales = scales;
                self.layout.group = group;
            }
        }
    }

    /// Whether scales and minimums of every run of `run` groups are the same to the bit.
    fn runs_are_equal(&self, run: usize) -> bool {
        let bits = |numbers: &[f16; PANEL]| numbers.map(f16::to_bits);
        (0..self.panels()).map(|index| self.panel(index)).all(|panel| {
            let mut runs = panel.scales.chunks(run).chain(panel.mins.chunks(run));
            runs.all(|run| run.iter().all(|numbers| bits(numbers) == bits(&run[0])))
        })
    }

    /// The panel of rows `16 * index ..`.
    ///
    /// # Panics
    /// If `index >= self.panels()`.
    #[inline]
    pub fn panel(&self, index: usize) -> Panel<'_> {
        let (lines, scale_lines) = (self.panel_lines(), self.scale_lines());
        let mins = if self.layout.min { index * scale_lines..(index + 1) * scale_lines } else { 0..0 };
        Panel {
            codes: &self.codes[index * lines..][..lines],
            scales: numbers(&self.scales[index * scale_lines..][..scale_lines], self.groups()),
            mins: numbers(&self.mins[mins], if self.layout.min { self.groups() } else { 0 }),
        }
    }

    /// The codes of panel `index` and of all that come after it, `(panels, blocks, lines_per_block)`: what will be read next.
    ///
    /// # Panics
    /// If `index > self.panels()`.
    #[inline]
    pub fn codes_from(&self, index: usize) -> &[CacheLine] {
        &self.codes[index * self.panel_lines()..]
    }

    /// All panels, to be filled side by side.
    pub fn panels_mut(&mut self) -> Vec<PanelMut<'_>> {
        let (lines, scale_lines, groups) = (self.panel_lines(), self.scale_lines(), self.groups());
        let mut scales = self.scales.chunks_mut(scale_lines.max(1));
        let mut mins = self.mins.chunks_mut(scale_lines.max(1));
        self.codes
            .chunks_mut(lines.max(1))
            .map(|codes| PanelMut {
                codes,
                scales: scales.next().map_or(&mut [], |lines| numbers_mut(lines, groups)),
                mins: mins.next().map_or(&mut [], |lines| numbers_mut(lines, groups)),
            })
            .collect()
    }

    /// Writes row `row` as F32: what the products compute with, and how embeddings are looked up.
    ///
    /// # Panics
    /// If `row >= self.rows()` or `out.len() != self.columns()`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.columns, "length of the row");
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        for (column, out) in out.iter_mut().enumerate() {
            *out = panel.weight(self.layout, lane, column) * self.gain;
        }
    }
}

fn numbers(lines: &[CacheLine], groups: usize) -> &[[f16; PANEL]] {
    &bytemuck::cast_slice(lines)[..groups]
}

fn numbers_mut(lines: &mut [CacheLine], groups: usize) -> &mut [[f16; PANEL]] {
    &mut bytemuck::cast_slice_mut(lines)[..groups]
}

impl Panel<'_> {
    /// The integer that stands for the weight at (`lane`, `column`), signed; 0..=15 for [`Code::Int4`].
    #[inline]
    pub fn integer(&self, code: Code, lane: usize, column: usize) -> i32 {
        let (block, column) = (column / BLOCK, column % BLOCK);
        let nibble = || {
            let byte = self.codes[block * 4 + column / 8].0[4 * lane + column % 4];
            usize::from(if column % 8 < 4 { byte & 15 } else { byte >> 4 })
        };
        match code {
            Code::Int4 => nibble() as i32,
            Code::Table4(table) => i32::from(table[nibble()]),
            Code::Int8 => i32::from(self.codes[block * 8 + column / 4].0[4 * lane + column % 4]) - 128,
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
        }
    }

    /// The float weight at (`lane`, `column`).
    #[inline]
    pub fn float(&self, code: Code, lane: usize, column: usize) -> f32 {
        match code {
            Code::F32 => bytemuck::cast_slice::<CacheLine, f32>(self.codes)[column * PANEL + lane],
            Code::F16 => bytemuck::cast_slice::<CacheLine, f16>(self.codes)[column * PANEL + lane].to_f32(),
            Code::BF16 => f32::from_bits(
                u32::from(bytemuck::cast_slice::<CacheLine, u16>(self.codes)[column * PANEL + lane]) << 16,
            ),
            Code::Int4 | Code::Table4(_) | Code::Int8 => unreachable!("integers have scales"),
        }
    }

    /// The weight at (`lane`, `column`), without the matrix's gain.
    fn weight(&self, layout: Layout, lane: usize, column: usize) -> f32 {
        if !layout.is_integer() {
            return self.float(layout.code, lane, column);
        }
        let group = column / layout.group;
        let scale = self.scales[group][lane].to_f32();
        let code = self.integer(layout.code, lane, column) as f32;
        match (layout.code, layout.min) {
            (Code::Int4, false) => scale * (code - 8.0),
            (_, false) => scale * code,
            (_, true) => scale * code + self.mins[group][lane].to_f32(),
        }
    }
}

impl PanelMut<'_> {
    /// The first row with a scale, a minimum or a float that is NaN or infinite.
    ///
    /// Integers of a file have no such values, so only what they are multiplied with is looked at, which is little.
    pub fn unusable_row(&self, code: Code) -> Option<usize> {
        /// Which rows have a number with all bits of `exponent` set. A row of `numbers` is one number of each.
        fn mark<T: bytemuck::Pod + std::ops::BitAnd<Output = T> + PartialEq>(
            numbers: &[T],
            exponent: T,
            bad: &mut [bool; PANEL],
        ) {
            for numbers in numbers.as_chunks::<PANEL>().0 {
                for (bad, number) in bad.iter_mut().zip(numbers) {
                    *bad |= *number & exponent == exponent;
                }
            }
        }
        let mut bad = [false; PANEL];
        match code {
            Code::F32 => mark(bytemuck::cast_slice::<CacheLine, u32>(self.codes), 0x7f80_0000, &mut bad),
            Code::F16 => mark(bytemuck::cast_slice::<CacheLine, u16>(self.codes), 0x7c00, &mut bad),
            Code::BF16 => mark(bytemuck::cast_slice::<CacheLine, u16>(self.codes), 0x7f80, &mut bad),
            Code::Int4 | Code::Table4(_) | Code::Int8 => {
                mark(bytemuck::cast_slice::<_, u16>(self.scales), 0x7c00, &mut bad);
                mark(bytemuck::cast_slice::<_, u16>(self.mins), 0x7c00, &mut bad);
            }
        }
        bad.iter().position(|bad| *bad)
    }

    /// Stores the codes of block `block` of row `lane`: 0..=15 for 4-bit codes, -128..=127 for 8-bit ones.
    #[inline]
    pub fn set_codes(&mut self, code: Code, lane: usize, block: usize, codes: &[i8; BLOCK]) {
        match code {
            Code::Int4 | Code::Table4(_) => {
                let lines = &mut self.codes[block * 4..][..4];
                for (line, codes) in lines.iter_mut().zip(codes.as_chunks::<8>().0) {
                    let bytes = &mut line.0[4 * lane..][..4];
                    for i in 0..4 {
                        bytes[i] = (codes[i] & 15) as u8 | ((codes[i + 4] & 15) as u8) << 4;
                    }
                }
            }
            Code::Int8 => {
                let lines = &mut self.codes[block * 8..][..8];
                for (line, codes) in lines.iter_mut().zip(codes.as_chunks::<4>().0) {
                    let bytes = &mut line.0[4 * lane..][..4];
                    for i in 0..4 {
                        bytes[i] = (codes[i] as u8) ^ 0x80;
                    }
                }
            }
            Code::F32 | Code::F16 | Code::BF16 => unreachable!("floats have no integer codes"),
        }
    }

    /// As [`set_codes`](Self::set_codes) of 4-bit codes, from the bytes in which most files have them: low nibbles are columns
    /// 0..16, high nibbles columns 16..32.
    #[inline]
    pub fn set_nibbles(&mut self, lane: usize, block: usize, bytes: &[u8; BLOCK / 2]) {
        const LOW: u32 = 0x0f0f_0f0f;
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let (a, b, c, d) = (word(0), word(4), word(8), word(12));
        let words =
            [a & LOW | (b & LOW) << 4, c & LOW | (d & LOW) << 4, a >> 4 & LOW | b & !LOW, c >> 4 & LOW | d & !LOW];
        for (line, word) in self.codes[block * 4..][..4].iter_mut().zip(words) {
            line.0[4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Stores a float weight, rounded to the layout's type.
    #[inline]
    pub fn set_float(&mut self, code: Code, lane: usize, column: usize, value: f32) {
        let at = column * PANEL + lane;
        match code {
            Code::F32 => bytemuck::cast_slice_mut::<CacheLine, f32>(self.codes)[at] = value,
            Code::F16 => bytemuck::cast_slice_mut::<CacheLine, f16>(self.codes)[at] = f16::from_f32(value),
            Code::BF16 => {
                bytemuck::cast_slice_mut::<CacheLine, u16>(self.codes)[at] = half::bf16::from_f32(value).to_bits();
            }
            Code::Int4 | Code::Table4(_) | Code::Int8 => unreachable!("integers have scales"),
        }
    }
}
