//! Quantization: from a full-precision checkpoint to a GGUF file with linear layers in about 4 bits.
//!
//! [`quantize`] passes a checkpoint through one [`Recipe`]. [`auto()`] tries recipes until one meets a [`Target`]. [`spend_bits`]
//! gives sensitive layers more bits. [`eval`] measures perplexity and the divergence from a reference.
//!
//! A recipe receives one linear layer at a time, as a `LayerProblem`: its weights and the second moments of its inputs. It returns a
//! `Solution`: codes and scales of a plain block format.

mod auto;
mod bits;
mod calibration;
mod compute;
mod context;
pub mod eval;
mod format;
mod importance;
mod layer;
mod overrides;
mod pipeline;
mod recipes;
mod resume;
mod tuning;

pub use auto::{AutoOptions, AutoReport, Figures, Outcome, Target, auto};
pub use bits::{choose_formats, spend_bits, write_importance};
pub use context::{Interrupted, RunContext, StageProgress};
pub use format::{Format, GroupedFormat};
pub use importance::Importance;
pub use overrides::{Stored, TensorFormats};
pub use pipeline::{ExpertCounts, QuantizeOptions, Report, TensorReport, quantize};
pub use recipes::{GptqOptions, Recipe, SignroundOptions};
pub use tuning::TuningOptions;
