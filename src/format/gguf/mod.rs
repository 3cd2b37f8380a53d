//! GGUF: the file format of llama.cpp and its relatives, versions 2 and 3, little-endian.
//!
//! A file is a header, metadata (keys and values), a list of tensors, and their data. [`Gguf::open`] maps the file, reads the
//! metadata and the list, and checks both. Every count, length, offset and dimension is compared with the size of the file
//! before it is used. A damaged or hostile file gives an [`Error`] with the place, what was found and what was expected. It
//! never causes a panic, nor an allocation larger than a small multiple of the file.
//!
//! [`Writer`] writes version 3, which all current readers accept.
//!
//! ```
//! use nybble::format::gguf::{Gguf, Metadata, NewTensor, Writer};
//! use nybble::quant::block::BlockType;
//!
//! # fn main() -> nybble::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("tiny.gguf");
//! let mut metadata = Metadata::new();
//! metadata.set("general.architecture", "llama").set("llama.block_count", 1u32);
//! let mut writer = Writer::create(&path, &metadata, [NewTensor::new("output_norm.weight", BlockType::F32, [4])])?;
//! writer.write_values("output_norm.weight", &[1.0, 2.0, 3.0, 4.0])?;
//! writer.finish()?;
//!
//! let file = Gguf::open(&path)?;
//! assert_eq!(file.get_str("general.architecture")?, Some("llama"));
//! let tensor = file.tensor("output_norm.weight").unwrap();
//! assert_eq!(file.decode(tensor)?, [1.0, 2.0, 3.0, 4.0]);
//! # Ok(())
//! # }
//! ```
//!
//! # Stricter than the format
//! Like ggml, nybble refuses duplicate keys and tensor names, arrays of arrays, strings and arrays of more than 2^30
//! elements, tensor names of 64 bytes or more, and alignments that are not a power of two. It also refuses alignments above
//! 64 KiB, keys that are not printable ASCII, booleans other than 0 and 1, tensors without dimensions or with a dimension of
//! 0, and tensors whose data are not in the order of the list. Gaps between tensors are accepted.

mod limits;
mod metadata;
mod parse;
mod reader;
mod shard;
mod shared_ids;
mod split;
mod tensor;
mod value;
mod writer;

pub use metadata::Metadata;
pub use reader::Gguf;
pub use shard::OpenOptions;
pub(super) use split::shard_paths;
pub use tensor::TensorInfo;
pub use value::{Array, StringArray, Value};
pub use writer::{NewTensor, Writer};

#[cfg(doc)]
use crate::error::Error;
