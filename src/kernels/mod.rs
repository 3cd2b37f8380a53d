//! Kernels: a table of functions for each instruction set. SIMD intrinsics occur only here.
//!
//! The scalar kernel defines what every operation computes. The other sets compute the same bits: each output is summed
//! over its inputs in one fixed order with fused multiply-add, integer products cannot overflow or saturate, and
//! everything else is the same source code (`generic/`), compiled for the set's registers.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
mod available;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
pub(crate) mod cache;
pub(crate) mod cpu;
mod generic;
mod kv;
mod limits;
#[cfg(target_arch = "aarch64")]
mod neon;
mod operations;
mod quantize;
mod scalar;
pub(crate) mod tuning;

#[doc(hidden)]
pub use activations::{Activations, MAX_TILE_ROWS, RowMut, Tile};
pub use available::available;
#[doc(hidden)]
pub use generic::math::Activation;
pub(crate) use generic::math::exp;
#[doc(hidden)]
pub use kv::{
    INT8_GROUP, Int8Queries, Int8ScoreInputs, Int8WeightedValues, Int8Weights, KvSlice, PAGE, ScoreInputs,
    SelectiveStep, Softmax, SoftmaxMut, StateUpdate, WeightedValues, WkvStep,
};
#[doc(hidden)]
pub use limits::{Limits, limits};
pub use operations::Kernel;
#[doc(hidden)]
pub use tuning::{Choice, choices};

use crate::error::{Error, Result};

/// The fastest kernel that this CPU can run: the first of [`available()`], whose products other kernels compute where loading a
/// model measured that they are faster.
pub fn best() -> &'static Kernel {
    tuning::kernel().unwrap_or_else(|| available()[0])
}

/// The kernel called `name`.
///
/// # Errors
/// [`Error::UnknownKernel`] with the available names.
pub fn by_name(name: &str) -> Result<&'static Kernel> {
    let kernels = available();
    kernels.iter().copied().find(|kernel| kernel.name() == name).ok_or_else(|| Error::UnknownKernel {
        name: name.to_owned(),
        available: kernels.iter().map(|kernel| kernel.name()).collect(),
    })
}

/// The kernel called `name`; without a name the one in the environment variable `NYBBLE_KERNEL`, otherwise the best.
///
/// # Errors
/// [`Error::UnknownKernel`] with the available names.
pub fn choose(name: Option<&str>) -> Result<&'static Kernel> {
    match name {
        Some(name) => by_name(name),
        None => match std::env::var("NYBBLE_KERNEL") {
            Ok(name) if !name.is_empty() => by_name(&name),
            Err(std::env::VarError::NotUnicode(name)) => by_name(&name.to_string_lossy()),
            _ => Ok(best()),
        },
    }
}
