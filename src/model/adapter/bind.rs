//! Attaches an adapter to a model: packs its matrices for the linear layers whose products they add to.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::factors::Factors;
use super::file::{AdapterFile, Base};
use super::low_rank::{Adapter, LowRank, LowRankLinear, LowRankTable};
use super::read;
use crate::error::{Error, Place, Result};
use crate::model::config::Config;
use crate::model::hf::placement::Placement;
use crate::model::linear::{Linear, PartSource, RowSource};
use crate::model::transformer::Weights;
use crate::quant::block::BlockType;
use crate::quant::pack::{PackError, PackJob, Rows};
use crate::quant::packed::Packed;
use crate::system::arena::Arena;
use crate::threads::ThreadPool;

/// The tensors of `weights` that adapters may change, and their dimensions.
pub(super) fn dims(weights: &Weights, name: &str) -> Option<[usize; 3]> {
    let table = &weights.embedding.parts()[0];
    if matches!(name, "token_embd" | "output") {
        return Some([table.columns(), table.rows(), 1]);
    }
    let mut sources = weights.adaptable().filter_map(Linear::adaptable).flat_map(|adaptable| &adaptable.parts);
    sources.find(|source| source.name == name).map(|source| source.dims)
}

/// Reads the adapter at `path` for the model with these weights, and attaches it under `name`. Returns it, and what its file says
/// that has no influence.
///
/// Uses the pool for each matrix on its own, so that steps of the model run in between.
///
/// # Errors
/// Those of [`read::read`]; [`Error::OutOfMemory`].
pub(super) fn load(
    pool: &ThreadPool,
    name: &str,
    path: &Path,
    config: &Config,
    weights: &Weights,
    placements: &dyn Fn() -> Result<Vec<Vec<Placement>>>,
) -> Result<(Adapter, Vec<String>)> {
    let mut known: HashMap<&str, [usize; 3]> = HashMap::new();
    for adaptable in weights.adaptable().filter_map(Linear::adaptable) {
        known.extend(adaptable.parts.iter().map(|source| (source.name.as_str(), source.dims)));
    }
    let dims = |name: &str| known.get(name).copied().or_else(|| dims(weights, name));
    let mut file = read::read(path, &Base { config, dims: &dims, placements })?;
    compare_all(&mut file, weights)?;
    let (mut used, mut linears) = (HashSet::new(), HashMap::new());
    for linear in weights.adaptable() {
        let Some(adaptable) = linear.adaptable() else { continue };
        add(pool, &file, adaptable.id, &adaptable.parts, &mut used, &mut linears)?;
    }
    // The output may be the embedding, which the other entry changes.
    let table = weights.embedding.adaptable();
    let output = weights.own_output().and_then(Linear::adaptable);
    if let Some(adaptable) = output {
        add(pool, &file, adaptable.id, &adaptable.parts, &mut used, &mut linears)?;
    } else if let (Some(adaptable), [part]) = (table, weights.embedding.parts()) {
        let dims = [part.columns(), part.rows(), 1];
        let parts = [PartSource { name: "output".to_owned(), dims, count: part.rows(), rows: RowSource::From(0) }];
        add(pool, &file, adaptable.id, &parts, &mut used, &mut linears)?;
    }
    let embedding = file.factors("token_embd", 0).map(|own| LowRankTable {
        weights: own.up.clone(),
        directions: own.down.clone(),
        rank: own.rank,
    });
    if embedding.is_some() {
        used.insert("token_embd".to_owned());
    }
    match file.deltas.keys().find(|name| !used.contains(*name)) {
        None => Ok((Adapter::new(name, path, file.hash(), linears, embedding), file.notes)),
        Some(name) => Err(Error::Unsupported {
            path: path.to_path_buf(),
            place: Place::Tensor(format!("{name}.weight")),
            what: "an adapter of this tensor".to_owned(),
            supported: "supported: adapters of linear layers, the embedding and the output".to_owned(),
        }),
    }
}

/// Adds what `file` has for the layer with this id and these parts to `linears`.
fn add(
    pool: &ThreadPool,
    file: &AdapterFile,
    id: u64,
    parts: &[PartSource],
    used: &mut HashSet<String>,
    linears: &mut HashMap<u64, LowRankLinear>,
) -> Result<()> {
    if !parts.iter().any(|part| file.deltas.contains_key(&part.name)) {
        return Ok(());
    }
    let mut packed = Vec::with_capacity(parts.len());
    for part in parts {
        let [columns, of, _] = part.dims;
        if file.deltas.contains_key(&part.name) {
            used.insert(part.name.clone());
        }
        let index = part.rows.source(0) / of.max(1);
        let own = file.factors(&part.name, index);
        packed.push(own.map(|own| pack(pool, part, own, columns, index * of)).transpose()?);
    }
    if packed.iter().any(Option::is_some) {
        linears.insert(id, LowRankLinear { parts: packed });
    }
    Ok(())
}

/// The factors of a part whose tensor's matrix begins at row `first`.
fn pack(pool: &ThreadPool, part: &PartSource, own: &Factors, columns: usize, first: usize) -> Result<LowRank> {
    let count = part.count;
    let order = |row: usize| part.rows.source(row) - first;
    Ok(LowRank {
        down: pack_rows(pool, &own.down, own.rank, columns, &|row| row)?,
        up: pack_rows(pool, &own.up, count, own.rank, &order)?,
    })
}

/// Rows of numbers, in the smallest type of floats that holds them exactly.
struct FloatRows<'a> {
    values: &'a [f32],
    columns: usize,
    block_type: BlockType,
}

impl Rows for FloatRows<'_> {
    fn block_type(&self) -> BlockType {
        self.block_type
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let row = &self.values[index * self.columns..][..self.columns];
        if self.block_type == BlockType::F32 {
            return bytemuck::cast_slice(row);
        }
        scratch.clear();
        scratch.extend(row.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()));
        scratch
    }
}

fn pack_rows(
    pool: &ThreadPool,
    values: &[f32],
    rows: usize,
    columns: usize,
    order: &(dyn Fn(usize) -> usize + Sync),
) -> Result<Packed> {
    let is_short = values.iter().all(|value| value.to_bits() & 0xffff == 0);
    let block_type = if is_short { BlockType::BF16 } else { BlockType::F32 };
    let source = FloatRows { values, columns, block_type };
    // The matrices are too small for maps of several.
    let arena = Arena::new(0);
    let job = PackJob { source: &source, rows, columns, order, release: &|| {}, arena: &arena };
    pool.run(|scope| job.run(scope)).map_err(|error| match error {
        PackError::Memory(error) => error,
        PackError::NotFinite(row) => Error::argument("adapter", format_args!("NaN in row {row}"), "finite numbers"),
    })
}

/// Checks that the copies of the base's matrices that `file` holds are those of the model, and notes them.
fn compare_all(file: &mut AdapterFile, weights: &Weights) -> Result<()> {
    for copy in &file.copies {
        let own = if copy.tensor == "output" { weights.output() } else { &weights.embedding };
        let table = &own.parts()[0];
        let shape = [table.rows(), table.columns()];
        copy.compare(shape, table.layout().is_integer(), |index, row| table.decode_row(index, row))?;
    }
    file.note_copies();
    Ok(())
}
