//! Block types as files hold them, and the packed layouts that kernels read.

pub mod block;
mod blocks256;
mod blocks32;
mod codebooks;
mod decoder;
mod encode;
mod few_bits;
mod grids;
mod layout;
pub(crate) mod other_types;
#[doc(hidden)]
pub mod pack;
#[doc(hidden)]
pub mod packed;
mod panel;
pub(crate) mod scale_range;

#[doc(hidden)]
pub use pack::Rows;
