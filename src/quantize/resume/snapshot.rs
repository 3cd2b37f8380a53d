//! Snapshots of numbers, from which a killed run continues.
//!
//! Layout: a line that names the file format, the key of the run, the position of the run, a checksum of both and of the
//! numbers, then the numbers. A file with another key, length or checksum counts as absent.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::digest::{Digest, number};
use crate::error::{Error, Result};

const MAGIC: &[u8; 16] = b"nybble numbers2\n";
/// Bytes before the first number.
const START: u64 = MAGIC.len() as u64 + 24;
/// Numbers per read while a checksum is computed.
const CHUNK: usize = 1 << 18;
/// Saving may take one part in this many of a run's time.
const SHARE: u32 = 100;
/// The longest pause between saves, for a save that took long by accident, for example because the machine slept.
const LONGEST: Duration = Duration::from_secs(600);

/// The file for the snapshots of a run, and the key of the run.
#[derive(Debug, Clone)]
pub(in crate::quantize) struct SnapshotFile {
    pub(in crate::quantize) path: PathBuf,
    /// The key of the run.
    pub(in crate::quantize) key: u64,
}

impl SnapshotFile {
    /// The run's snapshot of `count` numbers; `None` if there is none, or a damaged one.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn open(&self, count: usize) -> Result<Option<Snapshot>> {
        let failed = |source| Error::io(&self.path, source);
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        if file.metadata().map_err(failed)?.len() != START + 4 * count as u64 {
            return Ok(None);
        }
        let mut start = [0; START as usize];
        file.read_exact(&mut start).map_err(failed)?;
        let (magic, rest) = start.split_at(MAGIC.len());
        let [key, position, sum] = [0, 8, 16].map(|at| number(&rest[at..at + 8]));
        if magic != MAGIC || key != self.key {
            return Ok(None);
        }
        let snapshot = Snapshot { path: self.path.clone(), file, position };
        let mut digest = digest(key, position);
        let mut chunk = vec![0.0; CHUNK.min(count)];
        for at in (0..count).step_by(CHUNK) {
            let chunk = &mut chunk[..CHUNK.min(count - at)];
            snapshot.read(at, chunk)?;
            digest.stream(bytemuck::cast_slice(chunk));
        }
        Ok((digest.finish() == sum).then_some(snapshot))
    }

    /// Begins a snapshot of the run at `position`. It replaces the one before when it is finished.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn create(&self, position: u64) -> Result<SnapshotWriter> {
        let path = self.path.clone();
        // The next run overwrites what a kill leaves under this name.
        let unfinished = path.with_extension("resume-new");
        let mut file = File::create(&unfinished).map_err(|source| Error::io(&path, source))?;
        file.write_all(&[0; START as usize]).map_err(|source| Error::io(&path, source))?;
        let header = [self.key, position];
        Ok(SnapshotWriter { path, unfinished, file, digest: digest(self.key, position), header, is_whole: false })
    }
}

/// A snapshot that was read back and checked.
#[derive(Debug)]
pub(in crate::quantize) struct Snapshot {
    path: PathBuf,
    file: File,
    /// The layer or step at which the run continues.
    pub(in crate::quantize) position: u64,
}

impl Snapshot {
    /// Fills `out` with the numbers from index `at`.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(START + 4 * at as u64))
            .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(out)))
            .map_err(|source| Error::io(&self.path, source))
    }
}

/// Writes a snapshot under another name and renames it when it is whole.
#[derive(Debug)]
pub(in crate::quantize) struct SnapshotWriter {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
    digest: Digest,
    header: [u64; 2],
    is_whole: bool,
}

impl SnapshotWriter {
    /// Appends numbers.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn write(&mut self, numbers: &[f32]) -> Result<()> {
        let bytes = bytemuck::cast_slice(numbers);
        self.digest.stream(bytes);
        self.file.write_all(bytes).map_err(|source| Error::io(&self.path, source))
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn finish(mut self) -> Result<()> {
        let [key, position] = self.header;
        let start = [&MAGIC[..], &[key, position, self.digest.finish()].map(u64::to_le_bytes).concat()].concat();
        let written = self.file.seek(SeekFrom::Start(0)).and_then(|_| self.file.write_all(&start));
        written
            .and_then(|()| std::fs::rename(&self.unfinished, &self.path))
            .map_err(|source| Error::io(&self.path, source))?;
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.is_whole {
            // The error that led here matters more than a second one about cleaning up.
            let _ = std::fs::remove_file(&self.unfinished);
        }
    }
}

fn digest(key: u64, position: u64) -> Digest {
    let mut digest = Digest::default();
    [key, position].iter().for_each(|x| digest.stream(&x.to_le_bytes()));
    digest
}

/// Decides when to save, so that saving takes about a hundredth of the time.
#[derive(Debug)]
pub(in crate::quantize) struct SavePace {
    last: Instant,
    cost: Duration,
}

impl SavePace {
    /// The first save is due at once, because its cost is not known yet.
    pub(in crate::quantize) fn new() -> SavePace {
        SavePace { last: Instant::now(), cost: Duration::ZERO }
    }

    /// Whether a save is due.
    pub(in crate::quantize) fn is_due(&self) -> bool {
        self.last.elapsed() >= interval(self.cost)
    }

    /// Saves, and measures how long that takes.
    ///
    /// # Errors
    /// Those of `save`.
    pub(in crate::quantize) fn save(&mut self, save: impl FnOnce() -> Result<()>) -> Result<()> {
        let started = Instant::now();
        save()?;
        self.last = Instant::now();
        self.cost = self.last - started;
        Ok(())
    }
}

/// The pause after a save that took `cost`.
fn interval(cost: Duration) -> Duration {
    (SHARE * cost).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const NUMBERS: [f32; 6] = [1.0, -2.5, 0.0, f32::MAX, f32::MIN_POSITIVE, 7.0];

    fn file(folder: &Path, key: u64) -> SnapshotFile {
        SnapshotFile { path: folder.join("out.gguf.resume-state"), key }
    }

    fn save(file: &SnapshotFile, chunks: &[&[f32]]) {
        let mut writer = file.create(3).unwrap();
        chunks.iter().for_each(|chunk| writer.write(chunk).unwrap());
        writer.finish().unwrap();
    }

    #[test]
    fn saved_numbers_are_read_back_from_any_index() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path(), 7);
        assert!(file.open(6).unwrap().is_none());
        save(&file, &[&NUMBERS[..1], &[], &NUMBERS[1..]]);
        let snapshot = file.open(6).unwrap().unwrap();
        assert_eq!(snapshot.position, 3);
        for at in [0, 4, 2] {
            let mut found = [0.0; 2];
            snapshot.read(at, &mut found).unwrap();
            assert_eq!(found, NUMBERS[at..at + 2]);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn snapshots_of_other_runs_and_damaged_ones_count_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let own = file(folder.path(), 7);
        save(&own, &[&NUMBERS]);
        assert!(file(folder.path(), 8).open(6).unwrap().is_none(), "another key");
        assert!(own.open(5).unwrap().is_none(), "another length");
        let whole = std::fs::read(&own.path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&own.path, bytes).unwrap();
            assert!(own.open(6).unwrap().is_none(), "byte {at}");
            std::fs::write(&own.path, &whole[..at]).unwrap();
            assert!(own.open(6).unwrap().is_none(), "{at} bytes");
        }
        std::fs::write(&own.path, whole).unwrap();
        assert!(own.open(6).unwrap().is_some());
    }

    #[test]
    fn an_unfinished_snapshot_leaves_the_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path(), 7);
        save(&file, &[&NUMBERS]);
        let mut writer = file.create(4).unwrap();
        writer.write(&[0.0; 6]).unwrap();
        drop(writer);
        assert_eq!(file.open(6).unwrap().unwrap().position, 3);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn saving_takes_a_hundredth_of_the_time_up_to_a_longest_pause() {
        assert_eq!(interval(Duration::from_millis(50)), Duration::from_secs(5));
        assert_eq!(interval(Duration::from_secs(3600)), Duration::from_secs(600));
        assert!(SavePace::new().is_due());
    }
}
