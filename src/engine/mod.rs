//! Generation for many sequences over one model: prefill, decode, sampling.
//!
//! [`step`] computes one token for each sequence it is given. A [`Scheduler`] keeps sequences and decides which of them
//! join a step and with how many tokens.

mod beams;
mod constrained_sampler;
#[cfg(feature = "grammar")]
pub mod constraint;
mod disk_cache;
#[cfg(not(feature = "grammar"))]
mod no_constraint;
mod prefill_budget;
mod prefix;
mod processor;
pub mod sampler;
mod scheduler;
mod sequence;
mod speculation;

#[cfg(not(feature = "grammar"))]
use no_constraint as constraint;

pub use scheduler::{Event, Scheduler, SchedulerOptions, Stats};
pub use sequence::{Sequence, step};
pub use speculation::Speculation;
