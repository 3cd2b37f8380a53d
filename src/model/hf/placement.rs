//! Which modules of a checkpoint become which tensor of GGUF: where the matrices of an adapter belong that names modules.

use std::borrow::Cow;

use super::HfFolder;
use super::entry::{Entry, Transform, Values};
use super::families;
use super::planner::{Planned, expanded};
use super::rows::{Arranged, Computed, HeadOrder, Mapped, Mapping, RowOrder, TiledColumns};
use crate::model::config::Config;
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// A matrix of GGUF, and the modules whose weights it is made of.
#[derive(Debug)]
pub(in crate::model) struct Placement {
    /// GGUF's name without `.weight`.
    pub(in crate::model) tensor: String,
    /// GGUF's dimensions: columns, rows, and the number of matrices. 0 where they are not known.
    pub(in crate::model) dims: [usize; 3],
    /// The modules, by their names in the checkpoint or the last parts of them.
    pub(in crate::model) modules: Vec<String>,
    /// Whether each module is a matrix of its own.
    pub(in crate::model) is_stack: bool,
    /// Rows that the modules have together, where the checkpoint is at hand.
    height: Option<usize>,
    order: Option<RowOrder>,
    columns: Option<HeadOrder>,
    mapping: Option<Mapping>,
}

impl Placement {
    fn new(name: &str, dims: &[usize], modules: Vec<String>, order: RowOrder) -> Option<Placement> {
        let [columns, rows, count] = match *dims {
            [columns, rows] => [columns, rows, 1],
            [columns, rows, count] => [columns, rows, count],
            _ => return None,
        };
        let order = match order {
            // The matrix is transposed in the checkpoint, the parts of an adapter are not.
            RowOrder::Transpose => Some(RowOrder::Same),
            RowOrder::Columns { .. } | RowOrder::EveryNth { .. } => None,
            order => Some(order),
        };
        let tensor = name.strip_suffix(".weight")?.to_owned();
        let is_stack = count > 1 && modules.len() == count;
        let dims = [columns, rows, count];
        Some(Placement { tensor, dims, modules, is_stack, height: None, order, columns: None, mapping: None })
    }

    /// Whether an adapter of the modules can be one of the tensor.
    pub(in crate::model) fn is_supported(&self) -> bool {
        self.order.is_some() && !matches!(self.mapping, Some(Mapping::AddOne | Mapping::NegExp))
    }

    /// Rows that the modules have together. The tensor's rows are among them.
    pub(in crate::model) fn source_rows(&self) -> usize {
        match self.order {
            _ if self.height.is_some() => self.height.unwrap_or_default(),
            Some(RowOrder::Same | RowOrder::Concat) | None => self.dims[1],
            // The last rows of a matrix may belong to another tensor.
            Some(RowOrder::Slice { of, len, .. }) => self.dims[1].div_ceil(len.max(1)).saturating_mul(of),
            Some(order) => (0..self.dims[1]).map(|row| order.source(row) + 1).max().unwrap_or(0),
        }
    }

    /// The rows of the tensor in GGUF's order, from the rows of the modules `(source rows, columns)`, one module after the other.
    pub(in crate::model) fn arrange(&self, values: &[f32], columns: usize) -> Vec<f32> {
        let bytes: Cow<'_, [u8]> = Cow::Borrowed(bytemuck::cast_slice(values));
        let order = self.order.unwrap_or(RowOrder::Same);
        let parts = vec![bytes.as_ref()];
        let arranged = Arranged { block_type: BlockType::F32, parts, order, columns, is_vector: false };
        let mut rows: Box<dyn Rows + '_> = Box::new(arranged);
        if let Some(mapping) = &self.mapping {
            rows = Box::new(Mapped { rows, mapping, columns, is_vector: false });
        }
        decode(rows.as_ref(), self.dims[1], columns)
    }

    /// Rows over the tensor's columns, in GGUF's order, from `rows` over those of the modules.
    pub(in crate::model) fn arrange_columns(&self, values: Vec<f32>, columns: usize) -> Vec<f32> {
        let Some(order) = self.columns else { return values };
        let tiled = |row: &[f32]| decode(&TiledColumns { rows: Box::new(Computed(row)), order, columns }, 1, columns);
        values.chunks_exact(columns.max(1)).flat_map(tiled).collect()
    }
}

/// All numbers of F32 rows.
fn decode(rows: &dyn Rows, count: usize, columns: usize) -> Vec<f32> {
    let (mut values, mut scratch) = (Vec::with_capacity(count * columns), Vec::new());
    for row in 0..count {
        let bytes = rows.row(row, &mut scratch).as_chunks().0;
        values.extend(bytes.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    }
    values
}

/// The output matrix, where it is that of the embedding.
fn tied(embedding: &Placement) -> Placement {
    let (columns, mapping) = (embedding.columns, embedding.mapping.clone());
    let modules = vec!["lm_head".to_owned()];
    Placement { tensor: "output".to_owned(), modules, columns, mapping, ..*embedding }
}

impl HfFolder {
    /// Where the modules of the checkpoint belong.
    pub(in crate::model) fn placements(&self) -> Vec<Placement> {
        let name_of = |name: &str| name.strip_suffix(".weight").unwrap_or(name).to_owned();
        let place = |planned: &Planned| {
            let parts = planned.parts.iter().filter_map(|part| self.files.tensors().get(*part));
            let mut modules: Vec<String> = parts.map(|part| name_of(part.name())).collect();
            // Packed matrices are several tensors of the same module.
            let codes = planned.packed.iter().filter_map(|matrix| self.files.tensors().get(matrix.tensors().next()?));
            modules.extend(codes.filter_map(|tensor| Some(tensor.name().rsplit_once('.')?.0.to_owned())));
            let placement = Placement::new(&planned.name, &planned.dims, modules, planned.order)?;
            let parts = planned.parts.iter().map(|part| self.files.tensors().get(*part)?.shape().first().copied());
            // The modules of a transposed matrix have its columns as rows.
            let is_plain = planned.order != RowOrder::Transpose && !planned.parts.is_empty();
            let height = parts.sum::<Option<usize>>().filter(|_| is_plain && planned.packed.is_empty());
            Some(Placement { height, columns: planned.columns, mapping: planned.mapping.clone(), ..placement })
        };
        with_output(self.tensors.iter().filter_map(place).collect())
    }
}

/// The placements with that of the output matrix.
fn with_output(mut placements: Vec<Placement>) -> Vec<Placement> {
    let embedding = placements.iter().find(|placement| placement.tensor == "token_embd");
    if !placements.iter().any(|placement| placement.tensor == "output")
        && let Some(output) = embedding.map(tied)
    {
        placements.push(output);
    }
    placements
}

/// Where the modules of each family with the architecture of `config` belong. `dims` are the dimensions of a tensor by its name
/// without `.weight`, where the model has it.
pub(in crate::model) fn placements_of(
    config: &Config,
    dims: &dyn Fn(&str) -> Option<[usize; 3]>,
) -> Vec<Vec<Placement>> {
    let own = families::of_architecture(config.family.name);
    let of_family = |family: &families::HfFamily| {
        let name = |entry: &Entry| entry.hf.replace(['~', '@'], "").replace('#', family.mixer);
        let mut placements: Vec<Placement> = Vec::new();
        let mut place = |entry: &Entry, layer: Option<usize>, prefix: &str| {
            let alternatives = std::iter::successors(Some(entry), |entry| entry.alternative);
            for entry in alternatives.filter(|entry| entry.suffixes == [".weight", ".weight"]) {
                let tensor = layer.map_or(entry.gguf.to_owned(), |layer| format!("blk.{layer}.{}", entry.gguf));
                let Some(dims) = dims(&tensor) else { continue };
                let source = format!("{prefix}{}", name(entry));
                let modules = match entry.transform {
                    Transform::Stack => (0..dims[2]).map(|at| source.replace("{e}", &at.to_string())).collect(),
                    _ => expanded(&source),
                };
                let order = order(entry.transform, config, layer, dims[1]);
                let order = order.filter(|_| matches!(entry.values, Values::Same));
                let Some(new) = Placement::new(&format!("{tensor}.weight"), &dims, modules, RowOrder::Same) else {
                    continue;
                };
                let is_same = |old: &&mut Placement| old.tensor == new.tensor && old.modules == new.modules;
                match placements.iter_mut().find(is_same) {
                    // The configuration of the checkpoint, which is not known, chooses the order.
                    Some(old) => old.order = old.order.filter(|own| Some(*own) == order),
                    None => placements.push(Placement { order, ..new }),
                }
            }
        };
        family.outside.iter().flat_map(|entries| entries.iter()).for_each(|entry| place(entry, None, ""));
        let layers = family.layers.replace(['~', '@'], "");
        for layer in 0..config.layers.len() {
            let prefix = format!("{layers}{layer}.");
            family.layer.iter().flat_map(|entries| entries.iter()).for_each(|entry| place(entry, Some(layer), &prefix));
        }
        with_output(placements)
    };
    own.map(of_family).collect()
}

/// The order of the `rows` rows that a transform makes, where the model's configuration says enough.
fn order(transform: Transform, config: &Config, layer: Option<usize>, rows: usize) -> Option<RowOrder> {
    let own = config.layers.get(layer.unwrap_or(0))?;
    let (heads, kv_heads, head_dim) = (own.heads, own.kv_heads, own.head_dim);
    // Layers without rotation have the order of the others, or that of a whole head if there are none.
    let others = config.layers.iter().map(|layer| layer.rotary).max().filter(|rotary| *rotary > 0);
    let rotary = if own.rotary > 0 { own.rotary } else { others.unwrap_or(head_dim) };
    match transform {
        Transform::Copy | Transform::Stack | Transform::Transpose => Some(RowOrder::Same),
        Transform::Concat => Some(RowOrder::Concat),
        Transform::PairNeighbors => Some(RowOrder::PairNeighbors { head_dim, rotary }),
        Transform::PairHeads => Some(RowOrder::PairNeighbors { head_dim, rotary: head_dim }),
        Transform::Ungroup => Some(RowOrder::Ungroup { heads, kv_heads, head_dim }),
        Transform::RowsOfPart { part, parts } => {
            Some(RowOrder::Slice { of: parts.checked_mul(rows)?, len: rows, start: part * rows })
        }
        _ => None,
    }
}
