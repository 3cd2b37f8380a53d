//! Finds the tensors of a checkpoint that each tensor of GGUF is made of, by the name map of the family.

use std::collections::HashSet;

use super::entry::{Entry, Need, Segment, Transform, Values};
use super::families::HfFamily;
use super::heads;
use super::mtp::{self, FoundHead};
use super::packings::Packing;
use super::packings::matrix::Matrix;
use super::packings::mxfp4::Blocks;
use super::rows::{HeadOrder, Mapping, RowOrder};
use super::settings::Settings;
use super::sizes::{Size, Sizes};

use crate::error::{Error, Place, Result};
use crate::format::safetensors::{SafeTensors, TensorInfo};
use crate::quant::block::BlockType;

/// A tensor of GGUF and the tensors that it is made of. Everything is checked.
#[derive(Debug)]
pub(super) struct Planned {
    /// GGUF's name.
    pub(super) name: String,
    /// GGUF's dimensions, the fastest-varying first.
    pub(super) dims: Vec<usize>,
    /// The type of the checkpoint's values.
    pub(super) block_type: BlockType,
    /// Indices into [`SafeTensors::tensors`]; none where the tensors are packed.
    pub(super) parts: Vec<usize>,
    /// The matrices that it is made of, where they are in 4 bits already.
    pub(super) packed: Vec<Matrix>,
    pub(super) order: RowOrder,
    /// Where its rows are, where they are blocks of MXFP4.
    pub(super) blocks: Option<Blocks>,
    /// The order of its columns, where it is another.
    pub(super) columns: Option<HeadOrder>,
    /// What is done with its values.
    pub(super) mapping: Option<Mapping>,
}

impl Planned {
    /// Whether its weights are in 4 bits already.
    pub(super) fn is_packed(&self) -> bool {
        !self.packed.is_empty() || self.blocks.is_some()
    }
}

/// Frequencies of the rotation, which older versions of transformers saved.
const INV_FREQ: &str = ".rotary_emb.inv_freq";
/// The names that `{a|b}` in a name stands for.
pub(super) fn expanded(name: &str) -> Vec<String> {
    let parts = name.split_once('{').and_then(|(start, rest)| Some((start, rest.split_once('}')?)));
    match parts {
        Some((start, (names, end))) if names.contains('|') => {
            names.split('|').map(|name| format!("{start}{name}{end}")).collect()
        }
        _ => vec![name.to_owned()],
    }
}

/// Whether a factor is other than 1.
fn is_scaled(segments: &[Segment]) -> bool {
    segments.iter().any(|segment| segment.factors != [1.0; 2])
}

/// Finds all tensors of a family, and checks that none is left over.
pub(super) struct Planner<'a> {
    family: &'a HfFamily,
    settings: &'a Settings,
    sizes: Sizes,
    files: &'a SafeTensors,
    packing: Option<Packing>,
    /// The prefix that `~` stands for in names.
    base: &'static str,
    planned: Vec<Planned>,
    /// Names of the checkpoint's tensors that are part of `planned`.
    used: HashSet<&'a str>,
}

impl<'a> Planner<'a> {
    /// All tensors of a family; and, where the checkpoint has a head for multi-token prediction, the sizes of the model with
    /// the head's layer, or the reason why the head is left out.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`] with the checkpoint's name of the tensor.
    pub(super) fn plan(
        family: &'a HfFamily,
        settings: &'a Settings,
        sizes: Sizes,
        files: &'a SafeTensors,
        packing: Option<Packing>,
    ) -> Result<(Vec<Planned>, Option<Result<Sizes>>)> {
        // Checkpoints of a model that was saved without its head lack the first part of every name.
        let starts_with = |base: &&&str| files.tensors().iter().any(|tensor| tensor.name().starts_with(**base));
        let base = family.bases.iter().find(starts_with).copied().unwrap_or_default();
        let mut planner =
            Planner { family, settings, sizes, files, packing, base, planned: Vec::new(), used: HashSet::new() };
        for entry in family.outside.iter().flat_map(|entries| entries.iter()) {
            planner.entry(entry, None, "")?;
        }
        for layer in 0..planner.sizes.layers {
            planner.layer(layer, &format!("{}{layer}.", family.layers))?;
        }
        let layers = family.layers.replace('~', base);
        let found = family.mtp.and_then(|head| mtp::find(head, &layers, settings, &planner.sizes, files).transpose());
        let head = found.map(|found| {
            let count = planner.planned.len();
            let planned = found.and_then(|found| planner.add_head(&found));
            if planned.is_err() {
                planner.planned.truncate(count);
            }
            planned.map(|()| planner.sizes.clone())
        });
        planner.check_leftovers()?;
        Ok((planner.planned, head))
    }

    /// The tensors of a layer, whose names begin with `prefix`.
    fn layer(&mut self, layer: usize, prefix: &str) -> Result<()> {
        let mut entries = self.family.layer.iter().flat_map(|entries| entries.iter());
        entries.try_for_each(|entry| self.entry(entry, Some(layer), prefix))
    }

    /// The tensors of the head for multi-token prediction, in a layer behind the last.
    fn add_head(&mut self, found: &FoundHead) -> Result<()> {
        mtp::add_sizes(&found.head, self.settings, &mut self.sizes)?;
        let layer = self.sizes.layers;
        found.head.entries.iter().try_for_each(|entry| self.entry(entry, Some(layer), &found.names))?;
        self.layer(layer, &found.layer)?;
        let is_read = |tensor: &TensorInfo| {
            let is_bias = self.packing.is_some() && tensor.name().ends_with(".bias");
            self.used.contains(tensor.name()) || is_bias || tensor.is_empty() || tensor.name().ends_with(INV_FREQ)
        };
        let layers = found.layer.trim_end_matches(|end: char| end == '.' || end.is_ascii_digit());
        let own = |tensor: &&TensorInfo| {
            let name = tensor.name();
            name.starts_with(&found.layer) || (name.starts_with(&found.names) && !name.starts_with(layers))
        };
        match self.files.tensors().iter().filter(own).find(|tensor| !is_read(tensor)) {
            None => Ok(()),
            Some(tensor) => Err(self.unknown(tensor)),
        }
    }

    /// The error that a tensor is not one of the family.
    fn unknown(&self, tensor: &TensorInfo) -> Error {
        let expected = format!("none: {} describes a {} without it", self.config(), self.family.model_types[0]);
        Error::malformed(self.files.path(tensor), Place::Tensor(tensor.name().to_owned()), "a tensor", expected)
    }

    /// The tensors of an entry, whose names in the checkpoint begin with `prefix`.
    fn entry(&mut self, entry: &Entry, layer: Option<usize>, prefix: &str) -> Result<()> {
        if let (Some(applies), Some(layer)) = (entry.only, layer)
            && !applies(&self.sizes, layer)
        {
            return Ok(());
        }
        let entry = self.chosen(entry, prefix);
        let Entry { gguf, transform, weight, bias, dims, suffixes, .. } = *entry;
        let dims: Vec<usize> =
            dims.unwrap_or(Size::named(gguf)).iter().map(|size| size.of(&self.sizes, layer)).collect();
        let vector = dims.get(1..2).unwrap_or(&dims).to_vec();
        // Transforms of rows apply to the bias. It has no columns, and adding 1 is for weights.
        let bias_transform = match transform {
            Transform::Transpose | Transform::TileColumns => Transform::Copy,
            other => other,
        };
        let mapping = match entry.values {
            Values::Same => None,
            Values::AddOne => Some(Mapping::AddOne),
            Values::NegExp => Some(Mapping::NegExp),
            Values::Scaled(factors) => {
                Some(factors(self.settings, &self.sizes)?).filter(|segments| is_scaled(segments)).map(Mapping::Scale)
            }
        };
        let parts =
            [(suffixes, weight, dims, transform, mapping), ([".bias", ".bias"], bias, vector, bias_transform, None)];
        let mut has_weight = matches!(weight, Need::Never);
        for ([suffix, source_suffix], need, dims, transform, mapping) in parts {
            let name = match layer {
                Some(layer) => format!("blk.{layer}.{gguf}{suffix}"),
                None => format!("{gguf}{suffix}"),
            };
            let source = self.source(entry, source_suffix, prefix);
            // A layer without the weight has no bias either.
            let is_bias = source_suffix == ".bias" && suffix == ".bias";
            if self.is_needed(need, layer, &source)? && (has_weight || !is_bias) {
                self.add(name, &source, dims, transform, layer, mapping)?;
                has_weight = true;
            }
        }
        Ok(())
    }

    /// The checkpoint's name of an entry's tensor, which begins with `prefix`.
    fn source(&self, entry: &Entry, suffix: &str, prefix: &str) -> String {
        let source = format!("{prefix}{}{suffix}", entry.hf);
        // The head is next to the model, which may be a part of a larger one.
        source.replace('~', self.base).replace('@', self.head()).replace('#', self.family.mixer)
    }

    /// The entry, or the first of those in its place whose weight the checkpoint has.
    fn chosen<'e>(&self, entry: &'e Entry, prefix: &str) -> &'e Entry {
        let is_there = |entry: &Entry| {
            let first = expanded(&self.source(entry, entry.suffixes[1], prefix)).swap_remove(0).replace("{e}", "0");
            self.files.tensor(&first).is_some() || self.is_packed(&first)
        };
        std::iter::successors(Some(entry), |entry| entry.alternative).find(|entry| is_there(entry)).unwrap_or(entry)
    }

    /// What stands before the name of the output matrix: the first part of the base, where it is more than one.
    fn head(&self) -> &'static str {
        match self.base.strip_suffix("model.").filter(|outer| !outer.is_empty()) {
            Some(outer)
                if self.files.tensors().iter().any(|tensor| tensor.name().starts_with(&format!("{outer}lm_head."))) =>
            {
                outer
            }
            _ => "",
        }
    }

    fn is_needed(&self, need: Need, layer: Option<usize>, source: &str) -> Result<bool> {
        let is_there = || self.files.tensor(source).is_some() || self.is_packed(source);
        let sparse = layer.is_some_and(|layer| self.sizes.is_sparse(layer));
        Ok(match need {
            Need::Never => false,
            Need::Always => true,
            Need::Optional => is_there(),
            Need::If(key) => self.settings.switch(key, false)?,
            Need::Both(key, other) => self.settings.switch(key, false)? && self.settings.switch(other, false)?,
            Need::Unless(key) => !self.settings.switch(key, false)?,
            Need::IfSo(is_so) => is_so(self.settings)?,
            Need::Sparse => sparse,
            Need::Dense => !sparse,
            Need::Where(is_so) => layer.is_some_and(|layer| is_so(&self.sizes, layer)),
            Need::Untied => {
                let tied = self.settings.switch("tie_word_embeddings", false)?;
                is_there() || !(tied || heads::is_headless(self.settings)?)
            }
        })
    }

    fn add(
        &mut self,
        name: String,
        source: &str,
        dims: Vec<usize>,
        transform: Transform,
        layer: Option<usize>,
        mapping: Option<Mapping>,
    ) -> Result<()> {
        // The shape of one part, the slowest-varying dimension first, as in the checkpoint.
        let mut shape: Vec<usize> = dims.iter().rev().copied().collect();
        let mut sources = vec![source.to_owned()];
        match transform {
            Transform::Stack => {
                let parts = shape.remove(0);
                sources = (0..parts).map(|part| source.replace("{e}", &part.to_string())).collect();
            }
            Transform::Transpose => shape.reverse(),
            Transform::Skip(rows) => shape.iter_mut().take(1).for_each(|dim| *dim += rows),
            Transform::SkipPadding => shape.iter_mut().take(1).for_each(|dim| *dim += self.sizes.padding),
            Transform::PadRows => shape.iter_mut().take(1).for_each(|dim| *dim = self.sizes.input_vocabulary),
            Transform::Squeeze => shape.insert(0, 1),
            Transform::Unflatten => shape = vec![shape.iter().product()],
            Transform::Concat => sources = expanded(source),
            Transform::DeltaGroups { .. } => {
                let recurrent = self.sizes.recurrent;
                shape[0] = 2 * (recurrent.groups * recurrent.state + recurrent.inner);
            }
            // (matrices, rows, columns) of the whole tensor.
            Transform::RowsOfPart { parts, .. } => {
                let at = shape.len().saturating_sub(2);
                shape[at] *= parts;
            }
            Transform::ColumnsOfPart { parts, .. } => {
                let len = shape.len();
                shape[len - 2] *= parts;
                shape.swap(len - 1, len - 2);
            }
            Transform::EveryNth { parts, .. } => {
                if let Some(last) = shape.last_mut() {
                    *last *= parts;
                }
            }
            Transform::LatentKeys | Transform::LatentValues => {
                let latent = self.sizes.latent;
                shape = vec![self.sizes.of_layer(layer).heads * (latent.plain + latent.value), latent.kv_rank];
            }
            _ => {}
        }
        let planned = Planned {
            name,
            dims: dims.clone(),
            block_type: BlockType::F32,
            parts: Vec::new(),
            packed: Vec::new(),
            order: RowOrder::new(transform, &self.sizes, layer, &dims),
            blocks: None,
            columns: (transform == Transform::TileColumns)
                .then(|| HeadOrder::new(&self.sizes, self.sizes.recurrent.head_width())),
            mapping,
        };
        if let Some((blocks, tensors)) = Blocks::find(self.files, source, &dims, transform)? {
            let files = self.files;
            self.used.extend(tensors.into_iter().filter_map(|at| files.tensors().get(at)).map(TensorInfo::name));
            let (block_type, parts, blocks) = (BlockType::MXFP4, tensors.to_vec(), Some(blocks));
            self.planned.push(Planned { block_type, parts, blocks, ..planned });
            return Ok(());
        }
        if sources.first().is_some_and(|source| self.is_packed(source)) {
            let packed = self.packed(&sources, &shape, transform, planned.mapping.is_some())?;
            self.planned.push(Planned { packed, ..planned });
            return Ok(());
        }
        let mut parts = Vec::with_capacity(sources.len());
        let mut block_type = None;
        let mut rows = shape.first().copied().unwrap_or(1);
        let last = sources.len() - 1;
        for (index, source) in sources.into_iter().enumerate() {
            if transform == Transform::Concat {
                // The last part has the rows that are left.
                let found = self.files.tensor(&source).and_then(|part| part.shape().first().copied());
                shape[0] = found.filter(|found| index < last && *found < rows).unwrap_or(rows);
                rows -= shape[0];
            }
            let (at, part) = self.part(&source, &shape)?;
            let found = self.block_type(part)?;
            if *block_type.get_or_insert(found) != found {
                let place = Place::Tensor(part.name().to_owned());
                let expected = format!("the type of the other tensors of {}", planned.name);
                return Err(Error::malformed(self.files.path(part), place, part.dtype(), expected));
            }
            self.used.insert(part.name());
            parts.push(at);
        }
        let block_type = block_type.unwrap_or(BlockType::F32);
        self.planned.push(Planned { block_type, parts, ..planned });
        Ok(())
    }

    /// Whether the matrix called `source` is packed in 4 bits.
    fn is_packed(&self, source: &str) -> bool {
        self.packing.as_ref().is_some_and(|packing| packing.find(self.files, &source.replace("{e}", "0")).is_some())
    }

    /// The packed matrices called `sources`, all of the same shape.
    fn packed(
        &mut self,
        sources: &[String],
        shape: &[usize],
        transform: Transform,
        is_mapped: bool,
    ) -> Result<Vec<Matrix>> {
        let files = self.files;
        let mut packed = Vec::with_capacity(sources.len());
        for source in sources {
            let (Some(packing), &[rows, columns]) = (&self.packing, shape) else { continue };
            let by_row = !is_mapped
                && !matches!(
                    transform,
                    Transform::Transpose
                        | Transform::Concat
                        | Transform::ColumnsOfPart { .. }
                        | Transform::EveryNth { .. }
                        | Transform::LatentKeys
                );
            if !by_row {
                return Err(Error::Unsupported {
                    path: files.folder().to_path_buf(),
                    place: Place::Tensor(source.clone()),
                    what: format!("a packed matrix of a {}", self.family.model_types[0]),
                    supported: "supported: families whose linear layers are stored row by row".to_owned(),
                });
            }
            let matrix = packing.matrix(files, source, rows, columns)?;
            self.used.extend(matrix.tensors().filter_map(|at| files.tensors().get(at)).map(TensorInfo::name));
            packed.push(matrix);
        }
        Ok(packed)
    }

    /// The tensor called `name` and its index. It must have this shape.
    fn part(&self, name: &str, shape: &[usize]) -> Result<(usize, &'a TensorInfo)> {
        let files = self.files;
        let Some((at, tensor)) = files.position(name).zip(files.tensor(name)) else {
            return Err(Error::Missing {
                path: self.files.folder().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                expected: format!("a tensor of shape {shape:?}, as {} says", self.config()),
            });
        };
        // Dimensions of 1 do not change the order of the values.
        let dims = |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|dim| *dim != 1).collect() };
        if dims(tensor.shape()) != dims(shape) {
            let found = format!("shape {:?}", tensor.shape());
            let expected = format!("{shape:?}, as {} says", self.config());
            return Err(Error::malformed(self.files.path(tensor), Place::Tensor(name.to_owned()), found, expected));
        }
        Ok((at, tensor))
    }

    fn config(&self) -> String {
        self.settings.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn block_type(&self, tensor: &TensorInfo) -> Result<BlockType> {
        tensor.block_type().ok_or_else(|| Error::Unsupported {
            path: self.files.path(tensor).to_path_buf(),
            place: Place::Tensor(tensor.name().to_owned()),
            what: format!("the type {}", tensor.dtype()),
            supported: "supported: F32, F16, BF16".to_owned(),
        })
    }

    /// Returns an error for a tensor that is not used: without it the model would compute something else.
    fn check_leftovers(&self) -> Result<()> {
        /// Buffers that older versions of transformers saved: masks and frequencies.
        const BUFFERS: &[&str] =
            &[".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", INV_FREQ];
        /// Layers that predict several tokens at once: those of a head that is left out, or not used.
        const DRAFTS: &[&str] = &["mtp.", "model.mtp."];
        // Layers after the last are for drafts, too, where the configuration counts them.
        let drafts = self.settings.number(&["num_nextn_predict_layers"])?;
        let prefix = self.family.layers.replace('~', self.base);
        let is_draft = |name: &str| {
            let number = name.strip_prefix(&prefix).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            number.is_some_and(|number| (self.sizes.layers..self.sizes.layers + drafts).contains(&number))
        };
        let ignored = |name: &str| {
            is_draft(name)
                || self.family.unused.iter().any(|end| name.ends_with(end))
                || DRAFTS.iter().any(|start| name.starts_with(start))
                || BUFFERS.iter().any(|end| name.ends_with(end))
                || self.family.ignored.iter().any(|start| name.starts_with(start))
        };
        // Programs that pack checkpoints give every linear layer a bias, of zeros where it had none.
        let is_zero_bias = |tensor: &TensorInfo| {
            self.packing.is_some()
                && tensor.name().ends_with(".bias")
                && self.files.data(tensor).iter().all(|b| *b == 0)
        };
        let leftover = |tensor: &&TensorInfo| {
            !self.used.contains(tensor.name()) && !ignored(tensor.name()) && !tensor.is_empty() && !is_zero_bias(tensor)
        };
        match self.files.tensors().iter().find(leftover) {
            None => Ok(()),
            Some(tensor) => Err(self.unknown(tensor)),
        }
    }
}
