//! The bytes of a file, mapped into memory or read.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use super::replaceable::unresolved_link;
use crate::system::memory;

/// The bytes of a file.
#[derive(Debug)]
pub(super) enum Bytes {
    /// The system reads the pages that are accessed. The file must not be truncated or overwritten while it is mapped.
    Mapped(Mmap),
    /// The whole file was read.
    Read(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Read(bytes) => bytes,
        }
    }
}

/// Opens the regular file at `path` for reading.
pub(crate) fn open(path: &Path) -> std::io::Result<File> {
    // Checked before opening, which would wait on a pipe.
    let metadata = std::fs::metadata(path).map_err(|error| name_link(path, error))?;
    if metadata.is_dir() {
        // Reading or mapping a folder fails too, but with a useless message.
        return Err(ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

/// Says so if the path is a link that leads nowhere.
fn name_link(path: &Path, error: std::io::Error) -> std::io::Error {
    if path.is_symlink() { std::io::Error::new(error.kind(), unresolved_link(path, &error)) } else { error }
}

impl Bytes {
    /// Opens the file at `path` and maps or reads it.
    pub(super) fn open(path: &Path, mmap: bool) -> std::io::Result<Bytes> {
        Bytes::of(&mut open(path)?, mmap)
    }

    /// Maps or reads an open file.
    pub(super) fn of(file: &mut File, mmap: bool) -> std::io::Result<Bytes> {
        if mmap && let Some(map) = first_map(file, [shared, private])? {
            return Ok(Bytes::Mapped(map));
        }
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        memory::check("a file", len).map_err(|error| std::io::Error::new(ErrorKind::OutOfMemory, error))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Bytes::Read(bytes))
    }

    /// Lets the system drop the pages of `range` from memory. They can still be read, from the disk. Does nothing when the
    /// file is not mapped, or on systems without such a call.
    #[allow(unsafe_code, reason = "the advice is unsafe in memmap2, because it loses what was written to a map")]
    pub(super) fn release(&self, range: Range<usize>) {
        /// The smallest page size of any system. Where pages are larger, the kernel drops whole ones, and a neighboring
        /// tensor's part of them is read again when it is accessed.
        const PAGE: usize = 4096;
        let Bytes::Mapped(map) = self else { return };
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end / PAGE * PAGE;
        if start >= end || end > map.len() {
            return;
        }
        // SAFETY: nothing was ever written to the map, so dropped pages come back from the file with the same bytes,
        // and slices into them stay valid. A failure only costs memory, so it is ignored.
        #[cfg(unix)]
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        #[cfg(windows)]
        crate::system::windows::drop_pages(&map[start..end]);
    }
}

/// Tries to map a file in several ways. `None` if the file system supports none of them, as some network file systems do; the file
/// must be read then.
///
/// # Errors
/// Memory has run out, or an error that concerns the file and not the map.
fn first_map(file: &File, ways: [fn(&File) -> std::io::Result<Mmap>; 2]) -> std::io::Result<Option<Mmap>> {
    for way in ways {
        match way(file) {
            Err(error) if error.kind() == ErrorKind::OutOfMemory => return Err(error),
            Err(_) => {}
            Ok(map) => return Ok(Some(map)),
        }
    }
    Ok(None)
}

#[allow(unsafe_code, reason = "mapping a file is how a model loads without being read twice")]
fn shared(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is never written to. Another process may change the file, which the callers' documentation forbids.
    // Every length is checked against that of the map, so a change can alter values, and a truncation can kill the process,
    // but no read leaves the map.
    unsafe { Mmap::map(file) }
}

#[allow(unsafe_code, reason = "mapping a file is how a model loads without being read twice")]
fn private(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: as in `shared`.
    unsafe { MmapOptions::new().map_copy_read_only(file) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn refuse(_: &File) -> std::io::Result<Mmap> {
        Err(std::io::Error::from_raw_os_error(19)) // ENODEV: the file system does not support maps.
    }

    fn run_out(_: &File) -> std::io::Result<Mmap> {
        Err(ErrorKind::OutOfMemory.into())
    }

    #[test]
    fn a_file_that_cannot_be_mapped_shared_is_mapped_privately_or_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"weights").unwrap();
        assert_eq!(first_map(&file, [refuse, private]).unwrap().unwrap()[..], *b"weights");
        assert!(first_map(&file, [refuse, refuse]).unwrap().is_none());
        assert!(first_map(&file, [run_out, private]).is_err());
    }
}
