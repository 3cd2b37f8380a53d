//! Numbers: block types as files hold them, and the packed layouts that kernels read.

pub mod packed;
