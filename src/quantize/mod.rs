//! The automatic INT4 flow: from a full-precision checkpoint to 4-bit blocks that keep the model's function.
//!
//! Every recipe sees one linear layer at a time as a [`Problem`](problem::Problem): its weights and the second moments of its
//! inputs. It returns a [`Solution`](problem::Solution): codes and scales that are a plain block format of GGUF files.

pub mod compute;
pub mod gptq;
pub mod problem;
pub mod refine;
pub mod rtn;
pub mod signround;
