//! Qwen 2 and 3, dense and with experts.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Quirks, Residual, family};
use crate::kernels::Activation::Silu;
use NormKind::Rms;
use Position::Rope;
use Residual::Sequential;

pub(super) const FAMILIES: &[Family] = &[
    // Yang et al. 2024, arXiv 2407.10671; also Qwen 2.5.
    family("qwen2", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("qwen2moe", Rms, Sequential, Rope, Silu, Quirks { normalized_experts: false, ..DEFAULT_QUIRKS }),
    // Yang et al. 2025, arXiv 2505.09388.
    family("qwen3", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    family("qwen3moe", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
];
