//! Measures the importance of columns and writes it to a file.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::format::Checkpoint;
use crate::format::gguf::{Metadata, NewTensor, StringArray, Writer};
use crate::model::layerwise::{Layerwise, Site};
use crate::quant::block::BlockType;
use crate::quantize::calibration::{Calibration, Moments, Visitor, check_windows};
use crate::quantize::context::{OpenRun, RunContext};
use crate::quantize::format::Format;
use crate::quantize::importance::{COUNTS, SUMS};
use crate::quantize::overrides::{TensorFormats, is_linear};
use crate::quantize::resume::ResumeFiles;

/// Measures the importance of the columns of all linear layers of the source on the windows of the context, and writes it to
/// an `imatrix.gguf` file at `path`, which llama.cpp reads, too.
///
/// # Errors
/// Those of [`quantize`](crate::quantize::quantize).
pub fn write_importance(context: &RunContext<'_>, path: &Path) -> Result<()> {
    let sums = context.with_checkpoint(|checkpoint| {
        let layers = &Layerwise::load(checkpoint, &context.load_options())?;
        check_windows(layers, context.windows)?;
        let files = &ResumeFiles::next_to(context.out);
        let formats =
            &TensorFormats { format: Format::Q4_0, group: 32, output_type: BlockType::Q8_0, overrides: Vec::new() };
        let run = OpenRun { context: *context, checkpoint, layers, formats, files };
        let mut collector = Collector { run, sums: BTreeMap::new() };
        let folder = std::env::temp_dir();
        let mut calibration = Calibration::start(layers, context.windows, &folder)?;
        for index in 0..layers.config().layers.len() {
            calibration.layer(index, &mut collector)?;
            run.release_layer(index);
        }
        Ok(collector.sums)
    })?;
    let mut metadata = Metadata::new();
    let (chunks, tokens) = (context.windows.len(), context.windows.iter().map(Vec::len).max().unwrap_or(0));
    let datasets: StringArray = ["calibration text"].into_iter().collect();
    metadata.set("general.type", "imatrix").set("imatrix.datasets", datasets);
    metadata.set("imatrix.chunk_count", chunks as u32).set("imatrix.chunk_size", tokens as u32);
    let tensors = sums.iter().flat_map(|(name, Sums { columns, counts, .. })| {
        let matrices = counts.len() as u64;
        let tensor =
            |suffix: &str, width: u64| NewTensor::new(format!("{name}{suffix}"), BlockType::F32, [width, matrices]);
        [tensor(SUMS, *columns as u64), tensor(COUNTS, 1)]
    });
    let mut writer = Writer::create(path, &metadata, tensors)?;
    for (name, Sums { squares, counts, .. }) in &sums {
        writer.write_values(&format!("{name}{SUMS}"), squares)?;
        writer.write_values(&format!("{name}{COUNTS}"), counts)?;
    }
    writer.finish()
}

/// The sums of a tensor.
struct Sums {
    columns: usize,
    /// `(matrices, columns)`
    squares: Vec<f32>,
    /// `(matrices)`: tokens.
    counts: Vec<f32>,
}

/// Sums the squared inputs of each linear layer.
struct Collector<'a> {
    run: OpenRun<'a>,
    sums: BTreeMap<String, Sums>,
}

impl Visitor for Collector<'_> {
    fn wants(&self, _: usize, _: Site) -> bool {
        true
    }

    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()> {
        let Some(moments) = moments else { return Ok(()) };
        for name in site.tensors().into_iter().map(|name| format!("blk.{layer}.{name}")) {
            let Some(dims) = self.run.checkpoint.tensor(&name).map(|tensor| tensor.dims) else { continue };
            if !is_linear(name.strip_suffix(".weight").unwrap_or(&name)) {
                continue;
            }
            let (columns, matrices) = (dims[0], dims.iter().skip(2).product());
            let sums = self.sums.entry(name).or_insert_with(|| Sums {
                columns,
                squares: vec![0.0; matrices * columns],
                counts: vec![0.0; matrices],
            });
            let (part, tokens) = (site.expert().unwrap_or(0), moments.tokens as f32);
            let own = &mut sums.squares[part * columns..][..columns];
            own.iter_mut()
                .zip(moments.hessian.iter().step_by(columns + 1))
                .for_each(|(sum, mean)| *sum = mean * tokens);
            sums.counts[part] = tokens;
        }
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        self.run.checkpoint
    }

    fn step(&self, layer: usize, _: Site, _: usize) -> Result<()> {
        self.run.enter_layer("measuring importance", layer)
    }
}
