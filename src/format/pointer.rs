//! Git LFS pointers, which stand for files that were not downloaded.

use std::path::Path;

use crate::error::{Error, Place};

/// The error for a file that is a Git LFS pointer, if `bytes` begin like one.
pub(crate) fn pointer_error(path: &Path, bytes: &[u8]) -> Option<Error> {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/").then(|| {
        let expected = "the file that it stands for: run git lfs pull in the clone, or download the file again";
        Error::malformed(path, Place::File, "a Git LFS pointer", expected)
    })
}
