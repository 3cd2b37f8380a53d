//! A sampler together with the constraint that its tokens must follow.

use std::ops::Range;

use super::constraint::{Allowed, Constraint};
use super::sampler::{Process, Sampled, Sampler};
use crate::error::Result;

/// Samples tokens, only those that its constraint allows if it has one.
#[derive(Debug)]
pub(super) struct ConstrainedSampler {
    sampler: Sampler,
    constraint: Option<Constraint>,
    /// The tokens allowed next, once they are known.
    allowed: Option<Result<Allowed>>,
}

impl ConstrainedSampler {
    pub(super) fn new(sampler: Sampler) -> ConstrainedSampler {
        ConstrainedSampler { sampler, constraint: None, allowed: None }
    }

    /// Never samples ids in these ranges.
    pub(super) fn exclude(&mut self, ids: Vec<Range<u32>>) {
        self.sampler.exclude(ids);
    }

    /// Sets the tokens that end a completion, which `min_tokens` concerns.
    pub(super) fn set_ends(&mut self, ends: &[u32]) {
        self.sampler.set_ends(ends);
    }

    /// Sets the tokens that end a completion and are never sampled, unless nothing else is allowed.
    pub(super) fn ignore(&mut self, ends: &[u32]) {
        self.sampler.ignore(ends);
    }

    /// Allows only tokens that follow `constraint` from now on.
    #[cfg(feature = "grammar")]
    pub(super) fn constrain(&mut self, constraint: Constraint) {
        (self.constraint, self.allowed) = (Some(constraint), None);
    }

    /// The constraint, if there is one.
    pub(super) fn constraint(&self) -> Option<&Constraint> {
        self.constraint.as_ref()
    }

    /// The sampler without its constraint, for a beam search, which has none.
    pub(super) fn unconstrained_mut(&mut self) -> &mut Sampler {
        &mut self.sampler
    }

    /// The sampler without its constraint.
    pub(super) fn unconstrained(&self) -> &Sampler {
        &self.sampler
    }

    /// Adds a token to the history that the penalties use.
    pub(super) fn accept(&mut self, token: u32) {
        self.sampler.accept(token);
    }

    /// Samples the next token, after `process` has changed the logits, and adds it to the history.
    pub(super) fn sample(&mut self, logits: &mut [f32], process: Option<Process<'_>>) -> Result<Sampled> {
        let sampled = match &mut self.constraint {
            None => self.sampler.sample_allowed(logits, None, process)?,
            Some(constraint) => {
                let allowed = self.allowed.take().unwrap_or_else(|| constraint.allowed())?;
                let sampled = self.sampler.sample_allowed(logits, Some(&allowed), process)?;
                constraint.accept(sampled.token)?;
                sampled
            }
        };
        self.sampler.accept(sampled.token);
        Ok(sampled)
    }

    /// Finds the tokens allowed next. They are known already if the step before was interrupted.
    fn find_allowed(&mut self) {
        if let (Some(constraint), None) = (&mut self.constraint, &self.allowed) {
            self.allowed = Some(constraint.allowed());
        }
    }
}

/// Runs `compute` while another thread finds the tokens that each constraint allows next.
pub(super) fn compute_and_find_allowed<T>(
    mut samplers: Vec<&mut ConstrainedSampler>,
    compute: impl FnOnce() -> T,
) -> T {
    samplers.retain(|sampler| sampler.constraint.is_some());
    if samplers.is_empty() {
        return compute();
    }
    std::thread::scope(|scope| {
        let find = || samplers.into_iter().for_each(ConstrainedSampler::find_allowed);
        // If the system refuses a thread, sampling finds them later.
        let _ = std::thread::Builder::new().spawn_scoped(scope, find);
        compute()
    })
}
