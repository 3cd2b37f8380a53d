//! The importance of the columns of linear layers, in the `imatrix.gguf` files of llama.cpp.
//!
//! For each linear layer such a file has two F32 tensors: `NAME.in_sum2 [columns, matrices]`, the sums of the squared inputs, and
//! `NAME.counts [1, matrices]`, the number of tokens in each sum. A stack of experts has several matrices.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::calibration::{Calibration, Moments, Visitor, check_windows};
use super::context::{OpenRun, RunContext};
use super::overrides::is_linear;
use super::resume::ResumeFiles;
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::format::gguf::{Gguf, Metadata, NewTensor, StringArray, Writer};
use crate::model::layerwise::{Layerwise, Site};
use crate::quant::block::BlockType;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// The mean square of each input of linear layers.
#[derive(Debug)]
pub struct Importance {
    /// By tensor: its columns, and the means `(matrices, columns)`. A matrix without tokens has zeros.
    layers: HashMap<String, (usize, Vec<f32>)>,
    digest: u64,
}

impl Importance {
    /// Reads an `imatrix.gguf` file.
    ///
    /// # Errors
    /// Those of [`Gguf::open`]; [`Error::Malformed`] and [`Error::Missing`] when it is not an importance matrix.
    pub fn read(path: &Path) -> Result<Importance> {
        let file = Gguf::open(path)?;
        let fault = |place, found: String, expected: &str| Err(Error::malformed(path, place, found, expected));
        match file.get_str("general.type")? {
            None | Some("imatrix") => {}
            Some(other) => return fault(Place::Key("general.type".to_owned()), format!("{other:?}"), "imatrix"),
        }
        let (mut layers, mut hasher) = (HashMap::new(), blake3::Hasher::new());
        for sums in file.tensors() {
            let Some(name) = sums.name().strip_suffix(SUMS) else { continue };
            let Some(counts) = file.tensor(&format!("{name}{COUNTS}")) else {
                let place = Place::Tensor(format!("{name}{COUNTS}"));
                return Err(Error::Missing {
                    path: path.to_path_buf(),
                    place,
                    expected: "numbers of tokens".to_owned(),
                });
            };
            let (columns, mut values, counts) = (sums.columns(), file.decode(sums)?, file.decode(counts)?);
            if counts.len() != sums.rows() {
                let expected = format!("{} matrices, like {}", sums.rows(), sums.name());
                return fault(
                    Place::Tensor(format!("{name}{COUNTS}")),
                    format!("{} matrices", counts.len()),
                    &expected,
                );
            }
            for (sums, count) in values.chunks_mut(columns.max(1)).zip(counts) {
                sums.iter_mut().for_each(|sum| *sum = if count > 0.0 { *sum / count } else { 0.0 });
            }
            if let Some(bad) = values.iter().find(|value| !(value.is_finite() && **value >= 0.0)) {
                return fault(Place::Tensor(sums.name().to_owned()), format!("{bad}"), "finite sums of squares");
            }
            hasher.update(name.as_bytes());
            hasher.update(bytemuck::cast_slice(&values));
            layers.insert(name.to_owned(), (columns, values));
        }
        if layers.is_empty() {
            return fault(Place::File, format!("no tensor called NAME{SUMS}"), "an imatrix.gguf file of llama.cpp");
        }
        let digest = u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().unwrap_or(&[0; 8]));
        Ok(Importance { layers, digest })
    }

    /// A number that differs between files.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// Checks that the layers fit those of a checkpoint, and that it has at least one of them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(super) fn check(&self, checkpoint: &dyn Checkpoint) -> Result<()> {
        let mut known = 0;
        for (name, (columns, values)) in &self.layers {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            known += 1;
            let expected = [tensor.dims.first().copied().unwrap_or(0), tensor.dims.iter().skip(2).product()];
            let found = [*columns, values.len() / (*columns).max(1)];
            if found != expected {
                let found = format!("{} columns of {} matrices for {name}", found[0], found[1]);
                return Err(Error::argument("imatrix", found, format_args!("{} of {}", expected[0], expected[1])));
            }
        }
        if known > 0 {
            Ok(())
        } else {
            Err(Error::argument("imatrix", "no layer of this model", "its importance matrix"))
        }
    }

    /// The mean square of each column of a part of a tensor. Empty if it is unknown.
    pub(super) fn of(&self, name: &str, part: usize) -> &[f32] {
        let Some((columns, values)) = self.layers.get(name) else { return &[] };
        let own = values.get(part * columns..(part + 1) * columns).unwrap_or_default();
        if own.iter().any(|value| *value > 0.0) { own } else { &[] }
    }
}

/// Measures the importance of the columns of all linear layers of the source on the windows of the context, and writes it to
/// an `imatrix.gguf` file at `path`, which llama.cpp reads, too.
///
/// # Errors
/// Those of [`quantize`](super::quantize).
pub fn write_importance(context: &RunContext<'_>, path: &Path) -> Result<()> {
    let sums = context.with_checkpoint(|checkpoint| {
        let layers = &Layerwise::load(checkpoint, &context.load_options())?;
        check_windows(layers, context.windows)?;
        let files = &ResumeFiles::next_to(context.out);
        let formats = &super::overrides::TensorFormats {
            format: super::format::Format::Q4_0,
            group: 32,
            output_type: BlockType::Q8_0,
            overrides: Vec::new(),
        };
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
        self.run.check()?;
        self.run.report("measuring importance", layer, self.run.layers.config().layers.len());
        Ok(())
    }
}
