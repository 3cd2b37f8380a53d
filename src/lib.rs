//! nybble runs language models on CPUs from 4-bit weights.
//!
//! [`model::Model`] loads a checkpoint and computes logits for token ids. [`engine::Sequence`] and [`engine::step`] sample from
//! them; [`engine::Scheduler`] batches many sequences. [`quantize::quantize`] writes 4-bit files. Results are bit-identical
//! across thread counts, batch sizes, prompt chunks and CPUs.
//!
//! | module | contents |
//! | --- | --- |
//! | [`model`] | loading, sessions, the forward pass, conversion to GGUF |
//! | [`engine`] | sampling, constraints, continuous batching, speculation |
//! | [`quantize`] | recipes, the pipeline, evaluation |
//! | [`format`](mod@format) | GGUF and safetensors, reading and writing |
//! | [`kernels`] | instruction sets, and the limits of this machine |
//! | [`quant`] | block types and packed layouts |
//! | [`threads`] | the thread pool |
//! | [`vocab`] | SentencePiece vocabularies |
//! | [`error`] | [`Error`], [`Place`] and [`Result`] |

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
pub mod tokenizer;

pub use error::{Error, Place, Result};

// Compiles the examples of the README with those of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
