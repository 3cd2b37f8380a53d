//! Chooses the format of each linear layer where the caller leaves it open.

use std::collections::HashMap;

use crate::error::Result;
use crate::format::Checkpoint;
use crate::model::layerwise::{Layerwise, Site};
use crate::quant::block::BlockType;
use crate::quantize::calibration::{Calibration, MIN_TOKENS, Moments, Visitor, check_windows, read_rows};
use crate::quantize::compute::Compute;
use crate::quantize::context::{OpenRun, RunContext};
use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::LayerProblem;
use crate::quantize::overrides::{Stored, TensorFormats, is_linear};
use crate::quantize::recipes::{exact, rtn};
use crate::quantize::resume::ResumeFiles;

/// The formats of 4 bits. Where two of them lose the same, the first is chosen.
const CANDIDATES: [Format; 3] = [Format::Q4_0, Format::Q4_1, Format::Iq4Nl];
/// Tokens on which formats are compared.
const SAMPLE_TOKENS: usize = 4096;
/// The share of the error of the default format that another format of the same size must stay below.
const SAME_SIZE: f64 = 0.75;
/// The same for a format that takes half a bit more, with which the default format would halve its error.
const HALF_A_BIT: f64 = 0.5;

/// `formats` with overrides for linear layers that another 4-bit format suits better.
///
/// A layer that the source has in 4 bits gets the format that holds it exactly. With `weigh`, the others get the format whose
/// rounding changes their outputs least on a sample of the windows.
///
/// # Errors
/// Those of [`quantize`](crate::quantize::quantize).
pub fn choose_formats(context: &RunContext<'_>, formats: &TensorFormats, weigh: bool) -> Result<TensorFormats> {
    formats.check()?;
    context.with_checkpoint(|checkpoint: &dyn Checkpoint| {
        formats.check_names(checkpoint)?;
        let mut chosen = formats.clone();
        chosen.overrides.extend(exact_formats(checkpoint, formats));
        if weigh {
            let layers = &Layerwise::load(checkpoint, &context.load_options())?;
            check_windows(layers, context.windows)?;
            let files = &ResumeFiles::next_to(context.out);
            let sample = sample(context.windows);
            let context = RunContext { windows: &sample, ..*context };
            let run = OpenRun { context, checkpoint, layers, formats: &chosen, files };
            let better = weigh_formats(&run)?;
            chosen.overrides.extend(better);
        }
        Ok(chosen)
    })
}

/// The first windows, up to [`SAMPLE_TOKENS`].
fn sample(windows: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut tokens = 0;
    let mut enough = |window: &&Vec<u32>| {
        tokens += window.len();
        tokens - window.len() < SAMPLE_TOKENS
    };
    windows.iter().take_while(|window| enough(window)).cloned().collect()
}

/// The format of each linear layer that a 4-bit format holds exactly.
fn exact_formats(checkpoint: &dyn Checkpoint, formats: &TensorFormats) -> Vec<(String, BlockType)> {
    let mut found = Vec::new();
    for name in checkpoint.names() {
        let Some(tensor) = checkpoint.tensor(name).filter(|tensor| is_open(formats, name, &tensor.dims)) else {
            continue;
        };
        if exact::is_few_bits(&tensor, checkpoint.is_quantized(name)) {
            let holds = |format: &Format| {
                let grouped = GroupedFormat::fitting(*format, formats.group, tensor.dims[0]);
                grouped.is_some_and(|grouped| exact::is_exact(&tensor, &grouped))
            };
            let format = CANDIDATES.into_iter().find(holds);
            found.extend(format.map(|format| (name.to_owned(), format.block_type())));
        }
        drop(tensor);
        checkpoint.release(name);
    }
    found
}

/// Whether a tensor is a linear layer in the default format.
fn is_open(formats: &TensorFormats, name: &str, dims: &[usize]) -> bool {
    let is_default = |stored| matches!(stored, Stored::Solved(grouped) if grouped.format == formats.format);
    let is_overridden = formats.is_overridden(name);
    is_linear(name.strip_suffix(".weight").unwrap_or(name)) && !is_overridden && is_default(formats.stored(name, dims))
}

/// Overrides for the linear layers that another format suits better than the default one.
fn weigh_formats(run: &OpenRun<'_>) -> Result<Vec<(String, BlockType)>> {
    let folder = std::env::temp_dir();
    let mut scale = Scale { run: *run, compute: run.compute(), errors: HashMap::new() };
    let mut calibration = Calibration::start(run.layers, run.context.windows, &folder)?;
    for index in 0..run.layers.config().layers.len() {
        calibration.layer(index, &mut scale)?;
        run.release_layer(index);
    }
    let better = |(name, errors): (String, [f64; CANDIDATES.len()])| {
        let default = CANDIDATES.iter().position(|format| *format == run.formats.format)?;
        // What the error counts, in units of that of the default format.
        let cost = |at: usize| match CANDIDATES[at].has_min() {
            _ if at == default => errors[at],
            true => errors[at] / HALF_A_BIT,
            false => errors[at] / SAME_SIZE,
        };
        let best = (0..CANDIDATES.len()).min_by(|a, b| cost(*a).total_cmp(&cost(*b)))?;
        (cost(best) < errors[default]).then(|| (name, CANDIDATES[best].block_type()))
    };
    let mut better: Vec<_> = scale.errors.into_iter().filter_map(better).collect();
    better.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(better)
}

/// Sums the error of each linear layer in each format.
struct Scale<'a> {
    run: OpenRun<'a>,
    compute: Compute<'a>,
    /// By tensor: the sum over its parts of the relative error of each candidate, weighted by tokens.
    errors: HashMap<String, [f64; CANDIDATES.len()]>,
}

impl Scale<'_> {
    /// The tensors of a site that are in the default format.
    fn tensors(&self, layer: usize, site: Site) -> impl Iterator<Item = String> {
        let names = site.tensors().into_iter().map(move |name| format!("blk.{layer}.{name}"));
        names.filter(|name| {
            self.run.checkpoint.tensor(name).is_some_and(|tensor| is_open(self.run.formats, name, &tensor.dims))
        })
    }
}

impl Visitor for Scale<'_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        self.tensors(layer, site).next().is_some()
    }

    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()> {
        let Some(moments) = moments.filter(|moments| moments.tokens >= MIN_TOKENS) else { return Ok(()) };
        let names: Vec<String> = self.tensors(layer, site).collect();
        for name in names {
            self.run.check()?;
            let Some(tensor) = self.run.checkpoint.tensor(&name) else { continue };
            let (columns, rows) = (tensor.dims[0], tensor.dims[1]);
            let weights = read_rows(&tensor, site.expert().unwrap_or(0) * rows, rows)?;
            let problem = LayerProblem::new(&weights, rows, columns, &moments.hessian, &moments.magnitude)?;
            let sums = self.errors.entry(name).or_default();
            for (sum, format) in sums.iter_mut().zip(CANDIDATES) {
                let Some(grouped) = GroupedFormat::fitting(format, self.run.formats.group, columns) else { continue };
                let decoded = rtn::solve(&problem, &grouped, true, &self.compute).decode(&grouped, columns);
                *sum += self.compute.error(&problem, &decoded) * moments.tokens as f64;
            }
        }
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        self.run.checkpoint
    }

    fn step(&self, layer: usize, _: Site, _: usize) -> Result<()> {
        self.run.enter_layer("choosing formats", layer)
    }
}
