//! Steps between their beginning and their end.

use std::time::Instant;

use crate::model::Ticket;

/// A step that is begun.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) number: u64,
    /// `None` where the results are there.
    pub(super) ticket: Option<Ticket>,
    pub(super) members: Vec<Member>,
    pub(super) started: Instant,
    /// Rows of sequences that decode, and of prompts.
    pub(super) decoding: usize,
    pub(super) prompt_rows: usize,
    /// Tokens of prompts, without those that are computed again.
    pub(super) prompt_tokens: usize,
}

/// A sequence of a step.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: u64,
    pub(super) inputs: usize,
    /// Rows of logits.
    pub(super) rows: usize,
}
