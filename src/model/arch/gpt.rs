//! GPT-2 and the families that resemble it: LayerNorm and a feed-forward layer without a gate.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Quirks, family};
use crate::kernels::Activation::{Gelu, GeluTanh, Relu};
use NormKind::Layer;
use Position::{Learned, RopeAdjacent};

pub(super) const FAMILIES: &[Family] = &[
    // Radford et al. 2019.
    family("gpt2").norm(Layer).position(Learned).activation(GeluTanh),
    // Wang and Komatsuzaki 2021.
    family("gptj").norm(Layer).parallel().position(RopeAdjacent).activation(GeluTanh),
    // Black et al. 2022, arXiv 2204.06745; also Pythia, Dolly and StableLM-Alpha.
    family("gptneox").norm(Layer).parallel().activation(Gelu),
    // Zhang et al. 2022, arXiv 2205.01068.
    family("opt")
        .norm(Layer)
        .position(Learned)
        .activation(Relu)
        .quirks(Quirks { optional_output_norm: true, ..DEFAULT_QUIRKS }),
    // Li et al. 2023, arXiv 2305.06161: gpt_bigcode.
    family("starcoder").norm(Layer).position(Learned).activation(GeluTanh),
    // Lozhkov et al. 2024, arXiv 2402.19173.
    family("starcoder2").norm(Layer).activation(GeluTanh),
];
