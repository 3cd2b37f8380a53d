//! The engine: scheduler, sampler, constraints and thread pool.

#[path = "../common/tiny_model.rs"]
mod tiny_model;

#[cfg(feature = "grammar")]
mod constraint;
mod ends;
mod examples;
mod jobs;
mod recurrent;
mod sampler;
mod scheduler;
mod sequences;
mod threads;
mod windows;
