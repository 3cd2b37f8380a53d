//! The automatic INT4 flow: from a full-precision checkpoint to 4-bit blocks that keep the model's function.
//!
//! Every recipe sees one linear layer at a time as a [`Problem`](problem::Problem): its weights and the second moments of its
//! inputs. It returns a [`Solution`](problem::Solution): codes and scales that are a plain block format of GGUF files.
//! [`quantize`] takes a whole checkpoint through a recipe.

mod calibrate;
pub mod compute;
mod flow;
pub mod gptq;
mod journal;
mod overlay;
mod policy;
pub mod problem;
mod report;
pub mod refine;
pub mod rtn;
pub mod signround;
mod stream;

pub use flow::{Options, Progress, Recipe, quantize};
pub use policy::{Policy, Stored};
pub use report::{Report, TensorReport};
