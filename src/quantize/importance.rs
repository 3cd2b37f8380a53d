//! The importance of the columns of linear layers, in the `imatrix.gguf` files of llama.cpp.
//!
//! For each linear layer such a file has two F32 tensors: `NAME.in_sum2 [columns, matrices]`, the sums of the squared inputs, and
//! `NAME.counts [1, matrices]`, the number of tokens in each sum. A stack of experts has several matrices.

use std::collections::HashMap;
use std::path::Path;

use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::gguf::Gguf;

/// The end of the names of sums.
pub(super) const SUMS: &str = ".in_sum2";
/// The end of the names of numbers of tokens.
pub(super) const COUNTS: &str = ".counts";

/// The mean square of each input of linear layers.
#[derive(Debug)]
pub struct Importance {
    /// By tensor: its columns, and the means `(matrices, columns)`. A matrix without tokens has zeros.
    layers: HashMap<String, (usize, Vec<f32>)>,
    digest: u64,
}

impl Importance {
    /// Reads an `imatrix.gguf` file.
    ///
    /// # Errors
    /// Those of [`Gguf::open`]; [`Error::Malformed`] and [`Error::Missing`] when it is not an importance matrix.
    pub fn read(path: &Path) -> Result<Importance> {
        let file = Gguf::open(path)?;
        let fault = |place, found: String, expected: &str| Err(Error::malformed(path, place, found, expected));
        match file.get_str("general.type")? {
            None | Some("imatrix") => {}
            Some(other) => return fault(Place::Key("general.type".to_owned()), format!("{other:?}"), "imatrix"),
        }
        let (mut layers, mut hasher) = (HashMap::new(), blake3::Hasher::new());
        for sums in file.tensors() {
            let Some(name) = sums.name().strip_suffix(SUMS) else { continue };
            let Some(counts) = file.tensor(&format!("{name}{COUNTS}")) else {
                let place = Place::Tensor(format!("{name}{COUNTS}"));
                return Err(Error::Missing {
                    path: path.to_path_buf(),
                    place,
                    expected: "numbers of tokens".to_owned(),
                });
            };
            let (columns, mut values, counts) = (sums.columns(), file.decode(sums)?, file.decode(counts)?);
            if counts.len() != sums.rows() {
                let expected = format!("{} matrices, like {}", sums.rows(), sums.name());
                return fault(
                    Place::Tensor(format!("{name}{COUNTS}")),
                    format!("{} matrices", counts.len()),
                    &expected,
                );
            }
            for (sums, count) in values.chunks_mut(columns.max(1)).zip(counts) {
                sums.iter_mut().for_each(|sum| *sum = if count > 0.0 { *sum / count } else { 0.0 });
            }
            if let Some(bad) = values.iter().find(|value| !(value.is_finite() && **value >= 0.0)) {
                return fault(Place::Tensor(sums.name().to_owned()), format!("{bad}"), "finite sums of squares");
            }
            hasher.update(name.as_bytes());
            hasher.update(bytemuck::cast_slice(&values));
            layers.insert(name.to_owned(), (columns, values));
        }
        if layers.is_empty() {
            return fault(Place::File, format!("no tensor called NAME{SUMS}"), "an imatrix.gguf file of llama.cpp");
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
            let found = [*columns, values.len() / (*columns).max(1)];
            if found != expected {
                let found = format!("{} columns of {} matrices for {name}", found[0], found[1]);
                return Err(Error::argument("imatrix", found, format_args!("{} of {}", expected[0], expected[1])));
            }
        }
        if known > 0 {
            Ok(())
        } else {
            Err(Error::argument("imatrix", "no layer of this model", "its importance matrix"))
        }
    }

    /// The mean square of each column of a part of a tensor. Empty if it is unknown.
    pub(super) fn of(&self, name: &str, part: usize) -> &[f32] {
        let Some((columns, values)) = self.layers.get(name) else { return &[] };
        let own = values.get(part * columns..(part + 1) * columns).unwrap_or_default();
        if own.iter().any(|value| *value > 0.0) { own } else { &[] }
    }
}
