//! The options of tuning.

/// How scales and norms are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TuningOptions {
    /// Passes over the calibration text.
    pub rounds: usize,
    /// Windows per step.
    pub batch: usize,
    /// Length of the first full step, as a share of a scale or weight. Later steps are shorter.
    pub rate: f32,
    /// Seed of the order in which windows are used.
    pub seed: u64,
}

impl Default for TuningOptions {
    fn default() -> Self {
        TuningOptions { rounds: 1, batch: 4, rate: 1e-3, seed: 0 }
    }
}

setters!(TuningOptions { with_rounds(rounds: usize), with_batch(batch: usize), with_rate(rate: f32), with_seed(seed: u64) });
