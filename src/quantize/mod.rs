//! Quantization: from a full-precision checkpoint to a GGUF file with linear layers in about 4 bits.
//!
//! [`quantize`] passes a checkpoint through one [`Recipe`]. [`auto()`] tries recipes until one meets a [`Target`].
//! [`TensorFormats::spend_bits`] gives sensitive layers more bits. [`eval`] measures perplexity and the divergence from a reference.
//!
//! ```no_run
//! use nybble::quantize::{Format, QuantizeOptions, Recipe, RunContext, TensorFormats, quantize};
//!
//! // Token ids of a text, in windows that the model sees one by one.
//! let windows = vec![vec![1, 504, 3575, 282]];
//! let formats = TensorFormats::new(Format::Q4_0).with_group(128);
//! let options = QuantizeOptions::new(Recipe::by_name("gptq")?, formats);
//! let report = quantize(&RunContext::new("model".as_ref(), "model.gguf".as_ref(), &windows), &options)?;
//! println!("{:.2} bits per weight", report.bits_per_weight());
//! # Ok::<(), nybble::Error>(())
//! ```
//!
//! A recipe receives one linear layer at a time, as a `LayerProblem`: its weights and the second moments of its inputs. It returns a
//! `Solution`: codes and scales of a plain block format.

mod auto;
mod bits;
mod calibration;
mod compute;
mod context;
pub mod eval;
mod expert_choice;
mod format;
mod importance;
mod layer;
mod overrides;
mod pipeline;
mod pruning;
mod recipes;
mod resume;
mod sparsity;
mod tuning;

#[doc(hidden)]
pub use auto::Outcome;
pub use auto::{AutoOptions, AutoReport, Figures, Target, auto};
#[doc(hidden)]
pub use bits::{choose_formats, write_importance};
#[doc(hidden)]
pub use context::remove_leftovers;
pub use context::{Interrupted, RunContext, StageProgress};
pub use format::Format;
#[doc(hidden)]
pub use format::GroupedFormat;
pub use importance::Importance;
#[doc(hidden)]
pub use overrides::Stored;
pub use overrides::TensorFormats;
#[doc(hidden)]
pub use pipeline::ExpertCounts;
pub use pipeline::{QuantizeOptions, Report, TensorReport, quantize};
#[doc(hidden)]
pub use pruning::Pruning;
pub use recipes::Recipe;
#[doc(hidden)]
pub use recipes::{GptqOptions, SignroundOptions};
#[doc(hidden)]
pub use sparsity::Sparsity;
pub use tuning::TuningOptions;
