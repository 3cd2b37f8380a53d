//! The engine: scheduler, sampler, constraints and thread pool.

#[path = "../common/tiny_model.rs"]
mod tiny_model;

mod constraint;
mod sampler;
mod scheduler;
mod threads;
