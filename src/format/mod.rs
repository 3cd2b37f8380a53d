//! File formats: metadata and named tensors. Nothing here depends on models.

pub(crate) mod atomic_file;
#[doc(hidden)]
pub mod file_range;
pub mod gguf;
pub(crate) mod json;
pub(crate) mod mapped;
#[doc(hidden)]
pub mod output;
pub(crate) mod pointer;
mod replaceable;
#[doc(hidden)]
pub mod safetensors;

use std::path::Path;

use crate::quant::pack::Rows;
use file_range::FileRange;
use gguf::{Gguf, Metadata};

/// A source of a model: metadata under GGUF keys and tensors under GGUF names.
#[doc(hidden)]
pub trait Checkpoint: Sync {
    /// The file or folder, for error messages.
    fn path(&self) -> &Path;

    /// All keys and values.
    fn metadata(&self) -> &Metadata;

    /// The tensor called `name`, as rows.
    fn tensor(&self, name: &str) -> Option<Tensor<'_>>;

    /// The names of all tensors, in the best order for reading.
    fn names(&self) -> Vec<&str>;

    /// Whether the tensor called `name` is already quantized and must be kept exactly, even if its rows are floats.
    fn is_quantized(&self, _name: &str) -> bool {
        false
    }

    /// Where the bytes of the tensor called `name` are, whose rows follow one another in a file as they are computed with. `None` for
    /// rows that are computed or come from several places.
    fn location(&self, _name: &str) -> Option<FileRange> {
        None
    }

    /// Why the head for multi-token prediction is left out, where there is a part of one.
    fn mtp_fault(&self) -> Option<&str> {
        None
    }

    /// Lets the system drop the bytes of a tensor from memory.
    fn release(&self, name: &str);
}

/// The methods of [`Checkpoint`] that a wrapper of another one, in its field `source`, does not change.
macro_rules! as_in_source {
    () => {
        fn path(&self) -> &std::path::Path {
            self.source.path()
        }

        fn metadata(&self) -> &crate::format::gguf::Metadata {
            self.source.metadata()
        }

        fn names(&self) -> Vec<&str> {
            self.source.names()
        }

        fn mtp_fault(&self) -> Option<&str> {
            self.source.mtp_fault()
        }

        fn release(&self, name: &str) {
            self.source.release(name);
        }
    };
}
pub(crate) use as_in_source;

/// A tensor as rows of blocks.
#[doc(hidden)]
#[non_exhaustive]
pub struct Tensor<'a> {
    /// Dimensions, the fastest-varying first: `[columns, rows]` for a linear layer.
    pub dims: Vec<usize>,
    /// The rows, each of `dims[0]` values.
    pub rows: Box<dyn Rows + 'a>,
}

impl<'a> Tensor<'a> {
    /// A tensor of these dimensions, the fastest-varying first, and rows of `dims[0]` values.
    pub fn new(dims: impl Into<Vec<usize>>, rows: Box<dyn Rows + 'a>) -> Tensor<'a> {
        Tensor { dims: dims.into(), rows }
    }
}

impl Checkpoint for Gguf {
    fn path(&self) -> &Path {
        self.path()
    }

    fn metadata(&self) -> &Metadata {
        self.metadata()
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let tensor = self.tensor(name)?;
        // The reader has checked that every dimension and the number of bytes fit into the file.
        let dims: Vec<usize> = tensor.dims().iter().map(|dim| *dim as usize).collect();
        Some(Tensor::new(dims, self.rows(tensor)))
    }

    fn location(&self, name: &str) -> Option<FileRange> {
        self.location(self.tensor(name)?)
    }

    fn names(&self) -> Vec<&str> {
        self.tensors().iter().map(|tensor| tensor.name()).collect()
    }

    fn release(&self, name: &str) {
        if let Some(tensor) = self.tensor(name) {
            self.release(tensor);
        }
    }
}
