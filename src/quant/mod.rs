//! Block types as files hold them, and the packed layouts that kernels read.

pub mod block;
mod blocks256;
mod blocks32;
mod decoder;
mod encode;
mod layout;
pub mod pack;
pub mod packed;
mod panel;
pub(crate) mod scale_range;
