//! Bytes of a file that are read when they are needed.
//!
//! Reading does not map the file: a file that is truncated meanwhile is an error, where access to a missing page of a map kills the
//! process.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, Place, Result};

/// A file that stays open, and what it was like when it was opened.
#[derive(Debug)]
pub(super) struct OpenFile {
    path: PathBuf,
    file: File,
    len: u64,
    modified: Option<SystemTime>,
}

impl OpenFile {
    /// `file`, which was opened at `path`.
    pub(super) fn new(path: &Path, file: File) -> std::io::Result<OpenFile> {
        let metadata = file.metadata()?;
        let (len, modified) = (metadata.len(), metadata.modified().ok());
        Ok(OpenFile { path: path.to_path_buf(), file, len, modified })
    }
}

/// A range of a file that stays open.
#[derive(Debug, Clone)]
pub struct FileRange {
    file: Arc<OpenFile>,
    start: u64,
    len: usize,
}

impl FileRange {
    pub(super) fn new(file: &Arc<OpenFile>, range: Range<usize>) -> FileRange {
        FileRange { file: Arc::clone(file), start: range.start as u64, len: range.len() }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.file.path
    }

    /// Bytes of the range.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Checks that nothing has changed the file since it was opened.
    ///
    /// # Errors
    /// [`Error::Malformed`] if its size or the time of its last change is another one; [`Error::Io`].
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let OpenFile { path, file, len, modified } = &*self.file;
        let now = file.metadata().map_err(|error| Error::io(path, error))?;
        if now.len() != *len {
            return Err(self.changed(format_args!("{} bytes, and {len} before", now.len())));
        }
        if now.modified().ok() != *modified {
            return Err(self.changed("a file that was written to"));
        }
        Ok(())
    }

    /// Fills `out` with the bytes from `offset` of the range on.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a file that has become too short; [`Error::Io`].
    ///
    /// # Panics
    /// If these bytes are not in the range.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        assert!(offset + out.len() <= self.len, "bytes of the range");
        match read_exact_at(&self.file.file, out, self.start + offset as u64) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err(self.changed(format_args!("its end before byte {}", self.start + (offset + out.len()) as u64)))
            }
            Err(error) => Err(Error::io(&self.file.path, error)),
        }
    }

    /// Lets the system read `len` bytes from `offset` of the range on in the background. Does nothing where it cannot.
    pub(crate) fn prefetch(&self, offset: usize, len: usize) {
        #[cfg(target_os = "linux")]
        {
            let len = std::num::NonZeroU64::new(len as u64);
            let start = self.start + offset as u64;
            let _ = rustix::fs::fadvise(&self.file.file, start, len, rustix::fs::Advice::WillNeed);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, len);
    }

    fn changed(&self, found: impl std::fmt::Display) -> Error {
        let expected = "the file that the model was loaded from, unchanged: load the model again";
        Error::malformed(&self.file.path, Place::File, found, expected)
    }
}

/// Fills `out` with the bytes from `offset` on.
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    let (mut out, mut offset) = (out, offset);
    while !out.is_empty() {
        match read_at(file, out, offset) {
            Ok(0) => return Err(IoError::from(ErrorKind::UnexpectedEof)),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;

    /// The bytes 2.. of a file of `0..100`.
    fn range(folder: &Path) -> FileRange {
        let path = folder.join("a file");
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        let file = Arc::new(OpenFile::new(&path, File::open(&path).unwrap()).unwrap());
        FileRange::new(&file, 2..100)
    }

    #[test]
    fn a_range_is_read_from_any_offset() {
        let folder = tempfile::tempdir().unwrap();
        let range = range(folder.path());
        let mut out = [0; 4];
        for offset in [0, 50, 94] {
            range.prefetch(offset, 4);
            range.read(offset, &mut out).unwrap();
            assert_eq!(out, [2, 3, 4, 5].map(|byte| byte + offset as u8));
        }
        range.check_unchanged().unwrap();
    }

    #[test]
    fn a_file_that_was_truncated_is_an_error_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let range = range(folder.path());
        OpenOptions::new().write(true).open(range.path()).unwrap().set_len(50).unwrap();
        let mut out = [0; 4];
        range.read(40, &mut out).unwrap();
        for error in [range.read(46, &mut out).unwrap_err(), range.check_unchanged().unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("a file: ") && text.contains("load the model again"), "{text}");
        }
    }

    #[test]
    fn a_file_that_was_written_to_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let range = range(folder.path());
        let mut file = OpenOptions::new().write(true).open(range.path()).unwrap();
        file.write_all(b"other").unwrap();
        file.set_modified(SystemTime::now() + std::time::Duration::from_secs(7)).unwrap();
        let error = range.check_unchanged().unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }

    #[test]
    fn a_file_that_was_replaced_is_still_read() {
        let folder = tempfile::tempdir().unwrap();
        let range = range(folder.path());
        let other = folder.path().join("other");
        std::fs::write(&other, [7; 10]).unwrap();
        if std::fs::rename(&other, range.path()).is_ok() {
            let mut out = [0; 1];
            range.check_unchanged().unwrap();
            range.read(97, &mut out).unwrap();
            assert_eq!(out, [99]);
        }
    }
}
