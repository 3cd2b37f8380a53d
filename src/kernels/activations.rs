//! Activations as INT8 blocks, rows interleaved in tiles, with the sums that products need of each block.

use std::collections::TryReserveError;
use std::ops::Range;

use crate::quant::packed::{BLOCK, CacheLine};

/// The number of rows of the largest tile.
pub const MAX_TILE_ROWS: usize = 8;

/// Rows of activations, quantized to INT8 in blocks of 32.
///
/// Rows form tiles of 8. The last rows form a tile of 8, 4, 2 or 1, the smallest that holds them; its remaining rows are
/// zeros, and products write no output for them. Within a tile, the codes of all rows for one block are contiguous, and so
/// are their scales and sums, so that a product reads a tile through a handful of pointers. A tile of `n` rows takes `n`
/// times [`row_lines`](Self::row_lines) whole cache lines, so tiles can be filled in parallel.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    blocks: usize,
    lines: Vec<CacheLine>,
}

/// A tile of `R` rows of [`Activations`].
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a, const R: usize> {
    /// `(blocks, R, 8)`: four INT8 codes from -127 to 127 in each number, lowest byte first.
    pub codes: &'a [[[i32; 8]; R]],
    /// `(blocks, R)`: the value of a code of 1.
    pub scales: &'a [[f32; R]],
    /// `(blocks, R)`: scale times the sum of the codes, by which a minimum is multiplied.
    pub sums: &'a [[f32; R]],
    /// `(blocks, R)`: -8 times the sum of the codes, the zero point of 4-bit weights.
    pub zeros: &'a [[i32; R]],
    /// `(blocks, 2, R)`: as `sums`, for each half of a block.
    pub half_sums: &'a [[[f32; R]; 2]],
    /// `(blocks, 2, R)`: as `zeros`, for each half of a block.
    pub half_zeros: &'a [[[i32; R]; 2]],
}

impl<'a, const R: usize> Tile<'a, R> {
    /// The blocks of `range`: all slices cut to one length, so that a loop over it needs no bounds checks.
    #[inline(always)]
    pub(super) fn blocks(&self, range: Range<usize>) -> Tile<'a, R> {
        let n = range.len();
        Tile {
            codes: &self.codes[range.clone()][..n],
            scales: &self.scales[range.clone()][..n],
            sums: &self.sums[range.clone()][..n],
            zeros: &self.zeros[range.clone()][..n],
            half_sums: &self.half_sums[range.clone()][..n],
            half_zeros: &self.half_zeros[range][..n],
        }
    }
}

/// One row of [`Activations`] to write to: block `b` of every field is at `b * height + row`.
#[derive(Debug)]
pub struct RowMut<'a> {
    /// Rows in the tile.
    pub height: usize,
    /// This row's index in the tile.
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

/// Bytes of a block of a row: 32 codes and 7 numbers.
const BLOCK_BYTES: usize = BLOCK + 7 * 4;

impl Activations {
    /// Resizes to `rows` rows of `columns` values. The contents are unspecified until every row is filled.
    pub fn resize(&mut self, rows: usize, columns: usize) {
        self.rows = rows;
        self.blocks = columns.div_ceil(BLOCK);
        let lines = self.padded_rows() * self.row_lines();
        if self.lines.len() < lines {
            self.lines.resize(lines, CacheLine([0; 64]));
        }
    }

    /// Allocates memory for `rows` rows of `columns` values, so that [`resize`](Self::resize) does not.
    ///
    /// # Errors
    /// If the allocation fails.
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

    /// Blocks of 32 values per row, the last one padded with zeros.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Cache lines per row.
    pub fn row_lines(&self) -> usize {
        (self.blocks * BLOCK_BYTES).div_ceil(size_of::<CacheLine>())
    }

    /// The memory of all tiles. Callers split it into chunks of `MAX_TILE_ROWS * row_lines()` and [`fill`](Self::fill) each.
    pub fn lines_mut(&mut self) -> &mut [CacheLine] {
        let lines = self.padded_rows() * self.row_lines();
        &mut self.lines[..lines]
    }

    /// The number of rows of the tile that starts where `left` rows are left. A padded tile has more than `left`.
    #[inline]
    pub fn height(left: usize) -> usize {
        left.next_power_of_two().min(MAX_TILE_ROWS)
    }

    /// The tile of `R` rows that starts at `row`.
    ///
    /// # Panics
    /// If no tile of `R` rows starts there.
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
        self.codes_of(row, column / BLOCK)[column % BLOCK]
    }

    /// The INT8 codes of `row` in block `block`.
    #[inline]
    pub(super) fn codes_of(&self, row: usize, block: usize) -> &[i8; BLOCK] {
        bytemuck::cast_ref(&self.codes[block][row])
    }
}
