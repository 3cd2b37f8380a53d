//! An open file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};

use super::parse::{Parsed, parse};
use super::shards;
use super::tensor::TensorInfo;
use super::value::{Array, Metadata, StringArray, Value};
use crate::error::{Error, Place, Result};
use crate::format::mapped::Bytes;
use crate::quant::block::BlockType;

/// How to open a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// Maps the file into memory (the default), so that only what is used is read. While it is mapped nobody may shorten
    /// or overwrite the file: touching a page that is gone ends the process (SIGBUS). Without mapping the whole file is
    /// read at once and may change afterwards.
    pub mmap: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { mmap: true }
    }
}

/// A GGUF model: its metadata, its tensors, and access to their bytes.
///
/// A model that was cut into several files (`-00001-of-00003.gguf`) is opened by any one of them; the metadata are those of
/// the first and the tensors those of all.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    shards: Vec<Shard>,
}

/// One file of a model.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

/// Opens and parses the file that is number `shard` of its model.
pub(super) fn open_shard(path: &Path, shard: usize, options: &OpenOptions) -> Result<(Shard, Parsed)> {
    let bytes = Bytes::open(path, options.mmap).map_err(|source| Error::io(path, source))?;
    let parsed = parse(path, &bytes, shard)?;
    Ok((Shard { path: path.to_path_buf(), bytes }, parsed))
}

impl Gguf {
    /// Opens a model: maps the file, and the others of its model if there are several, and checks all but the tensors' data.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses, [`Error::Malformed`] when a file breaks the format, [`Error::Missing`] when
    /// one of several files is not there.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        Gguf::open_with(path, &OpenOptions::default())
    }

    /// As [`Gguf::open`], but reads the files into memory instead of mapping them.
    ///
    /// # Errors
    /// Those of [`Gguf::open`].
    pub fn open_unmapped(path: impl AsRef<Path>) -> Result<Gguf> {
        Gguf::open_with(path, &OpenOptions { mmap: false })
    }

    /// Opens a model as `options` say.
    ///
    /// # Errors
    /// Those of [`Gguf::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Gguf> {
        let (version, metadata, files) = shards::open(path.as_ref(), options)?;
        let mut gguf = Gguf {
            version,
            metadata,
            tensors: Vec::new(),
            index: HashMap::new(),
            shards: Vec::with_capacity(files.len()),
        };
        for (shard, tensors) in files {
            for tensor in tensors {
                match gguf.index.entry(tensor.name.clone()) {
                    Entry::Vacant(free) => free.insert(gguf.tensors.len()),
                    Entry::Occupied(_) => {
                        let place = Place::Tensor(tensor.name);
                        let found = "a tensor that an earlier file of the model holds too";
                        return Err(Error::malformed(shard.path, place, found, "each tensor once"));
                    }
                };
                gguf.tensors.push(tensor);
            }
            gguf.shards.push(shard);
        }
        Ok(gguf)
    }

    /// The file; of several, the first.
    pub fn path(&self) -> &Path {
        self.shards.first().map_or(Path::new(""), |shard| &shard.path)
    }

    /// The files of the model, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The integer under `key`, of whatever integer type.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the value is something else or does not fit; so for the other typed getters.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 2^32 - 1", Value::as_u32)
    }

    /// The integer under `key`, of whatever integer type.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an integer from 0 to 2^64 - 1", Value::as_u64)
    }

    /// The float under `key`. It may be infinite or NaN.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a float", Value::as_f32)
    }

    /// The boolean under `key`.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// The text under `key`.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`], and when the string is not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string of valid UTF-8", Value::as_str)
    }

    /// The array of strings under `key`.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_strings(&self, key: &str) -> Result<Option<&StringArray>> {
        self.typed(key, "an array of strings", Value::as_strings)
    }

    /// The array of integers under `key`, of whatever integer type.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_array_u32(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.typed(key, "an array of integers from 0 to 2^32 - 1", |value| value.as_array()?.to_integers())
    }

    /// The array of integers under `key`, of whatever integer type.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_array_i32(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.typed(key, "an array of integers from -2^31 to 2^31 - 1", |value| value.as_array()?.to_integers())
    }

    /// The array of floats under `key`.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_array_f32(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of floats", |value| value.as_array()?.to_f32())
    }

    /// The array of booleans under `key`.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_array_bool(&self, key: &str) -> Result<Option<&[bool]>> {
        self.typed(key, "an array of booleans", |value| value.as_array()?.as_bools())
    }

    /// The integers under `key`, one a layer: an array of them, or one that all of the `layers` layers share.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`], and when the array has another length.
    pub fn per_layer_u32(&self, key: &str, layers: usize) -> Result<Option<Vec<u32>>> {
        let expected = format!("an integer from 0 to 2^32 - 1, or an array of {layers} of them");
        self.typed(key, &expected, |value| match value {
            Value::Array(array) if array.len() == layers => array.to_integers(),
            _ => value.as_u32().map(|one| vec![one; layers]),
        })
    }

    /// The booleans under `key`, one a layer: an array of them, or one that all of the `layers` layers share.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`], and when the array has another length.
    pub fn per_layer_bool(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let expected = format!("a boolean, or an array of {layers} of them");
        self.typed(key, &expected, |value| match value {
            Value::Array(Array::Bool(array)) if array.len() == layers => Some(array.clone()),
            _ => value.as_bool().map(|one| vec![one; layers]),
        })
    }

    /// The value under `key` as `read` takes it, which must be able to.
    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        typed(self.path(), &self.metadata, key, expected, read)
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|at| self.tensors.get(*at))
    }

    /// The bytes of `tensor`, which must be one of this model's: [`TensorInfo::nbytes`] bytes, and empty for a tensor that
    /// lies outside the files of this model. They start at a multiple of the file's alignment, but in memory they need not.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let bytes = self.shards.get(tensor.shard).and_then(|shard| shard.bytes.get(tensor.bytes.clone()));
        bytes.unwrap_or_default()
    }

    /// The values of `tensor`, row after row.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when nybble does not know how to decode the type.
    pub fn decode(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let block_type = tensor.block_type;
        if !block_type.is_supported() {
            return Err(Error::Unsupported {
                path: self.shards.get(tensor.shard).map_or(PathBuf::new(), |shard| shard.path.clone()),
                place: Place::Tensor(tensor.name.clone()),
                what: format!("block type {block_type}"),
                supported: format!("supported: {}", BlockType::names(BlockType::is_supported)),
            });
        }
        let mut values = vec![0.0; tensor.elements];
        block_type.decode(self.data(tensor), &mut values)?;
        Ok(values)
    }

    /// Tells the system that the bytes of `tensor` will not be needed again soon, so that it may have the memory back. They
    /// can still be read, from the disk again. Does nothing when the file is not mapped, or on systems without such a call.
    pub fn release(&self, tensor: &TensorInfo) {
        if let Some(shard) = self.shards.get(tensor.shard) {
            shard.bytes.release(tensor.bytes.clone());
        }
    }
}

/// The value under `key` as `read` takes it; `None` when there is no such key.
pub(super) fn typed<'a, T>(
    path: &Path,
    metadata: &'a Metadata,
    key: &str,
    expected: &str,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    match read(value) {
        Some(value) => Ok(Some(value)),
        None => Err(Error::malformed(path, Place::Key(key.to_owned()), value, expected)),
    }
}
