//! Converts any checkpoint to a GGUF file that llama.cpp reads.

#[doc(hidden)]
pub mod requantize;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Gguf, Metadata, NewTensor, Writer};
use crate::format::output::Sources;
use crate::format::{Checkpoint, Tensor};
use crate::model::adapter::merged::{Merged, Placements};
use crate::model::config::Config;
use crate::model::hf::HfFolder;
use crate::model::hf::placement::placements_of;
use crate::model::transformer::Weights;
use crate::model::weights::loader::Progress;
use crate::quant::block::BlockType;
use crate::quant::scale_range::ScaleRange;
use crate::threads::{Scope, ThreadPool, default_threads};
use requantize::{check_finite, decode, encode, target, unfit};

/// Bytes of a piece, which one thread encodes.
const PIECE: usize = 1 << 20;

/// Writes the checkpoint at `source`, a GGUF file or a Hugging Face folder with its tokenizer, to a GGUF file at `out`.
///
/// Matrices are stored in the type `wanted`. Vectors, norms and the few matrices that must keep their precision become F32; the embedding and the output become
/// Q8_0 where Q4_0 or Q4_1 is wanted; a matrix whose rows do not fill whole blocks becomes F16, as in llama.cpp's converter.
/// Tensors that have the right type are copied, and so are those that a Hugging Face checkpoint holds in 4 bits where a block
/// type is wanted.
///
/// `progress` is called with the number of tensors done and their total.
///
/// # Errors
/// Those of opening the source; [`Error::InvalidArgument`] for a type that cannot be encoded; [`Error::Unsupported`] for tensors
/// that cannot be decoded; [`Error::Malformed`] for values that do not fit into the type; those of [`Writer`] and of `progress`.
/// No file is left after an error.
pub fn convert_path(source: &Path, out: &Path, wanted: BlockType, progress: Option<Progress<'_>>) -> Result<()> {
    if source.is_dir() {
        let folder = HfFolder::open(source)?;
        convert(&folder, &folder.tokenizer()?, out, wanted, progress)
    } else {
        convert(&Gguf::open(source)?, &Metadata::new(), out, wanted, progress)
    }
}

/// As [`convert_path`], with the adapter at `adapter` merged in F32 before matrices are stored. `adapter` is a folder that PEFT has
/// saved, or a GGUF file. Returns what its files say that has no influence, a line each.
///
/// # Errors
/// As for [`convert_path`]; [`Error::Io`], [`Error::Malformed`] and [`Error::Missing`] for the adapter's files;
/// [`Error::Unsupported`] with the setting or the tensor for what is not computed.
#[doc(hidden)]
pub fn convert_with_adapter(
    source: &Path,
    adapter: &Path,
    out: &Path,
    wanted: BlockType,
    progress: Option<Progress<'_>>,
) -> Result<Vec<String>> {
    Sources::new([source, adapter]).check("out", out)?;
    let merge = |checkpoint: &dyn Checkpoint, more: &Metadata, placements: &Placements<'_>| {
        let config = Config::read(checkpoint)?;
        let pool = ThreadPool::new(default_threads())?;
        let merged = pool.run(|scope| Merged::new(scope, checkpoint, &config, adapter, placements))?;
        drop(pool);
        convert(&merged, more, out, wanted, progress)?;
        Ok(merged.notes().to_vec())
    };
    if source.is_dir() {
        let folder = HfFolder::open(source)?;
        merge(&folder, &folder.tokenizer()?, &|_, _| vec![folder.placements()])
    } else {
        merge(&Gguf::open(source)?, &Metadata::new(), &placements_of)
    }
}

/// Writes `checkpoint` to a GGUF file at `out`, with its own keys and those of `more`.
///
/// Tensors are stored as [`convert_path`] says.
///
/// # Errors
/// As for [`convert_path`], but for opening the source.
#[doc(hidden)]
pub fn convert(
    checkpoint: &dyn Checkpoint,
    more: &Metadata,
    out: &Path,
    wanted: BlockType,
    progress: Option<Progress<'_>>,
) -> Result<()> {
    if !wanted.can_encode() {
        let known = BlockType::names(BlockType::can_encode);
        return Err(Error::argument("type", wanted, format_args!("one of {known}")));
    }
    let pool = &ThreadPool::new(default_threads())?;
    let config = Config::read(checkpoint).ok();
    if let Some(config) = &config {
        check_leftovers(checkpoint, config, pool)?;
    }
    let job = Job {
        checkpoint,
        more,
        file_type: wanted,
        stored: &|name, tensor| {
            let found = tensor.rows.block_type();
            // Tensors that are quantized already would lose precision in other blocks.
            let is_final = checkpoint.is_quantized(name) && found.block_len() > 1 && wanted.block_len() > 1;
            if is_final { found } else { stored(name, tensor, wanted) }
        },
        made: &|_| Ok(None),
        pool,
        last: &|_| Ok(()),
    };
    job.write(out, progress)?;
    // A model that nybble runs is one afterwards.
    if config.is_some() {
        Config::read(&Gguf::open(out)?)?;
    }
    Ok(())
}

/// Checks that a model that nybble runs has no tensor that changes what it computes and that nybble does not read.
fn check_leftovers(checkpoint: &dyn Checkpoint, config: &Config, pool: &ThreadPool) -> Result<()> {
    match pool.run(|scope| Weights::check(scope, checkpoint, config)) {
        // Other deviations are in the output as they are in the source, and loading it tells them.
        Err(error @ Error::Unsupported { place: Place::Tensor(_), .. }) => Err(error),
        _ => Ok(()),
    }
}

/// How the tensors of a checkpoint are written to a file.
pub(crate) struct Job<'a> {
    /// The source of the tensors.
    pub(crate) checkpoint: &'a dyn Checkpoint,
    /// Keys in addition to those of the checkpoint.
    pub(crate) more: &'a Metadata,
    /// The type that most matrices have.
    pub(crate) file_type: BlockType,
    /// The type of each tensor.
    pub(crate) stored: &'a dyn Fn(&str, &Tensor<'_>) -> BlockType,
    /// The bytes of tensors that are encoded already; `None` for those to be encoded.
    pub(crate) made: &'a dyn Fn(&str) -> Result<Option<Vec<u8>>>,
    /// The threads that encode.
    pub(crate) pool: &'a ThreadPool,
    /// Called with the temporary path of the complete file, before it is renamed.
    pub(crate) last: &'a dyn Fn(&Path) -> Result<()>,
}

impl Job<'_> {
    /// Writes the file.
    ///
    /// # Errors
    /// Those of [`convert`].
    pub(crate) fn write(&self, out: &Path, progress: Option<Progress<'_>>) -> Result<()> {
        let checkpoint = self.checkpoint;
        Sources::new([checkpoint.path()]).check("out", out)?;
        let mut metadata = checkpoint.metadata().of_model();
        for (key, value) in self.more.iter() {
            metadata.set(key, value.clone());
        }
        let names = checkpoint.names();
        let mut planned = Vec::with_capacity(names.len());
        for name in &names {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            let stored = (self.stored)(name, &tensor);
            let found = tensor.rows.block_type();
            if found != stored && !found.is_supported() {
                return Err(Error::Unsupported {
                    path: checkpoint.path().to_path_buf(),
                    place: Place::Tensor((*name).to_owned()),
                    what: format!("the type {found}"),
                    supported: format!("supported: {}", BlockType::names(BlockType::is_supported)),
                });
            }
            let dims: Vec<u64> = tensor.dims.iter().map(|dim| *dim as u64).collect();
            planned.push((*name, stored, NewTensor::new(*name, stored, dims)));
        }
        // Without this number, readers derive it from the tensors.
        if let Some(file_type) = file_type(most(&planned).unwrap_or(self.file_type)) {
            metadata.set("general.file_type", file_type);
        }
        metadata.set("general.quantization_version", 2u32);
        let mut writer = Writer::create(out, &metadata, planned.iter().map(|tensor| tensor.2.clone()))?;
        for (done, (name, stored, _)) in planned.iter().enumerate() {
            if let Some(progress) = progress {
                progress(done, planned.len())?;
            }
            if let Some(bytes) = (self.made)(name)? {
                writer.write_tensor(name, &bytes)?;
                continue;
            }
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            let bytes = self.pool.run(|scope| encode_all(scope, &tensor, *stored));
            writer.write_tensor(name, &bytes.map_err(|error| unfit(checkpoint.path(), name, &error))?)?;
            drop(tensor);
            checkpoint.release(name);
        }
        writer.finish_after(self.last)?;
        if let Some(progress) = progress {
            progress(planned.len(), planned.len())?;
        }
        Ok(())
    }
}

/// llama.cpp's number for files whose matrices have that type.
fn file_type(wanted: BlockType) -> Option<u32> {
    Some(match wanted {
        BlockType::F32 => 0,
        BlockType::F16 => 1,
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q5_1 => 9,
        BlockType::Q2_K => 10,
        BlockType::Q3_K => 12,
        BlockType::Q4_K => 15,
        BlockType::Q5_K => 17,
        BlockType::Q6_K => 18,
        BlockType::IQ4_NL => 25,
        BlockType::IQ4_XS => 30,
        BlockType::BF16 => 32,
        BlockType::MXFP4 => 38,
        _ => return None,
    })
}

/// The type that most weights of the layers' matrices have; `None` without such matrices.
fn most(planned: &[(&str, BlockType, NewTensor)]) -> Option<BlockType> {
    let mut counts: Vec<(BlockType, u64)> = Vec::new();
    for (name, stored, tensor) in planned {
        let dims: Vec<usize> = tensor.dims().iter().map(|dim| *dim as usize).collect();
        if !name.starts_with("blk.") || target(name, &dims, BlockType::Q4_0).is_none() {
            continue;
        }
        let weights = tensor.dims().iter().product::<u64>();
        match counts.iter_mut().find(|(known, _)| known == stored) {
            Some((_, count)) => *count += weights,
            None => counts.push((*stored, weights)),
        }
    }
    // The first of several with the same count, so that the result does not depend on how they are compared.
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(stored, _)| stored)
}

/// The type that a tensor is stored in.
fn stored(name: &str, tensor: &Tensor<'_>, wanted: BlockType) -> BlockType {
    match target(name, &tensor.dims, wanted) {
        None => BlockType::F32,
        Some(wanted) if tensor.dims.first().is_some_and(|columns| columns.is_multiple_of(wanted.block_len())) => wanted,
        Some(_) => BlockType::F16,
    }
}

/// An error of row `index`.
fn in_row(error: Error, index: usize) -> Error {
    match error {
        Error::InvalidArgument { name, found, expected } => {
            Error::InvalidArgument { name, found: format!("{found} of row {index}"), expected }
        }
        other => other,
    }
}

/// The bytes of a whole tensor, encoded by all threads.
fn encode_all(scope: &Scope<'_>, tensor: &Tensor<'_>, stored: BlockType) -> Result<Vec<u8>> {
    let columns = tensor.dims.first().copied().unwrap_or(0);
    let rows: usize = tensor.dims.iter().skip(1).product();
    // The writer has checked that the number of bytes does not overflow.
    let row_bytes = stored.bytes_for(columns).unwrap_or_default();
    let mut bytes = vec![0; rows * row_bytes];
    let fault = Mutex::new(None);
    let fail = |error| {
        fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    };
    // A range per matrix of a stack of experts.
    let matrix = tensor.dims.get(1).copied().unwrap_or(1).max(1);
    let ranges: Vec<_> = (0..rows.div_ceil(matrix)).map(|_| Mutex::new(ScaleRange::new(stored))).collect();
    let found = tensor.rows.block_type();
    let rows_per_piece = (PIECE / row_bytes.max(1)).max(1);
    scope.for_each_chunk(&mut bytes, (rows_per_piece * row_bytes).max(1), |piece, out| {
        let (mut scratch, mut values, mut encoded) = (Vec::new(), Vec::new(), Vec::new());
        for (i, out) in out.chunks_exact_mut(row_bytes).enumerate() {
            let index = piece * rows_per_piece + i;
            encoded.clear();
            let decoded = match found.is_supported() {
                true => decode(tensor.rows.as_ref(), index, columns, &mut scratch, &mut values),
                // It can only be copied.
                false => Ok(()),
            };
            let done = decoded.and_then(|()| {
                if found == stored {
                    encoded.extend_from_slice(tensor.rows.row(index, &mut scratch));
                    return check_finite(&values);
                }
                encode(stored, &values, &mut encoded)?;
                ranges[index / matrix].lock().unwrap_or_else(PoisonError::into_inner).add_row(&values);
                Ok(())
            });
            match done {
                Ok(()) => out.copy_from_slice(&encoded),
                Err(error) => return fail(in_row(error, index)),
            }
        }
    });
    for range in ranges {
        if let Some((found, expected)) = range.into_inner().unwrap_or_else(PoisonError::into_inner).fault() {
            fail(Error::argument("values", found, expected));
        }
    }
    fault.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(bytes), Err)
}
