//! Families of 2025 and 2026 that go ways of their own: gates, sinks, clamped experts, windows in most layers.

use super::family::{DEFAULT_QUIRKS, Family, Gating, NormKind, Position, Quirks, Rotated, family};
use crate::kernels::Activation::Softplus;
use NormKind::Layer;
use Position::RopeAdjacent;

/// Only layers with a window rotate.
const WINDOWED: Quirks = Quirks { window_period: 4, rotated: Rotated::Windowed, ..DEFAULT_QUIRKS };

const GPT_OSS: Quirks = Quirks {
    window_period: 2,
    gating: Gating::SoftmaxOfChosen,
    clamped_gate: Some((1.702, 7.0)),
    untruncated_yarn: true,
    ..DEFAULT_QUIRKS
};

const LAGUNA: Quirks =
    Quirks { window_period: 4, full_layer_first: true, gate: Softplus, gating: Gating::Sigmoid, ..DEFAULT_QUIRKS };

const SIGMOID: Quirks = Quirks { gating: Gating::Sigmoid, ..DEFAULT_QUIRKS };

pub(super) const FAMILIES: &[Family] = &[
    // Agarwal et al. 2025, arXiv 2508.10925.
    family("gpt-oss").quirks(GPT_OSS),
    // Cohere 2024 and 2025: Command R and R7B.
    family("command-r").norm(Layer).parallel().position(RopeAdjacent),
    family("cohere2").norm(Layer).parallel().position(RopeAdjacent).quirks(WINDOWED),
    // LG AI Research 2025, arXiv 2507.11407.
    family("exaone4").quirks(WINDOWED),
    // Tencent 2025 and 2026.
    family("hunyuan-dense").quirks(Quirks { norms_after_rotation: true, ..DEFAULT_QUIRKS }),
    family("hy_v3").quirks(SIGMOID).mtp(),
    // GLM Team 2024, arXiv 2406.12793, and the versions after it.
    family("chatglm").position(RopeAdjacent),
    family("glm4").position(RopeAdjacent),
    family("glm4moe").quirks(SIGMOID).mtp(),
    // MiniMax 2025.
    family("minimax-m2").quirks(SIGMOID),
    // rednote-hilab 2025, arXiv 2506.05767.
    family("dots1"),
    // Swiss AI 2025, arXiv 2509.14233.
    family("apertus").quirks(Quirks { xielu: true, ..DEFAULT_QUIRKS }),
    // Muse Glimmer: the text part.
    family("muse-glimmer").position(RopeAdjacent).quirks(Quirks {
        embedding_norm: true,
        post_norm_eps: Some(1e-8),
        ..WINDOWED
    }),
    // Poolside 2026.
    family("laguna").quirks(LAGUNA),
    // JetBrains 2026.
    family("mellum").quirks(Quirks { window_period: 4, ..DEFAULT_QUIRKS }).mtp(),
    // DeepSeek-AI 2024, arXiv 2405.04434 and 2412.19437; also GLM 4 Lite.
    family("deepseek2")
        .position(RopeAdjacent)
        .quirks(Quirks { normalized_experts: false, latent_norm_eps: Some(1e-6), ..DEFAULT_QUIRKS })
        .latent()
        .mtp(),
];
