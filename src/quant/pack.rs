//! Packing: from the blocks of a file to panels.
//!
//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and floats are packed exactly. The types whose scales are computed (Q2_K to Q6_K,
//! IQ4_XS, MXFP4) get them rounded to F16. First they are divided by a power of two, the matrix's
//! [output scale](super::packed::Packed::output_scale), which keeps them in the range of F16.
//!
//! A weight that is NaN or infinite makes every output useless. Packing detects such weights while they are in the CPU cache.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::block::BlockType;
pub use super::blocks32::{IQ4_VALUES, MXFP4_VALUES};
use super::decoder::{Decoder, PanelRow};
use super::packed::{PANEL, Packed, PanelMut};
use crate::error::Error;
use crate::system::arena::{Arena, ForEach};
use crate::threads::Scope;

/// Weights that are packed before the source may release what was read: enough for all threads, and 32 MiB of F32.
const SLAB: usize = 8 << 20;

/// The rows of a matrix, as blocks of a file's type.
pub trait Rows: Sync {
    /// The type of every row's blocks.
    fn block_type(&self) -> BlockType;

    /// The bytes of row `index`. Sources that compute them write them to `scratch`.
    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8];

    /// The same rows with reordered columns, and the order: column `i` there is column `order[i]` here.
    ///
    /// Only for sources in which the columns that share a scale are not adjacent, but are in that order.
    fn reordered(&self) -> Option<(Vec<u32>, Box<dyn Rows + '_>)> {
        None
    }
}

/// Why a matrix could not be packed.
#[derive(Debug)]
#[non_exhaustive]
pub enum PackError {
    /// A scale, a minimum or a float is NaN or infinite, in this row of the result.
    NotFinite(usize),
    /// The packed matrix does not fit into memory.
    Memory(Error),
}

/// A matrix that is to be packed.
pub struct PackJob<'a> {
    /// The rows.
    pub source: &'a dyn Rows,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the source and of the result.
    pub columns: usize,
    /// Row `i` of the result is row `order(i)` of the source.
    pub order: &'a (dyn Fn(usize) -> usize + Sync),
    /// Called after every few million weights of the source, which will not be read again soon, so that a tensor that is
    /// half of a model is not in memory twice.
    pub release: &'a (dyn Fn() + Sync),
    /// Where the result lies.
    pub(crate) arena: &'a Arena,
}

impl PackJob<'_> {
    /// Packs the matrix on the threads of `scope`.
    ///
    /// # Errors
    /// [`PackError::NotFinite`] with the first such row, [`PackError::Memory`].
    ///
    /// # Panics
    /// If the type is not [supported](BlockType::is_supported), or a row of the source has too few bytes: callers check both.
    pub fn run(&self, scope: &Scope<'_>) -> Result<Packed, PackError> {
        let decoder = self.source.block_type().decoder().expect("callers check that the type is supported");
        let slab = (SLAB / self.columns.max(1) / PANEL).max(1); // panels
        let for_each: ForEach<'_> = &|count, item| scope.for_each(count, item);
        let packed = Packed::try_zeroed_in(self.arena, for_each, [self.rows, self.columns], decoder.layout);
        let mut packed = packed.map_err(PackError::Memory)?;
        let output_scale = match decoder.bound {
            Some(bound) if self.columns > 0 => output_scale(self.bound(scope, slab, bound)),
            _ => 1.0,
        };
        packed.set_output_scale(output_scale);
        let non_finite = AtomicUsize::new(usize::MAX);
        let mut panels = packed.panels_mut();
        for (i, panels) in panels.chunks_mut(slab).enumerate() {
            scope.for_each_chunk(panels, 1, |index, panel| {
                let first = (i * slab + index) * PANEL;
                if let Some(row) = self.fill(decoder, output_scale, first, &mut panel[0]) {
                    non_finite.fetch_min(row, Ordering::Relaxed);
                }
            });
            (self.release)();
        }
        drop(panels);
        let non_finite = non_finite.into_inner();
        if non_finite < self.rows {
            return Err(PackError::NotFinite(non_finite));
        }
        packed.merge_groups();
        packed.shorten_in(self.arena);
        Ok(packed)
    }

    /// Fills the panel of rows `first..` and returns the first row that is not finite.
    fn fill(&self, decoder: &Decoder, output_scale: f32, first: usize, panel: &mut PanelMut<'_>) -> Option<usize> {
        let mut scratch = Vec::new();
        for lane in 0..PANEL.min(self.rows - first) {
            let row = self.source.row((self.order)(first + lane), &mut scratch);
            (decoder.pack)(row, PanelRow { panel, lane, columns: self.columns, output_scale });
        }
        panel.non_finite_row(decoder.layout.code).map(|row| first + row)
    }

    /// The largest of `of_row` over all rows, which are read in slabs of as many panels.
    fn bound(&self, scope: &Scope<'_>, slab: usize, of_row: fn(&[u8]) -> f32) -> f32 {
        let mut bounds = vec![0.0f32; self.rows];
        for (i, bounds) in bounds.chunks_mut(slab * PANEL).enumerate() {
            scope.for_each_chunk(bounds, PANEL, |chunk, bounds| {
                let mut scratch = Vec::new();
                let first = (i * slab + chunk) * PANEL;
                for (lane, bound) in bounds.iter_mut().enumerate() {
                    *bound = of_row(self.source.row((self.order)(first + lane), &mut scratch));
                }
            });
            (self.release)();
        }
        bounds.into_iter().fold(0.0, f32::max)
    }
}

/// The power of two that brings scales and minimums up to `bound` below 2^15.
fn output_scale(bound: f32) -> f32 {
    if bound > 0.0 { libm::exp2f((libm::log2f(bound) - 14.0).ceil().clamp(-100.0, 100.0)) } else { 1.0 }
}
