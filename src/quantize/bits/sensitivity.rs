//! The sensitivity of each linear layer: how much the predictions of the model change when it alone is quantized.

use serde_json::json;

use super::allocate::{Choice, allocate};
use super::head;
use super::measure::{bytes, divergence, logits};
use crate::error::{Error, Result};
use crate::format::Tensor;
use crate::quant::block::BlockType;
use crate::quantize::calibration::{Calibration, PassThrough, PatchedCheckpoint, read_rows};
use crate::quantize::compute::Compute;
use crate::quantize::context::OpenRun;
use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::{LayerProblem, error};
use crate::quantize::overrides::{Stored, is_linear};
use crate::quantize::recipes::rtn;
use crate::quantize::resume::ResumeLog;

/// Formats that a sensitive tensor may get instead, if they are finer than its own.
const FINER: [Format; 3] = [Format::Iq4Nl, Format::Q5_0, Format::Q8_0];

/// The formats of [`FINER`] that take more bits than `format`, fewest bits first.
fn finer(format: Format) -> impl Iterator<Item = Format> {
    let bits = |format: Format| GroupedFormat { format, group: format.block() }.bits_stored();
    FINER.into_iter().filter(move |finer| bits(*finer) > bits(format))
}

/// Overrides for [`TensorFormats`](super::super::TensorFormats) with which the linear layers have at most `bits` per weight, scales
/// included (`None`: what they have now), and the model loses as little as possible. With `chooses_head`, the embedding and the output
/// matrix give up bytes for linear layers where that loses less.
///
/// The loss of a tensor is the mean divergence of the predictions on the windows of the run when that tensor alone is rounded.
/// Finer formats reduce it in proportion to the error of the weights. Measurements are read from `log` or added to it.
///
/// # Errors
/// [`Error::InvalidArgument`] if the format of linear layers takes more bits; [`Error::Interrupted`]; those of the forward pass.
pub(super) fn plan(
    run: &OpenRun<'_>,
    bits: Option<f64>,
    chooses_head: bool,
    log: &mut ResumeLog,
) -> Result<Vec<(String, BlockType)>> {
    let head = if chooses_head { head::open(run) } else { Vec::new() };
    if !has_spare_bits(run, bits)? && head.is_empty() {
        return Ok(Vec::new());
    }
    let folder = std::env::temp_dir();
    let (windows, layers) = (run.context.windows, run.layers);
    let mut calibration = Calibration::start(layers, windows, &folder)?;
    let count = layers.config().layers.len();
    let mut before = Vec::with_capacity(count);
    for index in 0..count {
        before.push(calibration.fork()?);
        calibration.layer(index, &mut PassThrough(run.checkpoint))?;
    }
    let reference = logits(&mut calibration, windows.len())?;

    // Per tensor: its name, the format that it has without an override, and the formats to choose from.
    let (mut tensors, mut choices) = (Vec::new(), Vec::new());
    let mut add = |name: &str, own: BlockType, formats: Vec<BlockType>, weights: usize, loss: f64, errors: &[f64]| {
        let of = |(block_type, error): (&BlockType, &f64)| Choice {
            bytes: bytes(*block_type, weights),
            loss: if errors[0] > 0.0 { loss * error / errors[0] } else { 0.0 },
        };
        choices.push(formats.iter().zip(errors).map(of).collect::<Vec<Choice>>());
        tensors.push((name.to_owned(), own, formats));
    };
    for (name, weights) in &head {
        run.check()?;
        run.report("sensitivity", 0, count);
        let numbers = known(log, name, || head::measure(run, name, &reference))?;
        let formats = head::FORMATS.map(Format::block_type).to_vec();
        add(name, run.formats.output_type, formats, *weights, numbers[0], &numbers[1..]);
    }
    for (index, before) in before.iter_mut().enumerate() {
        for tensor in linear_layers(run, index) {
            run.check()?;
            run.report("sensitivity", index, count);
            let formats = tensor.formats().into_iter().map(|grouped| grouped.format.block_type()).collect();
            let numbers = known(log, &tensor.name, || measure(run, index, &tensor, before, &reference))?;
            let own = tensor.grouped.format.block_type();
            add(&tensor.name, own, formats, tensor.weights.len(), numbers[0], &numbers[1..]);
        }
    }
    let budget = Budget::of(run, bits)?.open + if chooses_head { head::size(run) } else { 0 };
    let Some(chosen) = allocate(&choices, budget) else { return Err(Budget::too_few(run, bits.unwrap_or_default())) };
    let types = tensors.into_iter().zip(chosen).map(|((name, own, formats), choice)| (name, own, formats[choice]));
    let changed = types.filter(|(_, own, chosen)| own != chosen);
    Ok(changed.map(|(name, _, chosen)| (name, chosen)).collect())
}

/// The loss of a tensor in its own format, then the errors of its weights in each of its formats. `before` has the windows
/// before the tensor's layer.
fn measure(
    run: &OpenRun<'_>,
    index: usize,
    tensor: &LinearLayer,
    before: &mut Calibration<'_>,
    reference: &[f32],
) -> Result<Vec<f64>> {
    let compute = Compute::new(run.layers.pool(), run.layers.kernel());
    let problem = LayerProblem::new(&tensor.weights, tensor.rows, tensor.columns, &[], &[])?;
    let rounded =
        |grouped: &GroupedFormat| rtn::solve(&problem, grouped, true, &compute).decode(grouped, tensor.columns);
    let errors: Vec<f64> = tensor.formats().iter().map(|grouped| error(&problem, &rounded(grouped))).collect();
    let mut patched = PatchedCheckpoint::new(run.checkpoint);
    patched.replace(&tensor.name, 0, rounded(&tensor.grouped));
    let mut fork = before.fork()?;
    for later in index..run.layers.config().layers.len() {
        fork.layer(later, &mut PassThrough(&patched))?;
    }
    let found = logits(&mut fork, run.context.windows.len())?;
    let loss = divergence(reference, &found, run.layers.vocabulary());
    Ok([&[loss], &errors[..]].concat())
}

/// The numbers that the log has under a name; if it has none, those that `measure` returns.
fn known(log: &mut ResumeLog, name: &str, measure: impl FnOnce() -> Result<Vec<f64>>) -> Result<Vec<f64>> {
    if let Some(bytes) = log.blocks(name, 0)? {
        return Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect());
    }
    let numbers = measure()?;
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    log.add(name, 0, json!({ "name": name, "part": 0 }), &bytes)?;
    Ok(numbers)
}

/// What the linear layers may take.
struct Budget {
    /// Bytes for the linear layers whose format is chosen here.
    open: u64,
    /// Bytes that these take in their own format.
    own: u64,
}

impl Budget {
    /// The bytes that a number of bits per weight of all linear layers leaves to those whose format is open.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if they do not suffice for the format of linear layers.
    fn of(run: &OpenRun<'_>, bits: Option<f64>) -> Result<Budget> {
        let (all, fixed, own, _) = sizes(run);
        let Some(bits) = bits else { return Ok(Budget { open: own, own }) };
        let open = ((bits * all as f64 / 8.0) as u64).checked_sub(fixed).filter(|open| *open >= own);
        open.map(|open| Budget { open, own }).ok_or_else(|| Budget::too_few(run, bits))
    }

    fn too_few(run: &OpenRun<'_>, bits: f64) -> Error {
        let (all, fixed, own, widest) = sizes(run);
        let format = run.formats.format.block_type();
        // Rounded up, so that asking for this number succeeds.
        let least = ((fixed + own) as f64 * 8e3 / all.max(1) as f64).ceil() / 1e3;
        let why = match widest {
            Some((name, block_type)) => {
                format!(
                    "the bits of {format}, and of matrices that are stored in other types, such as {name} in {block_type}"
                )
            }
            None => format!("the bits of {format}"),
        };
        Error::argument("bits_per_weight", bits, format_args!("at least {least}, {why}"))
    }
}

/// Over all linear layers: their weights, the bytes of those whose type is fixed, the bytes of the others in their own format,
/// and the first whose type is fixed and larger.
fn sizes(run: &OpenRun<'_>) -> (usize, u64, u64, Option<(String, BlockType)>) {
    let (mut all, mut fixed, mut own, mut widest) = (0, 0, 0, None);
    let default = run.formats.format.block_type();
    let bits = |block_type: BlockType| block_type.block_bytes() * 8 / block_type.block_len();
    for name in run.checkpoint.names() {
        let Some(tensor) = run.checkpoint.tensor(name) else { continue };
        if tensor.dims.len() < 2 || !is_linear(name.strip_suffix(".weight").unwrap_or(name)) {
            continue;
        }
        let weights = tensor.dims.iter().product();
        all += weights;
        let block_type = run.formats.stored(name, &tensor.dims).block_type();
        // The formats of a head behind the last layer are not chosen.
        let layer = name.split('.').nth(1).and_then(|layer| layer.parse::<usize>().ok());
        if block_type == default && layer.is_some_and(|layer| layer < run.layers.config().layers.len()) {
            own += bytes(block_type, weights);
            continue;
        }
        fixed += bytes(block_type, weights);
        if widest.is_none() && bits(block_type) > bits(default) {
            widest = Some((name.to_owned(), block_type));
        }
    }
    (all, fixed, own, widest)
}

/// Whether the bits suffice for a finer format of any tensor.
///
/// # Errors
/// [`Error::InvalidArgument`] if they do not even suffice for the format of linear layers.
fn has_spare_bits(run: &OpenRun<'_>, bits: Option<f64>) -> Result<bool> {
    let own = run.formats.format.block_type();
    let Some(finer) = finer(run.formats.format).next().map(Format::block_type) else { return Ok(false) };
    let of_layer = |index| quantized(run, index).map(|(_, tensor, _)| tensor.dims.iter().product());
    let sizes: Vec<usize> = (0..run.layers.config().layers.len()).flat_map(of_layer).collect();
    let budget = Budget::of(run, bits)?;
    let left = budget.open - budget.own;
    Ok(sizes.iter().any(|size| bytes(finer, *size) <= left + bytes(own, *size)))
}

/// A linear layer without override.
struct LinearLayer {
    name: String,
    /// `(rows, columns)`, with the rows of all experts.
    weights: Vec<f32>,
    rows: usize,
    columns: usize,
    grouped: GroupedFormat,
}

impl LinearLayer {
    /// Its own format and the finer ones.
    fn formats(&self) -> Vec<GroupedFormat> {
        std::iter::once(self.grouped)
            .chain(finer(self.grouped.format).map(|format| GroupedFormat { format, group: 32 }))
            .collect()
    }
}

/// The linear layers of a block of the model whose format is not overridden.
fn quantized<'a>(
    run: &OpenRun<'a>,
    index: usize,
) -> impl Iterator<Item = (&'a str, Tensor<'a>, GroupedFormat)> + use<'a> {
    let prefix = format!("blk.{index}.");
    let (checkpoint, formats) = (run.checkpoint, run.formats);
    let names: Vec<&str> = checkpoint.names().into_iter().filter(|name| name.starts_with(&prefix)).collect();
    names.into_iter().filter_map(move |name| {
        let tensor = checkpoint.tensor(name).filter(|_| is_linear(name.strip_suffix(".weight").unwrap_or(name)))?;
        match formats.stored(name, &tensor.dims) {
            Stored::Solved(grouped) if grouped.format == formats.format => Some((name, tensor, grouped)),
            _ => None,
        }
    })
}

/// Reads the layers of [`quantized`], one at a time.
fn linear_layers(run: &OpenRun<'_>, index: usize) -> impl Iterator<Item = LinearLayer> {
    quantized(run, index).filter_map(|(name, tensor, grouped)| {
        let (columns, rows) = (*tensor.dims.first()?, tensor.dims.iter().skip(1).product());
        let weights = read_rows(&tensor, 0, rows).ok()?;
        Some(LinearLayer { name: name.to_owned(), weights, rows, columns, grouped })
    })
}
