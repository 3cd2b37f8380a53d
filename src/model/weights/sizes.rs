//! The memory that tensors take, from their dimensions and types.

use crate::format::Tensor;
use crate::quant::packed::{Code, Layout, Packed};

/// Columns to which rows are filled up. Layouts need less, but parts of a tensor may be packed one by one.
const FILLED_COLUMNS: usize = 64;
/// Tensors with as few columns are filters of convolutions and the like, which are not packed.
const FILTER_COLUMNS: usize = 8;
/// The tensors that hold the experts of a layer.
pub(in crate::model) const EXPERT_STACKS: [&str; 4] = ["gate", "up", "gate_up", "down"];

/// Whether a tensor holds experts.
pub(in crate::model) fn holds_experts(name: &str) -> bool {
    EXPERT_STACKS.iter().any(|stack| name.ends_with(&format!(".ffn_{stack}_exps.weight")))
}

/// Bytes of a tensor in memory, at most.
pub(in crate::model) fn packed_bytes(name: &str, tensor: &Tensor<'_>) -> usize {
    let columns = tensor.dims.first().copied().unwrap_or(0);
    let is_plain = tensor.dims.len() == 1 && (name.contains("norm") || name.ends_with(".bias"));
    if is_plain || columns <= FILTER_COLUMNS {
        return count(&tensor.dims).saturating_mul(size_of::<f32>());
    }
    // Other vectors may be packed as matrices of one row.
    let rows = tensor.dims.get(1).map_or(1, |rows| *rows);
    let matrices = tensor.dims.get(2..).map_or(1, count);
    let layout = tensor.rows.block_type().packed_layout().unwrap_or(Layout::float(Code::F32));
    let columns = columns.checked_next_multiple_of(FILLED_COLUMNS).unwrap_or(usize::MAX);
    Packed::bytes_needed(rows, columns, layout).saturating_mul(matrices)
}

/// The number of values of a tensor of these dimensions, saturating.
pub(in crate::model) fn count(dims: &[usize]) -> usize {
    dims.iter().fold(1, |all: usize, dim| all.saturating_mul(*dim))
}
