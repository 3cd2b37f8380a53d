//! How keys and values are stored.

use half::f16;

use crate::error::{Error, Result};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheType {
    /// Single precision, for models that compute in it.
    F32,
    /// Half precision.
    F16,
    /// INT8 with a scale per position and 32 numbers: about half the memory of F16. Keys and values are rotated first, so
    /// that single large numbers do not coarsen the others.
    Int8,
}

impl CacheType {
    const ALL: [CacheType; 3] = [CacheType::F32, CacheType::F16, CacheType::Int8];

    /// The type called `f32`, `f16` or `int8`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<CacheType> {
        let found = CacheType::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| Error::argument("cache_type", format_args!("{name:?}"), "f16, int8 or f32"))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Int8 => "int8",
        }
    }

    /// Bytes per number.
    pub(super) fn bytes(self) -> usize {
        match self {
            CacheType::F32 => 4,
            CacheType::F16 => 2,
            CacheType::Int8 => 1,
        }
    }

    /// The largest number that it holds; no limit for types that hold all of F32.
    pub(in crate::model) fn largest(self) -> Option<f32> {
        (self == CacheType::F16).then(|| f16::MAX.to_f32())
    }
}
