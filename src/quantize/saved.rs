//! Numbers with which a run goes on after a kill, in a file beside its output.
//!
//! A line that names the format, the key of the run, how far it was, a checksum of these two and the numbers, then the
//! numbers. A file of another run, another length or another checksum is none.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const MAGIC: &[u8; 16] = b"nybble numbers1\n";
/// Bytes before the first number.
const START: u64 = MAGIC.len() as u64 + 24;
/// Numbers that are read at a time where only their checksum is asked for.
const PIECE: usize = 1 << 18;
/// The part of a run's time that saving may take.
const SHARE: u32 = 100;
/// A save that took long by chance, because the machine slept, does not put off the next one for longer than this.
const LONGEST: Duration = Duration::from_secs(600);

/// A file with numbers that were saved.
#[derive(Debug)]
pub(super) struct Saved {
    path: PathBuf,
    file: File,
    /// How far the run was.
    pub(super) number: u64,
}

impl Saved {
    /// What the run with that `key` saved at `path`, `count` numbers; `None` if there is no such file, or a damaged one.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn open(path: &Path, key: u64, count: usize) -> Result<Option<Saved>> {
        let failed = |source| Error::io(path, source);
        let mut file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        if file.metadata().map_err(failed)?.len() != START + 4 * count as u64 {
            return Ok(None);
        }
        let mut start = [0; START as usize];
        file.read_exact(&mut start).map_err(failed)?;
        let (magic, rest) = start.split_at(MAGIC.len());
        let [found, number, sum] =
            [0, 8, 16].map(|at| rest[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        if magic != MAGIC || found != key {
            return Ok(None);
        }
        let saved = Saved { path: path.to_path_buf(), file, number };
        let mut hasher = hasher(key, number);
        let mut piece = vec![0.0; PIECE.min(count)];
        for at in (0..count).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(count - at)];
            saved.read(at, piece)?;
            hasher.write(bytemuck::cast_slice(piece));
        }
        Ok((hasher.finish() == sum).then_some(saved))
    }

    /// Fills `out` with the numbers from the one at `at` on.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn read(&self, at: usize, out: &mut [f32]) -> Result<()> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(START + 4 * at as u64))
            .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(out)))
            .map_err(|source| Error::io(&self.path, source))
    }
}

/// Numbers on their way into a file, which gets its name, and takes the place of the one before it, when it is whole.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    new: PathBuf,
    file: File,
    hasher: DefaultHasher,
    header: [u64; 2],
    is_whole: bool,
}

impl Writer {
    /// Begins a file for [`Saved::open`].
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn create(path: &Path, key: u64, number: u64) -> Result<Writer> {
        // What a kill leaves behind under this name is overwritten by the next run.
        let new = path.with_extension("resume-new");
        let mut file = File::create(&new).map_err(|source| Error::io(path, source))?;
        file.write_all(&[0; START as usize]).map_err(|source| Error::io(path, source))?;
        let (path, hasher) = (path.to_path_buf(), hasher(key, number));
        Ok(Writer { path, new, file, hasher, header: [key, number], is_whole: false })
    }

    /// Adds numbers.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn write(&mut self, numbers: &[f32]) -> Result<()> {
        let bytes = bytemuck::cast_slice(numbers);
        // One stream of bytes: where they are cut makes no difference.
        self.hasher.write(bytes);
        self.file.write_all(bytes).map_err(|source| Error::io(&self.path, source))
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn finish(mut self) -> Result<()> {
        let [key, number] = self.header;
        let start = [&MAGIC[..], &[key, number, self.hasher.finish()].map(u64::to_le_bytes).concat()].concat();
        let written = self.file.seek(SeekFrom::Start(0)).and_then(|_| self.file.write_all(&start));
        written
            .and_then(|()| std::fs::rename(&self.new, &self.path))
            .map_err(|source| Error::io(&self.path, source))?;
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_whole {
            // The error that led here says more than a second one about the rest of a file.
            let _ = std::fs::remove_file(&self.new);
        }
    }
}

fn hasher(key: u64, number: u64) -> DefaultHasher {
    let mut hasher = DefaultHasher::new();
    [key, number].iter().for_each(|x| hasher.write(&x.to_le_bytes()));
    hasher
}

/// Tells when it is time to save, so that saving takes a hundredth of the time.
#[derive(Debug)]
pub(super) struct Pace {
    last: Instant,
    cost: Duration,
}

impl Pace {
    /// It is time at once, since nobody knows yet what it takes.
    pub(super) fn new() -> Pace {
        Pace { last: Instant::now(), cost: Duration::ZERO }
    }

    /// Whether it is time.
    pub(super) fn is_due(&self) -> bool {
        self.last.elapsed() >= interval(self.cost)
    }

    /// Saves, and learns what that takes.
    ///
    /// # Errors
    /// Those of `save`.
    pub(super) fn save(&mut self, save: impl FnOnce() -> Result<()>) -> Result<()> {
        let started = Instant::now();
        save()?;
        self.last = Instant::now();
        self.cost = self.last - started;
        Ok(())
    }
}

/// How long to wait after a save that took `cost`.
fn interval(cost: Duration) -> Duration {
    (SHARE * cost).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: [f32; 6] = [1.0, -2.5, 0.0, f32::MAX, f32::MIN_POSITIVE, 7.0];

    fn save(path: &Path, pieces: &[&[f32]]) {
        let mut writer = Writer::create(path, 7, 3).unwrap();
        pieces.iter().for_each(|piece| writer.write(piece).unwrap());
        writer.finish().unwrap();
    }

    #[test]
    fn numbers_are_there_again_from_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf.resume-state");
        assert!(Saved::open(&path, 7, 6).unwrap().is_none());
        save(&path, &[&NUMBERS[..1], &[], &NUMBERS[1..]]);
        let saved = Saved::open(&path, 7, 6).unwrap().unwrap();
        assert_eq!(saved.number, 3);
        for at in [0, 4, 2] {
            let mut found = [0.0; 2];
            saved.read(at, &mut found).unwrap();
            assert_eq!(found, NUMBERS[at..at + 2]);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn files_of_other_runs_and_damaged_ones_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf.resume-state");
        save(&path, &[&NUMBERS]);
        assert!(Saved::open(&path, 8, 6).unwrap().is_none(), "another key");
        assert!(Saved::open(&path, 7, 5).unwrap().is_none(), "another length");
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            assert!(Saved::open(&path, 7, 6).unwrap().is_none(), "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(Saved::open(&path, 7, 6).unwrap().is_none(), "{at} bytes");
        }
        std::fs::write(&path, whole).unwrap();
        assert!(Saved::open(&path, 7, 6).unwrap().is_some());
    }

    #[test]
    fn a_file_that_is_not_finished_leaves_the_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf.resume-state");
        save(&path, &[&NUMBERS]);
        let mut writer = Writer::create(&path, 7, 4).unwrap();
        writer.write(&[0.0; 6]).unwrap();
        drop(writer);
        assert_eq!(Saved::open(&path, 7, 6).unwrap().unwrap().number, 3);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn saving_takes_a_hundredth_of_the_time_and_a_sleep_does_not_end_it() {
        assert_eq!(interval(Duration::from_millis(50)), Duration::from_secs(5));
        assert_eq!(interval(Duration::from_secs(3600)), Duration::from_secs(600));
        assert!(Pace::new().is_due());
    }
}
