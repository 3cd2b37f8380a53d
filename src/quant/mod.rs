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
pub mod pack;
pub mod packed;
mod panel;
