//! The only place with SIMD intrinsics: one folder an instruction set, all behind one trait.
//!
//! The scalar kernel defines what every operation computes, to the bit. The other sets compute the same bits because each
//! output is summed over its inputs in one fixed order with fused multiply-add, integer products cannot overflow or
//! saturate, and everything elementwise is the same source code (`portable.rs`) compiled for the set's registers.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "x86_64")]
mod delegate;
mod kv;
mod limits;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod scalar;

use std::fmt;
use std::ops::Range;

use half::f16;

pub use activations::{Activations, MAX_TILE_ROWS, RowMut, Tile};
pub use kv::{KvSlice, Softmax, SoftmaxMut};
pub use limits::{Limits, limits};
pub use portable::Activation;

use crate::error::{Error, Result};
use crate::quant::packed::Packed;
use crate::threads::Columns;

/// Positions in a page of the key/value cache: four panels of 16 keys.
pub const PAGE: usize = 64;

/// What a forward pass computes, for one instruction set.
///
/// Holding an implementation proves that the CPU has the instructions: the witness types have no other constructor than
/// a run-time check. Every implementation returns the same bits as the scalar one.
pub trait Kernel: Send + Sync + fmt::Debug {
    /// The name by which users choose the kernel.
    fn name(&self) -> &'static str;

    /// Quantizes a row of activations to INT8, a scale every 32 values: `scale = max|x| / 127`, ties to even.
    fn quantize(&self, x: &[f32], out: RowMut<'_>);

    /// `out = x * panels(w)^T`: an integer layout with quantized activations `(rows, columns)`.
    ///
    /// `out` has `x.rows()` rows and the columns of these panels, `16 * panels.start ..` up to at most `w.rows()`.
    /// Over the blocks of a row (or their halves, for groups of 16) in order:
    /// `acc = fma(integer dot, weight scale * activation scale, acc)`, then, with minimums,
    /// `acc = fma(min, activation scale * sum of codes, acc)`. Where a group has several blocks, over its blocks
    /// `part = fma(integer dot, activation scale, part)`, then `acc = fma(part, weight scale, acc)`, then the minimums.
    fn product(&self, w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>);

    /// `out = x * panels(w)^T`: a float layout with F32 activations, row `r` at `x[r * stride ..]`.
    ///
    /// Over the columns in order: `acc = fma(w, x, acc)`.
    fn product_float(&self, w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>);

    /// Dot products of `queries (n, head_dim)` with a page of keys `(PAGE / 16, head_dim, 16)` into
    /// `scores[i * stride ..][.. PAGE]`, times the scale of the position. Over `head_dim` in order with fused multiply-add.
    fn scores(
        &self,
        queries: &[f32],
        head_dim: usize,
        keys: KvSlice<'_>,
        scales: &[f32; PAGE],
        scores: &mut [f32],
        stride: usize,
    );

    /// Adds to `out (n, width)` the rows `values (PAGE, width)` of the positions `ranges[i]`, weighted by
    /// `weights[i * stride ..]`, in order with fused multiply-add. `width` is a multiple of 16.
    fn weighted_sum(
        &self,
        weights: &[f32],
        stride: usize,
        ranges: &[Range<usize>],
        values: KvSlice<'_>,
        width: usize,
        out: &mut [f32],
    );

    /// The numbers in single precision.
    fn widen(&self, numbers: KvSlice<'_>, out: &mut [f32]);

    /// Replaces scores by `exp(score - max)` and returns `(max, sum)`. Minus infinity counts as absent.
    fn exp_segment(&self, scores: &mut [f32]) -> (f32, f32);

    /// Joins softmax sums over `more` positions to those so far: with the larger maximum `m` of a query, both are multiplied
    /// with `exp(max - m)` and added.
    fn join(&self, so_far: SoftmaxMut<'_>, more: Softmax<'_>);

    /// `x *= y`, elementwise.
    fn multiply(&self, x: &mut [f32], y: &[f32]);

    /// `scores[i] -= slope * (distance - i)`: a bias by the distance to the keys, `distance` being that to the first.
    fn add_slope(&self, scores: &mut [f32], slope: f32, distance: f32);

    /// Quantizes numbers to INT8 with one scale for all, which it returns: `max|x| / 127`, ties to even. Where that is not
    /// finite the codes are unspecified.
    fn to_int8(&self, x: &[f32], codes: &mut [i8]) -> f32;

    /// `out = x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);

    /// `out = (x - mean) / sqrt(variance + eps) * weight + bias`; no bias where it is empty.
    fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]);

    /// `x += scale * y`, elementwise.
    fn add_scaled(&self, x: &mut [f32], y: &[f32], scale: f32);

    /// `x = activation(x)`, elementwise.
    fn activate(&self, activation: Activation, x: &mut [f32]);

    /// `gate = activation(gate) * up`, elementwise.
    fn gate(&self, activation: Activation, gate: &mut [f32], up: &[f32]);

    /// Rotates the pairs `(x[i], x[i + n])` with `n = cos.len()`: `(x0 cos - x1 sin, x1 cos + x0 sin)`.
    fn rope(&self, x: &mut [f32], cos: &[f32], sin: &[f32]);

    /// `x = cap * tanh(x / cap)`, elementwise.
    fn soft_cap(&self, x: &mut [f32], cap: f32);

    /// Converts to half precision, round to nearest even.
    fn to_f16(&self, x: &[f32], out: &mut [f16]);

    /// Sum of a buffer read as `u64`: measures read bandwidth.
    fn read_sum(&self, data: &[u64]) -> u64;

    /// Runs `rounds` rounds of independent integer dot products in registers and returns the number of operations
    /// (a multiply and an add are two) and a checksum: measures the peak INT8 rate.
    fn peak_int8(&self, rounds: usize) -> (u64, i32);
}

/// The kernels that this CPU can run, best first. Never empty: `scalar` is always there.
pub fn available() -> Vec<&'static dyn Kernel> {
    let mut kernels: Vec<&'static dyn Kernel> = vec![];
    #[cfg(target_arch = "x86_64")]
    {
        kernels.extend(avx512::Avx512::detect().map(|k| k as &dyn Kernel));
        kernels.extend(avxvnni::AvxVnni::detect().map(|k| k as &dyn Kernel));
        kernels.extend(avx2::Avx2::detect().map(|k| k as &dyn Kernel));
        // Behind the others until a CPU with AMX has run its tests, so that nobody gets it who does not ask for it.
        kernels.extend(amx::Amx::detect().map(|k| k as &dyn Kernel));
    }
    #[cfg(target_arch = "aarch64")]
    kernels.extend(neon::Neon::detect().map(|k| k as &dyn Kernel));
    kernels.push(&scalar::Scalar);
    kernels
}

/// The fastest kernel that this CPU can run.
pub fn best() -> &'static dyn Kernel {
    available().first().copied().unwrap_or(&scalar::Scalar)
}

/// The kernel of that name.
///
/// # Errors
/// [`Error::UnknownKernel`] with the available names.
pub fn by_name(name: &str) -> Result<&'static dyn Kernel> {
    let kernels = available();
    kernels.iter().copied().find(|kernel| kernel.name() == name).ok_or_else(|| Error::UnknownKernel {
        name: name.to_owned(),
        available: kernels.iter().map(|kernel| kernel.name()).collect(),
    })
}

/// The kernel asked for, else the one that `NYBBLE_KERNEL` names, else the best.
///
/// # Errors
/// [`Error::UnknownKernel`] with the available names.
pub fn choose(name: Option<&str>) -> Result<&'static dyn Kernel> {
    match name {
        Some(name) => by_name(name),
        None => match std::env::var("NYBBLE_KERNEL") {
            Ok(name) if !name.is_empty() => by_name(&name),
            Err(std::env::VarError::NotUnicode(name)) => by_name(&name.to_string_lossy()),
            _ => Ok(best()),
        },
    }
}

/// `exp(x)` with the bits that every kernel computes.
pub(crate) fn exp(x: f32) -> f32 {
    portable::exp(x)
}
