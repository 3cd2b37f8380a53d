//! What the integer products of all instruction sets share: the choice by layout and the order of tiles.

use std::ops::Range;

use crate::kernels::activations::{Activations, MAX_TILE_ROWS};
use crate::quant::packed::{CacheLine, Code, Layout, Packed};
use crate::threads::Columns;

/// [`Code::Int4`] as a constant parameter.
pub(in crate::kernels) const INT4: u8 = 0;
/// [`Code::Table4`] as a constant parameter.
pub(in crate::kernels) const TABLE4: u8 = 1;
/// [`Code::Int8`] as a constant parameter.
pub(in crate::kernels) const INT8: u8 = 2;

/// The operands of an integer product, for the instruction set `S`.
pub(in crate::kernels) struct Product<'a, 'c, S> {
    pub(in crate::kernels) set: S,
    pub(in crate::kernels) w: &'a Packed,
    pub(in crate::kernels) panels: Range<usize>,
    pub(in crate::kernels) x: &'a Activations,
    pub(in crate::kernels) out: &'a mut Columns<'c>,
}

/// Code that is compiled for each layout.
pub(in crate::kernels) trait ByLayout {
    /// Runs for codes of the kind `CODE`, groups of `GROUP` columns and, if `MIN`, minimums.
    ///
    /// `table` are the values of [`TABLE4`], otherwise zeros.
    fn run<const CODE: u8, const GROUP: usize, const MIN: bool>(self, table: &[i8; 16]);
}

/// Runs the code for `layout`, which must be one of integers.
#[inline(always)]
pub(in crate::kernels) fn by_layout(layout: Layout, code: impl ByLayout) {
    const NONE: [i8; 16] = [0; 16];
    match (layout.code, layout.group, layout.min) {
        (Code::Int4, 16, false) => code.run::<INT4, 16, false>(&NONE),
        (Code::Int4, 16, true) => code.run::<INT4, 16, true>(&NONE),
        (Code::Int4, 32, false) => code.run::<INT4, 32, false>(&NONE),
        (Code::Int4, 32, true) => code.run::<INT4, 32, true>(&NONE),
        (Code::Int4, 64, false) => code.run::<INT4, 64, false>(&NONE),
        (Code::Int4, 64, true) => code.run::<INT4, 64, true>(&NONE),
        (Code::Int4, _, false) => code.run::<INT4, 128, false>(&NONE),
        (Code::Int4, _, true) => code.run::<INT4, 128, true>(&NONE),
        (Code::Table4(table), 16, false) => code.run::<TABLE4, 16, false>(&table),
        (Code::Table4(table), 16, true) => code.run::<TABLE4, 16, true>(&table),
        (Code::Table4(table), _, false) => code.run::<TABLE4, 32, false>(&table),
        (Code::Table4(table), _, true) => code.run::<TABLE4, 32, true>(&table),
        (Code::Int8, 16, false) => code.run::<INT8, 16, false>(&NONE),
        (Code::Int8, 16, true) => code.run::<INT8, 16, true>(&NONE),
        (Code::Int8, _, false) => code.run::<INT8, 32, false>(&NONE),
        (Code::Int8, _, true) => code.run::<INT8, 32, true>(&NONE),
        (Code::F32 | Code::F16 | Code::BF16, ..) => unreachable!("float layouts go to product_float"),
    }
}

/// Code that is compiled for each height of a tile of [`Activations`].
pub(in crate::kernels) trait ByTile {
    /// Runs for the tile of `R` rows that starts at `row`.
    fn tile<const R: usize>(&mut self, row: usize);
}

/// Runs the code for every tile that starts in `rows`.
#[inline(always)]
pub(in crate::kernels) fn by_tile(x: &Activations, rows: Range<usize>, code: &mut impl ByTile) {
    let mut row = rows.start;
    while row < rows.end {
        let height = Activations::height(x.rows() - row);
        match height {
            8 => code.tile::<8>(row),
            4 => code.tile::<4>(row),
            2 => code.tile::<2>(row),
            _ => code.tile::<1>(row),
        }
        row += height;
    }
}

/// Bytes of activations that stay in the second-level cache while the panels pass.
const CACHE_BYTES: usize = 256 << 10;

/// The rows of `x` in slices of whole tiles that stay in the cache.
pub(in crate::kernels) fn slices(x: &Activations) -> impl Iterator<Item = Range<usize>> {
    let row_bytes = (x.row_lines() * size_of::<CacheLine>()).max(1);
    let slice = (CACHE_BYTES / row_bytes).max(MAX_TILE_ROWS) / MAX_TILE_ROWS * MAX_TILE_ROWS;
    let rows = x.rows();
    (0..rows).step_by(slice).map(move |first| first..rows.min(first + slice))
}
