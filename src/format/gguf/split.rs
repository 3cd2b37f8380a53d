//! Models that are split into several files, `<prefix>-00001-of-00003.gguf` and so on. The first holds the metadata, all
//! hold tensors.

use std::path::{Path, PathBuf};

use super::metadata::Metadata;
use super::parse::Parsed;
use super::shard::{self, OpenOptions, Shard};
use super::tensor::TensorInfo;
use super::value::Value;
use crate::error::{Error, Place, Result};

const NUMBER_KEY: &str = "split.no";
const COUNT_KEY: &str = "split.count";
const TENSORS_KEY: &str = "split.tensors.count";

/// The version, the metadata and the files of a model, each with its tensors.
type Opened = (u32, Metadata, Vec<(Shard, Vec<TensorInfo>)>);

/// Opens the file at `path` and, if it is one of several, the others.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Opened> {
    let (opened, parsed) = shard::open(path, 0, options)?;
    let split = Split::of(path, &parsed.metadata)?;
    if split.count <= 1 {
        return Ok((parsed.version, parsed.metadata, vec![(opened, parsed.tensors)]));
    }
    let name = split.check_name(path)?;
    let (shard, Parsed { version, metadata, tensors }) =
        if split.number == 0 { (opened, parsed) } else { open_sibling(path, &name, 0, &split, options)? };
    let mut total = tensors.len();
    let mut files = vec![(shard, tensors)];
    for number in 1..split.count {
        let (shard, parsed) = open_sibling(path, &name, number, &split, options)?;
        total += parsed.tensors.len();
        files.push((shard, parsed.tensors));
    }
    let first = name.path(path, 0);
    match metadata.typed(&first, TENSORS_KEY, "a count", Value::as_u64)? {
        Some(expected) if expected != total as u64 => {
            let found = format!("{total} tensors in {} files", split.count);
            Err(Error::malformed(first, Place::Key(TENSORS_KEY.to_owned()), found, expected))
        }
        _ => Ok((version, metadata, files)),
    }
}

/// Opens file `number` (from 0) of the model of the file at `path`.
fn open_sibling(
    path: &Path,
    name: &ShardName,
    number: usize,
    split: &Split,
    options: &OpenOptions,
) -> Result<(Shard, Parsed)> {
    let path = name.path(path, number);
    let opened = shard::open(&path, number, options).map_err(|error| match error {
        Error::Io { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            let expected = format!("number {} of the {} files of a model", number + 1, split.count);
            Error::Missing { path, place: Place::File, expected }
        }
        other => other,
    })?;
    let theirs = Split::of(&path, &opened.1.metadata)?;
    for (key, found, expected) in [(COUNT_KEY, theirs.count, split.count), (NUMBER_KEY, theirs.number, number)] {
        if found != expected {
            return Err(Error::malformed(path, Place::Key(key.to_owned()), found, expected));
        }
    }
    Ok(opened)
}

/// The paths of all shards of a model, if the file at `path` has the name of one of them.
pub(in crate::format) fn shard_paths(path: &Path) -> Vec<PathBuf> {
    let name = ShardName::of(path);
    name.map_or_else(Vec::new, |name| (0..name.count).map(|number| name.path(path, number)).collect())
}

/// The part of a file in its model, from its metadata.
struct Split {
    /// Its number, from 0.
    number: usize,
    /// The number of files, 0 or 1 where the model is one file.
    count: usize,
}

impl Split {
    fn of(path: &Path, metadata: &Metadata) -> Result<Split> {
        // The format has u16 here, which the five digits of the name can hold.
        let get = |key: &str| {
            let read = |value: &Value| value.as_u64().and_then(|v| u16::try_from(v).ok());
            metadata.typed(path, key, "an integer from 0 to 65535", read).map(|v| usize::from(v.unwrap_or(0)))
        };
        let split = Split { number: get(NUMBER_KEY)?, count: get(COUNT_KEY)? };
        if split.count > 1 && split.number >= split.count {
            let expected = format!("a number below {COUNT_KEY}, {}", split.count);
            return Err(Error::malformed(path, Place::Key(NUMBER_KEY.to_owned()), split.number, expected));
        }
        Ok(split)
    }

    /// The parts of the file's name, which must match the metadata.
    fn check_name(&self, path: &Path) -> Result<ShardName> {
        let name = ShardName::of(path);
        name.filter(|name| name.number == self.number + 1 && name.count == self.count).ok_or_else(|| {
            let found = format!("file {} of a model of {} files, under this name", self.number + 1, self.count);
            let expected = format!("a name that ends in -{:05}-of-{:05}.gguf", self.number + 1, self.count);
            Error::malformed(path, Place::Key(COUNT_KEY.to_owned()), found, expected)
        })
    }
}

/// A name like `<prefix>-00001-of-00003.gguf`.
struct ShardName {
    prefix: String,
    number: usize,
    count: usize,
}

impl ShardName {
    fn of(path: &Path) -> Option<ShardName> {
        let (rest, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| {
            let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten()
        };
        Some(ShardName { prefix: prefix.to_owned(), number: five_digits(number)?, count: five_digits(count)? })
    }

    /// The path of file `number` (from 0), in the folder of the file at `path`. Nothing in it comes from the contents of a
    /// file.
    fn path(&self, path: &Path, number: usize) -> PathBuf {
        path.with_file_name(format!("{}-{:05}-of-{:05}.gguf", self.prefix, number + 1, self.count))
    }
}
