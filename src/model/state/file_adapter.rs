//! The adapter of a session in the session's file.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Place, Result};
use crate::model::adapter::low_rank::Adapter;
use crate::model::adapter::registry::Adapters;

/// The bit in the version of files whose session has an adapter.
pub(super) const FLAG: u32 = 1 << 8;
/// The largest length of a name in bytes.
const MAX_NAME: u32 = 1 << 10;

/// The name of an adapter and the hash of its weights.
pub(super) struct FileAdapter {
    name: String,
    hash: blake3::Hash,
}

/// Whether `fields`, which begin with the version of a file, have the bit for an adapter.
pub(super) fn is_flagged(fields: &[u8]) -> bool {
    fields.first_chunk().is_some_and(|bytes| u32::from_le_bytes(*bytes) & FLAG != 0)
}

impl FileAdapter {
    pub(super) fn of(adapter: &Adapter) -> FileAdapter {
        FileAdapter { name: adapter.name().to_owned(), hash: *adapter.hash() }
    }

    /// The bytes in the file.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [&(self.name.len() as u32).to_le_bytes()[..], self.name.as_bytes(), self.hash.as_bytes()].concat()
    }

    /// Reads the bytes of a file that has `left` more.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for a name that is too long, is not UTF-8 or does not fit into the file.
    pub(super) fn read(file: &mut impl Read, path: &Path, left: u64) -> Result<FileAdapter> {
        let io = |source| Error::io(path, source);
        let fault = |found: String, expected: String| {
            Err(Error::malformed(path, Place::Key("adapter".to_owned()), found, expected))
        };
        let (mut length, mut hash) = ([0; size_of::<u32>()], [0; blake3::OUT_LEN]);
        let left_for_name = left.saturating_sub((length.len() + hash.len()) as u64);
        if left_for_name == 0 {
            return fault("the end of the file".to_owned(), "a name and a hash".to_owned());
        }
        file.read_exact(&mut length).map_err(io)?;
        let length = u32::from_le_bytes(length);
        let most = MAX_NAME.min(u32::try_from(left_for_name).unwrap_or(u32::MAX));
        if length > most {
            return fault(format!("a name of {length} bytes"), format!("at most {most}"));
        }
        let mut name = vec![0; length as usize];
        file.read_exact(&mut name).map_err(io)?;
        file.read_exact(&mut hash).map_err(io)?;
        match String::from_utf8(name) {
            Ok(name) => Ok(FileAdapter { name, hash: hash.into() }),
            Err(_) => fault("a name that is not UTF-8".to_owned(), "UTF-8".to_owned()),
        }
    }

    /// The adapter for the session of a file with adapter `stored`: the one with the same weights.
    ///
    /// # Errors
    /// [`Error::Malformed`] when `adapters` has none with the same weights, or one for everything that the file lacks.
    pub(super) fn find(stored: Option<&FileAdapter>, adapters: &Adapters, path: &Path) -> Result<Option<Arc<Adapter>>> {
        let fault = |found: String, expected: String| {
            Err(Error::malformed(path, Place::Key("adapter".to_owned()), found, expected))
        };
        let expected = || {
            let default = adapters.default_adapter();
            let names = || adapters.named().keys().cloned().collect::<Vec<_>>().join(", ");
            match default.as_deref() {
                Some(adapter) => format!("the adapter {}, which applies to everything", adapter.path().display()),
                None if adapters.named().is_empty() => "a session without an adapter: none is loaded".to_owned(),
                None => format!("a session with a loaded adapter ({}) or without one", names()),
            }
        };
        match stored {
            None if adapters.default_adapter().is_some() => {
                fault("a session without an adapter".to_owned(), expected())
            }
            None => Ok(None),
            Some(FileAdapter { name, hash }) => match adapters.with_hash(name, hash) {
                Some(adapter) => Ok(Some(adapter)),
                None => {
                    let name = if name.is_empty() { "an adapter".to_owned() } else { format!("the adapter {name:?}") };
                    fault(format!("a session with {name} of the hash {}", hash.to_hex()), expected())
                }
            },
        }
    }
}
