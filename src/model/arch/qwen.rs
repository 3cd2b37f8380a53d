//! Qwen 2 and 3, dense and with experts.

use super::family::{DEFAULT_QUIRKS, Family, Quirks, family};

pub(super) const FAMILIES: &[Family] = &[
    // Yang et al. 2024, arXiv 2407.10671; also Qwen 2.5.
    family("qwen2"),
    family("qwen2moe").quirks(Quirks { normalized_experts: false, ..DEFAULT_QUIRKS }),
    // Yang et al. 2025, arXiv 2505.09388.
    family("qwen3"),
    family("qwen3moe"),
];
