//! Activations as INT8 blocks, rows interleaved in tiles, with everything that a product needs of a block computed once.

use std::collections::TryReserveError;

use crate::quant::packed::{BLOCK, CacheLine};

/// Rows in the tallest tile.
pub const MAX_TILE_ROWS: usize = 8;

/// Rows of activations, quantized to INT8 in blocks of 32.
///
/// Rows are grouped in tiles of 8, the rest of them in one of 8, 4, 2 or 1, the lowest that holds them; rows that it has
/// beyond that are zeros, and nothing is to be written for them. In a tile the rows' codes of a block lie together, and
/// so do their scales and sums, so that a product walks over a tile with a handful of pointers. A tile of `n` rows takes
/// `n` times [`row_lines`](Self::row_lines) whole cache lines, so tiles can be filled side by side.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    blocks: usize,
    lines: Vec<CacheLine>,
}

/// A tile of `R` rows of [`Activations`].
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a, const R: usize> {
    /// `(blocks, R, 8)`: four INT8 codes -127..=127 in each number, lowest byte first.
    pub codes: &'a [[[i32; 8]; R]],
    /// `(blocks, R)`: what a code of 1 stands for.
    pub scales: &'a [[f32; R]],
    /// `(blocks, R)`: scale times the sum of the codes, what a minimum is multiplied with.
    pub sums: &'a [[f32; R]],
    /// `(blocks, R)`: -8 times the sum of the codes, the zero point of 4-bit weights.
    pub zeros: &'a [[i32; R]],
    /// `(blocks, 2, R)`: as `sums`, for each half of a block.
    pub half_sums: &'a [[[f32; R]; 2]],
    /// `(blocks, 2, R)`: as `zeros`, for each half of a block.
    pub half_zeros: &'a [[[i32; R]; 2]],
}

/// One row of [`Activations`], to be filled: block `b` of every field is at `b * height + row`.
#[derive(Debug)]
pub struct RowMut<'a> {
    /// Rows in the tile.
    pub height: usize,
    /// This row's place in the tile.
    pub row: usize,
    /// `(blocks, height)`: 32 codes
    pub codes: &'a mut [[i8; BLOCK]],
    /// `(blocks, height)`
    pub scales: &'a mut [f32],
    /// `(blocks, height)`
    pub sums: &'a mut [f32],
    /// `(blocks, height)`
    pub zeros: &'a mut [i32],
    /// `(blocks, 2, height)`
    pub half_sums: &'a mut [f32],
    /// `(blocks, 2, height)`
    pub half_zeros: &'a mut [i32],
}

/// Bytes of a row before padding: 32 codes and 7 numbers a block.
const BLOCK_BYTES: usize = BLOCK + 7 * 4;

impl Activations {
    /// Makes room for `rows` rows of `columns` values. The contents are unspecified until every row was filled.
    pub fn resize(&mut self, rows: usize, columns: usize) {
        self.rows = rows;
        self.blocks = columns.div_ceil(BLOCK);
        let lines = self.padded_rows() * self.row_lines();
        if self.lines.len() < lines {
            self.lines.resize(lines, CacheLine([0; 64]));
        }
    }

    /// Asks for the memory of `rows` rows of `columns` values, so that [`resize`](Self::resize) need not.
    ///
    /// # Errors
    /// When there is none.
    pub fn try_reserve(&mut self, rows: usize, columns: usize) -> Result<(), TryReserveError> {
        let blocks = columns.div_ceil(BLOCK);
        let lines = rows.next_multiple_of(MAX_TILE_ROWS) * (blocks * BLOCK_BYTES).div_ceil(size_of::<CacheLine>());
        self.lines.try_reserve_exact(lines.saturating_sub(self.lines.len()))
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows of all tiles.
    fn padded_rows(&self) -> usize {
        let rest = self.rows % MAX_TILE_ROWS;
        self.rows - rest + if rest > 0 { Self::height(rest) } else { 0 }
    }

    /// Blocks of 32 values a row, the last one padded with zeros.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Lines that one row takes.
    pub fn row_lines(&self) -> usize {
        (self.blocks * BLOCK_BYTES).div_ceil(size_of::<CacheLine>())
    }

    /// The memory of all tiles: cut it into chunks of `MAX_TILE_ROWS * row_lines()` and fill each with [`fill`](Self::fill).
    pub fn lines_mut(&mut self) -> &mut [CacheLine] {
        let lines = self.padded_rows() * self.row_lines();
        &mut self.lines[..lines]
    }

    /// Height of the tile that starts at a row which `left` rows follow, itself included: more than `left`, if the tile
    /// is padded.
    #[inline]
    pub fn height(left: usize) -> usize {
        left.next_power_of_two().min(MAX_TILE_ROWS)
    }

    /// The tile of `R` rows that starts at `row`.
    ///
    /// # Panics
    /// If no tile of that height starts there.
    #[inline]
    pub fn tile<const R: usize>(&self, row: usize) -> Tile<'_, R> {
        assert!(row < self.rows && Self::height(self.rows - row) == R, "no tile of {R} rows at row {row}");
        let (line, n) = (self.row_lines(), self.blocks * R);
        let bytes: &[u8] = bytemuck::cast_slice(&self.lines[row * line..][..R * line]);
        let (codes, bytes) = bytes.split_at(n * BLOCK);
        let (scales, bytes) = bytes.split_at(n * 4);
        let (sums, bytes) = bytes.split_at(n * 4);
        let (zeros, bytes) = bytes.split_at(n * 4);
        let (half_sums, bytes) = bytes.split_at(n * 8);
        Tile {
            codes: bytemuck::cast_slice(codes),
            scales: bytemuck::cast_slice(scales),
            sums: bytemuck::cast_slice(sums),
            zeros: bytemuck::cast_slice(zeros),
            half_sums: bytemuck::cast_slice(half_sums),
            half_zeros: bytemuck::cast_slice(&bytes[..n * 8]),
        }
    }
}

impl<const R: usize> Tile<'_, R> {
    /// The INT8 code of `row` at `column`.
    #[inline]
    pub fn code(&self, row: usize, column: usize) -> i8 {
        bytemuck::cast_ref::<[i32; 8], [i8; BLOCK]>(&self.codes[column / BLOCK][row])[column % BLOCK]
    }
}
