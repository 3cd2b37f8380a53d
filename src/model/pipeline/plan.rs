//! The messages of a pipeline: plans of the driver, and replies of stages.
//!
//! A plan is JSON. A reply is the length of its header (U32), the header as JSON, and numbers (F32), all little-endian.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::batch::{Input, Logits};
use crate::model::state::journal::Change;

/// What all stages do in a step.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// How often the stages have lost their sessions.
    pub(super) epoch: u64,
    /// Number of plans before it in this epoch. A stage follows all of them in order.
    pub(super) number: u64,
    /// What has happened to sessions since the plan before.
    pub(super) changes: Vec<Change>,
    pub(super) inputs: Vec<PlannedInput>,
}

/// Tokens to add to a session.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlannedInput {
    pub(super) session: u64,
    /// Tokens that it holds before the step.
    pub(super) len: usize,
    pub(super) tokens: Vec<u32>,
    logits: Wanted,
    second_text: Option<usize>,
    /// Whether pages that no later query sees stay after the step, and whether the recurrent states do.
    pub(super) keeps: [bool; 2],
}

/// [`Logits`] in a message.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Wanted {
    None,
    Last,
    All,
    Hidden,
}

impl PlannedInput {
    pub(super) fn of(input: &Input<'_>, session: u64) -> PlannedInput {
        let logits = match input.logits {
            Logits::None => Wanted::None,
            Logits::Last => Wanted::Last,
            Logits::All => Wanted::All,
            Logits::Hidden => Wanted::Hidden,
        };
        let (len, keeps) = (input.session.len(), input.session.keeps());
        PlannedInput { session, len, tokens: input.tokens.to_vec(), logits, second_text: input.second_text, keeps }
    }

    pub(super) fn logits(&self) -> Logits {
        match self.logits {
            Wanted::None => Logits::None,
            Wanted::Last => Logits::Last,
            Wanted::All => Logits::All,
            Wanted::Hidden => Logits::Hidden,
        }
    }

    pub(super) fn second_text(&self) -> Option<usize> {
        self.second_text
    }
}

/// Why a stage has not computed a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Failure {
    /// It has no memory for this many bytes.
    Memory { bytes: usize, left: Option<usize> },
    /// Its sessions are not those of the driver.
    Lost(String),
}

impl Failure {
    /// The error of a step.
    pub(super) fn into_error(self) -> Error {
        match self {
            Failure::Memory { bytes, left } => Error::OutOfMemory { what: "a stage of the pipeline", bytes, left },
            Failure::Lost(cause) => Error::StageLost(cause),
        }
    }
}

/// What a stage returns.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) header: Header,
    /// Rows for the next stage, or logits.
    pub(super) numbers: Vec<f32>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) failure: Option<Failure>,
    /// `(inputs)`: the first position whose keys or values the cache of a stage does not hold.
    pub(super) overflows: Vec<Option<usize>>,
}

impl Reply {
    pub(super) fn failed(failure: Failure) -> Reply {
        Reply { header: Header { failure: Some(failure), overflows: Vec::new() }, numbers: Vec::new() }
    }

    /// The message.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // Numbers, strings and lists of them: nothing that JSON cannot hold.
        let header = serde_json::to_vec(&self.header).unwrap_or_default();
        let numbers: &[u8] = bytemuck::cast_slice(&self.numbers);
        [&(header.len() as u32).to_le_bytes()[..], &header, numbers].concat()
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`Error::StageLost`] for anything else.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Reply> {
        let malformed = || Error::StageLost(format!("a reply of {} bytes that no stage writes", bytes.len()));
        let (len, rest) = bytes.split_first_chunk().ok_or_else(malformed)?;
        let (header, numbers) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(malformed)?;
        let header = serde_json::from_slice(header).map_err(|_| malformed())?;
        if !numbers.len().is_multiple_of(size_of::<f32>()) {
            return Err(malformed());
        }
        Ok(Reply { header, numbers: bytemuck::pod_collect_to_vec(numbers) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_read_as_it_was_written() {
        for reply in [
            Reply {
                header: Header { failure: None, overflows: vec![None, Some(7)] },
                numbers: vec![1.5, f32::INFINITY],
            },
            Reply::failed(Failure::Memory { bytes: 64, left: None }),
            Reply::failed(Failure::Lost("\"gone\"".to_owned())),
        ] {
            assert_eq!(Reply::from_bytes(&reply.to_bytes()).unwrap(), reply);
        }
    }

    #[test]
    fn a_damaged_reply_is_an_error() {
        let whole = Reply { numbers: vec![1.0], ..Reply::default() }.to_bytes();
        for len in (0..whole.len()).filter(|len| *len != whole.len() - size_of::<f32>()) {
            assert!(matches!(Reply::from_bytes(&whole[..len]), Err(Error::StageLost(_))), "{len} bytes");
        }
    }
}
