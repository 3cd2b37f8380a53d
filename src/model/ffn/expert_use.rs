//! What a model's passes have chosen of its experts.

/// What the passes of a model have chosen of its experts so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertUse {
    /// Experts that passes needed: each counts once per layer and pass. 0 where all are in memory.
    pub needed: u64,
    /// Experts of these that were read from the file.
    pub read: u64,
    /// For each layer with experts: how many of those that tokens chose have a weight of 0, 1, 2, ... hundredths of the token's largest
    /// one, rounded down, and last how many have the largest. Empty unless `expert_skip` is an option of the model.
    pub weight_shares: Vec<Vec<u64>>,
    /// For each layer with experts: how many tokens chose each expert, also where it was left out. Empty unless `expert_skip` is an option
    /// of the model.
    pub chosen: Vec<Vec<u64>>,
}
