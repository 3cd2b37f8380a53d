//! An adapter as its file describes it: factors of matrices, under GGUF's names and in GGUF's order of rows.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::factors::{Delta, Factors};
use crate::error::{Error, Place, Result};
use crate::model::config::Config;
use crate::model::hf::placement::Placement;

/// How far a copy of a matrix may be from the base's, as a share of its size: where the base is quantized, and where it is not,
/// which leaves the difference between F16 and BF16.
const QUANTIZED_ERROR: f64 = 0.2;
const FLOAT_ERROR: f64 = 1e-4;

/// The model that an adapter is read for.
pub(super) struct Base<'a> {
    pub(super) config: &'a Config,
    /// The dimensions of the tensors that adapters may change, by their names without `.weight`: columns, rows, and the number
    /// of matrices.
    pub(super) dims: &'a dyn Fn(&str) -> Option<[usize; 3]>,
    /// Where the modules of a Hugging Face checkpoint belong: the possible answers.
    pub(super) placements: &'a dyn Fn() -> Result<Vec<Vec<Placement>>>,
}

/// A copy of a matrix of the base that the file of an adapter holds.
pub(super) struct BaseCopy {
    /// The name in the file.
    pub(super) source: String,
    /// The file.
    pub(super) path: PathBuf,
    /// GGUF's name without `.weight`.
    pub(super) tensor: String,
    /// `(rows, columns)`
    pub(super) values: Vec<f32>,
    pub(super) columns: usize,
}

/// The contents of an adapter.
#[derive(Default)]
pub(super) struct AdapterFile {
    /// By GGUF's name without `.weight`.
    pub(super) deltas: BTreeMap<String, Delta>,
    pub(super) copies: Vec<BaseCopy>,
    /// What the file says that has no influence on the result, a line each.
    pub(super) notes: Vec<String>,
}

impl BaseCopy {
    /// Checks that it is the base's matrix of this shape, whose rows `decode` writes, as far as the type of the base tells.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the tensor.
    pub(super) fn compare(
        &self,
        [rows, columns]: [usize; 2],
        is_quantized: bool,
        decode: impl Fn(usize, &mut [f32]),
    ) -> Result<()> {
        let fault = |found: String| {
            let expected = "the base's matrix, because matrices that were trained as a whole are not computed";
            Err(Error::malformed(&self.path, Place::Tensor(self.source.clone()), found, expected))
        };
        if columns != self.columns || rows.checked_mul(columns) != Some(self.values.len()) {
            return fault("a matrix of another shape".to_owned());
        }
        let mut row = vec![0.0; columns];
        let (mut errors, mut squares) = (0.0, 0.0);
        for (index, values) in self.values.chunks_exact(columns.max(1)).enumerate() {
            decode(index, &mut row);
            for (own, value) in row.iter().zip(values) {
                errors += f64::from(own - value).powi(2);
                squares += f64::from(*value).powi(2);
            }
        }
        let share = if errors == 0.0 { 0.0 } else { (errors / squares).sqrt() };
        let limit = if is_quantized { QUANTIZED_ERROR } else { FLOAT_ERROR };
        if share.is_nan() || share > limit {
            return fault(format!("numbers that differ from the base's by {:.3}%", share * 100.0));
        }
        Ok(())
    }
}

impl AdapterFile {
    /// Notes that the copies of the base's matrices have no influence, which the caller has checked.
    pub(super) fn note_copies(&mut self) {
        let notes = self.copies.drain(..).map(|copy| format!("{} repeats the base and has no influence", copy.source));
        self.notes.extend(notes);
    }

    /// A hash of everything that changes results.
    pub(super) fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for (name, delta) in &self.deltas {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
            delta.hash(&mut hasher);
        }
        hasher.finalize()
    }

    /// The factors of matrix `index` of the tensor called `name`.
    pub(super) fn factors(&self, name: &str, index: usize) -> Option<&Factors> {
        self.deltas.get(name)?.matrices.get(index)?.as_ref()
    }
}
