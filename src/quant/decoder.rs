//! Decoding of blocks, written once per block type and used for values and for packing.
//!
//! A block type is a struct that is laid out as in a file. Its [`Block`] implementation yields codes, scales and minimums in
//! the form that panels hold. [`Decoder`] derives everything else from it: values, panels and the range of the scales.

use bytemuck::AnyBitPattern;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::layout::{BLOCK, Code, Layout, PANEL};
use super::panel::{Bytes, Nibbles, PanelMut, Planes};

/// A block as it lies in a file, a struct of bytes.
///
/// Its weights are [`Layout::weight`] of its codes, scales and minimums.
pub(super) trait Block: AnyBitPattern {
    /// How panels hold the block's numbers.
    const LAYOUT: Layout;
    /// Weights in a block, a multiple of [`BLOCK`].
    const WEIGHTS: usize = Self::LAYOUT.group * Self::Groups::COUNT;
    /// Weights that share a scale, if every block repeats its scales.
    const SHARED: usize = Self::LAYOUT.group;
    /// Whether all blocks of a tensor have the same scale, which becomes the output scale of the matrix.
    const IS_ONE_SCALE: bool = false;
    /// [`Nibbles`], [`Bytes`] or [`Planes`].
    type Codes: Codes;
    /// An array of [`Group`]s.
    type Groups: Groups;

    /// The codes of weights `32 * index..32 * (index + 1)`.
    fn codes(&self, index: usize) -> Self::Codes;

    /// The scale and minimum of each group of [`Layout::group`] weights.
    fn groups(&self) -> Self::Groups;

    /// Upper bounds of the absolute scales and minimums. Only asked of types with computed scales.
    fn bounds(&self) -> [f32; 2] {
        [0.0; 2]
    }
}

/// The numbers that a group of weights shares.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Group<S> {
    pub(super) scale: S,
    /// 0 in layouts without minimums.
    pub(super) min: S,
}

impl<S: Default> Group<S> {
    /// A group without a minimum.
    #[inline(always)]
    pub(super) fn scaled(scale: S) -> Self {
        Group { scale, min: S::default() }
    }
}

/// All groups of a block.
pub(super) trait Groups {
    const COUNT: usize;
    type Scale: Scale;

    fn as_slice(&self) -> &[Group<Self::Scale>];

    /// Calls `store` with the index, the scale and the minimum of each group, as panels hold them: 0 for the minimum where there
    /// is none.
    fn to_panel(&self, has_min: bool, output_scale: f32, store: impl FnMut(usize, f16, f16));
}

impl<S: Scale, const N: usize> Groups for [Group<S>; N] {
    const COUNT: usize = N;
    type Scale = S;

    #[inline(always)]
    fn as_slice(&self) -> &[Group<S>] {
        self
    }

    #[inline(always)]
    fn to_panel(&self, has_min: bool, output_scale: f32, mut store: impl FnMut(usize, f16, f16)) {
        let scales = S::to_panel(self.map(|group| group.scale), output_scale);
        let mins = if has_min { S::to_panel(self.map(|group| group.min), output_scale) } else { [f16::ZERO; N] };
        scales.into_iter().zip(mins).enumerate().for_each(|(i, (scale, min))| store(i, scale, min));
    }
}

/// A scale or a minimum: `f16` where the file holds it as such and panels keep it, `f32` where it is computed and rounded.
pub(super) trait Scale: Copy + Default {
    /// Whether it is computed and may exceed the range of F16.
    const IS_COMPUTED: bool;

    fn to_f32(self) -> f32;

    /// The numbers divided by the matrix's output scale, as panels hold them.
    fn to_panel<const N: usize>(numbers: [Self; N], output_scale: f32) -> [f16; N];
}

impl Scale for f16 {
    const IS_COMPUTED: bool = false;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn to_panel<const N: usize>(numbers: [f16; N], _output_scale: f32) -> [f16; N] {
        numbers
    }
}

impl Scale for f32 {
    const IS_COMPUTED: bool = true;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn to_panel<const N: usize>(numbers: [f32; N], output_scale: f32) -> [f16; N] {
        // All at once, because each conversion asks for the CPU's features first.
        let mut converted = [f16::ZERO; N];
        converted.convert_from_f32_slice(&numbers.map(|number| number / output_scale));
        converted
    }
}

/// The codes of 32 weights.
pub(super) trait Codes {
    /// The codes as numbers.
    fn unpack(self) -> [i8; BLOCK];

    /// Stores them as block `block` of row `lane` of a panel.
    fn store(&self, panel: &mut PanelMut<'_>, lane: usize, block: usize);
}

impl Codes for Nibbles {
    #[inline(always)]
    fn unpack(self) -> [i8; BLOCK] {
        let mut codes = [0; BLOCK];
        for (j, byte) in self.into_iter().enumerate() {
            codes[j] = (byte & 15) as i8;
            codes[j + 16] = (byte >> 4) as i8;
        }
        codes
    }

    #[inline(always)]
    fn store(&self, panel: &mut PanelMut<'_>, lane: usize, block: usize) {
        panel.set_nibbles(lane, block, self);
    }
}

impl Codes for Bytes {
    #[inline(always)]
    fn unpack(self) -> [i8; BLOCK] {
        self
    }

    #[inline(always)]
    fn store(&self, panel: &mut PanelMut<'_>, lane: usize, block: usize) {
        panel.set_codes(Code::Int8, lane, block, self);
    }
}

impl<const LOW: usize, const HIGH: usize> Codes for Planes<LOW, HIGH> {
    #[inline(always)]
    fn unpack(self) -> [i8; BLOCK] {
        self.0.map(|code| code as i8)
    }

    #[inline(always)]
    fn store(&self, panel: &mut PanelMut<'_>, lane: usize, block: usize) {
        panel.set_planes(lane, block, LOW, HIGH, &self.0);
    }
}

/// A row of a panel that is to be packed.
pub(super) struct PanelRow<'a, 'b> {
    pub(super) panel: &'a mut PanelMut<'b>,
    /// Which of the panel's rows.
    pub(super) lane: usize,
    /// Columns of the matrix.
    pub(super) columns: usize,
    /// What scales and minimums are divided by.
    pub(super) output_scale: f32,
}

/// The operations on rows of a block type. A row is given as the bytes of whole blocks.
#[derive(Debug)]
pub(super) struct Decoder {
    /// The panel layout that holds the type's numbers.
    pub(super) layout: Layout,
    /// The layout of a packed matrix, in which groups with equal scales are merged. Single matrices may be smaller.
    pub(super) merged: Layout,
    /// Weights and bytes of a block.
    #[cfg_attr(not(test), expect(dead_code, reason = "a test compares it with the table of sizes"))]
    pub(super) size: [usize; 2],
    /// Computes the values of a row.
    pub(super) decode: fn(&[u8], &mut [f32]),
    /// Packs a row. Panics when the row has fewer blocks than the panel.
    pub(super) pack: fn(&[u8], PanelRow<'_, '_>),
    /// The largest finite bound of a row's scales and minimums. `None` for types whose scales panels hold exactly.
    pub(super) bound: Option<fn(&[u8]) -> f32>,
    /// As [`Block::IS_ONE_SCALE`].
    pub(super) is_one_scale: bool,
}

impl Decoder {
    /// The decoder of quantized blocks.
    pub(super) const fn of<B: Block>() -> Decoder {
        Decoder {
            layout: B::LAYOUT,
            merged: Layout { group: B::SHARED, ..B::LAYOUT },
            size: [B::WEIGHTS, size_of::<B>()],
            decode: decode::<B>,
            pack: pack::<B>,
            bound: if <B::Groups as Groups>::Scale::IS_COMPUTED { Some(bound::<B>) } else { None },
            is_one_scale: B::IS_ONE_SCALE,
        }
    }

    /// The decoder of floats.
    pub(super) const fn float<F: Float>() -> Decoder {
        Decoder {
            layout: Layout::float(F::CODE),
            merged: Layout::float(F::CODE),
            size: [1, size_of::<F>()],
            decode: decode_floats::<F>,
            pack: pack_floats::<F>,
            bound: None,
            is_one_scale: false,
        }
    }
}

/// The blocks of a row.
fn blocks<B: Block>(row: &[u8]) -> &[B] {
    const { assert!(align_of::<B>() == 1 && B::WEIGHTS.is_multiple_of(BLOCK)) };
    bytemuck::cast_slice(&row[..row.len() / size_of::<B>() * size_of::<B>()])
}

fn decode<B: Block>(row: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<B>(row).iter().zip(out.chunks_exact_mut(B::WEIGHTS)) {
        let groups = block.groups();
        let mut groups = groups.as_slice().iter();
        for (index, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let codes = block.codes(index).unpack();
            let parts = out.chunks_exact_mut(B::LAYOUT.group).zip(codes.chunks_exact(B::LAYOUT.group));
            for ((out, codes), group) in parts.zip(&mut groups) {
                let scale = group.scale.to_f32();
                // The conversion of F16 is a call that the compiler does not drop where the result is unused.
                let min = if B::LAYOUT.min { group.min.to_f32() } else { 0.0 };
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = B::LAYOUT.weight(B::LAYOUT.code.integer(i32::from(*code)), scale, min);
                }
            }
        }
    }
}

fn pack<B: Block>(row: &[u8], PanelRow { panel, lane, output_scale, .. }: PanelRow<'_, '_>) {
    let (parts, groups) = (B::WEIGHTS / BLOCK, B::Groups::COUNT);
    let count = panel.scales.len() / groups;
    for (b, block) in blocks::<B>(row)[..count].iter().enumerate() {
        for index in 0..parts {
            block.codes(index).store(panel, lane, b * parts + index);
        }
        block.groups().to_panel(B::LAYOUT.min, output_scale, |i, scale, min| {
            panel.scales[b * groups + i][lane] = scale;
            if B::LAYOUT.min {
                panel.mins[b * groups + i][lane] = min;
            }
        });
    }
}

fn bound<B: Block>(row: &[u8]) -> f32 {
    blocks::<B>(row).iter().flat_map(Block::bounds).filter(|bound| bound.is_finite()).fold(0.0, f32::max)
}

/// A float of a file and of a panel.
pub(super) trait Float: bytemuck::Pod {
    const CODE: Code;

    /// The number in these little-endian bytes, which are exactly those of the type.
    fn read(bytes: &[u8]) -> Self;

    fn to_f32(self) -> f32;
}

macro_rules! float {
    ($type:ty, $code:expr) => {
        impl Float for $type {
            const CODE: Code = $code;

            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                bytes.try_into().map(<$type>::from_le_bytes).unwrap_or_default()
            }

            #[inline(always)]
            fn to_f32(self) -> f32 {
                self.into()
            }
        }
    };
}

float!(f32, Code::F32);
float!(f16, Code::F16);
float!(bf16, Code::BF16);

fn decode_floats<F: Float>(row: &[u8], out: &mut [f32]) {
    for (bytes, out) in row.chunks_exact(size_of::<F>()).zip(out) {
        *out = F::read(bytes).to_f32();
    }
}

fn pack_floats<F: Float>(row: &[u8], PanelRow { panel, lane, columns, .. }: PanelRow<'_, '_>) {
    let out = bytemuck::cast_slice_mut::<_, F>(panel.codes).chunks_exact_mut(PANEL);
    for (out, bytes) in out.zip(row[..columns * size_of::<F>()].chunks_exact(size_of::<F>())) {
        out[lane] = F::read(bytes);
    }
}
