//! What generic code needs of an instruction set: 16 floats at a time.

use bytemuck::Pod;
use half::{bf16, f16};

use crate::quant::packed::PANEL;

/// An instruction set that computes with [`PANEL`] F32 at a time, in as many registers as they take.
///
/// A value of the type proves that the CPU has the instructions, so its methods are safe to call. They and everything
/// generic over them are `#[inline(always)]`: a set's `#[target_feature]` functions take them in, and only there does the
/// compiler turn them into the set's instructions.
pub(in crate::kernels) trait Vector: Copy {
    /// [`PANEL`] F32.
    type F32s: Copy;

    /// How many [`F32s`](Self::F32s) fit into the registers. Tile sizes follow from it.
    const CAPACITY: usize;

    /// All the same value.
    fn splat(self, x: f32) -> Self::F32s;
    fn load(self, x: &[f32; PANEL]) -> Self::F32s;
    fn load_f16(self, x: &[f16; PANEL]) -> Self::F32s;
    fn load_bf16(self, x: &[bf16; PANEL]) -> Self::F32s;
    fn load_i8(self, x: &[i8; PANEL]) -> Self::F32s;
    fn store(self, x: Self::F32s, out: &mut [f32; PANEL]);
    /// Rounds to nearest even.
    fn store_f16(self, x: Self::F32s, out: &mut [f16; PANEL]);
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s;

    /// Prefetches the cache line in which `x` begins, where the set has an instruction for it.
    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}

    /// Stores as many values as `out` holds, at most [`PANEL`]: the last panel of a matrix may have fewer rows.
    #[inline(always)]
    fn store_partial(self, x: Self::F32s, out: &mut [f32]) {
        match out.first_chunk_mut() {
            Some(out) => self.store(x, out),
            None => {
                let mut lanes = [0.0; PANEL];
                self.store(x, &mut lanes);
                out.copy_from_slice(&lanes[..out.len()]);
            }
        }
    }
}

/// A type of number that a [`Vector`] loads as F32.
pub(super) trait Number: Pod {
    fn load<V: Vector>(v: V, x: &[Self; PANEL]) -> V::F32s;
}

impl Number for f32 {
    #[inline(always)]
    fn load<V: Vector>(v: V, x: &[Self; PANEL]) -> V::F32s {
        v.load(x)
    }
}

impl Number for f16 {
    #[inline(always)]
    fn load<V: Vector>(v: V, x: &[Self; PANEL]) -> V::F32s {
        v.load_f16(x)
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn load<V: Vector>(v: V, x: &[Self; PANEL]) -> V::F32s {
        v.load_bf16(x)
    }
}

impl Number for i8 {
    #[inline(always)]
    fn load<V: Vector>(v: V, x: &[Self; PANEL]) -> V::F32s {
        v.load_i8(x)
    }
}

/// `N` rows of `length` values, `stride` apart.
#[inline(always)]
pub(super) fn rows<const N: usize, T>(x: &[T], stride: usize, length: usize) -> [&[T]; N] {
    std::array::from_fn(|i| &x[i * stride..][..length])
}
