//! Writes GGUF files tensor by tensor. A file appears when it is complete.

use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::limits::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_LENGTH, VERSION, alignment_is_valid, key_fault,
    name_fault,
};
use super::metadata::Metadata;
use super::parse::tensor_size;
use super::reader::Gguf;
use super::tensor::TensorInfo;
use super::value::{Array, Value};
use crate::error::{Error, Place, Result};
use crate::format::atomic_file::AtomicFile;
use crate::quant::block::BlockType;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    name: String,
    block_type: BlockType,
    dims: Vec<u64>,
}

impl NewTensor {
    /// A tensor called `name` with 1 to 4 dimensions, none of them 0, the fastest-varying first: `[columns, rows]`.
    pub fn new(name: impl Into<String>, block_type: BlockType, dims: impl Into<Vec<u64>>) -> Self {
        NewTensor { name: name.into(), block_type, dims: dims.into() }
    }

    /// Its dimensions, the fastest-varying first.
    pub(crate) fn dims(&self) -> &[u64] {
        &self.dims
    }
}

impl From<&TensorInfo> for NewTensor {
    fn from(tensor: &TensorInfo) -> Self {
        NewTensor::new(tensor.name(), tensor.block_type(), tensor.dims())
    }
}

/// A tensor and its place.
#[derive(Debug)]
struct Planned {
    tensor: NewTensor,
    nbytes: usize,
    /// From the start of the data.
    offset: u64,
}

/// Writes a GGUF file of version 3.
///
/// The data go to a temporary file in the same folder. [`Writer::finish`] renames it and replaces an existing file. A writer
/// that failed, or is dropped before that, leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// `None` after a failure, when it is unknown how much was written.
    file: Option<BufWriter<AtomicFile>>,
    alignment: u64,
    tensors: Vec<Planned>,
    /// The number of tensors that were written.
    written: usize,
}

impl Writer {
    /// Begins the file at `path` and writes everything but the data of the tensors, which follow in this order.
    ///
    /// The key `general.alignment` sets the alignment of tensors. The default is 32 bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a reader would refuse the metadata or the tensors, or something other than a regular file
    /// is at `path`; [`Error::Io`] when writing fails.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &Metadata,
        tensors: impl IntoIterator<Item = NewTensor>,
    ) -> Result<Writer> {
        let path = path.as_ref().to_path_buf();
        let alignment = check_metadata(metadata)?;
        let tensors = plan(tensors, alignment)?;
        let header = header(metadata, &tensors, alignment);
        let file = Some(BufWriter::with_capacity(1 << 20, AtomicFile::create(&path, false)?));
        let mut writer = Writer { path, file, alignment, tensors, written: 0 };
        writer.write(&header)?;
        Ok(writer)
    }

    /// Writes the bytes of the next tensor, which must be the one called `name`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when another tensor is next or the number of bytes is wrong, and nothing is written.
    /// [`Error::Io`] when writing fails, and the file cannot be finished.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let nbytes = self.expect(name)?.nbytes;
        if bytes.len() != nbytes {
            let expected = format!("{nbytes} bytes for tensor {name:?}");
            return Err(Error::argument("bytes", format_args!("{} bytes", bytes.len()), expected));
        }
        self.write(bytes)?;
        let padding = (nbytes as u64).next_multiple_of(self.alignment) - nbytes as u64;
        self.write(&vec![0; padding as usize])?;
        self.written += 1;
        Ok(())
    }

    /// Encodes the values of the next tensor, which must be the one called `name`, and writes them.
    ///
    /// # Errors
    /// Those of [`Writer::write_tensor`] and of [`BlockType::encode`].
    pub fn write_values(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let next = self.expect(name)?;
        let mut bytes = Vec::with_capacity(next.nbytes);
        next.tensor.block_type.encode(values, &mut bytes)?;
        self.write_tensor(name, &bytes)
    }

    /// Flushes the file to disk, reads it back and renames it to its final path.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when tensors are missing, [`Error::Io`] when writing fails, [`Error::Malformed`] when a
    /// reader finds anything else than was written. No file is left behind.
    pub fn finish(self) -> Result<()> {
        self.finish_after(|_| Ok(()))
    }

    /// [`finish`](Writer::finish), which calls `last` with the temporary path of the complete file before it is renamed.
    pub(crate) fn finish_after(mut self, last: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if let Some(next) = self.tensors.get(self.written) {
            let found = format!("{} of {} tensors written", self.written, self.tensors.len());
            return Err(Error::argument("finish", found, format_args!("all of them, {:?} next", next.tensor.name)));
        }
        let file = self.file.take().ok_or_else(failed_before)?;
        let file = file.into_inner().map_err(|error| Error::io(&self.path, error.into_error()))?;
        self.read_back(file.path())?;
        last(file.path())?;
        file.finish()
    }

    /// Opens the finished file at `path` as a loader does, and compares its tensors with those that were planned.
    fn read_back(&self, path: &Path) -> Result<()> {
        let fault = |place, found: String, expected: String| Error::malformed(&self.path, place, found, expected);
        let file = Gguf::open(path).map_err(|error| match error {
            Error::Malformed { place, found, expected, .. } => fault(place, found, expected),
            other => fault(Place::File, other.to_string(), "a file that can be read back".to_owned()),
        })?;
        for Planned { tensor, nbytes, .. } in &self.tensors {
            let found = file.tensor(&tensor.name).map(|found| (NewTensor::from(found), file.data(found).len()));
            if found.as_ref() != Some(&(tensor.clone(), *nbytes)) {
                let expected = format!("{} {:?} in {nbytes} bytes", tensor.block_type, tensor.dims);
                return Err(fault(Place::Tensor(tensor.name.clone()), format!("{found:?}"), expected));
            }
        }
        if file.tensors().len() != self.tensors.len() {
            let found = format!("{} tensors", file.tensors().len());
            return Err(fault(Place::File, found, format!("{}", self.tensors.len())));
        }
        Ok(())
    }

    /// The next tensor, which must be called `name`.
    fn expect(&self, name: &str) -> Result<&Planned> {
        match self.tensors.get(self.written) {
            Some(next) if next.tensor.name == name => Ok(next),
            Some(next) => {
                Err(Error::argument("name", format_args!("{name:?}"), format_args!("{:?}", next.tensor.name)))
            }
            None => Err(Error::argument("name", format_args!("{name:?}"), "no more tensors")),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let mut file = self.file.take().ok_or_else(failed_before)?;
        file.write_all(bytes).map_err(|source| Error::io(&self.path, source))?;
        self.file = Some(file);
        Ok(())
    }
}

fn failed_before() -> Error {
    Error::argument("writer", "a writer that has failed", "a new writer")
}

/// Checks the metadata as a reader does and returns the alignment.
fn check_metadata(metadata: &Metadata) -> Result<u64> {
    let mut alignment = DEFAULT_ALIGNMENT;
    for (key, value) in metadata.iter() {
        if let Some(fault) = key_fault(key.as_bytes()) {
            return Err(Error::argument("metadata", fault, "1 to 65535 bytes of printable ASCII"));
        }
        let longest = match value {
            Value::String(text) => text.len(),
            Value::Array(Array::String(strings)) => strings.iter().map(<[u8]>::len).fold(strings.len(), usize::max),
            Value::Array(array) => array.len(),
            _ => 0,
        };
        if longest > MAX_LENGTH {
            let found = format!("{longest} bytes or elements of {key:?}");
            return Err(Error::argument("metadata", found, format_args!("at most {MAX_LENGTH}")));
        }
        if key == ALIGNMENT_KEY {
            alignment = match value {
                Value::U32(alignment) if alignment_is_valid(*alignment) => *alignment,
                _ => {
                    let expected = format!("a u32 that is a power of two from 1 to {MAX_ALIGNMENT}");
                    return Err(Error::argument("general.alignment", value, expected));
                }
            };
        }
    }
    Ok(alignment.into())
}

/// Checks the tensors as a reader does and places them one after the other, with no more padding than the alignment needs,
/// as ggml requires.
fn plan(tensors: impl IntoIterator<Item = NewTensor>, alignment: u64) -> Result<Vec<Planned>> {
    let mut names = HashSet::new();
    let mut planned = Vec::new();
    let mut offset = 0u64;
    for tensor in tensors {
        let name = &tensor.name;
        if let Some(fault) = name_fault(name) {
            return Err(Error::argument("tensors", format_args!("{fault}: {name:?}"), "at most 63 bytes without NUL"));
        }
        if !names.insert(name.clone()) {
            return Err(Error::argument("tensors", format_args!("{name:?} a second time"), "each tensor once"));
        }
        if tensor.block_type == BlockType::I2_S {
            let found = format!("{name:?} of I2_S, which has its scale after the last row");
            return Err(Error::argument("tensors", found, "a type whose rows are independent, for example TQ2_0"));
        }
        let (_, nbytes) = tensor_size(tensor.block_type, &tensor.dims)
            .map_err(|(found, expected)| Error::argument("tensors", format_args!("{found} of {name:?}"), expected))?;
        let end = offset.checked_add(nbytes as u64).and_then(|end| end.checked_next_multiple_of(alignment));
        let Some(end) = end.filter(|end| i64::try_from(*end).is_ok()) else {
            return Err(Error::argument("tensors", format_args!("{name:?} ends beyond 2^63"), "fewer bytes in all"));
        };
        planned.push(Planned { tensor, nbytes, offset });
        offset = end;
    }
    Ok(planned)
}

/// Everything before the data of the first tensor.
fn header(metadata: &Metadata, tensors: &[Planned], alignment: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(key.as_bytes(), &mut out);
        out.extend(value.type_id().to_le_bytes());
        put_value(value, &mut out);
    }
    for Planned { tensor, offset, .. } in tensors {
        put_string(tensor.name.as_bytes(), &mut out);
        out.extend((tensor.dims.len() as u32).to_le_bytes());
        out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
        out.extend(tensor.block_type.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    if !tensors.is_empty() {
        out.resize(out.len().next_multiple_of(alignment as usize), 0);
    }
    out
}

fn put_string(text: &[u8], out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}

fn put_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(text) => put_string(text, out),
        Value::Array(array) => put_array(array, out),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(array: &Array, out: &mut Vec<u8>) {
    out.extend(array.type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend_from_slice(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|v| u8::from(*v))),
        Array::String(v) => v.iter().for_each(|text| put_string(text, out)),
        Array::U64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
    }
}
