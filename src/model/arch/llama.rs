//! Llama and its closest relatives.

use super::family::{DEFAULT_QUIRKS, Family, Gating, NormKind, Position, Quirks, Rotated, Temperature, family};
use crate::kernels::Activation::Relu2;
use NormKind::Layer;
use Position::RopeAdjacent;

/// Chunks instead of windows in three of four layers, and queries that grow in the fourth.
const LLAMA_4: Quirks = Quirks {
    window_period: 4,
    chunk: Some(8192),
    rotated: Rotated::AllBut(4),
    temperature: Some(Temperature { scale: 0.1, length: 8192.0, offset: 1.0 }),
    norms_after_rotation: true,
    unweighted_head_norms: true,
    normalized_experts: false,
    gating: Gating::Sigmoid,
    weighted_input: true,
    ..DEFAULT_QUIRKS
};

pub(super) const FAMILIES: &[Family] = &[
    // Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; also Mistral, Mixtral, SmolLM, TinyLlama, Yi.
    family("llama").position(RopeAdjacent),
    // Stability AI 2024, arXiv 2402.17834.
    family("stablelm").norm(Layer),
    // Team OLMo 2024, arXiv 2501.00656.
    family("olmo2"),
    // IBM Granite 3.
    family("granite").position(RopeAdjacent).quirks(Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    // IBM Granite 3 and 4 with experts, and with windows and sinks.
    family("granitemoe").position(RopeAdjacent).quirks(Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    family("granite_swa").position(RopeAdjacent).quirks(Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    // Meta 2025.
    family("llama4").position(RopeAdjacent).quirks(LLAMA_4),
    // Mistral AI 2025: Ministral 3.
    family("mistral3").position(RopeAdjacent),
    // Arcee AI 2025.
    family("arcee").position(RopeAdjacent).activation(Relu2),
    // Groeneveld et al. 2024, arXiv 2402.00838.
    family("olmo").norm(Layer).position(RopeAdjacent).quirks(Quirks { unweighted_norms: true, ..DEFAULT_QUIRKS }),
    // Muennighoff et al. 2024, arXiv 2409.02060.
    family("olmoe").quirks(Quirks { normalized_experts: false, ..DEFAULT_QUIRKS }),
    // Ma et al. 2024, arXiv 2402.17764. Its files have weights that are ternary only in value.
    family("bitnet"),
    // Baidu 2025: ERNIE 4.5.
    family("ernie4_5").position(RopeAdjacent),
    family("ernie4_5-moe").position(RopeAdjacent),
    // ByteDance 2025.
    family("seed_oss"),
    // Parmar et al. 2024, arXiv 2402.16819.
    family("nemotron").norm(Layer).activation(Relu2),
    family("smollm3").position(RopeAdjacent).quirks(Quirks { rotated: Rotated::AllBut(4), ..DEFAULT_QUIRKS }),
];
