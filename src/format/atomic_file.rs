//! Files that appear under their name when they are complete.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::replaceable::check_replaceable;
use crate::error::{Error, Result};

/// A file under a temporary name in the folder of its target. [`AtomicFile::finish`] renames it; dropped before, it is removed.
///
/// The file is locked while it is written. What a killed process has left has no lock, and the next file for the same target
/// removes it.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    target: PathBuf,
    /// `None` after it was renamed.
    temporary: Option<PathBuf>,
    file: File,
}

impl AtomicFile {
    /// Creates the file. With `private`, only the user may read it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] if something other than a regular file is at `target`.
    pub(crate) fn create(target: &Path, private: bool) -> Result<AtomicFile> {
        remove_leftovers(folder(target), &prefix(target));
        AtomicFile::create_only(target, private)
    }

    /// As [`AtomicFile::create`], but leaves what a killed process has left for the target: listing a folder of many files for each of
    /// them takes too long. [`remove_all_leftovers`] removes it.
    ///
    /// # Errors
    /// As for [`AtomicFile::create`].
    pub(crate) fn create_only(target: &Path, private: bool) -> Result<AtomicFile> {
        /// Distinguishes the files of one process.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        check_replaceable("path", target)?;
        let prefix = prefix(target);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!("{prefix}{}-{number}.tmp", std::process::id()));
            let file = match options(private).open(&path) {
                Ok(file) => file,
                // A process with the same id in another container writes this file, or has left it on a system without locks.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(source) => return Err(Error::io(target, source)),
            };
            // Some file systems have no locks. Leftovers stay there.
            let _ = file.try_lock();
            // Another process may have taken the file for a leftover before it was locked.
            if path.exists() {
                return Ok(AtomicFile { target: target.to_path_buf(), temporary: Some(path), file });
            }
        }
    }

    /// Where the file is until it is finished.
    pub(crate) fn path(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.target)
    }

    /// Flushes the file to disk and renames it to its target.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::InvalidArgument`] if something other than a regular file is there by now. The file is
    /// removed then.
    pub(crate) fn finish(self) -> Result<()> {
        let target = self.target.clone();
        self.finish_name()?;
        // The new name is durable once the folder is flushed. Some file systems refuse this, which does not affect the file.
        let _ = File::open(folder(&target)).and_then(|folder| folder.sync_all());
        Ok(())
    }

    /// As [`AtomicFile::finish`], but the new name may be lost if the machine stops soon.
    ///
    /// # Errors
    /// As for [`AtomicFile::finish`].
    pub(crate) fn finish_name(mut self) -> Result<()> {
        self.file.sync_all().map_err(|source| Error::io(&self.target, source))?;
        check_replaceable("path", &self.target)?;
        if let Some(path) = &self.temporary {
            let renamed = std::fs::rename(path, &self.target);
            renamed.map_err(|source| Error::io(&self.target, named_if_in_use(source, cfg!(windows))))?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary {
            // A failure cannot be reported from here.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Says so if Windows refuses to replace a file that is in use, such as that of a model that loads.
fn named_if_in_use(error: std::io::Error, is_windows: bool) -> std::io::Error {
    /// Access denied, a sharing violation, and a file that is mapped into memory.
    const CODES: [i32; 3] = [5, 32, 1224];
    if is_windows && error.raw_os_error().is_some_and(|code| CODES.contains(&code)) {
        let reason = "Windows cannot replace it while a program has it open, or if it is read-only";
        return std::io::Error::new(ErrorKind::PermissionDenied, reason);
    }
    error
}

fn options(private: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    if private {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    #[cfg(not(unix))]
    let _ = private;
    options
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The beginning of all temporary names for a target. A hash, because the longest file names leave no space for a suffix.
fn prefix(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default();
    let hash = blake3::hash(name.as_encoded_bytes()).to_hex();
    format!("{PREFIX}{}-", &hash[..16])
}

/// The beginning of all temporary names.
const PREFIX: &str = ".nybble-";

/// Removes the files in a folder that killed processes have left, for any target.
pub(crate) fn remove_all_leftovers(folder: &Path) {
    remove_leftovers(folder, PREFIX);
}

/// Removes the files in a folder whose temporary names begin with `prefix` and that no process has locked.
fn remove_leftovers(folder: &Path, prefix: &str) {
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix) && name.ends_with(".tmp"))
            || !entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            continue;
        }
        let Ok(file) = OpenOptions::new().write(true).open(entry.path()) else { continue };
        match file.try_lock() {
            Ok(()) => {
                let _ = std::fs::remove_file(entry.path());
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn leftovers_of_the_same_target_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        let other = folder.path().join(format!("{}1-0.tmp", prefix(Path::new("other.gguf"))));
        let own = folder.path().join(format!("{}1-0.tmp", prefix(&target)));
        std::fs::write(&other, "").unwrap();
        std::fs::write(&own, "").unwrap();
        let file = AtomicFile::create(&target, false).unwrap();
        assert!(other.exists() && !own.exists());
        drop(file);
        assert_eq!(names(folder.path()).len(), 1);
    }

    #[test]
    fn two_writers_of_one_target_leave_each_other_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        let mut first = AtomicFile::create(&target, false).unwrap();
        let mut second = AtomicFile::create(&target, false).unwrap();
        first.write_all(b"first").unwrap();
        second.write_all(b"second").unwrap();
        first.finish().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"first");
        second.finish().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"second");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }

    #[test]
    fn a_file_in_use_is_named_as_such_on_windows() {
        for (code, is_windows, is_named) in [(5, true, true), (32, true, true), (2, true, false), (32, false, false)] {
            let error = named_if_in_use(std::io::Error::from_raw_os_error(code), is_windows);
            assert_eq!(error.to_string().contains("while a program has it open"), is_named, "{code}");
        }
    }

    #[test]
    fn a_mapped_file_is_replaced_or_the_error_says_that_it_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        std::fs::write(&target, "old").unwrap();
        let mapped = crate::format::mapped::Bytes::open(&target, true).unwrap();
        let mut file = AtomicFile::create(&target, false).unwrap();
        file.write_all(b"new").unwrap();
        match file.finish() {
            Ok(()) => assert_eq!(std::fs::read(&target).unwrap(), b"new"),
            Err(error) => {
                assert!(cfg!(windows) && error.to_string().contains("while a program has it open"), "{error}")
            }
        }
        assert_eq!(*mapped, *b"old");
        assert_eq!(names(folder.path()), ["model.gguf"]);
    }

    #[test]
    fn a_dropped_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        drop(AtomicFile::create(&folder.path().join("model.gguf"), true).unwrap());
        assert!(names(folder.path()).is_empty());
    }
}
