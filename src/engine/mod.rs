//! Sequences of many users over one model: what is fed, what is sampled.
//!
//! [`step`] feeds the sequences that it is given. A [`Scheduler`] keeps many, and decides who goes into a step and with how
//! many tokens.

pub mod constraint;
mod pace;
mod prefix;
pub mod sampler;
mod scheduler;
mod sequence;
mod speculation;

pub use scheduler::{Event, Scheduler, SchedulerOptions, Stats};
pub use sequence::{Sequence, step};
pub use speculation::Speculation;
