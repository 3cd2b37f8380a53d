//! Adapters in GGUF files, as llama.cpp's converter writes them.

use std::collections::BTreeMap;
use std::path::Path;

use super::factors::{Delta, Factors, transposed};
use super::file::{AdapterFile, Base};
use crate::error::{Error, Place, Result};
use crate::format::gguf::{Gguf, TensorInfo};
use crate::system::memory;

/// The name of the embedding, whose matrices are transposed.
const EMBEDDING: &str = "token_embd";

/// The keys whose values are checked, or have no influence.
const KEYS: &[&str] = &["adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"];

/// Reads the adapter in the GGUF file at `path`.
///
/// # Errors
/// Those of [`Gguf::open_unmapped`]; [`Error::Malformed`], [`Error::Missing`] and [`Error::Unsupported`] with the key or the tensor.
pub(super) fn read(path: &Path, base: &Base<'_>) -> Result<AdapterFile> {
    // Read instead of mapped, because clients may have it loaded while others write to it.
    let file = Gguf::open_unmapped(path)?;
    let alpha = settings(&file, base)?;
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for tensor in file.tensors() {
        let name = tensor.name();
        let found = [".weight.lora_a", ".weight.lora_b"].iter().position(|end| name.ends_with(end));
        let Some(side) = found else {
            let expected = "matrices whose names end with .lora_a or .lora_b";
            return Err(unsupported(
                &file,
                Place::Tensor(name.to_owned()),
                "a tensor that does not belong to LoRA",
                expected,
            ));
        };
        let stem = &name[..name.len() - ".weight.lora_a".len()];
        pairs.entry(stem).or_default()[side] = Some(tensor);
    }
    let mut read = AdapterFile::default();
    for (name, pair) in pairs {
        let [Some(a), Some(b)] = pair else {
            let missing = if pair[0].is_none() { "lora_a" } else { "lora_b" };
            let place = Place::Tensor(format!("{name}.weight.{missing}"));
            let expected = "both matrices of a tensor".to_owned();
            return Err(Error::Missing { path: path.to_path_buf(), place, expected });
        };
        let Some(dims) = (base.dims)(name) else {
            let place = Place::Tensor(a.name().to_owned());
            return Err(unsupported(
                &file,
                place,
                "an adapter of this tensor",
                "adapters of the model's linear layers",
            ));
        };
        read.deltas.insert(name.to_owned(), delta(&file, name, [a, b], dims, alpha)?);
    }
    Ok(read)
}

fn unsupported(file: &Gguf, place: Place, what: &str, supported: &str) -> Error {
    let (what, supported) = (what.to_owned(), format!("supported: {supported}"));
    Error::Unsupported { path: file.path().to_path_buf(), place, what, supported }
}

/// Checks the keys and returns `adapter.lora.alpha`, 0 where there is none.
fn settings(file: &Gguf, base: &Base<'_>) -> Result<f32> {
    let key = |name: &str| Place::Key(name.to_owned());
    let expect = |name: &str, wanted: &str| match file.get_str(name)? {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(Error::malformed(file.path(), key(name), format_args!("{found:?}"), format!("{wanted:?}"))),
        None => {
            Err(Error::Missing { path: file.path().to_path_buf(), place: key(name), expected: format!("{wanted:?}") })
        }
    };
    expect("general.type", "adapter")?;
    if let Some(kind) = file.get_str("adapter.type")?.filter(|kind| *kind != "lora") {
        return Err(unsupported(file, key("adapter.type"), &format!("the type {kind:?}"), "lora"));
    }
    expect("adapter.type", "lora")?;
    expect("general.architecture", base.config.family.name)?;
    for (name, _) in file.metadata().iter() {
        if !name.starts_with("general.") && !KEYS.contains(&name) {
            return Err(unsupported(file, key(name), "this setting of an adapter", &KEYS.join(", ")));
        }
    }
    let alpha = file.get_f32("adapter.lora.alpha")?.unwrap_or(0.0);
    if !alpha.is_finite() {
        return Err(Error::malformed(file.path(), key("adapter.lora.alpha"), alpha, "a finite number"));
    }
    Ok(alpha)
}

/// The change of the tensor called `name`, of dimensions `dims`.
fn delta(file: &Gguf, name: &str, pair: [&TensorInfo; 2], dims: [usize; 3], alpha: f32) -> Result<Delta> {
    let [columns, rows, count] = dims;
    let is_table = name == EMBEDDING;
    let size = |tensor: &TensorInfo| -> [usize; 3] {
        let mut all = tensor.dims().iter().map(|dim| usize::try_from(*dim).unwrap_or(usize::MAX)).chain([1; 3]);
        std::array::from_fn(|_| all.next().unwrap_or(1))
    };
    let [a, b] = pair;
    let rank = size(b)[0];
    let expected = match is_table {
        true => [[rank, rows, count], [rank, columns, count]],
        false => [[columns, rank, count], [rank, rows, count]],
    };
    for (tensor, expected) in [a, b].into_iter().zip(expected) {
        let is_deep = tensor.dims().get(3..).is_some_and(|more| more.iter().any(|dim| *dim != 1));
        if size(tensor) != expected || is_deep || rank == 0 {
            let found = format!("shape {:?}", tensor.dims());
            let expected = if count == 1 { &expected[..2] } else { &expected };
            let expected = format!("{expected:?}, for a matrix of {rows} rows and {columns} columns");
            return Err(Error::malformed(file.path(), Place::Tensor(tensor.name().to_owned()), found, expected));
        }
    }
    let scale = if alpha == 0.0 { 1.0 } else { alpha / rank as f32 };
    // The shapes are checked, so these are the numbers of values.
    let values = rank.saturating_mul(columns.saturating_add(rows)).saturating_mul(count);
    memory::check("the matrices of an adapter", values.saturating_mul(size_of::<f32>()))?;
    let (a, b) = (file.decode(a)?, file.decode(b)?);
    let matrices = a.chunks_exact(a.len() / count).zip(b.chunks_exact(b.len() / count)).map(|(a, b)| {
        Some(match is_table {
            true => Factors::scaled(rank, transposed(b, rank), a.to_vec(), scale),
            false => Factors::scaled(rank, a.to_vec(), b.to_vec(), scale),
        })
    });
    Ok(Delta { dims, matrices: matrices.collect() })
}
