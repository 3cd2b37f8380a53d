//! What is done of a run, beside its output: after a kill the same command reads it and goes on.
//!
//! A line that names the format, the key of the run, then a record for each finished part of a tensor: length of its
//! description, length of its blocks, description, blocks, checksum. Whatever was being written when the process
//! died fails its checksum and is cut off.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::Value;

use super::flow::beside;
use crate::error::{Error, Result};
use crate::format::Checkpoint;

const MAGIC: &[u8] = b"nybble quantize 1\n";
/// Bytes before the first record.
const START: u64 = MAGIC.len() as u64 + 8;

/// The records of a run.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    /// Place and length of the blocks, and the description, by tensor and part.
    records: HashMap<(String, usize), (u64, usize, Value)>,
}

impl Journal {
    /// The journal of the run with that `key` whose output is `out`: with its records if it is there, empty otherwise.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] when another process is making `out`.
    pub(super) fn open(out: &Path, key: u64) -> Result<Journal> {
        let path = beside(out, ".resume");
        let failed = |source| Error::io(&path, source);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let found = format!("{}, which another process is making", out.display());
                return Err(Error::argument("out", found, "a file of this run alone"));
            }
            // Where the system has no locks there is no harm in going on.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let mut journal = Journal { path: path.clone(), file, end: START, records: HashMap::new() };
        if !journal.read(key).map_err(failed)? {
            journal.file.set_len(0).map_err(failed)?;
            journal.file.seek(SeekFrom::Start(0)).map_err(failed)?;
            journal.file.write_all(&[MAGIC, &key.to_le_bytes()].concat()).map_err(failed)?;
        }
        journal.file.set_len(journal.end).map_err(failed)?;
        Ok(journal)
    }

    /// Reads all whole records. False when the file is none of this run.
    fn read(&mut self, key: u64) -> std::io::Result<bool> {
        let length = self.file.metadata()?.len();
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let mut start = [0; START as usize];
        if length < START || reader.read_exact(&mut start).is_err() || start[..] != [MAGIC, &key.to_le_bytes()].concat()
        {
            return Ok(false);
        }
        loop {
            let mut lengths = [0; 16];
            if length - self.end < 24 || reader.read_exact(&mut lengths).is_err() {
                return Ok(true);
            }
            let (text, blocks) = (number(&lengths[..8]), number(&lengths[8..]));
            let Some(all) = text.checked_add(blocks).and_then(|sum| sum.checked_add(24)) else { return Ok(true) };
            if all > length - self.end {
                return Ok(true);
            }
            let mut body = vec![0; (text + blocks) as usize];
            let mut sum = [0; 8];
            reader.read_exact(&mut body)?;
            reader.read_exact(&mut sum)?;
            let (text, blocks) = body.split_at(text as usize);
            let Ok(description) = serde_json::from_slice::<Value>(text) else { return Ok(true) };
            let (Some(name), Some(part)) = (description["name"].as_str(), description["part"].as_u64()) else {
                return Ok(true);
            };
            if checksum(&body) != number(&sum) {
                return Ok(true);
            }
            let place = self.end + 16 + text.len() as u64;
            self.records.insert((name.to_owned(), part as usize), (place, blocks.len(), description));
            self.end += all;
        }
    }

    /// The description of a part of a tensor, if it is done.
    pub(super) fn description(&self, name: &str, part: usize) -> Option<&Value> {
        self.records.get(&(name.to_owned(), part)).map(|(_, _, description)| description)
    }

    /// The blocks of a part of a tensor, if it is done.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn blocks(&self, name: &str, part: usize) -> Result<Option<Vec<u8>>> {
        let Some((place, length, _)) = self.records.get(&(name.to_owned(), part)) else { return Ok(None) };
        let mut blocks = vec![0; *length];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(*place))
            .and_then(|_| file.read_exact(&mut blocks))
            .map_err(|source| Error::io(&self.path, source))?;
        Ok(Some(blocks))
    }

    /// Adds a finished part. `description` has its `name` and `part`.
    ///
    /// # Errors
    /// [`Error::Io`]: the record is not there then.
    pub(super) fn add(&mut self, name: &str, part: usize, description: Value, blocks: &[u8]) -> Result<()> {
        let text = description.to_string().into_bytes();
        let lengths = [(text.len() as u64).to_le_bytes(), (blocks.len() as u64).to_le_bytes()].concat();
        let body = [&text, blocks].concat();
        let record = [&lengths, &body, &checksum(&body).to_le_bytes()[..]].concat();
        let mut file = &self.file;
        let written = file.seek(SeekFrom::Start(self.end)).and_then(|_| file.write_all(&record));
        written.map_err(|source| Error::io(&self.path, source))?;
        let place = self.end + 16 + text.len() as u64;
        self.records.insert((name.to_owned(), part), (place, blocks.len(), description));
        self.end += record.len() as u64;
        Ok(())
    }
}

/// A number that is the same for runs with the same result: those with the same `options`.
pub(super) fn key(checkpoint: &dyn Checkpoint, options: impl Hash, windows: &[Vec<u32>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    options.hash(&mut hasher);
    windows.hash(&mut hasher);
    let path = checkpoint.path();
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf()).hash(&mut hasher);
    // Names, sizes and times of the files stand for their bytes. What else is in the folder may change: the run writes there.
    let mut files: Vec<PathBuf> = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "safetensors" || end == "json"));
    files.push(path.to_path_buf());
    files.sort();
    for file in files {
        let Some(metadata) = file.metadata().ok().filter(|metadata| metadata.is_file()) else { continue };
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        (file, metadata.len(), changed).hash(&mut hasher);
    }
    for name in checkpoint.names() {
        (name, checkpoint.tensor(name).map(|tensor| tensor.dims)).hash(&mut hasher);
    }
    hasher.finish()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(journal: &mut Journal, name: &str, part: usize, blocks: &[u8]) {
        journal.add(name, part, json!({"name": name, "part": part, "error": 0.5}), blocks).unwrap();
    }

    #[test]
    fn records_are_there_again_and_torn_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model.gguf");
        let mut journal = Journal::open(&out, 7).unwrap();
        record(&mut journal, "a", 0, &[1, 2, 3]);
        record(&mut journal, "a", 1, &[]);
        record(&mut journal, "b", 0, &[9; 100]);
        let (path, whole) = (journal.path.clone(), journal.end);
        drop(journal);
        for length in (START..=whole).rev() {
            File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
            let journal = Journal::open(&out, 7).unwrap();
            assert_eq!(journal.blocks("b", 0).unwrap().is_some(), length == whole, "{length} bytes");
            if let Some(blocks) = journal.blocks("a", 0).unwrap() {
                assert_eq!(blocks, [1, 2, 3]);
                assert_eq!(journal.description("a", 0).unwrap()["error"], 0.5);
            }
        }
    }

    #[test]
    fn a_damaged_record_and_all_after_it_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model.gguf");
        let mut journal = Journal::open(&out, 7).unwrap();
        record(&mut journal, "a", 0, &[1; 50]);
        let middle = journal.end;
        record(&mut journal, "b", 0, &[2; 50]);
        record(&mut journal, "c", 0, &[3; 50]);
        let path = journal.path.clone();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[middle as usize + 60] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let journal = Journal::open(&out, 7).unwrap();
        let there = ["a", "b", "c"].map(|name| journal.description(name, 0).is_some());
        assert_eq!(there, [true, false, false]);
    }

    #[test]
    fn another_run_starts_anew_and_one_at_a_time_works_on_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model.gguf");
        let mut journal = Journal::open(&out, 7).unwrap();
        record(&mut journal, "a", 0, &[1]);
        assert!(Journal::open(&out, 7).unwrap_err().to_string().contains("another process is making"));
        drop(journal);
        assert!(Journal::open(&out, 8).unwrap().description("a", 0).is_none());
        let journal = Journal::open(&out, 7).unwrap();
        assert!(journal.description("a", 0).is_none());
    }
}
