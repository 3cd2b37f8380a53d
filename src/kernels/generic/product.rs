//! The shared part of all integer products: the choice by layout and the order of tiles.

use std::ops::Range;

use super::sparse::by_chunk;
use super::vector::Vector;
use crate::kernels::activations::{Activations, MAX_TILE_ROWS, Tile};
use crate::quant::packed::sparse::{Int4Block, SparseBlocks};
use crate::quant::packed::{BLOCK, CacheLine, Code, LONGEST_RUN, Layout, PANEL, Packed, Panel};
use crate::threads::Columns;

/// [`Code::Int4`] as a constant parameter.
pub(in crate::kernels) const INT4: u8 = 0;
/// [`Code::Table4`] as a constant parameter.
pub(in crate::kernels) const TABLE4: u8 = 1;
/// [`Code::Int8`] as a constant parameter.
pub(in crate::kernels) const INT8: u8 = 2;
/// [`Code::Int2`] as a constant parameter.
pub(in crate::kernels) const INT2: u8 = 3;
/// [`Code::Int3`] as a constant parameter.
pub(in crate::kernels) const INT3: u8 = 4;
/// [`Code::Int5`] as a constant parameter.
pub(in crate::kernels) const INT5: u8 = 5;
/// [`Code::Int6`] as a constant parameter.
pub(in crate::kernels) const INT6: u8 = 6;

/// Lines of a block of a panel.
pub(in crate::kernels) const fn lines_of_block(code: u8) -> usize {
    match code {
        INT2 => 2,
        INT3 => 3,
        INT5 => 5,
        INT6 => 6,
        INT8 => 8,
        _ => 4,
    }
}

/// Whether codes are unsigned: integers if there is a minimum, and otherwise higher than these by their zero point.
pub(in crate::kernels) const fn is_unsigned(code: u8) -> bool {
    !matches!(code, TABLE4 | INT8)
}

/// What to add to dot products for the zero point of the codes, from what 4-bit codes need. Signed codes count as 128 too high, as they
/// are where they are made unsigned.
#[inline(always)]
pub(in crate::kernels) const fn zero_point(code: u8, of_int4: i32) -> i32 {
    match code {
        INT2 => of_int4 >> 3,
        INT3 => of_int4 >> 1,
        INT5 => of_int4 << 1,
        INT6 => of_int4 << 2,
        TABLE4 | INT8 => of_int4 << 4,
        _ => of_int4,
    }
}

/// Bytes of activations that stay in the second-level cache while the panels pass.
const CACHE_BYTES: usize = 256 << 10;

/// The operands of an integer product, for the instruction set `S`.
pub(in crate::kernels) struct Product<'a, 'c, S> {
    /// Proof that the CPU has the instructions.
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

/// Runs the code for `layout`, which must be a [known](Layout::is_known) one of integers. Sparse codes count as [`INT4`], which they are
/// expanded to.
#[inline(always)]
pub(in crate::kernels) fn by_layout(layout: Layout, code: impl ByLayout) {
    const NONE: [i8; 16] = [0; 16];
    match (layout.code, layout.group, layout.min) {
        (Code::Int2, _, true) => code.run::<INT2, 16, true>(&NONE),
        (Code::Int2, 32, false) => code.run::<INT2, 32, false>(&NONE),
        (Code::Int2, 64, false) => code.run::<INT2, 64, false>(&NONE),
        (Code::Int2, 128, false) => code.run::<INT2, 128, false>(&NONE),
        (Code::Int2, _, false) => code.run::<INT2, 256, false>(&NONE),
        (Code::Int3, ..) => code.run::<INT3, 16, false>(&NONE),
        (Code::Int5, _, false) => code.run::<INT5, 32, false>(&NONE),
        (Code::Int5, _, true) => code.run::<INT5, 32, true>(&NONE),
        (Code::Int6, ..) => code.run::<INT6, 16, false>(&NONE),
        (Code::Int4, 16, false) => code.run::<INT4, 16, false>(&NONE),
        (Code::Int4, 16, true) => code.run::<INT4, 16, true>(&NONE),
        (Code::Int4 | Code::SparseInt4, 32, false) => code.run::<INT4, 32, false>(&NONE),
        (Code::Int4, 32, true) => code.run::<INT4, 32, true>(&NONE),
        (Code::Int4 | Code::SparseInt4, 64, false) => code.run::<INT4, 64, false>(&NONE),
        (Code::Int4, 64, true) => code.run::<INT4, 64, true>(&NONE),
        (Code::Int4 | Code::SparseInt4, _, false) => code.run::<INT4, 128, false>(&NONE),
        (Code::Int4 | Code::SparseInt4, _, true) => code.run::<INT4, 128, true>(&NONE),
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

/// The lines of block `b`.
#[inline(always)]
pub(in crate::kernels) fn block_lines<const CODE: u8>(codes: &[CacheLine], b: usize) -> &[CacheLine] {
    let lines = lines_of_block(CODE);
    &codes[b * lines..][..lines]
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

/// An instruction set that multiplies one panel at a time by all tiles.
pub(in crate::kernels) trait ByPanel: Copy {
    /// Multiplies the panel by the tile of `R` rows that starts at `row`.
    fn tile<const CODE: u8, const GROUP: usize, const MIN: bool, const R: usize>(
        panel: &mut OnePanel<'_, '_, '_, Self, CODE, GROUP, MIN>,
        row: usize,
    );

    /// [Expands](crate::quant::packed::sparse::expand) blocks of sparse codes.
    fn expand(self, blocks: SparseBlocks<'_>, out: &mut [Int4Block]);
}

/// Blocks whose sums are multiplied with the scale of their group together. Groups of more columns than [`LONGEST_RUN`] are summed in
/// parts of that length, so that merging groups does not change results.
pub(in crate::kernels) const fn run_of(group: usize) -> usize {
    if group > LONGEST_RUN { LONGEST_RUN / BLOCK } else { group.div_ceil(BLOCK) }
}

/// One panel of a [`Product`].
pub(in crate::kernels) struct OnePanel<'a, 'b, 'c, S, const CODE: u8, const GROUP: usize, const MIN: bool> {
    pub(in crate::kernels) product: &'a mut Product<'b, 'c, S>,
    /// The panel, or only `blocks` of it.
    pub(in crate::kernels) panel: Panel<'a>,
    pub(in crate::kernels) blocks: Range<usize>,
    /// The index of the panel in the output.
    pub(in crate::kernels) p: usize,
    /// The values of [`TABLE4`].
    pub(in crate::kernels) table: [i8; 16],
    /// The panel's codes and those after it, to be prefetched by the first tile.
    pub(in crate::kernels) prefetched: &'a [CacheLine],
}

impl<S, const CODE: u8, const GROUP: usize, const MIN: bool> OnePanel<'_, '_, '_, S, CODE, GROUP, MIN> {
    /// Groups in a block: one or two, or one where a group has several blocks.
    pub(in crate::kernels) const HALVES: usize = BLOCK.div_ceil(GROUP);
    /// Blocks whose sums are multiplied with the scale of their group together: one, or several.
    pub(in crate::kernels) const RUN: usize = run_of(GROUP);

    /// The number of groups of `blocks` blocks.
    pub(in crate::kernels) const fn groups(blocks: usize) -> usize {
        (blocks * BLOCK).div_ceil(GROUP)
    }

    /// The group of half `half` of block `b`, or of the whole block if it has one group.
    #[inline(always)]
    pub(in crate::kernels) const fn group_of(b: usize, half: usize) -> usize {
        if GROUP < BLOCK { b * Self::HALVES + half } else { b / (GROUP / BLOCK) }
    }

    /// Computes the tile of `R` rows at `row`, `ROWS` rows and `T` registers of the panel at a time, as registers are few.
    ///
    /// `strip` adds to the sums of the rows from its first number on and the registers from its second number on. It is
    /// given the lines that it should prefetch.
    #[inline(always)]
    pub(in crate::kernels) fn by_strips<V: Vector, const R: usize, const ROWS: usize, const T: usize>(
        &mut self,
        v: V,
        row: usize,
        strip: impl Fn(&Self, &Tile<'_, R>, [usize; 2], &[CacheLine], [[V::Register; T]; ROWS]) -> [[V::Register; T]; ROWS],
    ) {
        let x = self.product.x.tile::<R>(row).blocks(self.blocks.clone());
        let is_last = self.blocks.end == self.product.x.blocks();
        let output_scale = v.splat(if is_last { self.product.w.output_scale() } else { 1.0 });
        for part in (0..V::PARTS).step_by(T) {
            for first in (0..R).step_by(ROWS) {
                let prefetched = if row == 0 && first == 0 && part == 0 { self.prefetched } else { &[] };
                let mut sums = [[v.splat(0.0); T]; ROWS];
                if self.blocks.start > 0 {
                    self.load_sums(v, [row + first, part], &mut sums);
                }
                let sums = strip(self, &x, [first, part], prefetched, sums);
                let out = &mut *self.product.out;
                for (r, sums) in sums.into_iter().enumerate().take(out.rows().saturating_sub(row + first)) {
                    let out = &mut out.row_mut(row + first + r)[self.p * PANEL..];
                    (0..T).for_each(|t| v.store_part(v.mul(sums[t], output_scale), part + t, out));
                }
            }
        }
    }

    /// Loads the sums of the blocks before, which wait in the output: those of the rows and registers from these on.
    #[inline(always)]
    fn load_sums<V: Vector, const ROWS: usize, const T: usize>(
        &mut self,
        v: V,
        [row, part]: [usize; 2],
        sums: &mut [[V::Register; T]; ROWS],
    ) {
        let out = &mut *self.product.out;
        for (r, sums) in sums.iter_mut().enumerate().take(out.rows().saturating_sub(row)) {
            let from = &out.row_mut(row + r)[self.p * PANEL..];
            let mut lanes = [0.0; PANEL];
            let count = PANEL.min(from.len());
            lanes[..count].copy_from_slice(&from[..count]);
            (0..T).for_each(|t| sums[t] = v.load(&lanes, part + t));
        }
    }
}

impl<S: ByPanel, const CODE: u8, const GROUP: usize, const MIN: bool> ByTile
    for OnePanel<'_, '_, '_, S, CODE, GROUP, MIN>
{
    #[inline(always)]
    fn tile<const R: usize>(&mut self, row: usize) {
        S::tile::<CODE, GROUP, MIN, R>(self, row);
    }
}

impl<S: ByPanel> ByLayout for Product<'_, '_, S> {
    /// Multiplies rows in slices that stay in the second-level cache: each slice by every panel, in tiles.
    fn run<const CODE: u8, const GROUP: usize, const MIN: bool>(mut self, table: &[i8; 16]) {
        let (w, panels, x) = (self.w, self.panels.clone(), self.x);
        let row_bytes = (x.row_lines() * size_of::<CacheLine>()).max(1);
        let slice = (CACHE_BYTES / row_bytes).max(MAX_TILE_ROWS) / MAX_TILE_ROWS * MAX_TILE_ROWS;
        let (set, all, table) = (self.set, 0..x.blocks(), *table);
        for first in (0..x.rows()).step_by(slice) {
            let rows = first..x.rows().min(first + slice);
            for (p, index) in panels.clone().enumerate() {
                if !w.is_sparse() {
                    let (product, panel, prefetched) = (&mut self, w.panel(index), w.codes_from(index));
                    let blocks = all.clone();
                    let mut panel = OnePanel::<S, CODE, GROUP, MIN> { product, panel, blocks, p, table, prefetched };
                    by_tile(x, rows.clone(), &mut panel);
                    continue;
                }
                by_chunk(
                    w,
                    index,
                    |sparse, out| set.expand(sparse, out),
                    |panel, blocks| {
                        let product = &mut self;
                        let mut panel =
                            OnePanel::<S, CODE, GROUP, MIN> { product, panel, blocks, p, table, prefetched: &[] };
                        by_tile(x, rows.clone(), &mut panel);
                    },
                );
            }
        }
    }
}
