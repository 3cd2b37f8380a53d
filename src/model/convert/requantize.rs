//! Re-encodes the matrices of a checkpoint in another type, row by row while they are read.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use half::f16;

use crate::error::{Error, Place, Result};
use crate::format::{Checkpoint, Tensor, as_in_source};
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;
use crate::quant::scale_range::ScaleRange;

/// The type to store the tensor `name` in when matrices are wanted in `wanted`. `None` for tensors that are always F32:
/// vectors, norms, learned positions, routers, heads, convolutions and decays are small, and the quality depends on them.
///
/// The embedding, the output and what decides how fast recurrent states decay need more bits than the rest: where 4 are
/// wanted, they have 8.
pub fn target(name: &str, dims: &[usize], wanted: BlockType) -> Option<BlockType> {
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    let is_small =
        ["_norm", "position_embd", "token_types", "ffn_gate_inp", ".bias", ".ssm_a", ".ssm_d", ".shortconv.conv"]
            .iter()
            .any(|end| stem.ends_with(end))
            || ["rope_", "altup_", "per_layer_model_proj", "cls", "dense_"].iter().any(|start| stem.starts_with(start))
            || [".altup_", ".laurel_", ".ssm_conv1d", ".time_mix_lerp", ".channel_mix_lerp"]
                .iter()
                .any(|part| stem.contains(part));
    if dims.len() < 2 || is_small {
        return None;
    }
    // What decides how fast states decay is small, and its errors add up over positions.
    let decays = [".ssm_alpha", ".ssm_beta", ".ssm_ba", ".ssm_dt", ".ssm_x", ".ssm_f_a", ".ssm_f_b"];
    let of_head = [".nextn.embed_tokens", ".nextn.shared_head_head"];
    let is_outer = matches!(stem, "token_embd" | "per_layer_token_embd" | "output")
        || decays.iter().chain(&of_head).any(|end| stem.ends_with(end));
    let is_coarse = matches!(wanted, BlockType::Q4_0 | BlockType::Q4_1);
    Some(if is_outer && is_coarse { BlockType::Q8_0 } else { wanted })
}

/// A checkpoint with its F32, F16 and BF16 matrices in blocks of fewer bits. Matrices that are in blocks stay as they are.
pub struct Quantized<'a> {
    source: &'a dyn Checkpoint,
    wanted: BlockType,
    /// The error of the first row that could not be encoded.
    fault: Mutex<Option<Error>>,
}

impl<'a> Quantized<'a> {
    /// `source` with linear layers in `wanted`: [`BlockType::Q4_0`] for INT4, [`BlockType::Q8_0`] for INT8. Rows that do not
    /// fill whole blocks are padded with zeros.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for types that cannot be encoded.
    pub fn new(source: &'a dyn Checkpoint, wanted: BlockType) -> Result<Quantized<'a>> {
        if !wanted.can_encode() {
            let known = BlockType::names(BlockType::can_encode);
            return Err(Error::argument("block type", wanted, format_args!("one of {known}")));
        }
        Ok(Quantized { source, wanted, fault: Mutex::new(None) })
    }

    /// Returns the error of a row that could not be encoded. Call it after loading: such rows were read as zeros.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the tensor when one holds NaN, an infinity, or numbers too large or too small for its type.
    pub fn finish(self) -> Result<()> {
        self.fault.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

impl Checkpoint for Quantized<'_> {
    as_in_source!();

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let Tensor { dims, rows } = self.source.tensor(name)?;
        let is_float = matches!(rows.block_type(), BlockType::F32 | BlockType::F16 | BlockType::BF16)
            && !self.source.is_quantized(name);
        let Some(wanted) = target(name, &dims, self.wanted).filter(|_| is_float) else {
            return Some(Tensor { dims, rows });
        };
        let owned = name.to_owned();
        let encoded = Encoded {
            source: rows,
            wanted,
            columns: *dims.first()?,
            range: Mutex::new(ScaleRange::new(wanted)),
            fail: Box::new(move |error: Error| {
                let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
                fault.get_or_insert_with(|| unfit(self.path(), &owned, &error));
            }),
        };
        Some(Tensor { dims, rows: Box::new(encoded) })
    }

    fn is_quantized(&self, name: &str) -> bool {
        self.source.is_quantized(name)
    }
}

/// The error for tensor `name` of the file at `path`, which could not be encoded because of `error`.
pub(super) fn unfit(path: &Path, name: &str, error: &Error) -> Error {
    let place = Place::Tensor(name.to_owned());
    match error {
        Error::InvalidArgument { found, expected, .. } => Error::malformed(path, place, found, expected),
        other => Error::malformed(path, place, other, "values that can be encoded"),
    }
}

/// Rows of a matrix, encoded in another type.
struct Encoded<'a> {
    source: Box<dyn Rows + 'a>,
    wanted: BlockType,
    columns: usize,
    /// The range of the rows that were read.
    range: Mutex<ScaleRange>,
    /// Called with the reason why a row cannot be encoded.
    fail: Box<dyn Fn(Error) + Sync + 'a>,
}

impl Rows for Encoded<'_> {
    fn block_type(&self) -> BlockType {
        self.wanted
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let mut values = Vec::new();
        let decoded = decode(self.source.as_ref(), index, self.columns, scratch, &mut values);
        if values.iter().all(|value| value.is_finite()) {
            self.range.lock().unwrap_or_else(PoisonError::into_inner).add_row(&values);
        }
        values.resize(self.columns.next_multiple_of(self.wanted.block_len()), 0.0);
        scratch.clear();
        if let Err(error) = decoded.and_then(|()| encode(self.wanted, &values, scratch)) {
            scratch.resize(self.wanted.bytes_for(values.len()).unwrap_or_default(), 0);
            (self.fail)(error);
        }
        scratch
    }
}

impl Drop for Encoded<'_> {
    fn drop(&mut self) {
        let range = self.range.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some((found, expected)) = range.fault() {
            (self.fail)(Error::argument("values", found, expected));
        }
    }
}

/// Decodes the `columns` values of row `index`.
pub(super) fn decode(
    rows: &dyn Rows,
    index: usize,
    columns: usize,
    scratch: &mut Vec<u8>,
    values: &mut Vec<f32>,
) -> Result<()> {
    values.resize(columns, 0.0);
    rows.block_type().decode(rows.row(index, scratch), values)
}

/// Appends the blocks of `values`. Unlike [`BlockType::encode`] it refuses numbers that are not finite, or would become
/// infinite.
pub(super) fn encode(wanted: BlockType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    check_finite(values)?;
    if wanted == BlockType::F16
        && let Some(large) = values.iter().find(|value| value.is_finite() && f16::from_f32(**value).is_infinite())
    {
        return Err(Error::argument("values", large, "values up to 65504, the largest of F16"));
    }
    wanted.encode(values, out)
}

/// Checks that numbers are finite.
///
/// # Errors
/// [`Error::InvalidArgument`] with the first that is not.
pub(super) fn check_finite(values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(Error::argument("values", format_args!("{} in column {at}", values[at]), "finite numbers")),
        None => Ok(()),
    }
}
