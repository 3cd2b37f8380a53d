//! Reads GGUF models: opens their files and gives access to metadata and tensors.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use super::shard::{OpenOptions, Shard};
use super::shared_ids::I2_S_TAIL;
use super::split;
use super::tensor::TensorInfo;
use super::value::{Array, StringArray, Value};
use crate::error::{Error, Place, Result};
use crate::format::file_range::FileRange;
use crate::quant::block::BlockType;
use crate::quant::pack::{Contiguous, Rows};

/// A GGUF model: its metadata, its tensors, and access to their bytes.
///
/// A model that is split into several files (`-00001-of-00003.gguf`) is opened by the path of any of them. The first file
/// holds the metadata, all files hold tensors.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    shards: Vec<Shard>,
}

impl Gguf {
    /// Opens a model: maps its file or files and checks everything but the data of tensors.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Malformed`] when a file breaks the format, [`Error::Missing`] when
    /// one of several files does not exist.
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

    /// Opens a model with `options`.
    ///
    /// # Errors
    /// Those of [`Gguf::open`].
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Gguf> {
        let (version, metadata, files) = split::open(path.as_ref(), options)?;
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
                        let found = "a tensor that an earlier file of the model also holds";
                        return Err(Error::malformed(shard.path, place, found, "each tensor once"));
                    }
                };
                gguf.tensors.push(tensor);
            }
            gguf.shards.push(shard);
        }
        Ok(gguf)
    }

    /// The file, or the first of several.
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

    /// The integer under `key`, of any integer type.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the value has another type or is out of range, as for all typed getters.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 2^32 - 1", Value::as_u32)
    }

    /// The integer under `key`, of any integer type.
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

    /// The string under `key`.
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

    /// The array of integers under `key`, of any integer type.
    ///
    /// # Errors
    /// As for [`Gguf::get_u32`].
    pub fn get_array_u32(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.typed(key, "an array of integers from 0 to 2^32 - 1", |value| value.as_array()?.to_integers())
    }

    /// The array of integers under `key`, of any integer type.
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

    /// The integers under `key`, one per layer: an array, or one value that all `layers` layers share.
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

    /// The booleans under `key`, one per layer: an array, or one value that all `layers` layers share.
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

    /// The value under `key` as `read` converts it.
    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.metadata.typed(self.path(), key, expected, read)
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|at| self.tensors.get(*at))
    }

    /// The [`TensorInfo::nbytes`] bytes of `tensor`, which must belong to this model: its blocks, or for I2_S the codes of all blocks
    /// and their scale. Empty for a tensor outside its files.
    /// The bytes are aligned in the file, but not necessarily in memory.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let bytes = self.shards.get(tensor.shard).and_then(|shard| shard.bytes.get(tensor.bytes.clone()));
        bytes.unwrap_or_default()
    }

    /// The values of `tensor`, row after row.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when nybble does not support the block type.
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
        match block_type {
            BlockType::I2_S => {
                let (rows, mut scratch) = (TernaryRows::new(self.data(tensor), tensor.rows()), Vec::new());
                for (index, out) in values.chunks_exact_mut(tensor.columns()).enumerate() {
                    block_type.decode(rows.row(index, &mut scratch), out)?;
                }
            }
            _ => block_type.decode(self.data(tensor), &mut values)?,
        }
        Ok(values)
    }

    /// The rows of `tensor`.
    pub(in crate::format) fn rows<'a>(&'a self, tensor: &TensorInfo) -> Box<dyn Rows + 'a> {
        let bytes = self.data(tensor);
        match tensor.block_type {
            BlockType::I2_S => Box::new(TernaryRows::new(bytes, tensor.rows())),
            block_type => Box::new(Contiguous::new(block_type, bytes, tensor.rows())),
        }
    }

    /// Where the bytes of `tensor` are in its file. `None` for I2_S, whose rows share a scale that follows them.
    pub(in crate::format) fn location(&self, tensor: &TensorInfo) -> Option<FileRange> {
        let shard = self.shards.get(tensor.shard)?;
        (tensor.block_type != BlockType::I2_S).then(|| FileRange::new(&shard.file, tensor.bytes.clone()))
    }

    /// Lets the system drop the pages of `tensor` from memory. The bytes can still be read, from the disk. Does nothing when
    /// the file is not mapped, or on systems without such a call.
    pub fn release(&self, tensor: &TensorInfo) {
        if let Some(shard) = self.shards.get(tensor.shard) {
            shard.bytes.release(tensor.bytes.clone());
        }
    }
}

/// The rows of an I2_S tensor, in blocks that each have the scale of the tensor.
struct TernaryRows<'a> {
    codes: &'a [u8],
    /// The end of the file's bytes begins with it.
    scale: &'a [u8],
    /// Bytes of the codes of a row.
    row_bytes: usize,
}

impl<'a> TernaryRows<'a> {
    /// `bytes` as a file has them.
    fn new(bytes: &'a [u8], rows: usize) -> Self {
        let (codes, tail) = bytes.split_at(bytes.len().saturating_sub(I2_S_TAIL));
        TernaryRows { codes, scale: &tail[..size_of::<f32>().min(tail.len())], row_bytes: codes.len() / rows.max(1) }
    }
}

impl Rows for TernaryRows<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::I2_S
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        scratch.clear();
        let codes = BlockType::I2_S.block_bytes() - self.scale.len();
        for codes in self.codes[index * self.row_bytes..][..self.row_bytes].chunks_exact(codes) {
            scratch.extend_from_slice(codes);
            scratch.extend_from_slice(self.scale);
        }
        scratch
    }
}
