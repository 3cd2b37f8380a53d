//! The engine: scheduler, sampler, constraints and thread pool.

#[path = "../common/mtp.rs"]
mod mtp_goldens;
#[path = "../common/stages.rs"]
mod stages;
#[path = "../common/tiny_model.rs"]
mod tiny_model;

mod adapters;
mod beams;
#[cfg(feature = "grammar")]
mod constraint;
#[cfg(unix)]
mod disk_cache;
mod ends;
mod examples;
mod filters;
mod jobs;
mod mtp;
mod pipeline;
mod recurrent;
mod sampler;
mod scheduler;
mod sequences;
mod threads;
mod windows;
