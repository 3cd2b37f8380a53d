//! safetensors: the format of Hugging Face checkpoints, one file or several with an index.
//!
//! A file is the length of its header (u64), the header (a JSON object of tensors) and their data without gaps. Everything
//! is checked before it is used. A damaged or hostile file gives an [`Error`] with the file, the tensor, what was found and
//! what was expected.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::json;
use super::mapped::Bytes;
use super::pointer::pointer_error;
use crate::error::{Error, Place, Result};
use crate::quant::block::BlockType;

/// The largest header or index in bytes, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The ends of the names of other files of weights, and of other indices.
const END: &str = ".safetensors";
const INDEX_END: &str = ".safetensors.index.json";

/// The tensors of a folder.
#[derive(Debug)]
pub struct SafeTensors {
    folder: PathBuf,
    /// Whether files are mapped.
    mmap: bool,
    files: Vec<(PathBuf, Bytes)>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

/// A tensor as its file describes it. The description was checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: Range<usize>,
    file: usize,
}

impl TensorInfo {
    /// The name, for example `model.embed_tokens.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The type of the values, for example `BF16`.
    pub fn dtype(&self) -> &str {
        &self.dtype
    }

    /// The type of the values as a GGUF type. `None` for types that weights do not have.
    pub fn block_type(&self) -> Option<BlockType> {
        match self.dtype.as_str() {
            "F32" => Some(BlockType::F32),
            "F16" => Some(BlockType::F16),
            "BF16" => Some(BlockType::BF16),
            _ => None,
        }
    }

    /// Whether it has no values.
    pub(crate) fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Dimensions, the slowest-varying first: `[rows, columns]`, in the opposite order to GGUF.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
}

/// The bytes of a value. `None` for unknown types and types smaller than a byte.
fn value_bytes(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 1,
        "I16" | "U16" | "F16" | "BF16" => 2,
        "I32" | "U32" | "F32" => 4,
        "I64" | "U64" | "F64" | "C64" => 8,
        _ => return None,
    })
}

impl SafeTensors {
    /// Opens the checkpoint in `folder`: `model.safetensors`, or the files that `model.safetensors.index.json` names. Without
    /// them, the only file or index of another name.
    ///
    /// The files are mapped. They must not be truncated or overwritten while they are open.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Missing`] when a file does not exist, [`Error::Unsupported`] when
    /// there are only files of other formats, [`Error::Malformed`] when a file breaks the format or contradicts the index.
    pub fn open(folder: impl AsRef<Path>) -> Result<SafeTensors> {
        SafeTensors::open_with(folder, true)
    }

    /// As [`SafeTensors::open`], with files mapped or read into memory.
    ///
    /// # Errors
    /// Those of [`SafeTensors::open`].
    pub fn open_with(folder: impl AsRef<Path>, mmap: bool) -> Result<SafeTensors> {
        let folder = folder.as_ref();
        let single = folder.join(SINGLE);
        if exists(&single)? {
            let mut all = SafeTensors::empty(folder, mmap);
            all.add(single)?;
            return Ok(all);
        }
        let index = folder.join(INDEX);
        if exists(&index)? {
            return SafeTensors::open_indexed(folder, &index, mmap);
        }
        // Programs that pack or convert checkpoints have names of their own. One file leaves no doubt.
        match (only(folder, INDEX_END)?, only(folder, END)?) {
            (Some(index), _) => SafeTensors::open_indexed(folder, &index, mmap),
            (None, Some(single)) => {
                let mut all = SafeTensors::empty(folder, mmap);
                all.add(single)?;
                Ok(all)
            }
            (None, None) => Err(explain_absence(folder)),
        }
    }

    /// Opens one file of the folder.
    ///
    /// # Errors
    /// Those of [`SafeTensors::open`].
    pub(crate) fn open_file(folder: &Path, name: &str, mmap: bool) -> Result<SafeTensors> {
        let mut all = SafeTensors::empty(folder, mmap);
        all.add(folder.join(name))?;
        Ok(all)
    }

    fn empty(folder: &Path, mmap: bool) -> SafeTensors {
        let (files, tensors, index) = (Vec::new(), Vec::new(), HashMap::new());
        SafeTensors { folder: folder.to_path_buf(), mmap, files, tensors, index }
    }

    /// Opens the files of an index.
    fn open_indexed(folder: &Path, index: &Path, mmap: bool) -> Result<SafeTensors> {
        let object = json::read(index, MAX_HEADER)?;
        let place = || Place::Key("weight_map".to_owned());
        let Some(Value::Object(map)) = object.get("weight_map") else {
            return Err(Error::malformed(index, place(), "no object", "an object: the file of every tensor"));
        };
        let mut all = SafeTensors::empty(folder, mmap);
        let mut numbers = HashMap::new();
        let mut named = Vec::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str().filter(|file| is_plain_name(file)) else {
                let expected = "the name of a .safetensors file in the same folder";
                return Err(Error::malformed(index, Place::Tensor(tensor.clone()), json::brief(file), expected));
            };
            let number = match numbers.entry(file) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let path = folder.join(file);
                    if !exists(&path)? {
                        let expected = format!("this file, because {INDEX} lists it for tensor {tensor:?}");
                        return Err(Error::Missing { path, place: Place::File, expected });
                    }
                    all.add(path)?;
                    *new.insert(all.files.len() - 1)
                }
            };
            named.push((tensor, number));
        }
        for (tensor, number) in named {
            match all.tensor(tensor) {
                Some(found) if found.file == number => {}
                found => {
                    let found = match found {
                        Some(found) => format!("the tensor in {}", all.path(found).display()),
                        None => "no such tensor in any file".to_owned(),
                    };
                    let path = all.files.get(number).map_or(index, |file| file.0.as_path());
                    let expected = format!("the tensor in this file, as {INDEX} says");
                    return Err(Error::malformed(path, Place::Tensor(tensor.clone()), found, expected));
                }
            }
        }
        Ok(all)
    }

    /// Opens the file at `path` and adds its tensors.
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let bytes = Bytes::open(&path, self.mmap).map_err(|source| Error::io(&path, source))?;
        for tensor in parse(&path, &bytes, self.files.len())? {
            match self.index.entry(tensor.name.clone()) {
                Entry::Vacant(free) => free.insert(self.tensors.len()),
                Entry::Occupied(_) => {
                    let found = "a tensor that another file of the checkpoint also holds";
                    return Err(Error::malformed(path, Place::Tensor(tensor.name), found, "each tensor once"));
                }
            };
            self.tensors.push(tensor);
        }
        self.files.push((path, bytes));
        Ok(())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tensors, file after file, in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|at| self.tensors.get(*at))
    }

    /// The index among the [tensors](SafeTensors::tensors) of the tensor called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// The file of `tensor`, which must belong to this checkpoint.
    pub fn path(&self, tensor: &TensorInfo) -> &Path {
        self.files.get(tensor.file).map_or(Path::new(""), |file| &file.0)
    }

    /// The bytes of `tensor`, little-endian values row after row. Empty for a tensor outside this checkpoint.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        self.files.get(tensor.file).and_then(|file| file.1.get(tensor.bytes.clone())).unwrap_or_default()
    }

    /// Lets the system drop the pages of `tensor` from memory. The bytes can still be read, from the disk.
    pub fn release(&self, tensor: &TensorInfo) {
        if let Some((_, bytes)) = self.files.get(tensor.file) {
            bytes.release(tensor.bytes.clone());
        }
    }
}

/// The only file of the folder whose name has this end, if there is one. Files of low-rank adapters, hidden files and those
/// that macOS writes next to others do not count.
fn only(folder: &Path, end: &str) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|source| Error::io(folder, source))? {
        let entry = entry.map_err(|source| Error::io(folder, source))?;
        let name = entry.file_name();
        let counts = |name: &str| {
            name.ends_with(end) && !name.starts_with(['.']) && !name.starts_with("adapter_") && !is_one_of_several(name)
        };
        if name.to_str().is_some_and(counts) {
            found.push(entry.path());
        }
    }
    Ok(if found.len() == 1 { found.pop() } else { None })
}

/// Whether a name such as `model-00001-of-00002.safetensors` says that there are more files.
fn is_one_of_several(name: &str) -> bool {
    let stem = name.strip_suffix(END).unwrap_or_default();
    let count = stem.rsplit_once("-of-").and_then(|(_, count)| count.parse::<u32>().ok());
    count.is_some_and(|count| count > 1)
}

fn exists(path: &Path) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::io(path, source)),
    }
}

/// Whether `name` is a file of weights in the same folder, not a path to another one.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    plain && name.ends_with(".safetensors") && !name.contains(['\\', ':', '\0'])
}

/// The error for a folder without a checkpoint.
fn explain_absence(folder: &Path) -> Error {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(source) => return Error::io(folder, source),
    };
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let pickled = |name: &&String| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end));
    if names.iter().any(|name| name.ends_with(".safetensors")) {
        let expected = format!("this file, or {SINGLE}, because there are several .safetensors files");
        return Error::Missing { path: folder.join(INDEX), place: Place::File, expected };
    }
    match names.iter().find(pickled) {
        Some(name) => Error::Unsupported {
            path: folder.join(name),
            place: Place::File,
            what: "a pickled checkpoint, which can run any program when it is loaded,".to_owned(),
            supported: "supported: safetensors; look for a copy of the model in that format, or convert it with \
                        transformers in a sandbox"
                .to_owned(),
        },
        None => Error::Missing {
            path: folder.join(SINGLE),
            place: Place::File,
            expected: format!("this file, or {INDEX} and the files that it names"),
        },
    }
}

/// The tensors of a file, in the order of their data.
fn parse(path: &Path, bytes: &[u8], file: usize) -> Result<Vec<TensorInfo>> {
    let whole = |found: String, expected: String| Err(Error::malformed(path, Place::File, found, expected));
    if let Some(error) = pointer_error(path, bytes) {
        return Err(error);
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return whole(format!("{} bytes", bytes.len()), "the 8 bytes of a header's length".to_owned());
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return whole(format!("a header of {length} bytes"), format!("at most {MAX_HEADER}"));
    }
    // A length up to 10^8 fits into any `usize`.
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        return whole(format!("{} bytes", bytes.len()), format!("a header of {length} bytes: the file is truncated"));
    };
    let entries = json::entries(path, header, Place::Offset(8), "a header of JSON, an object of tensors")?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        if name != "__metadata__" {
            tensors.push(tensor(path, name, &value, data.len(), file)?);
        }
    }
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let mut end = 0;
    for tensor in &tensors {
        if tensor.bytes.start != end {
            let found = format!("data at {}", tensor.bytes.start);
            let expected = format!("data at {end}, without gaps or overlaps");
            return Err(Error::malformed(path, Place::Tensor(tensor.name.clone()), found, expected));
        }
        end = tensor.bytes.end;
    }
    if end != data.len() {
        return whole(format!("{} bytes of data", data.len()), format!("{end}, the end of the last tensor"));
    }
    // From offsets into the data to offsets into the file.
    let start = bytes.len() - data.len();
    for tensor in &mut tensors {
        tensor.bytes = start + tensor.bytes.start..start + tensor.bytes.end;
    }
    Ok(tensors)
}

/// Parses one tensor of a header, with `available` bytes of data in the file.
fn tensor(path: &Path, name: String, value: &Value, available: usize, file: usize) -> Result<TensorInfo> {
    let fail = |name: String, found: String, expected: String| {
        Err(Error::malformed(path, Place::Tensor(name), found, expected))
    };
    let numbers = |key: &str| -> Option<Vec<usize>> {
        let numbers = value.get(key)?.as_array()?;
        numbers.iter().map(|number| number.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
    };
    let dtype = value.get("dtype").and_then(Value::as_str);
    let (Some(dtype), Some(shape), Some(offsets)) = (dtype, numbers("shape"), numbers("data_offsets")) else {
        return fail(name, json::brief(value), "dtype, shape and data_offsets".to_owned());
    };
    let &[start, end] = offsets.as_slice() else {
        return fail(name, format!("{} offsets", offsets.len()), "2: start and end".to_owned());
    };
    if end > available {
        let expected = format!("data up to {end}: the file is truncated");
        return fail(name, format!("{available} bytes of data"), expected);
    }
    if start > end {
        return fail(name, format!("data from {start} to {end}"), "an end after the start".to_owned());
    }
    if let Some(size) = value_bytes(dtype) {
        let needed = shape.iter().try_fold(size, |bytes, dim| bytes.checked_mul(*dim));
        if needed != Some(end - start) {
            let expected = match needed {
                Some(needed) => format!("{needed} for the shape {shape:?} of {dtype}"),
                None => format!("a shape whose bytes can be counted, not {shape:?}"),
            };
            return fail(name, format!("{} bytes", end - start), expected);
        }
    }
    Ok(TensorInfo { name, dtype: dtype.to_owned(), shape, bytes: start..end, file })
}
