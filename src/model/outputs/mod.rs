//! What the hidden states of a document become: one vector, or a score for each label of a classifier.

pub(super) mod embedding;
pub(super) mod heads;
