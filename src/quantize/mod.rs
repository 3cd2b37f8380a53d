//! From a full-precision checkpoint to a 4-bit one, and what that cost.

pub mod eval;
