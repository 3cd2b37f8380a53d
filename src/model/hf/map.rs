//! Name maps as data: which tensors of a Hugging Face checkpoint make up which tensor of GGUF, and how.

use std::collections::HashSet;

use super::settings::Settings;
use super::sizes::{Size, Sizes};
use super::transform::Order;
use crate::error::{Error, Place, Result};
use crate::format::safetensors::{SafeTensors, TensorInfo};
use crate::model::hf::families::Family;
use crate::quant::block::BlockType;

/// How tensors of the checkpoint become one of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transform {
    /// As it is.
    Copy,
    /// Per head, rows `i` and `i + head_dim / 2` become neighbours, as llama.cpp rotates them for some families.
    PairNeighbours,
    /// Query, key and value rows that lie together by head, or by head of keys and values, become all queries, then all
    /// keys, then all values.
    Ungroup,
    /// Rows become columns.
    Transpose,
    /// 1 is added to every value.
    AddOne,
    /// The first rows are left out.
    Skip(usize),
    /// As many tensors as the last dimension says, `{e}` in the name being their number, one after the other.
    Stack,
    /// A matrix of one row becomes a vector.
    Squeeze,
}

/// Whether the checkpoint must have a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    Never,
    Always,
    /// If it is there, it is used.
    Optional,
    /// When this switch of the configuration is on.
    If(&'static str),
    /// When this switch of the configuration is off.
    Unless(&'static str),
    /// When the configuration says so in a less simple way.
    IfSo(fn(&Settings) -> Result<bool>),
    /// In layers with experts.
    Sparse,
    /// In layers without experts.
    Dense,
    /// The output matrix: optional where it may be tied to the embedding.
    Untied,
}

/// One tensor of GGUF, or two: a weight and its bias.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// GGUF's name without `blk.N.` and without `.weight`.
    gguf: &'static str,
    /// The checkpoint's name without `.weight`; `~` stands for what the names of all layers begin with.
    hf: &'static str,
    transform: Transform,
    weight: Need,
    bias: Need,
    /// Dimensions in GGUF's order, where they are not those of the [name](Size::named).
    dims: Option<&'static [Size]>,
}

/// An entry that must be there, is used as it is and has no bias; its methods say otherwise.
pub(super) const fn tensor(gguf: &'static str, hf: &'static str) -> Entry {
    Entry { gguf, hf, transform: Transform::Copy, weight: Need::Always, bias: Need::Never, dims: None }
}

impl Entry {
    pub(super) const fn by(self, transform: Transform) -> Entry {
        Entry { transform, ..self }
    }

    pub(super) const fn when(self, weight: Need) -> Entry {
        Entry { weight, ..self }
    }

    pub(super) const fn bias(self, bias: Need) -> Entry {
        Entry { bias, ..self }
    }

    /// A weight and a bias that are there or missing together.
    pub(super) const fn both(self, need: Need) -> Entry {
        Entry { weight: need, bias: need, ..self }
    }

    pub(super) const fn dims(self, dims: &'static [Size]) -> Entry {
        Entry { dims: Some(dims), ..self }
    }
}

/// A tensor of GGUF and what it is made of. All of it was checked.
#[derive(Debug)]
pub(super) struct Planned {
    /// GGUF's name.
    pub(super) name: String,
    /// GGUF's dimensions, the fastest-varying first.
    pub(super) dims: Vec<usize>,
    /// The type of the checkpoint's values.
    pub(super) block_type: BlockType,
    /// Indices into [`SafeTensors::tensors`].
    pub(super) parts: Vec<usize>,
    pub(super) order: Order,
}

/// Finds everything that a family is made of, and sees that nothing is left over.
pub(super) struct Planner<'a> {
    pub(super) family: &'a Family,
    pub(super) settings: &'a Settings,
    pub(super) sizes: &'a Sizes,
    pub(super) files: &'a SafeTensors,
    /// What the names of the layers begin with.
    base: &'static str,
    planned: Vec<Planned>,
    used: HashSet<&'a str>,
}

impl<'a> Planner<'a> {
    pub(super) fn plan(
        family: &'a Family,
        settings: &'a Settings,
        sizes: &'a Sizes,
        files: &'a SafeTensors,
    ) -> Result<Vec<Planned>> {
        // Some checkpoints were saved from the model without its head, and then lack the first part of every name.
        let starts_with = |base: &&&str| files.tensors().iter().any(|tensor| tensor.name().starts_with(**base));
        let base = family.bases.iter().find(starts_with).copied().unwrap_or_default();
        let mut planner = Planner { family, settings, sizes, files, base, planned: Vec::new(), used: HashSet::new() };
        for entry in family.outside.iter().flat_map(|entries| entries.iter()) {
            planner.entry(entry, None)?;
        }
        for layer in 0..sizes.layers {
            for entry in family.layer.iter().flat_map(|entries| entries.iter()) {
                planner.entry(entry, Some(layer))?;
            }
        }
        planner.check_leftovers()?;
        Ok(planner.planned)
    }

    fn entry(&mut self, entry: &Entry, layer: Option<usize>) -> Result<()> {
        let Entry { gguf, transform, weight, bias, dims, .. } = *entry;
        let dims: Vec<usize> = dims.unwrap_or(Size::named(gguf)).iter().map(|size| size.of(self.sizes)).collect();
        let vector = dims.get(1..2).unwrap_or(&dims).to_vec();
        // What changes rows changes the bias alike; there are no columns and no ones in it.
        let of_bias = match transform {
            Transform::Transpose | Transform::AddOne => Transform::Copy,
            other => other,
        };
        for (suffix, need, dims, transform) in [(".weight", weight, dims, transform), (".bias", bias, vector, of_bias)]
        {
            let name = match layer {
                Some(layer) => format!("blk.{layer}.{gguf}{suffix}"),
                None => format!("{gguf}{suffix}"),
            };
            let source = match layer {
                Some(layer) => format!("{}{layer}.{}{suffix}", self.family.layers, entry.hf),
                None => format!("{}{suffix}", entry.hf),
            };
            let source = source.replace('~', self.base);
            if self.is_needed(need, layer, &source)? {
                self.add(name, &source, dims, transform)?;
            }
        }
        Ok(())
    }

    fn is_needed(&self, need: Need, layer: Option<usize>, source: &str) -> Result<bool> {
        let is_there = || self.files.tensor(source).is_some();
        let sparse = layer.is_some_and(|layer| self.sizes.is_sparse(layer));
        Ok(match need {
            Need::Never => false,
            Need::Always => true,
            Need::Optional => is_there(),
            Need::If(key) => self.settings.switch(key, false)?,
            Need::Unless(key) => !self.settings.switch(key, false)?,
            Need::IfSo(is_so) => is_so(self.settings)?,
            Need::Sparse => sparse,
            Need::Dense => !sparse,
            Need::Untied => !self.settings.switch("tie_word_embeddings", false)? || is_there(),
        })
    }

    fn add(&mut self, name: String, source: &str, dims: Vec<usize>, transform: Transform) -> Result<()> {
        // The shape of one part, the slowest-varying dimension first as in the checkpoint.
        let mut shape: Vec<usize> = dims.iter().rev().copied().collect();
        let mut sources = vec![source.to_owned()];
        match transform {
            Transform::Stack => {
                let parts = shape.remove(0);
                sources = (0..parts).map(|part| source.replace("{e}", &part.to_string())).collect();
            }
            Transform::Transpose => shape.reverse(),
            Transform::Skip(rows) => shape.iter_mut().take(1).for_each(|dim| *dim += rows),
            Transform::Squeeze => shape.insert(0, 1),
            _ => {}
        }
        let mut parts = Vec::with_capacity(sources.len());
        let mut block_type = None;
        for source in sources {
            let (at, part) = self.part(&source, &shape)?;
            let found = self.block_type(part)?;
            if *block_type.get_or_insert(found) != found {
                let place = Place::Tensor(part.name().to_owned());
                let expected = format!("the type of the tensors beside it in {name}");
                return Err(Error::malformed(self.files.path(part), place, part.dtype(), expected));
            }
            self.used.insert(part.name());
            parts.push(at);
        }
        let order = Order::new(transform, self.sizes);
        self.planned.push(Planned { name, dims, block_type: block_type.unwrap_or(BlockType::F32), parts, order });
        Ok(())
    }

    /// The tensor called `name`, which must be there and have this shape, and its place among all.
    fn part(&self, name: &str, shape: &[usize]) -> Result<(usize, &'a TensorInfo)> {
        let files = self.files;
        let Some((at, tensor)) = files.position(name).zip(files.tensor(name)) else {
            return Err(Error::Missing {
                path: self.files.folder().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                expected: format!("a tensor of shape {shape:?}, as {} says", self.config()),
            });
        };
        if tensor.shape() != shape {
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

    /// A tensor that nothing was made of means that the model would be computed without a part of it.
    fn check_leftovers(&self) -> Result<()> {
        /// Buffers that older versions of transformers saved: masks and frequencies.
        const BUFFERS: &[&str] =
            &[".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"];
        let ignored = |name: &str| {
            BUFFERS.iter().any(|end| name.ends_with(end))
                || self.family.ignored.iter().any(|start| name.starts_with(start))
        };
        let leftover = |tensor: &&TensorInfo| !self.used.contains(tensor.name()) && !ignored(tensor.name());
        match self.files.tensors().iter().find(leftover) {
            None => Ok(()),
            Some(tensor) => Err(Error::malformed(
                self.files.path(tensor),
                Place::Tensor(tensor.name().to_owned()),
                "a tensor",
                format_args!("none: {} describes a {} without it", self.config(), self.family.model_types[0]),
            )),
        }
    }
}
