//! Encoders: models whose attention goes in both directions, for embeddings and classification.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Quirks, family};
use super::gemma::{QUIRKS_3, QUIRKS_4};
use crate::kernels::Activation::{Gelu, GeluTanh};
use NormKind::Layer;
use Position::{Learned, RopeAdjacent};

/// Norms follow the branches, and the last of them is that of the last layer.
const QUIRKS: Quirks =
    Quirks { bidirectional: true, without_output: true, optional_output_norm: true, ..DEFAULT_QUIRKS };

const MODERN_BERT: Quirks = Quirks {
    window_period: 3,
    full_layer_first: true,
    window_rope_base: Some(10000.0),
    optional_output_norm: false,
    optional_first_norm: true,
    ..QUIRKS
};

pub(super) const FAMILIES: &[Family] = &[
    // Devlin et al. 2018, arXiv 1810.04805; also RoBERTa, ELECTRA and DistilBERT.
    family("bert").norm(Layer).position(Learned).activation(Gelu).quirks(QUIRKS),
    // Nussbaum et al. 2024, arXiv 2402.01613.
    family("nomic-bert").norm(Layer).quirks(QUIRKS),
    // Sturua et al. 2024, arXiv 2409.10173.
    family("jina-bert-v3").norm(Layer).activation(Gelu).quirks(QUIRKS),
    // Warner et al. 2024, arXiv 2412.13663.
    family("modern-bert").norm(Layer).activation(Gelu).quirks(MODERN_BERT),
    // Schechter Vera et al. 2025, arXiv 2509.20354: EmbeddingGemma.
    family("gemma-embedding").activation(GeluTanh).quirks(Quirks { bidirectional: true, ..QUIRKS_3 }),
    // Google 2026: EmbeddingGemma 2.
    family("gemma-embedding2").activation(GeluTanh).quirks(Quirks { bidirectional: true, ..QUIRKS_4 }),
    // Boizard et al. 2025, arXiv 2503.05500.
    family("eurobert").quirks(Quirks { bidirectional: true, without_output: true, ..DEFAULT_QUIRKS }),
    // Llama models in both directions.
    family("llama-embed").position(RopeAdjacent).quirks(Quirks { bidirectional: true, ..DEFAULT_QUIRKS }),
];
