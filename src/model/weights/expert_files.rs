//! Reads experts of a layer again from the file that the model was loaded from.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::file_range::FileRange;
use crate::model::linear::{Linear, PartSource};
use crate::quant::block::BlockType;
use crate::quant::pack::{Contiguous, PackError, PackJob};
use crate::system::aligned_buf::AlignedBuf;
use crate::system::arena::Arena;
use crate::threads::Scope;

use super::sizes::EXPERT_STACKS;

/// Bytes that a thread reads at a time.
const PIECE: usize = 256 << 10;
/// The purpose of the memory, in errors.
const PURPOSE: &str = "the bytes of an expert";

/// Where the experts of a layer are in a file.
#[derive(Debug)]
pub(in crate::model) struct ExpertFiles {
    stacks: Vec<Stack>,
}

/// The tensor that holds a matrix of each expert.
#[derive(Debug)]
struct Stack {
    /// The tensor's name without `.weight`.
    name: String,
    range: FileRange,
    block_type: BlockType,
}

impl ExpertFiles {
    /// The experts of layer `index`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the tensor if its rows do not follow one another in a file.
    pub(in crate::model) fn locate(checkpoint: &dyn Checkpoint, index: usize) -> Result<ExpertFiles> {
        let mut stacks = Vec::new();
        for stack in EXPERT_STACKS {
            let name = format!("blk.{index}.ffn_{stack}_exps");
            let weight = format!("{name}.weight");
            let Some(tensor) = checkpoint.tensor(&weight) else { continue };
            let Some(range) = checkpoint.location(&weight) else {
                return Err(Error::Unsupported {
                    path: checkpoint.path().to_path_buf(),
                    place: Place::Tensor(weight),
                    what: "a limit of the memory of experts whose weights are computed while they load".to_owned(),
                    supported: "supported: GGUF files whose experts are used as stored, which `nybble convert` writes"
                        .to_owned(),
                });
            };
            stacks.push(Stack { name, range, block_type: tensor.rows.block_type() });
        }
        Ok(ExpertFiles { stacks })
    }

    /// Checks that the file is the one that was loaded.
    ///
    /// # Errors
    /// Those of [`FileRange::check_unchanged`].
    pub(super) fn check_unchanged(&self) -> Result<()> {
        self.stacks.iter().try_for_each(|stack| stack.range.check_unchanged())
    }

    /// Lets the system read the weights of a layer without memory in the background.
    pub(super) fn prefetch(&self, layer: &Linear) {
        for source in layer.adaptable().iter().flat_map(|adaptable| &adaptable.parts) {
            if let Some(stack) = self.stack(source) {
                let [start, len] = stack.extent(source);
                stack.range.prefetch(start, len);
            }
        }
    }

    /// Packs the weights of `layer`, which has no memory, as they were packed when the model was loaded. Overwrites `staging`.
    ///
    /// # Errors
    /// Those of [`FileRange::read`]; [`Error::Malformed`] for numbers that are not finite; [`Error::OutOfMemory`].
    pub(super) fn read(
        &self,
        scope: &Scope<'_>,
        arena: &Arena,
        staging: &mut AlignedBuf<u8>,
        layer: &Linear,
    ) -> Result<Linear> {
        let sources = layer.adaptable().map_or(&[][..], |adaptable| &adaptable.parts);
        let mut parts = Vec::with_capacity(sources.len());
        for source in sources {
            let stack = self.stack(source).expect("a layer of this model");
            let [start, len] = stack.extent(source);
            staging.try_resize(len, PURPOSE)?;
            let fault = Mutex::new(None);
            scope.for_each_chunk(staging, PIECE, |piece, bytes| {
                if let Err(error) = stack.range.read(start + piece * PIECE, bytes) {
                    *fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            });
            if let Some(error) = fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
                return Err(error);
            }
            let (rows, columns) = (source.count, source.dims[0]);
            let staged = Contiguous::new(stack.block_type, staging, rows);
            let job = PackJob { source: &staged, rows, columns, order: &|row| row, release: &|| (), arena };
            let packed = job.run(scope).map_err(|error| match error {
                PackError::Memory(error) => error,
                PackError::NotFinite(row) => Error::malformed(
                    stack.range.path(),
                    Place::Tensor(format!("{}.weight", stack.name)),
                    format_args!("NaN or an infinity in row {}", source.rows.source(row)),
                    "finite numbers",
                ),
            })?;
            parts.push(packed);
        }
        Ok(layer.with_parts(parts))
    }

    fn stack(&self, source: &PartSource) -> Option<&Stack> {
        self.stacks.iter().find(|stack| stack.name == source.name)
    }
}

impl Stack {
    /// The first byte of a part of an expert in the tensor, and its bytes.
    fn extent(&self, source: &PartSource) -> [usize; 2] {
        let row_bytes = self.range.len() / (source.dims[1] * source.dims[2]).max(1);
        [source.rows.source(0) * row_bytes, source.count * row_bytes]
    }
}
