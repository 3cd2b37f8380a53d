//! Sequences of many users over one model: what is fed, what is sampled.

pub mod constraint;
pub mod sampler;
mod sequence;

pub use sequence::{Sequence, step};
