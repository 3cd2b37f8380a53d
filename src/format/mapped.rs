//! Files as bytes: mapped into memory, or read into it.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;

use crate::system::memory;

/// The bytes of a file.
#[derive(Debug)]
pub(super) enum Bytes {
    /// Only what is touched is read. While it is mapped nobody may shorten or overwrite the file.
    Mapped(Mmap),
    /// All of it was read.
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

/// Opens the file at `path` for reading, which must be a regular one.
pub(super) fn open(path: &Path) -> std::io::Result<File> {
    // Looked at before it is opened, for that waits where the path is a pipe.
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        // Reading or mapping one would fail too, but with words that help nobody.
        return Err(ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

impl Bytes {
    /// Opens the file at `path`, mapped or not.
    pub(super) fn open(path: &Path, mmap: bool) -> std::io::Result<Bytes> {
        let mut file = open(path)?;
        if mmap {
            return map(&file).map(Bytes::Mapped);
        }
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        memory::check("a file", len).map_err(|error| std::io::Error::new(ErrorKind::OutOfMemory, error))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Bytes::Read(bytes))
    }

    /// Tells the system that `range` will not be needed again soon, so that it may have the memory back. It can still be
    /// read, from the disk again. Does nothing when the file is not mapped, or on systems without such a call.
    #[allow(unsafe_code, reason = "memmap2 guards the advice, because it would lose what was written to a map")]
    pub(super) fn release(&self, range: Range<usize>) {
        /// The smallest page of the systems we know. Where pages are larger, whole ones are given back all the same, and
        /// what a neighbour has of them is read again when it is touched.
        const PAGE: usize = 4096;
        #[cfg(unix)]
        if let Bytes::Mapped(map) = self {
            let start = range.start.next_multiple_of(PAGE);
            let end = range.end / PAGE * PAGE;
            if start < end && end <= map.len() {
                // SAFETY: nothing was ever written to the map, so pages that are dropped come back from the file with the
                // same bytes, and slices into them stay valid. A refusal costs memory only, so it may pass in silence.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }
}

#[allow(unsafe_code, reason = "mapping a file is how a model loads without being read twice")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and only ever read. What remains is that another process changes the file underneath, which
    // the callers' documentation forbids; every length is checked against the map's own, so a change can alter values (or,
    // where the file was cut, end the process) but never lead a read outside the map.
    unsafe { Mmap::map(file) }
}
