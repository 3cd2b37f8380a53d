//! Microsoft's Phi.

use super::family::{DEFAULT_QUIRKS, Family, Gating, NormKind, Position, Quirks, Residual, family};
use crate::kernels::Activation::{GeluTanh, Silu};
use NormKind::{Layer, Rms};
use Position::Rope;
use Residual::{Parallel, Sequential};

pub(super) const FAMILIES: &[Family] = &[
    // Li et al. 2023, arXiv 2309.05463: Phi 1, 1.5 and 2.
    family("phi2", Layer, Parallel, Rope, GeluTanh, DEFAULT_QUIRKS),
    // Abdin et al. 2024, arXiv 2404.14219; also Phi 4.
    family("phi3", Rms, Sequential, Rope, Silu, DEFAULT_QUIRKS),
    // Phi 3.5 with experts.
    family("phimoe", Layer, Sequential, Rope, Silu, Quirks { gating: Gating::SparseMixer, ..DEFAULT_QUIRKS }),
];
