//! Reads an adapter in any format.

use std::path::Path;

use super::file::{AdapterFile, Base};
use super::{gguf, peft};
use crate::error::{Error, Place, Result};

/// Reads the adapter at `path`: a PEFT folder, or a GGUF file.
///
/// # Errors
/// [`Error::Io`], [`Error::Malformed`] and [`Error::Missing`] with the place; [`Error::Unsupported`] for what is not computed.
pub(super) fn read(path: &Path, base: &Base<'_>) -> Result<AdapterFile> {
    let file = if path.is_dir() { peft::read(path, base)? } else { gguf::read(path, base)? };
    if file.deltas.is_empty() {
        return Err(Error::malformed(path, Place::File, "no matrices of an adapter", "at least one"));
    }
    for (name, delta) in &file.deltas {
        delta.check(path, name)?;
    }
    Ok(file)
}
