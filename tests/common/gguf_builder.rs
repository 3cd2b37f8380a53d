//! Builds valid and invalid GGUF files byte by byte. Nothing is checked, and no code is shared with the crate.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};

use nybble::format::gguf::Gguf;
use nybble::{Error, Place};

/// The parts of a file, which `bytes` joins.
pub(crate) struct Builder {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// Overrides the number of tensors in the header.
    pub(crate) tensor_count: Option<u64>,
    /// Overrides the number of keys in the header.
    pub(crate) entry_count: Option<u64>,
    /// The data section is aligned to this.
    pub(crate) alignment: usize,
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Builder {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            entry_count: None,
            alignment: 32,
            entries: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
        }
    }

    /// Adds a key with a value of type `type_id`.
    pub(crate) fn entry(mut self, key: impl AsRef<[u8]>, type_id: u32, value: impl AsRef<[u8]>) -> Self {
        self.entries.push([string(key).as_slice(), &type_id.to_le_bytes(), value.as_ref()].concat());
        self
    }

    /// Adds bytes in place of a key and its value.
    pub(crate) fn raw_entry(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.entries.push(bytes.as_ref().to_vec());
        self
    }

    /// Adds a tensor description.
    pub(crate) fn tensor(mut self, name: impl AsRef<[u8]>, dims: &[u64], type_id: u32, offset: u64) -> Self {
        let mut bytes = string(name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(type_id.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        self.tensors.push(bytes);
        self
    }

    /// Adds bytes in place of a tensor description.
    pub(crate) fn raw_tensor(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.tensors.push(bytes.as_ref().to_vec());
        self
    }

    /// Sets the data section.
    pub(crate) fn data(mut self, data: impl AsRef<[u8]>) -> Self {
        self.data = data.as_ref().to_vec();
        self
    }

    /// Returns the offset of the data section.
    pub(crate) fn data_start(&self) -> usize {
        self.header().len().next_multiple_of(self.alignment)
    }

    fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.entry_count.unwrap_or(self.entries.len() as u64).to_le_bytes());
        out.extend(self.entries.concat());
        out.extend(self.tensors.concat());
        out
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        if !self.data.is_empty() {
            out.resize(self.data_start(), 0);
            out.extend(&self.data);
        }
        out
    }
}

/// Encodes a string: a 64-bit length and the bytes.
pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// Encodes an array: element type, number of elements, and their bytes.
pub(crate) fn array(type_id: u32, count: u64, elements: impl AsRef<[u8]>) -> Vec<u8> {
    [type_id.to_le_bytes().as_slice(), &count.to_le_bytes(), elements.as_ref()].concat()
}

/// A file that is deleted at the end of the test.
pub(crate) struct Saved {
    folder: tempfile::TempDir,
}

impl Saved {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let saved = Saved { folder: tempfile::tempdir().unwrap() };
        saved.write(bytes);
        saved
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("model.gguf")
    }

    pub(crate) fn write(&self, bytes: &[u8]) {
        std::fs::write(self.path(), bytes).unwrap();
    }

    /// Opens the file with and without a memory map and compares the results.
    pub(crate) fn open(&self) -> Result<Gguf, Error> {
        open_both_ways(&self.path())
    }
}

pub(crate) fn open_both_ways(path: &Path) -> Result<Gguf, Error> {
    match (Gguf::open(path), Gguf::open_unmapped(path)) {
        (Ok(mapped), Ok(read)) => {
            // As a string, because NaN is not equal to itself.
            let text = |file: &Gguf| format!("{:?} {:?}", file.metadata().iter().collect::<Vec<_>>(), file.tensors());
            assert_eq!(text(&mapped), text(&read));
            Ok(mapped)
        }
        (Err(mapped), Err(read)) => {
            assert_eq!(mapped.to_string(), read.to_string());
            Err(mapped)
        }
        (mapped, read) => panic!("mapped and read differ: {mapped:?} {read:?}"),
    }
}

/// Returns the place, found and expected parts of a format error.
pub(crate) fn fault(bytes: &[u8]) -> (Place, String, String) {
    let saved = Saved::new(bytes);
    match saved.open() {
        Err(Error::Malformed { path, place, found, expected }) => {
            assert_eq!(path, saved.path());
            (place, found, expected)
        }
        other => panic!("a malformed file was not refused as such: {other:?}"),
    }
}

/// Asserts that a file is refused at `place` with these found and expected parts.
#[track_caller]
pub(crate) fn assert_refused(file: &Builder, place: Place, found: &str, expected: &str) {
    assert_eq!(fault(&file.bytes()), (place, found.to_owned(), expected.to_owned()));
}
