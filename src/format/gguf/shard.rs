//! One file of a model, and how to open it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::parse::{Parsed, parse};
use crate::error::{Error, Result};
use crate::format::file_range::OpenFile;
use crate::format::mapped::{self, Bytes};

/// How to open a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whether to map the file into memory (the default), so that only the parts that are used are read. A mapped file must
    /// not be truncated or overwritten: access to a missing page kills the process (SIGBUS). With false, the whole file is
    /// read when it is opened and may change afterwards.
    pub mmap: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { mmap: true }
    }
}

setters!(OpenOptions { with_mmap(mmap: bool) });

/// One file of a model.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) bytes: Bytes,
    pub(super) file: Arc<OpenFile>,
}

/// Opens and parses the file with index `shard` in its model.
pub(super) fn open(path: &Path, shard: usize, options: &OpenOptions) -> Result<(Shard, Parsed)> {
    let failed = |source| Error::io(path, source);
    let mut file = mapped::open(path).map_err(failed)?;
    let bytes = Bytes::of(&mut file, options.mmap).map_err(failed)?;
    let parsed = parse(path, &bytes, shard)?;
    let file = Arc::new(OpenFile::new(path, file).map_err(failed)?);
    Ok((Shard { path: path.to_path_buf(), bytes, file }, parsed))
}
