//! Hashes that are stored in files: the first 8 bytes of BLAKE3, the same on every machine and for every Rust version.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use crate::format::Checkpoint;

/// A hash of a sequence of parts.
#[derive(Debug, Clone, Default)]
pub(super) struct Digest(blake3::Hasher);

impl Digest {
    /// Adds bytes without their length: the hash does not depend on how a stream is cut.
    pub(super) fn stream(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds one part with its length, so that different parts never run together to the same bytes.
    fn part(&mut self, bytes: &[u8]) {
        self.stream(&(bytes.len() as u64).to_le_bytes());
        self.stream(bytes);
    }

    /// The hash.
    pub(super) fn finish(&self) -> u64 {
        let hash = self.0.finalize();
        number(&hash.as_bytes()[..8])
    }
}

/// Reads a little-endian number of up to 8 bytes.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The hash of a record.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let mut digest = Digest::default();
    digest.stream(bytes);
    digest.finish()
}

/// A number that identifies a run: the same for the same checkpoint, options, windows and version of nybble.
pub(in crate::quantize) fn run_key(checkpoint: &dyn Checkpoint, options: impl Debug, windows: &[Vec<u32>]) -> u64 {
    let mut digest = Digest::default();
    digest.part(env!("CARGO_PKG_VERSION").as_bytes());
    digest.part(format!("{options:?}").as_bytes());
    windows.iter().for_each(|window| digest.part(bytemuck::cast_slice(window)));
    let path = checkpoint.path();
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    digest.part(whole.as_os_str().as_encoded_bytes());
    // Names, sizes and times stand for the contents of the checkpoint's files. Other files in its folder may change: the run
    // may write there.
    let mut files: Vec<PathBuf> = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "safetensors" || end == "json"));
    files.push(path.to_path_buf());
    files.sort();
    for file in files {
        let Some(metadata) = file.metadata().ok().filter(|metadata| metadata.is_file()) else { continue };
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        digest.part(file.as_os_str().as_encoded_bytes());
        digest.part(format!("{} {changed:?}", metadata.len()).as_bytes());
    }
    for name in checkpoint.names() {
        digest.part(name.as_bytes());
        digest.part(format!("{:?}", checkpoint.tensor(name).map(|tensor| tensor.dims)).as_bytes());
    }
    digest.finish()
}
