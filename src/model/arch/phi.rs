//! Microsoft's Phi.

use super::family::{DEFAULT_QUIRKS, Family, Gating, NormKind, Quirks, family};
use crate::kernels::Activation::GeluTanh;
use NormKind::Layer;

pub(super) const FAMILIES: &[Family] = &[
    // Li et al. 2023, arXiv 2309.05463: Phi 1, 1.5 and 2.
    family("phi2").norm(Layer).parallel().activation(GeluTanh),
    // Abdin et al. 2024, arXiv 2404.14219; also Phi 4.
    family("phi3"),
    // Phi 3.5 with experts.
    family("phimoe").norm(Layer).quirks(Quirks { gating: Gating::SparseMixer, ..DEFAULT_QUIRKS }),
];
