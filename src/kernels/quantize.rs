//! Fills [`Activations`] with a kernel.

use super::activations::{Activations, MAX_TILE_ROWS, RowMut};
use super::operations::Kernel;
use crate::quant::packed::{BLOCK, CacheLine};

impl Activations {
    /// Quantizes the `count` rows of one tile with `kernel`. `lines` is a chunk of [`lines_mut`](Self::lines_mut).
    ///
    /// `rows` yields the values of each row, at most `blocks * 32` of them.
    pub fn fill<'x>(
        kernel: &Kernel,
        lines: &mut [CacheLine],
        blocks: usize,
        count: usize,
        mut rows: impl FnMut(usize) -> &'x [f32],
    ) {
        let height = Self::height(count);
        let n = blocks * height;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(lines);
        let (codes, bytes) = bytes.split_at_mut(n * BLOCK);
        let (scales, bytes) = bytes.split_at_mut(n * 4);
        let (sums, bytes) = bytes.split_at_mut(n * 4);
        let (zeros, bytes) = bytes.split_at_mut(n * 4);
        let (half_sums, bytes) = bytes.split_at_mut(n * 8);
        for row in 0..height {
            let out = RowMut {
                height,
                row,
                codes: bytemuck::cast_slice_mut(codes),
                scales: bytemuck::cast_slice_mut(scales),
                sums: bytemuck::cast_slice_mut(sums),
                zeros: bytemuck::cast_slice_mut(zeros),
                half_sums: bytemuck::cast_slice_mut(half_sums),
                half_zeros: bytemuck::cast_slice_mut(&mut bytes[..n * 8]),
            };
            kernel.quantize(if row < count { rows(row) } else { &[] }, out);
        }
    }

    /// Quantizes all rows of `x (rows, columns)` with `kernel`, one after the other.
    pub fn quantize(&mut self, kernel: &Kernel, x: &[f32], columns: usize) {
        let rows = x.len().checked_div(columns).unwrap_or(0);
        self.resize(rows, columns);
        let (row_lines, blocks) = (self.row_lines(), self.blocks());
        for (i, lines) in self.lines_mut().chunks_mut((MAX_TILE_ROWS * row_lines).max(1)).enumerate() {
            let first = i * MAX_TILE_ROWS;
            Self::fill(kernel, lines, blocks, MAX_TILE_ROWS.min(rows - first), |row| {
                &x[(first + row) * columns..][..columns]
            });
        }
    }
}
