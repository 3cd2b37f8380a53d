//! A checkpoint with an adapter merged into its matrices, in F32.

use std::path::Path;

use super::factors::Delta;
use super::file::{AdapterFile, Base};
use super::{bind, read};
use crate::error::{Error, Place, Result};
use crate::format::gguf::Metadata;
use crate::format::{Checkpoint, Tensor};
use crate::model::config::Config;
use crate::model::hf::placement::Placement;
use crate::model::transformer::Weights;
use crate::model::weights::loader::Loader;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;
use crate::threads::Scope;

const OUTPUT: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";

/// Returns where the modules of a model belong, from its configuration and the dimensions of its tensors: the possible answers.
pub(in crate::model) type Placements<'a> =
    dyn Fn(&Config, &dyn Fn(&str) -> Option<[usize; 3]>) -> Vec<Vec<Placement>> + 'a;

/// A checkpoint whose matrices are those of `source` and what an adapter adds. An output matrix that is the embedding becomes one
/// of its own where the adapter changes only one of the two.
pub(in crate::model) struct Merged<'a> {
    source: &'a dyn Checkpoint,
    file: AdapterFile,
    is_untied: bool,
}

impl<'a> Merged<'a> {
    /// `source`, a model of `config`, with the adapter at `path`.
    ///
    /// # Errors
    /// Those of [`read::read`]; [`Error::Unsupported`] for matrices that cannot be decoded.
    pub(in crate::model) fn new(
        scope: &Scope<'_>,
        source: &'a dyn Checkpoint,
        config: &Config,
        path: &Path,
        placements: &Placements<'_>,
    ) -> Result<Merged<'a>> {
        let weights = Weights::load(&Loader::hollow(scope, source), config, config.default_context())?;
        let dims = |name: &str| bind::dims(&weights, name);
        let base = Base { config, dims: &dims, placements: &|| Ok(placements(config, &dims)) };
        let mut file = read::read(path, &base)?;
        for name in file.deltas.keys() {
            let tensor = source.tensor(&format!("{name}.weight"));
            let found = tensor.map(|tensor| tensor.rows.block_type());
            if let Some(found) = found.filter(|found| !found.is_supported()) {
                return Err(Error::Unsupported {
                    path: source.path().to_path_buf(),
                    place: Place::Tensor(format!("{name}.weight")),
                    what: format!("the type {}", found.name()),
                    supported: format!("supported: {}", BlockType::names(BlockType::is_supported)),
                });
            }
        }
        for copy in &file.copies {
            let own = [format!("{}.weight", copy.tensor), EMBEDDING.to_owned()];
            let Some(tensor) = own.iter().find_map(|name| source.tensor(name)) else { continue };
            let shape = [tensor.dims.get(1).copied().unwrap_or(1), tensor.dims.first().copied().unwrap_or(0)];
            let block_type = tensor.rows.block_type();
            let is_quantized = block_type.block_len() > 1;
            copy.compare(shape, is_quantized, |row, out| decode(tensor.rows.as_ref(), row, out))?;
        }
        file.note_copies();
        let changed = |name: &str| file.deltas.contains_key(name);
        let is_untied = source.tensor(OUTPUT).is_none() && (changed("output") || changed("token_embd"));
        Ok(Merged { source, file, is_untied })
    }

    /// What the adapter's files say that has no influence, a line each.
    pub(in crate::model) fn notes(&self) -> &[String] {
        &self.file.notes
    }

    fn delta(&self, name: &str) -> Option<&Delta> {
        self.file.deltas.get(name.strip_suffix(".weight")?)
    }
}

/// Writes row `row` to `out`; its type is supported and it has as many values.
fn decode(rows: &dyn Rows, row: usize, out: &mut [f32]) {
    let mut scratch = Vec::new();
    // It fails only for lengths that do not match, and types that the constructor refuses.
    if rows.block_type().decode(rows.row(row, &mut scratch), out).is_err() {
        out.fill(f32::NAN);
    }
}

impl Checkpoint for Merged<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn metadata(&self) -> &Metadata {
        self.source.metadata()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let source = if self.is_untied && name == OUTPUT { EMBEDDING } else { name };
        let Tensor { dims, rows } = self.source.tensor(source)?;
        let Some(delta) = self.delta(name) else { return Some(Tensor { dims, rows }) };
        let columns = *dims.first()?;
        Some(Tensor { dims, rows: Box::new(MergedRows { rows, delta, columns }) })
    }

    fn names(&self) -> Vec<&str> {
        let mut names = self.source.names();
        names.extend(self.is_untied.then_some(OUTPUT));
        names
    }

    fn is_quantized(&self, name: &str) -> bool {
        let source = if self.is_untied && name == OUTPUT { EMBEDDING } else { name };
        self.delta(name).is_none() && self.source.is_quantized(source)
    }

    fn mtp_fault(&self) -> Option<&str> {
        self.source.mtp_fault()
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}

/// The rows of a matrix and what an adapter adds.
struct MergedRows<'a> {
    rows: Box<dyn Rows + 'a>,
    delta: &'a Delta,
    columns: usize,
}

impl Rows for MergedRows<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let mut values = vec![0.0; self.columns];
        decode(self.rows.as_ref(), index, &mut values);
        let rows = self.delta.dims[1].max(1);
        if let Some(factors) = self.delta.matrices.get(index / rows).and_then(Option::as_ref) {
            factors.add_row(index % rows, &mut values);
        }
        scratch.clear();
        scratch.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        scratch
    }
}
