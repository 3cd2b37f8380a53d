//! Matrices that cannot be stored in the format that was chosen for them, found before any of them is quantized.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Place, Result};
use crate::format::Tensor;
use crate::quant::block::BlockType;
use crate::quant::scale_range::ScaleRange;
use crate::quantize::calibration::read_rows;
use crate::quantize::context::OpenRun;
use crate::quantize::overrides::TensorFormats;

/// Rows that one task reads.
const TASK_ROWS: usize = 64;

/// The formats of a run, with overrides that store matrices in BF16 where F16 scales do not hold their weights; and the names
/// of these matrices, each with the reason.
///
/// # Errors
/// [`Error::Malformed`] for weights that are not finite; [`Error::Interrupted`].
pub(in crate::quantize) fn without_f16_scales(run: &OpenRun<'_>) -> Result<(TensorFormats, Vec<(String, String)>)> {
    let mut formats = run.formats.clone();
    let found = beyond_f16(run)?;
    formats.overrides.splice(0..0, found.iter().map(|(name, _)| (name.clone(), BlockType::BF16)));
    Ok((formats, found))
}

/// The matrices that F16 scales do not hold, each with the reason.
fn beyond_f16(run: &OpenRun<'_>) -> Result<Vec<(String, String)>> {
    let (checkpoint, names) = (run.checkpoint, run.checkpoint.names());
    let mut found = Vec::new();
    for name in &names {
        run.check()?;
        let Some(tensor) = checkpoint.tensor(name).filter(|tensor| tensor.dims.len() > 1) else { continue };
        let (source, stored) = (tensor.rows.block_type(), run.formats.stored(name, &tensor.dims).block_type());
        if source != stored && source.is_supported() {
            let place = || Place::Tensor((*name).to_owned());
            let reason = fault(run, &tensor, stored).map_err(|error| match error {
                Error::InvalidArgument { found, expected, .. } => {
                    Error::malformed(checkpoint.path(), place(), found, expected)
                }
                other => other,
            })?;
            found.extend(reason.map(|reason| ((*name).to_owned(), reason)));
        }
        checkpoint.release(name);
    }
    Ok(found)
}

/// Why a block type does not hold a tensor; `None` if it does.
fn fault(run: &OpenRun<'_>, tensor: &Tensor<'_>, stored: BlockType) -> Result<Option<String>> {
    let rows: usize = tensor.dims.iter().skip(1).product();
    let (columns, matrix) = (tensor.dims[0].max(1), tensor.dims[1].max(1));
    // A range per matrix of a stack of experts.
    let ranges: Vec<_> = (0..rows.div_ceil(matrix)).map(|_| Mutex::new(ScaleRange::new(stored))).collect();
    let error = Mutex::new(None);
    let mut tasks = vec![(); rows.div_ceil(TASK_ROWS)];
    run.layers.pool().run(|scope| {
        scope.for_each_chunk(&mut tasks, 1, |task, _| {
            let first = task * TASK_ROWS;
            let values = match read_rows(tensor, first, TASK_ROWS.min(rows - first)) {
                Ok(values) => values,
                Err(fault) => {
                    error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
                    return;
                }
            };
            for (row, values) in values.chunks(columns).enumerate() {
                let row = first + row;
                if let Some(column) = values.iter().position(|value| !value.is_finite()) {
                    let found = format!("{} at row {row}, column {column}", values[column]);
                    let fault = Error::argument("weights", found, "finite numbers");
                    error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
                    return;
                }
                ranges[row / matrix].lock().unwrap_or_else(PoisonError::into_inner).add_row(values);
            }
        });
    });
    if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let faults = ranges.into_iter().filter_map(|range| {
        let (found, expected) = range.into_inner().unwrap_or_else(PoisonError::into_inner).fault()?;
        Some(format!("stored in BF16: found {found}, expected {expected}"))
    });
    Ok(faults.into_iter().next())
}
