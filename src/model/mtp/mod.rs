//! Heads for multi-token prediction (MTP): a layer behind the last that drafts further tokens.
//!
//! The head reads pairs: the model's state at a position and the embedding of the next token. From the pair of position `i`, the
//! state at `i - 1` and token `i`, it drafts token `i + 1`. A further draft token reads the head's own output instead of a state of the
//! model. Draft tokens never change a result: the model checks each of them.
//!
//! `head` has the weights, and `forward` turns pairs into keys and values, and into draft tokens. What a session keeps for its head is
//! in `state/head.rs`.

mod forward;
pub(super) mod head;

pub(crate) use forward::HeadDraft;
