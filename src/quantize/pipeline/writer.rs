//! Writes the output from the log, and reports on its tensors.

use super::options::QuantizeOptions;
use super::report::{ExpertCounts, Report, TensorReport};
use crate::error::{Error, Result};
use crate::format::Tensor;
use crate::format::gguf::{Gguf, Metadata};
use crate::model::convert::Job;
use crate::model::layerwise::Layerwise;
use crate::quantize::calibration::MIN_TOKENS;
use crate::quantize::context::OpenRun;
use crate::quantize::overrides::{Stored, is_linear};
use crate::quantize::resume::ResumeLog;
use crate::quantize::tuning;

/// Writes the output of a run whose tensors are all in the log, with the tuned ones if `is_tuned`. `metadata` is added to that
/// of the checkpoint.
///
/// # Errors
/// Those of the log and of writing.
pub(super) fn write(
    run: &OpenRun<'_>,
    options: &QuantizeOptions,
    is_tuned: bool,
    log: &ResumeLog,
    metadata: &Metadata,
) -> Result<Report> {
    let (checkpoint, out) = (run.checkpoint, run.context.out);
    let stored = |name: &str, tensor: &Tensor<'_>| run.formats.stored(name, &tensor.dims).block_type();
    let made = |name: &str| {
        if is_tuned && let Some(bytes) = log.blocks(&tuning::tuned(name), 0)? {
            return Ok(Some(bytes));
        }
        let mut bytes = log.blocks(name, 0)?;
        for part in 1.. {
            let Some(more) = log.blocks(name, part)? else { break };
            bytes.get_or_insert_default().extend(more);
        }
        Ok(bytes)
    };
    let file_type = run.formats.format.block_type();
    let job = Job {
        checkpoint,
        more: metadata,
        file_type,
        stored: &stored,
        made: &made,
        pool: run.layers.pool(),
        last: &|made| run.files.mark_done(made),
    };
    job.write(out, None)?;
    read_back(run)?;
    let size = out.metadata().map_err(|source| Error::io(out, source))?.len();
    let mut report = Report::new(checkpoint.path(), out, &options.name(), size);
    for name in checkpoint.names() {
        if let Some(tensor) = checkpoint.tensor(name).filter(|tensor| tensor.dims.len() > 1) {
            report.add(tensor_report(run, log, name, &tensor));
        }
    }
    report.experts = experts(run, log);
    Ok(report)
}

/// Loads the output layer by layer, as a model does.
///
/// # Errors
/// Those of [`Model::load`](crate::model::Model::load).
fn read_back(run: &OpenRun<'_>) -> Result<()> {
    let file = Gguf::open(run.context.out)?;
    let layers = Layerwise::load(&file, &run.context.load_options())?;
    for index in 0..layers.config().layers.len() {
        run.check()?;
        layers.layer(&file, index)?;
    }
    Ok(())
}

/// Counts the experts by the tokens that reached them.
fn experts(run: &OpenRun<'_>, log: &ResumeLog) -> ExpertCounts {
    let mut counts = ExpertCounts::default();
    for layer in 0..run.layers.config().layers.len() {
        // Every expert has this matrix, and every token that reaches the expert reaches it.
        let name = format!("blk.{layer}.ffn_down_exps.weight");
        let tokens = |part| log.description(&name, part)?["tokens"].as_u64();
        for tokens in (0..).map_while(tokens) {
            counts.all += 1;
            counts.unreached += usize::from(tokens == 0);
            counts.rounded += usize::from(tokens < MIN_TOKENS as u64);
        }
    }
    counts
}

fn tensor_report(run: &OpenRun<'_>, log: &ResumeLog, name: &str, tensor: &Tensor<'_>) -> TensorReport {
    let stored = run.formats.stored(name, &tensor.dims);
    let parts: Vec<_> = (0..).map_while(|part| log.description(name, part)).collect();
    let sum = |key: &str| parts.iter().filter_map(|part| part[key].as_f64()).sum::<f64>();
    let mut recipes: Vec<String> = parts.iter().filter_map(|part| Some(part["recipe"].as_str()?.to_owned())).collect();
    recipes.dedup();
    TensorReport {
        name: name.to_owned(),
        block_type: stored.block_type(),
        group: if let Stored::Solved(grouped) = stored { grouped.group } else { stored.block_type().block_len() },
        recipe: if recipes.is_empty() { "encoded".to_owned() } else { recipes.join(", ") },
        relative_error: (!parts.is_empty()).then(|| sum("relative_error") / parts.len() as f64),
        seconds: sum("seconds"),
        weights: tensor.dims.iter().product(),
        zeros: parts.iter().filter_map(|part| part["zeros"].as_u64()).sum::<u64>() as usize,
        linear: is_linear(name.strip_suffix(".weight").unwrap_or(name)),
        note: run.formats.why_f16(name, &tensor.dims),
    }
}
