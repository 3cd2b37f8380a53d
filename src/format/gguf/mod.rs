//! GGUF: the file format of llama.cpp and its relatives, versions 2 and 3, little-endian.
//!
//! A file is a header, metadata (keys and values), a list of tensors, and their data. [`Gguf::open`] maps it, reads the
//! metadata and the list, and checks all of it: no count, length, offset or dimension is used before it was compared with
//! the bytes that are there, so a damaged or hostile file gives an [`Error`] that names the place, what was found and what
//! was expected, and never a panic or an allocation larger than a small multiple of the file.
//!
//! [`Writer`] writes version 3, which every reader of today takes.
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
//! # What is refused, beyond what the format itself forbids
//! As ggml: keys and tensor names that occur twice, arrays of arrays, strings and arrays beyond 2^30, tensor names of 64
//! bytes or more, alignments that are no power of two. And: alignments above 64 KiB, keys that are not printable ASCII,
//! booleans other than 0 and 1, tensors without dimensions or with a dimension of 0, and tensors that are not in the order
//! of the file (there may be room between them).

mod parse;
mod reader;
mod shards;
mod tensor;
mod value;
mod writer;

pub use reader::{Gguf, OpenOptions};
pub use tensor::TensorInfo;
pub use value::{Array, Metadata, StringArray, Value};
pub use writer::{NewTensor, Writer};

#[cfg(doc)]
use crate::error::Error;

/// The first four bytes of every file.
const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
const VERSION: u32 = 3;
/// The key that sets the alignment of tensors.
const ALIGNMENT_KEY: &str = "general.alignment";
/// The alignment of tensors where no key sets it, in bytes.
const DEFAULT_ALIGNMENT: u32 = 32;
/// The largest alignment that is accepted, in bytes. ggml has no bound, but a huge one only serves to exhaust memory.
const MAX_ALIGNMENT: u32 = 64 << 10;
/// The longest key, in bytes.
const MAX_KEY: usize = 65_535;
/// The longest string and the longest array, in bytes and elements.
const MAX_LENGTH: usize = 1 << 30;
/// The longest name of a tensor, in bytes.
const MAX_NAME: usize = 63;
/// The most dimensions of a tensor.
const MAX_DIMS: usize = 4;

/// Says what is wrong with `key`, if anything is.
fn key_fault(key: &[u8]) -> Option<&'static str> {
    if key.is_empty() {
        Some("an empty key")
    } else if key.len() > MAX_KEY {
        Some("a key of more than 65535 bytes")
    } else if !key.iter().all(|b| matches!(b, b' '..=b'~')) {
        Some("a key with bytes that are not printable ASCII")
    } else {
        None
    }
}

/// Whether `alignment` is one that tensors may have.
fn alignment_is_valid(alignment: u32) -> bool {
    alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT
}

/// Says what is wrong with the name of a tensor, if anything is.
fn name_fault(name: &str) -> Option<&'static str> {
    if name.len() > MAX_NAME {
        Some("a name of more than 63 bytes")
    } else if name.contains('\0') {
        Some("a name with a NUL byte")
    } else {
        None
    }
}
