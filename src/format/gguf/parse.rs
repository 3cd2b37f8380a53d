//! Parses one file into metadata and a list of tensors, with all checks.

use std::collections::HashSet;
use std::fmt::Display;
use std::path::Path;

use super::limits::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_DIMS, MAX_LENGTH, alignment_is_valid, key_fault,
    name_fault,
};
use super::metadata::Metadata;
use super::shared_ids;
use super::tensor::TensorInfo;
use super::value::{Array, StringArray, Value};
use crate::error::{Error, Place, Result};
use crate::format::pointer::pointer_error;
use crate::quant::block::BlockType;
use crate::quant::other_types::{self, OtherType};

/// The smallest size of a key (1 byte) with its value (1 byte).
const MIN_ENTRY: usize = 8 + 1 + 4 + 1;
/// The smallest size of a tensor's description, in bytes.
const MIN_TENSOR: usize = 8 + 4 + 4 + 8;

/// The contents of one file.
pub(super) struct Parsed {
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Parses everything in `bytes` but the data of tensors. `path` is for error messages, `shard` for [`TensorInfo`].
pub(super) fn parse(path: &Path, bytes: &[u8], shard: usize) -> Result<Parsed> {
    let mut cursor = Cursor { path, bytes, at: 0, part: Part::Header };
    let magic = cursor.array::<4>("the magic")?;
    if magic != MAGIC {
        if let Some(error) = pointer_error(path, bytes) {
            return Err(error);
        }
        return Err(cursor.fault_at(
            0,
            format_args!("\"{}\"", magic.escape_ascii()),
            "\"GGUF\", the start of every GGUF file",
        ));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        _ if version & 0xffff == 0 && version != 0 => {
            let found = format!("version {version:#010x}, that of a big-endian file");
            return Err(cursor.fault_at(4, found, "version 2 or 3 in a little-endian file"));
        }
        _ => return Err(cursor.fault_at(4, format_args!("version {version}"), "version 2 or 3")),
    }
    let tensor_count = cursor.count("tensors", MIN_TENSOR)?;
    let entry_count = cursor.count("keys", MIN_ENTRY)?;

    let mut metadata = Metadata::new();
    for _ in 0..entry_count {
        let key = cursor.key()?;
        if metadata.contains(key) {
            return Err(cursor.fault_in(Place::Key(key.to_owned()), "the key a second time", "each key once"));
        }
        cursor.part = Part::Key(key);
        let value = cursor.value(key)?;
        metadata.set(key, value);
        cursor.part = Part::Header;
    }
    let alignment = alignment(&cursor, &metadata)?;

    let mut names = HashSet::new();
    let mut raw = Vec::new();
    for _ in 0..tensor_count {
        let tensor = cursor.tensor()?;
        if !names.insert(tensor.name) {
            return Err(cursor.fault_in(tensor.place(), "the tensor a second time", "each tensor once"));
        }
        raw.push(tensor);
    }

    // Data start at the next multiple of the alignment. A file without tensors may end before that.
    let data_start = cursor.at.next_multiple_of(alignment);
    resolve_shared_ids(&cursor, &mut raw, bytes.len().saturating_sub(data_start))?;
    let mut tensors = Vec::with_capacity(raw.len());
    let mut free_from = data_start;
    for tensor in raw {
        let is_empty = tensor.elements == 0;
        let info = tensor.locate(&cursor, data_start, free_from, alignment, shard)?;
        free_from = info.bytes.end;
        // A tensor without values is none.
        if !is_empty {
            tensors.push(info);
        }
    }
    Ok(Parsed { version, metadata, tensors })
}

/// Gives the tensors whose type id has two meanings the type that fits the `data_len` bytes of data.
fn resolve_shared_ids(cursor: &Cursor<'_>, tensors: &mut [RawTensor<'_>], data_len: usize) -> Result<()> {
    let ends = tensors.iter().skip(1).map(|next| next.offset).chain([data_len as u64]);
    let sizes: Vec<usize> = tensors
        .iter()
        .zip(ends)
        .map(|(tensor, end)| usize::try_from(end.saturating_sub(tensor.offset)).unwrap_or(usize::MAX))
        .collect();
    for (tensor, size) in tensors.iter().zip(&sizes) {
        let is_other = match tensor.block_type {
            BlockType::PQ2_0 => shared_ids::is_iq2_tn(tensor.elements, *size),
            BlockType::I2_S => shared_ids::is_withdrawn(tensor.elements, *size),
            _ => false,
        };
        if is_other {
            return Err(tensor.unsupported(cursor));
        }
    }
    let q2_0 = tensors.iter().zip(&sizes).filter(|(tensor, _)| tensor.block_type == BlockType::Q2_0);
    if shared_ids::is_pq2_0(q2_0.map(|(tensor, size)| (tensor.elements, *size))) {
        for tensor in tensors.iter_mut().filter(|tensor| tensor.block_type == BlockType::Q2_0) {
            tensor.block_type = BlockType::PQ2_0;
            (tensor.elements, tensor.nbytes) = tensor.size(cursor)?;
        }
    }
    Ok(())
}

/// The alignment of tensors, in bytes.
fn alignment(cursor: &Cursor<'_>, metadata: &Metadata) -> Result<usize> {
    let value = metadata.get(ALIGNMENT_KEY);
    match value {
        None => Ok(DEFAULT_ALIGNMENT as usize),
        Some(Value::U32(alignment)) if alignment_is_valid(*alignment) => Ok(*alignment as usize),
        Some(value) => {
            let expected = format!("a u32 that is a power of two from 1 to {MAX_ALIGNMENT}");
            Err(cursor.fault_in(Place::Key(ALIGNMENT_KEY.to_owned()), value, expected))
        }
    }
}

/// A tensor as the file describes it, before its place is checked.
struct RawTensor<'a> {
    name: &'a str,
    block_type: BlockType,
    dims: Vec<u64>,
    elements: usize,
    nbytes: usize,
    offset: u64,
}

impl RawTensor<'_> {
    fn place(&self) -> Place {
        Place::Tensor(self.name.to_owned())
    }

    /// The number of values and bytes.
    fn size(&self, cursor: &Cursor<'_>) -> Result<(usize, usize)> {
        if self.dims.contains(&0) {
            return Ok((0, 0));
        }
        let size = tensor_size(self.block_type, &self.dims);
        size.map_err(|(found, expected)| cursor.fault_in(self.place(), found, expected))
    }

    /// The error for a type that is not read.
    fn unsupported(&self, cursor: &Cursor<'_>) -> Error {
        let id = self.block_type.id();
        let (what, supported) = match other_types::by_id(id) {
            Some(OtherType { name, origin, advice }) => (format!("the type {name}{origin},"), advice.to_owned()),
            None => (format!("the type {}", self.block_type), BlockType::names(BlockType::is_supported)),
        };
        let supported = format!("supported: {supported}");
        Error::Unsupported { path: cursor.path.to_path_buf(), place: self.place(), what, supported }
    }

    /// Locates the data and checks that they are aligned, inside the file, and after those of the previous tensor.
    fn locate(
        self,
        cursor: &Cursor<'_>,
        data_start: usize,
        free_from: usize,
        alignment: usize,
        shard: usize,
    ) -> Result<TensorInfo> {
        let offset = self.offset;
        if !offset.is_multiple_of(alignment as u64) {
            let expected = format!("a multiple of the alignment, {alignment}");
            return Err(cursor.fault_in(self.place(), format_args!("an offset of {offset}"), expected));
        }
        let range = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| Some(start..start.checked_add(self.nbytes)?));
        let len = cursor.bytes.len();
        let Some(bytes) = range.filter(|range| range.end <= len) else {
            let found =
                format!("{} bytes at offset {offset} of the data, which start at byte {data_start}", self.nbytes);
            return Err(cursor.fault_in(self.place(), found, format_args!("data inside the file of {len} bytes")));
        };
        if bytes.start < free_from {
            let found = format!("data from byte {}, before the end of the tensor before it", bytes.start);
            return Err(cursor.fault_in(self.place(), found, format_args!("data from byte {free_from} or later")));
        }
        let (name, elements) = (self.name.to_owned(), self.elements);
        Ok(TensorInfo { name, block_type: self.block_type, dims: self.dims, elements, bytes, shard })
    }
}

/// The number of values and bytes in a file of a tensor. The error is what was found and what was expected.
pub(super) fn tensor_size(block_type: BlockType, dims: &[u64]) -> Result<(usize, usize), (String, String)> {
    if dims.is_empty() || dims.len() > MAX_DIMS {
        return Err((format!("{} dimensions", dims.len()), format!("1 to {MAX_DIMS} dimensions")));
    }
    let found = || format!("dimensions {dims:?}");
    if dims.contains(&0) {
        return Err((found(), "dimensions of 1 or more".to_owned()));
    }
    let block = block_type.block_len();
    if !dims[0].is_multiple_of(block as u64) {
        let expected = format!("a first dimension that is a multiple of {block}, the block of {block_type}");
        return Err((found(), expected));
    }
    // Sizes stay below 2^63, to fit the signed integers of other readers.
    let fits = |n: &usize| i64::try_from(*n).is_ok();
    let elements = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(usize::try_from(*dim).ok()?));
    let sizes = elements.filter(fits).and_then(|n| Some((n, shared_ids::bytes_in_file(block_type, n).filter(fits)?)));
    sizes.ok_or_else(|| (found(), format!("fewer than 2^63 values and bytes of {block_type}")))
}

/// The part that is being parsed, for error messages.
#[derive(Clone, Copy)]
enum Part<'a> {
    Header,
    Key(&'a str),
    Tensor(&'a str),
}

impl Display for Part<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Part::Header => Ok(()),
            Part::Key(key) => write!(f, " of key {key:?}"),
            Part::Tensor(name) => write!(f, " of tensor {name:?}"),
        }
    }
}

/// An empty list with capacity for `count` elements. The count was checked against the size of the file, but the file may be
/// larger than the memory.
fn with_capacity<T>(count: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(count).map_err(|_| out_of_memory(count * size_of::<T>()))?;
    Ok(list)
}

fn out_of_memory(bytes: usize) -> Error {
    Error::OutOfMemory { what: "metadata", bytes, left: None }
}

/// The bytes of the file and the position of the parser. Names borrow from the bytes.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    part: Part<'a>,
}

impl<'a> Cursor<'a> {
    fn fault_in(&self, place: Place, found: impl Display, expected: impl Display) -> Error {
        Error::malformed(self.path, place, found, expected)
    }

    fn fault_at(&self, at: usize, found: impl Display, expected: impl Display) -> Error {
        self.fault_in(Place::Offset(at as u64), found, expected)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes, which errors call `what`.
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count);
        let Some(taken) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            let expected = format!("{count} bytes for {what}{}", self.part);
            return Err(self.fault_at(
                self.at,
                format_args!("the end of the file after {} bytes", self.left()),
                expected,
            ));
        };
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A u64 that counts `what`. Each takes `size` bytes or more, and all of them must fit into the rest of the file.
    fn count(&mut self, what: &str, size: usize) -> Result<usize> {
        let start = self.at;
        let count = self.u64("a count")?;
        let most = self.left() / size;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => {
                let expected = format!("at most {most}: each takes {size} bytes and {} are left", self.left());
                Err(self.fault_at(start, format_args!("{count} {what}{}", self.part), expected))
            }
        }
    }

    /// The length of a string or an array with elements of `size` bytes or more.
    fn length(&mut self, what: &str, size: usize) -> Result<usize> {
        let start = self.at;
        let length = self.count(what, size)?;
        if length > MAX_LENGTH {
            let found = format!("{length} {what}{}", self.part);
            return Err(self.fault_at(start, found, format_args!("at most {MAX_LENGTH}")));
        }
        Ok(length)
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let length = self.length("bytes of a string", 1)?;
        self.take(length, what)
    }

    fn key(&mut self) -> Result<&'a str> {
        let start = self.at;
        let key = self.string("a key")?;
        match (key_fault(key), str::from_utf8(key)) {
            (None, Ok(key)) => Ok(key),
            (fault, _) => {
                let expected = "1 to 65535 bytes of printable ASCII";
                Err(self.fault_at(start, fault.unwrap_or("a key that is not text"), expected))
            }
        }
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let start = self.at;
        let type_id = self.u32("the type of the value")?;
        let what = "the value";
        Ok(match type_id {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.booleans(1, key)?[0]),
            8 => {
                let text = self.string(what)?;
                let mut own = with_capacity(text.len())?;
                own.extend_from_slice(text);
                Value::String(own)
            }
            9 => Value::Array(self.elements(key)?),
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(self.bad_type(start, key, type_id, "0 to 12")),
        })
    }

    fn bad_type(&self, at: usize, key: &str, type_id: u32, expected: &str) -> Error {
        let found = format!("type {type_id} at byte {at}");
        self.fault_in(Place::Key(key.to_owned()), found, format_args!("a value type of {expected}"))
    }

    /// An array: the type of its elements, their number, and the elements.
    fn elements(&mut self, key: &str) -> Result<Array> {
        let start = self.at;
        Ok(match self.u32("the type of the elements")? {
            0 => Array::U8(self.scalars(u8::from_le_bytes)?),
            1 => Array::I8(self.scalars(i8::from_le_bytes)?),
            2 => Array::U16(self.scalars(u16::from_le_bytes)?),
            3 => Array::I16(self.scalars(i16::from_le_bytes)?),
            4 => Array::U32(self.scalars(u32::from_le_bytes)?),
            5 => Array::I32(self.scalars(i32::from_le_bytes)?),
            6 => Array::F32(self.scalars(f32::from_le_bytes)?),
            7 => {
                let count = self.length("elements", 1)?;
                Array::Bool(self.booleans(count, key)?)
            }
            8 => Array::String(self.strings()?),
            10 => Array::U64(self.scalars(u64::from_le_bytes)?),
            11 => Array::I64(self.scalars(i64::from_le_bytes)?),
            12 => Array::F64(self.scalars(f64::from_le_bytes)?),
            9 => {
                let found = format!("an array of arrays at byte {start}");
                return Err(self.fault_in(Place::Key(key.to_owned()), found, "an array of scalars or strings"));
            }
            type_id => return Err(self.bad_type(start, key, type_id, "0 to 8 or 10 to 12")),
        })
    }

    /// The number of elements and the elements, `N` bytes each.
    fn scalars<T, const N: usize>(&mut self, from_le_bytes: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let count = self.length("elements", N)?;
        // `length` has checked that this many bytes are left, so the product cannot overflow.
        let bytes = self.take(count * N, "the elements")?;
        let mut elements = with_capacity(count)?;
        elements.extend(bytes.as_chunks().0.iter().map(|bytes| from_le_bytes(*bytes)));
        Ok(elements)
    }

    /// `count` booleans, one byte each.
    fn booleans(&mut self, count: usize, key: &str) -> Result<Vec<bool>> {
        let start = self.at;
        let bytes = self.take(count, "booleans")?;
        match bytes.iter().position(|byte| *byte > 1) {
            None => {
                let mut booleans = with_capacity(count)?;
                booleans.extend(bytes.iter().map(|byte| *byte == 1));
                Ok(booleans)
            }
            Some(index) => {
                let found = format!("the boolean {} at byte {}", bytes[index], start + index);
                Err(self.fault_in(Place::Key(key.to_owned()), found, "0 or 1"))
            }
        }
    }

    fn strings(&mut self) -> Result<StringArray> {
        let count = self.length("strings", 8)?;
        let refused = |_| out_of_memory(count * size_of::<usize>());
        let mut strings = StringArray::new();
        strings.try_reserve(count, 0).map_err(refused)?;
        for _ in 0..count {
            let string = self.string("a string")?;
            strings.try_reserve(0, string.len()).map_err(refused)?;
            strings.push(string);
        }
        Ok(strings)
    }

    /// The description of the next tensor.
    fn tensor(&mut self) -> Result<RawTensor<'a>> {
        let start = self.at;
        let bytes = self.string("the name of a tensor")?;
        let Ok(name) = str::from_utf8(bytes) else {
            let found = format!("the name \"{}\"", bytes.escape_ascii());
            return Err(self.fault_at(start, found, "the name of a tensor in UTF-8"));
        };
        if let Some(fault) = name_fault(name) {
            return Err(self.fault_at(start, fault, "the name of a tensor: at most 63 bytes of UTF-8 without NUL"));
        }
        let place = || Place::Tensor(name.to_owned());
        self.part = Part::Tensor(name);
        let n_dims = self.u32("the number of dimensions")?;
        if !(1..=MAX_DIMS as u32).contains(&n_dims) {
            let expected = format!("1 to {MAX_DIMS} dimensions");
            return Err(self.fault_in(place(), format_args!("{n_dims} dimensions"), expected));
        }
        let dims = (0..n_dims).map(|_| self.u64("a dimension")).collect::<Result<Vec<u64>>>()?;
        let type_id = self.u32("the block type")?;
        let block_type = BlockType::from_id(type_id);
        if let (None, Some(OtherType { name, origin, advice })) = (block_type, other_types::by_id(type_id)) {
            let (what, supported) = (format!("the type {name}{origin},"), format!("supported: {advice}"));
            return Err(Error::Unsupported { path: self.path.to_path_buf(), place: place(), what, supported });
        }
        let Some(block_type) = block_type else {
            let expected = "a block type that ggml has (0 to 42 without 4, 5, 31 to 33, 37 and 38), or 142";
            return Err(self.fault_in(place(), format_args!("block type {type_id}"), expected));
        };
        let offset = self.u64("the offset")?;
        let mut tensor = RawTensor { name, block_type, dims, elements: 0, nbytes: 0, offset };
        (tensor.elements, tensor.nbytes) = tensor.size(self)?;
        self.part = Part::Header;
        Ok(tensor)
    }
}
