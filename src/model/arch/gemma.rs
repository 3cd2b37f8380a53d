//! Google's Gemma.

use super::family::{DEFAULT_QUIRKS, Family, Quirks, family};
use crate::kernels::Activation::GeluTanh;

const QUIRKS: Quirks = Quirks { scaled_embedding: true, ..DEFAULT_QUIRKS };

const QUIRKS_2: Quirks =
    Quirks { window_period: 2, soft_caps: Some((50.0, 30.0)), scaled_by_width: Some(46), ..QUIRKS };

pub(super) const QUIRKS_3: Quirks =
    Quirks { window_period: 6, window_rope_base: Some(10000.0), scaled_by_width: Some(62), ..QUIRKS };

const QUIRKS_3N: Quirks =
    Quirks { window_period: 5, window_rope_base: Some(10000.0), unscaled_attention: true, value_norm: true, ..QUIRKS };

pub(super) const QUIRKS_4: Quirks = Quirks { window_period: 6, ..QUIRKS_3N };

pub(super) const FAMILIES: &[Family] = &[
    // Gemma Team 2024, arXiv 2403.08295.
    family("gemma").activation(GeluTanh).quirks(QUIRKS),
    // Gemma Team 2024, arXiv 2408.00118.
    family("gemma2").activation(GeluTanh).quirks(QUIRKS_2),
    // Gemma Team 2025, arXiv 2503.19786.
    family("gemma3").activation(GeluTanh).quirks(QUIRKS_3),
    // Google 2025: Gemma 3n, and 2026: Gemma 4.
    family("gemma3n").activation(GeluTanh).quirks(QUIRKS_3N),
    family("gemma4").activation(GeluTanh).quirks(QUIRKS_4),
];
