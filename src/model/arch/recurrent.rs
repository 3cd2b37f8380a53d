//! Families with layers that carry a state.

use super::MixerKind::{AttentionAndMamba2, GatedDelta, KimiDelta, Mamba, Mamba2, Rwkv, ShortConvolution};
use super::RecurrentLayers::{All, Alone, Listed, WithoutKeys, WithoutKeysOrFeedForward};
use super::family::{DEFAULT_QUIRKS, Family, Gating, NormKind, Position, Quirks, Rotated, family};
use crate::kernels::Activation::Relu2;

const SIGMOID: Quirks = Quirks { gating: Gating::Sigmoid, ..DEFAULT_QUIRKS };

const PLAIN_EXPERTS: Quirks = Quirks { normalized_experts: false, ..DEFAULT_QUIRKS };

/// No layer rotates.
const KIMI: Quirks = Quirks { rotated: Rotated::AllBut(1), latent_norm_eps: Some(1e-6), ..SIGMOID };

pub(super) const FAMILIES: &[Family] = &[
    // Qwen 2025 and 2026: Qwen3-Next, Qwen 3.5 and 3.6. The later files have the heads of values in another order.
    Family { gated_queries: true, ..family("qwen3next").recurrent(GatedDelta, Listed) },
    Family { gated_queries: true, grouped_values: false, ..family("qwen35").recurrent(GatedDelta, Listed) },
    Family { gated_queries: true, grouped_values: false, ..family("qwen35moe").recurrent(GatedDelta, Listed) },
    // Ai2 2026.
    family("olmo-hybrid").recurrent(GatedDelta, Listed),
    // Kimi Team 2025, arXiv 2510.26692.
    family("kimi-linear").latent().recurrent(KimiDelta, WithoutKeys).quirks(KIMI),
    // Liquid AI 2025: LFM2 and its mixture of experts.
    Family { output_norm: "token_embd_norm", ..family("lfm2").recurrent(ShortConvolution, WithoutKeys) },
    Family {
        output_norm: "token_embd_norm",
        ..family("lfm2moe").recurrent(ShortConvolution, WithoutKeys).quirks(SIGMOID)
    },
    // Gu and Dao 2023, arXiv 2312.00752; Dao and Gu 2024, arXiv 2405.21060. Also Falcon Mamba.
    family("mamba").position(Position::Learned).recurrent(Mamba, Alone),
    family("mamba2").position(Position::Learned).recurrent(Mamba2, Alone),
    // AI21 2024, arXiv 2403.19887.
    family("jamba").position(Position::Learned).recurrent(Mamba, WithoutKeys).quirks(PLAIN_EXPERTS),
    // IBM 2025: Granite 4 and Bamba.
    family("granitehybrid")
        .position(Position::RopeAdjacent)
        .recurrent(Mamba2, WithoutKeys)
        .quirks(Quirks { divided_logits: true, ..DEFAULT_QUIRKS }),
    // NVIDIA 2025, arXiv 2504.03624.
    family("nemotron_h").position(Position::Learned).activation(Relu2).recurrent(Mamba2, WithoutKeysOrFeedForward),
    family("nemotron_h_moe")
        .position(Position::Learned)
        .activation(Relu2)
        .recurrent(Mamba2, WithoutKeysOrFeedForward)
        .quirks(SIGMOID),
    // Peng et al. 2023, arXiv 2305.13048: RWKV, version 4.
    family("rwkv4").norm(NormKind::Layer).position(Position::Learned).recurrent(Rwkv, All),
    // Falcon LLM Team 2025, arXiv 2507.22448.
    family("falcon-h1").recurrent(AttentionAndMamba2, All),
];
