//! Entries of a family's name map: which tensors of the checkpoint become which tensor of GGUF, and how.

use super::settings::Settings;
use super::sizes::{Size, Sizes};
use crate::error::Result;

/// How tensors of the checkpoint become one of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transform {
    /// Unchanged.
    Copy,
    /// In each head, rows `i` and `i + rotary / 2` become neighbors, the order that llama.cpp rotates in for some families.
    PairNeighbors,
    /// As `PairNeighbors`, for heads that are not rotated: llama.cpp's converter does it for them as well.
    PairHeads,
    /// Query, key and value rows that are grouped by head, or by key/value head, become all queries, then all keys, then all
    /// values.
    Ungroup,
    /// Rows become columns.
    Transpose,
    /// Without the first rows.
    Skip(usize),
    /// Without the rows of positions that padding has in RoBERTa: those up to the id of the padding token.
    SkipPadding,
    /// Tensors one after the other; the last dimension is their number. `{e}` in the name is the index of the tensor.
    Stack,
    /// Of matrices in one tensor, some of the rows of each: those of a part of equal parts.
    RowsOfPart {
        part: usize,
        parts: usize,
    },
    /// Of transposed matrices in one tensor, some of the columns of each as rows: every `step`th from `first` on, where they
    /// alternate, or the part of equal parts with that number.
    ColumnsOfPart {
        part: usize,
        parts: usize,
        alternate: bool,
    },
    /// Of a vector per matrix, every `parts`th number from `part` on.
    EveryNth {
        part: usize,
        parts: usize,
    },
    /// The part of latent attention's matrix of keys and values that makes keys, transposed; or the part that makes values.
    LatentKeys,
    LatentValues,
    /// Rows of tokens that stand for other inputs become the first row, as transformers reads them.
    Placeholders,
    /// The rows that the checkpoint has, then the first one for tokens that have none.
    PadRows,
    /// Pairs of the rotated part of each head's query, or of the shared key, become neighbors, unless they are already.
    LatentPairs,
    /// A matrix of one row becomes a vector.
    Squeeze,
    /// A vector becomes rows.
    Unflatten,
    /// Tensors one after the other. `{a|b}` in the name stands for those of all names.
    Concat,
    /// Rows of the heads of values of a delta rule: see `HeadOrder`.
    TileHeads(TiledRows),
    /// As `TileHeads(TiledRows::Values)`, for columns.
    TileColumns,
    /// Rows that are grouped by key head: queries, keys and values, or the gates.
    DeltaGroups {
        gate: bool,
    },
}

/// Rows that belong to heads of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TiledRows {
    /// Queries and keys, which keep their order, then values.
    All,
    /// Values.
    Values,
    /// One for each head.
    Heads,
}

/// What is done with the values of a weight.
#[derive(Debug, Clone, Copy)]
pub(super) enum Values {
    Same,
    /// 1 is added.
    AddOne,
    /// The negative exponential.
    NegExp,
    /// Rows are multiplied by factors of the configuration.
    Scaled(fn(&Settings, &Sizes) -> Result<Vec<Segment>>),
}

/// Rows that have factors in common. Segments follow one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Segment {
    /// The number of rows.
    pub(super) rows: usize,
    /// The factors, one after the other.
    pub(super) factors: [f32; 2],
}

/// Whether the checkpoint must have a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    Never,
    Always,
    /// Used if it is there.
    Optional,
    /// When this switch of the configuration is on.
    If(&'static str),
    /// When both of these switches of the configuration are on.
    Both(&'static str, &'static str),
    /// When this switch of the configuration is off.
    Unless(&'static str),
    /// When this function of the configuration says so.
    IfSo(fn(&Settings) -> Result<bool>),
    /// In layers with experts.
    Sparse,
    /// In layers without experts.
    Dense,
    /// In layers that this function chooses.
    Where(fn(&Sizes, usize) -> bool),
    /// The output matrix: optional where it may be tied to the embedding.
    Untied,
}

/// One tensor of GGUF, or two: a weight and its bias.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// GGUF's name without `blk.N.` and `.weight`.
    pub(super) gguf: &'static str,
    /// The checkpoint's name without `.weight`. `~` stands for the prefix of all names, `#` for the name of the mixer.
    pub(super) hf: &'static str,
    pub(super) transform: Transform,
    pub(super) weight: Need,
    pub(super) bias: Need,
    /// Dimensions in GGUF's order, where they differ from those of the [name](Size::named).
    pub(super) dims: Option<&'static [Size]>,
    /// What ends the name of the weight, in GGUF and in the checkpoint.
    pub(super) suffixes: [&'static str; 2],
    pub(super) values: Values,
    /// The layers that may have it, if not all.
    pub(super) only: Option<fn(&Sizes, usize) -> bool>,
    /// The entry that takes its place where the checkpoint has the weight of that one instead.
    pub(super) alternative: Option<&'static Entry>,
}

/// An entry that is required, unchanged and without a bias. Its methods change that.
pub(super) const fn tensor(gguf: &'static str, hf: &'static str) -> Entry {
    Entry {
        gguf,
        hf,
        transform: Transform::Copy,
        weight: Need::Always,
        bias: Need::Never,
        dims: None,
        suffixes: [".weight", ".weight"],
        values: Values::Same,
        only: None,
        alternative: None,
    }
}

impl Entry {
    pub(super) const fn by(self, transform: Transform) -> Entry {
        Entry { transform, ..self }
    }

    pub(super) const fn mapped(self, values: Values) -> Entry {
        Entry { values, ..self }
    }

    pub(super) const fn when(self, weight: Need) -> Entry {
        Entry { weight, ..self }
    }

    pub(super) const fn bias(self, bias: Need) -> Entry {
        Entry { bias, ..self }
    }

    /// A weight whose name in the checkpoint has no `.weight`.
    pub(super) const fn raw(self) -> Entry {
        Entry { suffixes: [self.suffixes[0], ""], ..self }
    }

    /// A weight whose name in GGUF ends with this instead of `.weight`.
    pub(super) const fn named(self, suffix: &'static str) -> Entry {
        Entry { suffixes: [suffix, self.suffixes[1]], ..self }
    }

    /// A weight and a bias that are needed together.
    pub(super) const fn both(self, need: Need) -> Entry {
        Entry { weight: need, bias: need, ..self }
    }

    /// Only in layers that this function chooses, whatever else it needs.
    pub(super) const fn only(self, layers: fn(&Sizes, usize) -> bool) -> Entry {
        Entry { only: Some(layers), ..self }
    }

    /// With another entry in its place where the checkpoint has the weight of that one instead.
    pub(super) const fn or(self, other: &'static Entry) -> Entry {
        Entry { alternative: Some(other), ..self }
    }

    pub(super) const fn dims(self, dims: &'static [Size]) -> Entry {
        Entry { dims: Some(dims), ..self }
    }
}
