//! The importance of the columns of linear layers, in the files of llama.cpp: `imatrix.gguf`, and the older `imatrix.dat`.
//!
//! For each linear layer `imatrix.gguf` has two F32 tensors: `NAME.in_sum2 [columns, matrices]`, the sums of the squared inputs, and
//! `NAME.counts [1, matrices]`, the number of tokens in each sum. A stack of experts has several matrices.
//!
//! `imatrix.dat` is the number of layers, then for each of them the length of its name, the name, a divisor, the number of
//! values, and the values as F32, which are means multiplied by the divisor. Integers have 32 bits. The number of chunks and the
//! name of the text may follow.

use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{Error, Place, Result};
use crate::format::gguf::Gguf;
use crate::format::{Checkpoint, mapped};

/// The end of the names of sums.
pub(super) const SUMS: &str = ".in_sum2";
/// The end of the names of numbers of tokens.
pub(super) const COUNTS: &str = ".counts";

/// By tensor: its columns, and the means `(matrices, columns)`. A matrix without tokens has zeros. `imatrix.dat` does not
/// contain the number of columns.
type Layers = HashMap<String, (Option<usize>, Vec<f32>)>;

/// The mean square of each input of linear layers.
#[derive(Debug)]
pub struct Importance {
    layers: Layers,
    digest: u64,
}

impl Importance {
    /// Reads an `imatrix.gguf` or `imatrix.dat` file. Files that do not begin as GGUF does are taken for the latter.
    ///
    /// # Errors
    /// Those of [`Gguf::open`]; [`Error::Malformed`] and [`Error::Missing`] when it is not an importance matrix.
    pub fn read(path: &Path) -> Result<Importance> {
        let layers = if is_gguf(path)? { read_gguf(path)? } else { read_legacy(path)? };
        let mut names: Vec<_> = layers.keys().collect();
        names.sort();
        let mut hasher = blake3::Hasher::new();
        for name in names {
            hasher.update(name.as_bytes());
            hasher.update(bytemuck::cast_slice(&layers[name].1));
        }
        let digest = u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().unwrap_or(&[0; 8]));
        Ok(Importance { layers, digest })
    }

    /// A number that differs between files.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// Checks that the layers fit those of a checkpoint, and that it has at least one of them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(super) fn check(&self, checkpoint: &dyn Checkpoint) -> Result<()> {
        let mut known = 0;
        for (name, (columns, values)) in &self.layers {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            known += 1;
            let expected = [tensor.dims.first().copied().unwrap_or(0), tensor.dims.iter().skip(2).product()];
            let columns = columns.unwrap_or(expected[0]);
            let found = [columns, values.len() / columns.max(1)];
            if found != expected || !values.len().is_multiple_of(columns.max(1)) {
                let found =
                    format!("{} values for {name}, {} columns of {} matrices", values.len(), found[0], found[1]);
                return Err(Error::argument("imatrix", found, format_args!("{} of {}", expected[0], expected[1])));
            }
        }
        if known > 0 {
            Ok(())
        } else {
            Err(Error::argument("imatrix", "no layer of this model", "its importance matrix"))
        }
    }

    /// The mean square of each of the `columns` of a part of a tensor. Empty if it is unknown.
    pub(super) fn of(&self, name: &str, part: usize, columns: usize) -> &[f32] {
        let Some((_, values)) = self.layers.get(name) else { return &[] };
        let own = values.get(part * columns..(part + 1) * columns).unwrap_or_default();
        if own.iter().any(|value| *value > 0.0) { own } else { &[] }
    }
}

/// Reads an `imatrix.gguf` file.
fn read_gguf(path: &Path) -> Result<Layers> {
    let file = Gguf::open(path)?;
    let fault = |place, found: String, expected: &str| Err(Error::malformed(path, place, found, expected));
    match file.get_str("general.type")? {
        None | Some("imatrix") => {}
        Some(other) => return fault(Place::Key("general.type".to_owned()), format!("{other:?}"), "imatrix"),
    }
    let mut layers = HashMap::new();
    for sums in file.tensors() {
        let Some(name) = sums.name().strip_suffix(SUMS) else { continue };
        let Some(counts) = file.tensor(&format!("{name}{COUNTS}")) else {
            let place = Place::Tensor(format!("{name}{COUNTS}"));
            return Err(Error::Missing { path: path.to_path_buf(), place, expected: "numbers of tokens".to_owned() });
        };
        let (columns, mut values, counts) = (sums.columns(), file.decode(sums)?, file.decode(counts)?);
        if counts.len() != sums.rows() {
            let expected = format!("{} matrices, like {}", sums.rows(), sums.name());
            return fault(Place::Tensor(format!("{name}{COUNTS}")), format!("{} matrices", counts.len()), &expected);
        }
        for (sums, count) in values.chunks_mut(columns.max(1)).zip(counts) {
            sums.iter_mut().for_each(|sum| *sum = if count > 0.0 { *sum / count } else { 0.0 });
        }
        if let Some(bad) = values.iter().find(|value| !(value.is_finite() && **value >= 0.0)) {
            return fault(Place::Tensor(sums.name().to_owned()), format!("{bad}"), "finite sums of squares");
        }
        layers.insert(name.to_owned(), (Some(columns), values));
    }
    if layers.is_empty() {
        return fault(Place::File, format!("no tensor called NAME{SUMS}"), "an imatrix.gguf file of llama.cpp");
    }
    Ok(layers)
}

fn is_gguf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let found = mapped::open(path).and_then(|mut file| file.read_exact(&mut magic));
    match found {
        Ok(()) => Ok(magic == *b"GGUF"),
        // The readers say what is wrong with a file of less than four bytes.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(source) => Err(Error::io(path, source)),
    }
}

/// Reads an `imatrix.dat` file.
fn read_legacy(path: &Path) -> Result<Layers> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let mut reader = Legacy { path, bytes: &bytes, at: 0 };
    let entries = reader.count("layers", 1)?;
    let mut layers = Layers::new();
    for _ in 0..entries {
        let length = reader.count("bytes of a name", 1)?;
        let start = reader.at;
        let name = String::from_utf8(reader.take(length, "the name of a layer")?.to_vec());
        let name = name.map_err(|_| reader.malformed(start, "bytes that are not UTF-8", "the name of a layer"))?;
        let divisor = reader.count("chunks", 0)?.max(1) as f32;
        let values = reader.count("values", 1)?;
        let start = reader.at;
        let bytes = reader.take(values.saturating_mul(4), "the values of a layer")?;
        let mut values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        values.iter_mut().for_each(|value| *value /= divisor);
        if let Some(at) = values.iter().position(|value| !(value.is_finite() && *value >= 0.0)) {
            let found = format!("{} for {name}", values[at] * divisor);
            return Err(reader.malformed(start + 4 * at, &found, "finite means of squares"));
        }
        if layers.insert(name.clone(), (None, values)).is_some() {
            return Err(reader.malformed(start, &format!("a second entry for {name}"), "one per layer"));
        }
    }
    Ok(layers)
}

/// The rest of an `imatrix.dat` file.
struct Legacy<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Legacy<'a> {
    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8]> {
        let Some(found) = self.bytes.get(self.at..).and_then(|rest| rest.get(..length)) else {
            let found = format!("{} bytes left", self.bytes.len() - self.at);
            return Err(self.malformed(self.at, &found, &format!("{length} bytes: {what} of an imatrix.dat file")));
        };
        self.at += length;
        Ok(found)
    }

    /// A number of things, at least `least`.
    fn count(&mut self, of: &str, least: i32) -> Result<usize> {
        let start = self.at;
        let bytes = self.take(4, &format!("the number of {of}"))?;
        let found = i32::from_le_bytes(*bytes.first_chunk().unwrap_or(&[0; 4]));
        if found < least {
            let expected = format!("the number of {of} of an imatrix.dat file, at least {least}");
            return Err(self.malformed(start, &found.to_string(), &expected));
        }
        Ok(found as usize)
    }

    fn malformed(&self, at: usize, found: &str, expected: &str) -> Error {
        Error::malformed(self.path, Place::Offset(at as u64), found.to_owned(), expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, chunks: i32, values: &[f32]) -> Vec<u8> {
        let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (length, count) = (name.len() as i32, values.len() as i32 / 4);
        [&length.to_le_bytes()[..], name.as_bytes(), &chunks.to_le_bytes(), &count.to_le_bytes(), &values].concat()
    }

    fn read(bytes: &[u8]) -> Result<Importance> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.dat");
        std::fs::write(&path, bytes).unwrap();
        Importance::read(&path)
    }

    #[test]
    fn an_older_importance_file_is_read_with_and_without_its_trailer() {
        let body = [entry("a.weight", 4, &[4.0, 8.0, 0.0, 0.0]), entry("b.weight", 0, &[2.0])].concat();
        let whole = [&2i32.to_le_bytes()[..], &body].concat();
        let trailer = [&whole[..], &3i32.to_le_bytes(), &5i32.to_le_bytes(), b"prose"].concat();
        for bytes in [&whole, &trailer] {
            let found = read(bytes).unwrap();
            assert_eq!(found.of("a.weight", 0, 2), [1.0, 2.0]);
            assert!(found.of("a.weight", 1, 2).is_empty(), "an expert that no token reached");
            assert_eq!(found.of("a.weight", 0, 4), [1.0, 2.0, 0.0, 0.0]);
            assert_eq!(found.of("b.weight", 0, 1), [2.0]);
            assert!(found.of("c.weight", 0, 1).is_empty());
        }
    }

    #[test]
    fn a_damaged_importance_file_is_refused_at_its_offset() {
        let whole = [&1i32.to_le_bytes()[..], &entry("a.weight", 4, &[4.0, 8.0])].concat();
        for length in 0..whole.len() {
            let error = read(&whole[..length]).unwrap_err().to_string();
            assert!(error.contains("imatrix.dat"), "{length} bytes: {error}");
        }
        let changed = |at: usize, value: [u8; 4]| {
            let mut bytes = whole.clone();
            bytes[at..at + 4].copy_from_slice(&value);
            read(&bytes).unwrap_err().to_string()
        };
        for at in [0, 4, 16, 20] {
            assert!(changed(at, (-1i32).to_le_bytes()).contains("-1"), "offset {at}");
        }
        for at in [4, 20] {
            assert!(changed(at, i32::MAX.to_le_bytes()).contains("bytes left"), "offset {at}");
        }
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            assert!(changed(28, bad.to_le_bytes()).contains("a.weight"), "{bad}");
        }
        let twice = [&2i32.to_le_bytes()[..], &whole[4..], &whole[4..]].concat();
        assert!(read(&twice).unwrap_err().to_string().contains("second entry"));
    }
}
