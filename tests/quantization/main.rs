//! Quantization: recipes, tuning and evaluation.

#[path = "../common/tiny_model.rs"]
mod tiny_model;

mod evaluation;
mod recipes;
mod sources;
mod tuning;
