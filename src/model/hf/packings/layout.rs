//! The layouts of packed matrices.

/// Where codes, scales and zero points are; see the [module](super).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Whether zero points are stored minus one.
    Gptq {
        one_less: bool,
    },
    Awq,
    /// Whether all zero points are 8, and not stored.
    Compressed {
        symmetric: bool,
    },
}
