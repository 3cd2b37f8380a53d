//! A model over several processes or machines: a pipeline of stages, each with some of the layers.
//!
//! The driver has the tokens and the sampler, and no weights. For each step it makes a plan, which all stages get; the rows go from
//! each stage to the next, and the last one returns logits. The sessions of the driver have no memory. Those of the stages have the
//! keys, values and states of their layers, and repeat what happens to the driver's: see `state/journal.rs`.
//!
//! | module | contents |
//! | --- | --- |
//! | `held` | which part of a model a process holds |
//! | `handover` | the rows that a stage hands to the next one |
//! | `plan` | what the driver sends, and what stages return |
//! | `cuts` | where a model can be divided, and where to |
//! | `stage` | a stage: follows plans |
//! | `remote`, `driver` | the driver: sends plans, and keeps its sessions and those of the stages together |

pub(super) mod cuts;
mod driver;
pub(super) mod handover;
pub(super) mod held;
mod plan;
pub(super) mod remote;
mod stage;

pub use cuts::Cuts;
pub(crate) use driver::Ticket;
pub use remote::Stages;
pub use stage::Stage;
