//! Families with ALiBi, or whose first models had it.

use super::family::{Family, NormKind, Position, family};
use crate::kernels::Activation::{Gelu, GeluTanh};
use NormKind::Layer;
use Position::Alibi;

pub(super) const FAMILIES: &[Family] = &[
    // Scao et al. 2022, arXiv 2211.05100.
    family("bloom").norm(Layer).position(Alibi).activation(GeluTanh),
    // Almazrouei et al. 2023, arXiv 2311.16867.
    family("falcon").norm(Layer).parallel().activation(Gelu),
    // MosaicML 2023.
    family("mpt").norm(Layer).position(Alibi).activation(Gelu),
];
