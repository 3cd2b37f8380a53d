//! Packing: from the blocks of a file to panels.
//!
//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, ternary types and floats are packed exactly. The types whose scales are computed (Q2_K to Q6_K,
//! IQ1 to IQ3, IQ4_XS, MXFP4) get them rounded to F16. First they are divided by a power of two, the matrix's
//! [output scale](super::packed::Packed::output_scale), which keeps them in the range of F16. Of I2_S the output scale is the
//! scale of the tensor, an F32.
//!
//! A weight that is NaN or infinite makes every output useless. Packing detects such weights while they are in the CPU cache.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::block::BlockType;
pub use super::blocks32::{IQ4_VALUES, MXFP4_VALUES};
use super::decoder::{Decoder, PanelRow};
use super::packed::{BLOCK, Code, Layout, PANEL, Packed, PanelMut};
use crate::error::Error;
use crate::system::arena::{Arena, ForEach};
use crate::threads::Scope;

/// Weights that are packed before the source may release what was read: enough for all threads, and 32 MiB of F32.
const SLAB: usize = 8 << 20;

/// Panels in which zeros are counted.
const SAMPLES: usize = 4;

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

/// Rows that follow one another in memory.
pub(crate) struct Contiguous<'a> {
    block_type: BlockType,
    bytes: &'a [u8],
    row_bytes: usize,
}

impl<'a> Contiguous<'a> {
    /// `rows` rows of equal length, which are all of `bytes`.
    pub(crate) fn new(block_type: BlockType, bytes: &'a [u8], rows: usize) -> Self {
        Contiguous { block_type, bytes, row_bytes: bytes.len() / rows.max(1) }
    }
}

impl Rows for Contiguous<'_> {
    fn block_type(&self) -> BlockType {
        self.block_type
    }

    fn row<'a>(&'a self, index: usize, _scratch: &'a mut Vec<u8>) -> &'a [u8] {
        &self.bytes[index * self.row_bytes..][..self.row_bytes]
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
        let for_each: ForEach<'_> = &|count, item| scope.for_each(count, item);
        let packed = Packed::try_zeroed_in(self.arena, for_each, [self.rows, self.columns], self.decoder().layout);
        let mut packed = packed.map_err(PackError::Memory)?;
        self.pack(scope, &mut packed)?;
        packed.shorten_in(self.arena);
        Ok(packed)
    }

    /// As [`run`](Self::run), but the result has no zeros if that saves enough of its [bytes](super::packed::sparse).
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_sparse(&self, scope: &Scope<'_>) -> Result<Packed, PackError> {
        let packed = Packed::try_zeroed(self.rows, self.columns, self.decoder().layout, 1.0);
        let mut packed = packed.map_err(PackError::Memory)?;
        self.pack(scope, &mut packed)?;
        let sparse = packed.sparse_in(self.arena, scope).map_err(PackError::Memory)?;
        Ok(sparse.unwrap_or(packed))
    }

    /// Whether some panels of the result, spread over it, have enough zeros for [`run_sparse`](Self::run_sparse) to save bytes.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn has_many_zeros(&self) -> bool {
        let decoder = self.decoder();
        if decoder.layout != Layout::scaled(Code::Int4, BLOCK) || self.rows == 0 || self.columns == 0 {
            return false;
        }
        let (panels, mut zeros, mut codes) = (self.rows.div_ceil(PANEL), 0, 0);
        for sample in 0..SAMPLES.min(panels) {
            let first = sample * panels / SAMPLES.min(panels) * PANEL;
            let Ok(mut packed) = Packed::try_zeroed(PANEL, self.columns, decoder.layout, 1.0) else { return false };
            for panel in &mut packed.panels_mut() {
                self.fill(decoder, 1.0, first, panel);
                let bytes = panel.codes.iter().flat_map(|line| line.0);
                zeros += bytes.map(|byte| usize::from(byte & 15 == 8) + usize::from(byte >> 4 == 8)).sum::<usize>();
                codes += PANEL.min(self.rows - first) * self.columns;
            }
        }
        // A mask saves bytes from a quarter on.
        zeros > codes / 3
    }

    fn decoder(&self) -> &'static Decoder {
        self.source.block_type().decoder().expect("callers check that the type is supported")
    }

    /// Packs the matrix into `packed`, which has its shape and the layout of its type.
    fn pack(&self, scope: &Scope<'_>, packed: &mut Packed) -> Result<(), PackError> {
        let decoder = self.decoder();
        let slab = (SLAB / self.columns.max(1) / PANEL).max(1); // panels
        let output_scale = match decoder.bound {
            Some(bound) if self.columns > 0 => output_scale(self.bound(scope, slab, bound), decoder.is_one_scale),
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
        Ok(())
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

/// The power of two that brings scales and minimums up to `bound` below 2^15, or `bound` itself.
fn output_scale(bound: f32, is_one_scale: bool) -> f32 {
    if is_one_scale {
        return if bound > 0.0 { bound } else { 1.0 };
    }
    if bound > 0.0 { libm::exp2f((libm::log2f(bound) - 14.0).ceil().clamp(-100.0, 100.0)) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::ThreadPool;

    /// Random blocks with finite scales.
    struct RandomBlocks {
        block_type: BlockType,
        row_bytes: usize,
        bytes: Vec<u8>,
    }

    impl RandomBlocks {
        fn new(block_type: BlockType, rows: usize, columns: usize) -> RandomBlocks {
            use BlockType::*;
            // The upper bytes of F16 and F32 scales, below whose second bit the numbers are finite.
            let exponents: &[usize] = match block_type {
                F32 | BF16 | F16 | MXFP4 | NVFP4 => &[],
                Q4_1 | Q5_1 | Q4_K | Q5_K => &[1, 3],
                Q2_K => &[81, 83],
                Q3_K => &[109],
                Q6_K => &[209],
                TQ1_0 => &[53],
                TQ2_0 => &[65],
                IQ1_M => &[55],
                I2_S => &[35],
                _ => &[1],
            };
            let (row_bytes, size) = (block_type.bytes_for(columns).unwrap(), block_type.block_bytes());
            let mut state = 5u64;
            let mut bytes: Vec<u8> = (0..rows * row_bytes)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 56) as u8
                })
                .collect();
            for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
                exponents.iter().for_each(|at| block[*at] = block[*at] & 0x83 | 0x30);
                match block_type {
                    F32 => block[3] = 0x3e,
                    F16 | BF16 => block[1] = 0x3c,
                    // Exponents near each other, so that F16 holds all scales.
                    MXFP4 => block[0] = 120 + (i % 8) as u8,
                    // A tensor has one scale.
                    I2_S => block[32..36].copy_from_slice(&0.123_456_79f32.to_le_bytes()),
                    _ => {}
                }
            }
            RandomBlocks { block_type, row_bytes, bytes }
        }
    }

    impl Rows for RandomBlocks {
        fn block_type(&self) -> BlockType {
            self.block_type
        }

        fn row<'a>(&'a self, index: usize, _scratch: &'a mut Vec<u8>) -> &'a [u8] {
            &self.bytes[index * self.row_bytes..][..self.row_bytes]
        }
    }

    fn pack(source: &dyn Rows, rows: usize, columns: usize) -> Packed {
        let (pool, arena) = (ThreadPool::new(2).unwrap(), Arena::new(0));
        let job = PackJob { source, rows, columns, order: &|row| row, release: &|| (), arena: &arena };
        pool.run(|scope| job.run(scope)).unwrap_or_else(|error| panic!("{error:?}"))
    }

    #[test]
    fn every_type_is_packed_into_its_layout_with_its_weights() {
        use BlockType::*;
        let (iq4, mxfp4) = (Code::Table4(IQ4_VALUES), Code::Table4(MXFP4_VALUES));
        // The layout, and whether it holds scales exactly. The table of codebooks is not compared.
        let table = Code::Table4([0; 16]);
        let expected = [
            (F32, Code::F32, 32, false, true),
            (F16, Code::F16, 32, false, true),
            (BF16, Code::BF16, 32, false, true),
            (Q4_0, Code::Int4, 32, false, true),
            (Q4_1, Code::Int4, 32, true, true),
            (Q5_0, Code::Int5, 32, false, true),
            (Q5_1, Code::Int5, 32, true, true),
            (Q8_0, Code::Int8, 32, false, true),
            (Q2_K, Code::Int2, 16, true, false),
            (Q3_K, Code::Int3, 16, false, false),
            (Q4_K, Code::Int4, 32, true, false),
            (Q5_K, Code::Int5, 32, true, false),
            (Q6_K, Code::Int6, 16, false, false),
            (IQ4_NL, iq4, 32, false, true),
            (IQ4_XS, iq4, 32, false, false),
            (IQ1_S, table, 32, false, false),
            (IQ1_M, table, 16, false, false),
            (IQ2_XXS, table, 32, false, false),
            (IQ2_XS, table, 16, false, false),
            (IQ2_S, table, 16, false, false),
            (IQ3_XXS, table, 32, false, false),
            (IQ3_S, table, 32, false, false),
            (TQ1_0, Code::Int2, 256, false, true),
            (TQ2_0, Code::Int2, 256, false, true),
            (Q1_0, Code::Int2, 128, false, true),
            (Q2_0, Code::Int2, 64, false, true),
            (PQ2_0, Code::Int2, 128, false, true),
            (I2_S, Code::Int2, 256, false, true),
            (MXFP4, mxfp4, 32, false, true),
            (NVFP4, mxfp4, 16, false, true),
        ];
        assert_eq!(expected.len(), BlockType::all().filter(|block_type| block_type.is_supported()).count());
        let (rows, columns) = (21, 1280);
        for (block_type, code, group, min, is_exact) in expected {
            let source = RandomBlocks::new(block_type, rows, columns);
            let packed = pack(&source, rows, columns);
            let Layout { code: found, .. } = packed.layout();
            let code = if code == table && matches!(found, Code::Table4(_)) { found } else { code };
            assert_eq!(packed.layout(), Layout { code, group, min }, "{block_type}");
            assert!(block_type.packed_layout().is_some_and(|layout| layout == packed.layout()), "{block_type}");
            let (mut weights, mut values) = (vec![f32::NAN; columns], vec![f32::NAN; columns]);
            for row in 0..rows {
                packed.decode_row(row, &mut weights);
                block_type.decode(source.row(row, &mut vec![]), &mut values).unwrap();
                let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                let tolerance = if is_exact { 0.0 } else { largest * 1e-3 };
                for (column, (weight, value)) in weights.iter().zip(&values).enumerate() {
                    assert!(
                        (weight - value).abs() <= tolerance,
                        "{block_type}: {weight}, not {value}, in {row}, {column}"
                    );
                }
            }
        }
    }

    #[test]
    fn only_4_bit_weights_with_many_zeros_are_packed_without_them() {
        let (rows, columns) = (262, 640);
        let (pool, arena) = (ThreadPool::new(2).unwrap(), Arena::new(0));
        for (block_type, zeros, expected) in [
            (BlockType::Q4_0, 0, false),
            (BlockType::Q4_0, 1, false),
            (BlockType::Q4_0, 2, true),
            (BlockType::Q4_1, 2, false),
            (BlockType::Q8_0, 2, false),
        ] {
            let mut source = RandomBlocks::new(block_type, rows, columns);
            // Of every four nibbles, this many are zero.
            for block in source.bytes.chunks_exact_mut(block_type.block_bytes()) {
                for (i, byte) in block[block_type.block_bytes() - 16..].iter_mut().enumerate() {
                    let (low, high) = (if zeros > i % 2 * 2 { 8 } else { *byte & 15 }, *byte >> 4);
                    *byte = low | if zeros > 1 + i % 2 * 2 { 8 } else { high } << 4;
                }
            }
            let job = PackJob { source: &source, rows, columns, order: &|row| row, release: &|| (), arena: &arena };
            assert_eq!(job.has_many_zeros(), expected, "{block_type}, {zeros}");
            let (dense, sparse) = pool.run(|scope| (job.run(scope).unwrap(), job.run_sparse(scope).unwrap()));
            assert_eq!(sparse.is_sparse(), expected, "{block_type}, {zeros}");
            let (mut found, mut weights) = (vec![f32::NAN; columns], vec![0.0; columns]);
            for row in 0..rows {
                sparse.decode_row(row, &mut found);
                dense.decode_row(row, &mut weights);
                assert_eq!(found, weights, "{block_type}, row {row}");
            }
        }
    }

    #[test]
    fn a_ternary_tensor_keeps_the_bits_of_its_scale() {
        for (scale, output_scale) in [(0.123_456_79f32, 0.123_456_79), (-3.3, 3.3), (1e-30, 1e-30), (0.0, 1.0)] {
            let mut source = RandomBlocks::new(BlockType::I2_S, 3, 256);
            source.bytes.chunks_exact_mut(36).for_each(|block| block[32..].copy_from_slice(&scale.to_le_bytes()));
            let packed = pack(&source, 3, 256);
            assert_eq!(packed.output_scale(), output_scale);
            let mut weights = vec![f32::NAN; 256];
            packed.decode_row(1, &mut weights);
            assert!(weights.iter().all(|weight| [-1.0, 0.0, 1.0, 2.0].map(|code| code * scale).contains(weight)));
        }
        for scale in [f32::NAN, f32::INFINITY] {
            let mut source = RandomBlocks::new(BlockType::I2_S, 3, 256);
            source.bytes.chunks_exact_mut(36).for_each(|block| block[32..].copy_from_slice(&scale.to_le_bytes()));
            let (pool, arena) = (ThreadPool::new(1).unwrap(), Arena::new(0));
            let job =
                PackJob { source: &source, rows: 3, columns: 256, order: &|row| row, release: &|| (), arena: &arena };
            let error = pool.run(|scope| job.run(scope)).unwrap_err();
            assert!(matches!(error, PackError::NotFinite(0)), "{error:?}");
        }
    }
}
