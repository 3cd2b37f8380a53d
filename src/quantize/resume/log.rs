//! The log of finished tensors, from which the same command continues after a kill.
//!
//! Layout: a line that names the file format, the key of the run, then one record per finished part of a tensor. A record is the
//! length of its description, the length of its blocks, the description as JSON, the blocks, and a checksum. An incomplete
//! record at the end fails its checksum and is cut off. A log of another run or of another version of nybble is discarded.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::digest::{checksum, number};
use crate::error::{Error, Result};

const MAGIC: &[u8] = b"nybble quantize 2\n";
/// Bytes before the first record.
const START: u64 = MAGIC.len() as u64 + 8;

/// The records of a run, in a file that this process has locked.
#[derive(Debug)]
pub(in crate::quantize) struct ResumeLog {
    path: PathBuf,
    file: File,
    end: u64,
    /// By tensor and part: offset and length of the blocks, and the description.
    records: HashMap<(String, usize), (u64, usize, Value)>,
}

impl ResumeLog {
    /// Opens the log of the run with that `key` at `path`. It has the records of an earlier attempt, or none. `out` is the
    /// output, for the error.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] while another process writes the log.
    pub(in crate::quantize) fn open(path: &Path, out: &Path, key: u64) -> Result<ResumeLog> {
        let failed = |source| Error::io(path, source);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let found = format!("{}, which another process is writing", out.display());
                return Err(Error::argument("out", found, "a file that no other run writes"));
            }
            // Continue on file systems without locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let mut log = ResumeLog { path: path.to_path_buf(), file, end: START, records: HashMap::new() };
        if !log.read(key).map_err(failed)? {
            log.file.set_len(0).map_err(failed)?;
            log.file.seek(SeekFrom::Start(0)).map_err(failed)?;
            log.file.write_all(&[MAGIC, &key.to_le_bytes()].concat()).map_err(failed)?;
        }
        log.file.set_len(log.end).map_err(failed)?;
        Ok(log)
    }

    /// Reads all whole records. Returns false if the file does not belong to this run.
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
            let offset = self.end + 16 + text.len() as u64;
            self.records.insert((name.to_owned(), part as usize), (offset, blocks.len(), description));
            self.end += all;
        }
    }

    /// The description of a finished part of a tensor.
    pub(in crate::quantize) fn description(&self, name: &str, part: usize) -> Option<&Value> {
        self.records.get(&(name.to_owned(), part)).map(|(_, _, description)| description)
    }

    /// The blocks of a finished part of a tensor.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn blocks(&self, name: &str, part: usize) -> Result<Option<Vec<u8>>> {
        let Some((offset, length, _)) = self.records.get(&(name.to_owned(), part)) else { return Ok(None) };
        let mut blocks = vec![0; *length];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(*offset))
            .and_then(|_| file.read_exact(&mut blocks))
            .map_err(|source| Error::io(&self.path, source))?;
        Ok(Some(blocks))
    }

    /// Adds a finished part. `description` contains its `name` and `part`.
    ///
    /// # Errors
    /// [`Error::Io`]; the record is not in the log then.
    pub(in crate::quantize) fn add(
        &mut self,
        name: &str,
        part: usize,
        description: Value,
        blocks: &[u8],
    ) -> Result<()> {
        let text = description.to_string().into_bytes();
        let lengths = [(text.len() as u64).to_le_bytes(), (blocks.len() as u64).to_le_bytes()].concat();
        let body = [&text, blocks].concat();
        let record = [&lengths, &body, &checksum(&body).to_le_bytes()[..]].concat();
        let mut file = &self.file;
        let written = file.seek(SeekFrom::Start(self.end)).and_then(|_| file.write_all(&record));
        written.map_err(|source| Error::io(&self.path, source))?;
        let offset = self.end + 16 + text.len() as u64;
        self.records.insert((name.to_owned(), part), (offset, blocks.len(), description));
        self.end += record.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn open(path: &Path, key: u64) -> Result<ResumeLog> {
        ResumeLog::open(path, Path::new("model.gguf"), key)
    }

    fn record(log: &mut ResumeLog, name: &str, part: usize, blocks: &[u8]) {
        log.add(name, part, json!({"name": name, "part": part, "error": 0.5}), blocks).unwrap();
    }

    #[test]
    fn whole_records_are_read_back_and_torn_ones_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf.resume");
        let mut log = open(&path, 7).unwrap();
        record(&mut log, "a", 0, &[1, 2, 3]);
        record(&mut log, "a", 1, &[]);
        record(&mut log, "b", 0, &[9; 100]);
        let whole = log.end;
        drop(log);
        for length in (START..=whole).rev() {
            File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
            let log = open(&path, 7).unwrap();
            assert_eq!(log.blocks("b", 0).unwrap().is_some(), length == whole, "{length} bytes");
            if let Some(blocks) = log.blocks("a", 0).unwrap() {
                assert_eq!(blocks, [1, 2, 3]);
                assert_eq!(log.description("a", 0).unwrap()["error"], 0.5);
            }
        }
    }

    #[test]
    fn a_damaged_record_and_all_after_it_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf.resume");
        let mut log = open(&path, 7).unwrap();
        record(&mut log, "a", 0, &[1; 50]);
        let middle = log.end;
        record(&mut log, "b", 0, &[2; 50]);
        record(&mut log, "c", 0, &[3; 50]);
        drop(log);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[middle as usize + 60] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let log = open(&path, 7).unwrap();
        let there = ["a", "b", "c"].map(|name| log.description(name, 0).is_some());
        assert_eq!(there, [true, false, false]);
    }

    #[test]
    fn another_run_starts_with_an_empty_log_and_a_locked_log_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf.resume");
        let mut log = open(&path, 7).unwrap();
        record(&mut log, "a", 0, &[1]);
        assert!(open(&path, 7).unwrap_err().to_string().contains("another process is writing"));
        drop(log);
        assert!(open(&path, 8).unwrap().description("a", 0).is_none());
        let log = open(&path, 7).unwrap();
        assert!(log.description("a", 0).is_none());
    }
}
