//! Recipes: methods that choose the codes and scales of one linear layer.

pub(super) mod awq;
pub(super) mod exact;
#[cfg(test)]
pub(super) mod fixtures;
pub(super) mod gptq;
mod norm_scaling;
pub(super) mod prune;
#[cfg(test)]
mod pruning_tests;
mod recipe;
mod refine;
pub(super) mod rtn;
mod signround;

pub use gptq::GptqOptions;
pub(super) use norm_scaling::NormScaling;
pub use recipe::Recipe;
pub use signround::SignroundOptions;
