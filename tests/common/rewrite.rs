//! Files that a test writes thousands of times.

use std::{fs, path::Path};

/// Replaces a file by a new one.
///
/// Some file systems, ext4 for one, write a file to the disk as soon as it is closed if it was truncated. A new file
/// waits, and is never written if it is removed before.
pub(crate) fn rewrite(path: &Path, bytes: impl AsRef<[u8]>) {
    if path.exists() {
        fs::remove_file(path).unwrap();
    }
    fs::write(path, bytes).unwrap();
}
