//! Stands in for constraints in a build without the feature `grammar`: types without values, so a sampler never has one.

use crate::error::Result;

/// A set of allowed tokens.
#[derive(Debug)]
pub(super) enum Allowed {}

impl Allowed {
    pub(super) fn apply(&self, _logits: &mut [f32]) {
        match *self {}
    }
}

/// A constraint.
#[derive(Debug)]
pub(super) enum Constraint {}

impl Constraint {
    pub(super) fn allowed(&mut self) -> Result<Allowed> {
        match *self {}
    }

    pub(super) fn accept(&mut self, _token: u32) -> Result<()> {
        match *self {}
    }

    pub(super) fn draft(&self, _count: usize, _lookup: impl FnOnce(&[u32]) -> Vec<u32>) -> Vec<u32> {
        match *self {}
    }
}
