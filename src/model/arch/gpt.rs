//! GPT-2 and the families that resemble it: LayerNorm and a feed-forward layer without a gate.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Quirks, Residual, family};
use crate::kernels::Activation::{Gelu, GeluTanh, Relu};
use NormKind::Layer;
use Position::{Learned, Rope, RopeAdjacent};
use Residual::{Parallel, Sequential};

pub(super) const FAMILIES: &[Family] = &[
    // Radford et al. 2019.
    family("gpt2", Layer, Sequential, Learned, GeluTanh, DEFAULT_QUIRKS),
    // Wang and Komatsuzaki 2021.
    family("gptj", Layer, Parallel, RopeAdjacent, GeluTanh, DEFAULT_QUIRKS),
    // Black et al. 2022, arXiv 2204.06745; also Pythia, Dolly and StableLM-Alpha.
    family("gptneox", Layer, Parallel, Rope, Gelu, DEFAULT_QUIRKS),
    // Zhang et al. 2022, arXiv 2205.01068.
    family("opt", Layer, Sequential, Learned, Relu, Quirks { optional_output_norm: true, ..DEFAULT_QUIRKS }),
    // Li et al. 2023, arXiv 2305.06161: gpt_bigcode.
    family("starcoder", Layer, Sequential, Learned, GeluTanh, DEFAULT_QUIRKS),
    // Lozhkov et al. 2024, arXiv 2402.19173.
    family("starcoder2", Layer, Sequential, Rope, GeluTanh, DEFAULT_QUIRKS),
];
