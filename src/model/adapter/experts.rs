//! Adapters of all experts of a layer, which PEFT writes as one pair of matrices per parameter (`target_parameters`).
//!
//! The first matrix holds the rows of expert after expert, `(experts * rank, columns)`. The columns of the second alternate
//! between the experts: `(rows, rank * experts)`.

use std::collections::BTreeMap;

use super::factors::{Delta, Factors};
use super::file::{AdapterFile, Base};
use super::peft_folder::{Folder, Module};
use crate::error::Result;

/// Families whose experts are stored as columns in the checkpoint.
const TRANSPOSED: &[&str] = &["gpt-oss", "llama4"];

/// Takes the adapters of experts out of `modules` and adds them to `read`.
///
/// # Errors
/// [`Error::Malformed`](crate::Error::Malformed) and [`Error::Unsupported`](crate::Error::Unsupported) with the tensor.
pub(super) fn take(
    folder: &Folder,
    modules: &mut BTreeMap<&str, Module<'_>>,
    base: &Base<'_>,
    read: &mut AdapterFile,
) -> Result<()> {
    let targets = |end: &str| folder.config.parameters.iter().any(|parameter| parameter.ends_with(end));
    let is_experts = |name: &str| name.trim_end_matches(".base_layer").ends_with(".experts");
    let names: Vec<&str> = modules.keys().copied().filter(|name| is_experts(name)).collect();
    if folder.config.parameters.is_empty() {
        return Ok(());
    }
    for name in names {
        let Some(Module { a: Some(a), b: Some(b), .. }) = modules.remove(name) else {
            let wrong = format!("{name}: one of two matrices");
            return Err(crate::Error::malformed(
                folder.files.folder(),
                crate::error::Place::File,
                wrong,
                "both matrices",
            ));
        };
        let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
        let dims = |part: &str| (base.dims)(&format!("blk.{}.ffn_{part}_exps", layer?));
        let unsupported = || folder.unsupported(a.tensor, &format!("an adapter of {name}"));
        let (Some([hidden, width, count]), Some(down)) = (dims("up"), dims("down")) else { return Err(unsupported()) };
        if TRANSPOSED.contains(&base.config.family.name) || count == 0 || down != [width, hidden, count] {
            return Err(unsupported());
        }
        // The shape says which parameter it is.
        let shape = [b.rows, a.columns];
        let parts: &[(&str, usize)] = match shape {
            _ if shape == [2 * width, hidden] && targets("gate_up_proj") => &[("gate", 0), ("up", width)],
            _ if shape == [hidden, width] && targets("down_proj") => &[("down", 0)],
            _ => return Err(unsupported()),
        };
        if dims("gate").is_none() || a.rows != b.columns || !a.rows.is_multiple_of(count) {
            return Err(unsupported());
        }
        let rank = a.rows / count;
        let parameter = if parts.len() == 2 { "gate_up_proj" } else { "down_proj" };
        let scale = folder.config.scale(&format!("{}.{parameter}", name.trim_end_matches(".base_layer")), rank)?;
        let (a, b, columns) = (folder.values(a)?, folder.values(b)?, a.columns);
        for (part, first) in parts {
            let Some(dims) = dims(part) else { return Err(unsupported()) };
            let mut delta = Delta::empty(dims);
            for (expert, to) in delta.matrices.iter_mut().enumerate() {
                let own = a[expert * rank * columns..][..rank * columns].to_vec();
                let rows = b.chunks_exact(rank * count).skip(*first).take(dims[1]);
                let up = rows.flat_map(|row| row.iter().skip(expert).step_by(count).copied()).collect();
                *to = Some(Factors::scaled(rank, own, up, scale));
            }
            let tensor = format!("blk.{}.ffn_{part}_exps", layer.unwrap_or_default());
            if read.deltas.insert(tensor, delta).is_some() {
                return Err(unsupported());
            }
        }
    }
    Ok(())
}
