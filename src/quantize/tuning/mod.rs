//! Tuning after a recipe: the scales of groups and the weights of norms are trained by gradient descent on the mean
//! Kullback-Leibler divergence from the full-precision model, through the whole model (as in the second phase of
//! EfficientQAT, Chen et al. 2024, arXiv 2407.11062, and of QuIP#'s fine-tuning, Tseng et al. 2024, arXiv 2402.04396; the
//! optimizer is Adam, Kingma and Ba 2014, arXiv 1412.6980).
//!
//! A recipe keeps the output of one layer at a time; tuning lets the errors of different layers cancel. Codes do not change, so
//! the file keeps its size and format. Only models of plain decoder blocks are supported: Llama, Mistral, Qwen2 and models
//! built like them.

mod adam;
mod backprop;
mod head;
mod options;
mod supported;
mod targets;
mod tune;
mod weights;

pub use options::TuningOptions;
pub(super) use supported::supports;
pub(super) use tune::tune;
pub(super) use weights::tuned;
