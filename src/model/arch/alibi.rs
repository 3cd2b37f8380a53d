//! Families with ALiBi, or whose first models had it.

use super::family::{DEFAULT_QUIRKS, Family, NormKind, Position, Residual, family};
use crate::kernels::Activation::{Gelu, GeluTanh};
use NormKind::Layer;
use Position::{Alibi, Rope};
use Residual::{Parallel, Sequential};

pub(super) const FAMILIES: &[Family] = &[
    // Scao et al. 2022, arXiv 2211.05100.
    family("bloom", Layer, Sequential, Alibi, GeluTanh, DEFAULT_QUIRKS),
    // Almazrouei et al. 2023, arXiv 2311.16867.
    family("falcon", Layer, Parallel, Rope, Gelu, DEFAULT_QUIRKS),
    // MosaicML 2023.
    family("mpt", Layer, Sequential, Alibi, Gelu, DEFAULT_QUIRKS),
];
