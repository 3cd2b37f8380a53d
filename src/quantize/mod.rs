//! The automatic INT4 flow: from a full-precision checkpoint to 4-bit blocks that keep the model's function.
//!
//! Every recipe sees one linear layer at a time as a [`Problem`](problem::Problem): its weights and the second moments of its
//! inputs. It returns a [`Solution`](problem::Solution): codes and scales that are a plain block format of GGUF files.
//! [`quantize`] takes a whole checkpoint through a recipe.

pub mod allocate;
mod auto;
pub mod awq;
mod calibrate;
pub mod compute;
mod decoder;
pub mod eval;
mod flow;
mod fold;
pub mod gptq;
mod journal;
mod learned;
mod overlay;
mod policy;
pub mod problem;
pub mod refine;
mod report;
pub mod rtn;
mod saved;
pub mod search;
mod sensitivity;
pub mod signround;
mod stream;
pub mod tune;

pub use auto::{AutoOptions, AutoReport, auto, spend_bits};
pub use flow::{Options, Progress, Recipe, quantize};
pub use policy::{Policy, Stored};
pub use report::{Report, TensorReport};
