//! Numbers: block types as files hold them, and the packed layouts that kernels read.

pub mod block;
mod blocks256;
mod blocks32;
pub mod pack;
pub mod packed;
