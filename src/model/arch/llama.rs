//! Llama and its closest relatives.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Quirks, Residual, family};
use crate::kernels::Activation::Silu;
use NormKind::{Layer, Rms};
use Position::{Rope, RopeAdjacent};
use Residual::Sequential;

pub(super) const FAMILIES: &[Family] = &[
    // Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; also Mistral, Mixtral, SmolLM, TinyLlama, Yi.
    family("llama", Rms, Sequential, RopeAdjacent, Silu, DEFAULT_QUIRKS),
    // Stability AI 2024, arXiv 2402.17834.
    family("stablelm", Layer, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    // Team OLMo 2024, arXiv 2501.00656.
    family("olmo2", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    // IBM Granite 3.
    family("granite", Rms, Sequential, RopeAdjacent, Silu, Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    family("smollm3", Rms, Sequential, RopeAdjacent, Silu, Quirks { unrotated_period: 4, ..DEFAULT_QUIRKS }),
];
