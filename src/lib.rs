//! nybble runs language models on CPUs from 4-bit weights.

pub mod engine;
pub mod error;
pub mod format;
pub mod kernels;
pub mod model;
#[cfg(feature = "python")]
mod python;
pub mod quant;
pub mod quantize;
mod system;
pub mod threads;
pub mod vocab;

pub use error::{Error, Place, Result};

// Compiles the examples of the README with those of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
