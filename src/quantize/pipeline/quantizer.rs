//! Quantizes the tensors at each site of the calibration and logs the result.

use std::time::Instant;

use serde_json::json;

use super::options::QuantizeOptions;
use crate::error::{Error, Place, Result};
use crate::format::{Checkpoint, Tensor};
use crate::model::layerwise::Site;
use crate::quantize::calibration::{Calibration, MIN_TOKENS, Moments, PatchedCheckpoint, Visitor, read_rows};
use crate::quantize::compute::Compute;
use crate::quantize::context::OpenRun;
use crate::quantize::format::GroupedFormat;
use crate::quantize::layer::LayerProblem;
use crate::quantize::overrides::Stored;
use crate::quantize::recipes::{NormScaling, Recipe, awq, exact};
use crate::quantize::resume::ResumeLog;
use crate::quantize::sparsity::Sparsity;

/// The name of the recipe that takes over what the source has.
pub(super) const EXACT: &str = "exact";
/// The output matrix, or else the embedding, which is used as one.
const OUTPUTS: [&str; 2] = ["output.weight", "token_embd.weight"];
/// Rows of the output matrix that are solved together.
const OUTPUT_ROWS: usize = 16_384;
/// What errors of an embedding that is the output as well cost as inputs, in units of the mean square of the output's inputs.
const EMBEDDING_SHARE: f32 = 0.1;
/// Units of progress per layer.
const UNITS: usize = 1000;

/// A run while its tensors are quantized.
pub(super) struct Quantizer<'a, 'l> {
    run: OpenRun<'a>,
    recipe: Recipe,
    sparsity: Option<Sparsity>,
    log: &'l mut ResumeLog,
    compute: Compute<'a>,
    /// The source with the quantized weights of the current layer.
    patched: PatchedCheckpoint<'a>,
}

/// Rows of a tensor that are solved together: the whole tensor, or those of one expert.
struct Piece {
    name: String,
    /// Number of the expert, or 0.
    part: usize,
    first: usize,
    rows: usize,
    columns: usize,
    stored: Stored,
}

impl<'a, 'l> Quantizer<'a, 'l> {
    pub(super) fn new(run: OpenRun<'a>, options: &QuantizeOptions, log: &'l mut ResumeLog) -> Quantizer<'a, 'l> {
        let QuantizeOptions { recipe, sparsity, .. } = *options;
        Quantizer {
            run,
            recipe,
            sparsity,
            log,
            compute: run.compute(),
            patched: PatchedCheckpoint::new(run.checkpoint),
        }
    }

    /// Whether the log has all of a layer.
    pub(super) fn is_done(&self, layer: usize) -> bool {
        let prefix = format!("blk.{layer}.");
        let checkpoint = self.run.checkpoint;
        let names = checkpoint.names().into_iter().filter(|name| name.starts_with(&prefix));
        names.filter_map(|name| Some((name, checkpoint.tensor(name)?.dims))).all(|(name, dims)| {
            let mut parts = 0..dims.iter().skip(2).product();
            let is_solved = matches!(self.run.formats.stored(name, &dims), Stored::Solved(_));
            !is_solved || parts.all(|part| self.log.description(name, part).is_some())
        })
    }

    /// Releases the memory of a layer whose tensors are all in the log.
    pub(super) fn finish_layer(&mut self, layer: usize) {
        self.patched.clear();
        self.run.release_layer(layer);
    }

    /// Quantizes the tensors that no token passes through, such as an embedding in four bits.
    pub(super) fn solve_rest(&mut self) -> Result<()> {
        let checkpoint = self.run.checkpoint;
        let names: Vec<String> = checkpoint.names().into_iter().map(str::to_owned).collect();
        for (done, name) in names.iter().enumerate() {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            let stored = self.run.formats.stored(name, &tensor.dims);
            let Stored::Solved(grouped) = stored else { continue };
            let (columns, rows) = (tensor.dims[0], tensor.dims[1]);
            for part in 0..tensor.dims.iter().skip(2).product() {
                self.run.check()?;
                self.run.report("quantize", done, names.len());
                if self.log.description(name, part).is_none() {
                    let piece = Piece { name: name.clone(), part, first: part * rows, rows, columns, stored };
                    self.solve(&piece, &grouped, &tensor, None, None)?;
                }
            }
            checkpoint.release(name);
        }
        Ok(())
    }

    /// Quantizes the output matrix where the recipe compensates for errors, after the last layer of the calibration.
    pub(super) fn solve_output(&mut self, calibration: &mut Calibration<'_>) -> Result<()> {
        let (checkpoint, config) = (self.run.checkpoint, self.run.layers.config());
        let found = OUTPUTS.into_iter().find_map(|name| Some((name, checkpoint.tensor(name)?)));
        let Some((name, tensor)) = found.filter(|_| config.has_logits && self.recipe.compensates()) else {
            return Ok(());
        };
        let Stored::Solved(grouped) = self.run.formats.stored(name, &tensor.dims) else { return Ok(()) };
        if self.log.description(name, 0).is_some() || exact::is_exact(&tensor, &grouped) {
            return Ok(());
        }
        let started = Instant::now();
        self.run.report("output", 0, 1);
        let (columns, rows) = (tensor.dims[0], tensor.dims[1]);
        let mut moments = calibration.output_moments(columns)?;
        if name != OUTPUTS[0] {
            // The rows of an embedding are inputs, too, for which errors of all columns count alike.
            let mean = moments.hessian.iter().step_by(columns + 1).sum::<f32>() / columns as f32;
            moments.hessian.iter_mut().step_by(columns + 1).for_each(|square| *square += EMBEDDING_SHARE * mean);
        }
        let (mut blocks, mut errors, mut zeros) = (Vec::new(), Vec::new(), 0);
        for first in (0..rows).step_by(OUTPUT_ROWS) {
            let count = OUTPUT_ROWS.min(rows - first);
            let weights = read_rows(&tensor, first, count)?;
            let problem = LayerProblem::new(&weights, count, columns, &moments.hessian, &moments.magnitude)
                .map_err(|error| self.fault(name, error))?;
            let solution = self.recipe.solve(&problem, &grouped, &self.compute);
            let decoded = solution.decode(&grouped, columns);
            errors.push(self.compute.error(&problem, &decoded));
            zeros += decoded.iter().filter(|weight| **weight == 0.0).count();
            blocks.extend(solution.encode(&grouped, columns));
            self.run.check()?;
        }
        let description = json!({
            "name": name,
            "part": 0,
            "recipe": self.recipe.name(),
            "tokens": moments.tokens,
            "relative_error": errors.iter().sum::<f64>() / errors.len().max(1) as f64,
            "zeros": zeros,
            "seconds": started.elapsed().as_secs_f64(),
        });
        self.log.add(name, 0, description, &blocks)
    }

    /// An error of the numbers of a tensor, with the tensor's name.
    fn fault(&self, tensor: &str, error: Error) -> Error {
        match error {
            Error::InvalidArgument { name, found, expected } => {
                let what = if name == "weights" { found } else { format!("{found} among the moments of its inputs") };
                Error::malformed(self.run.checkpoint.path(), Place::Tensor(tensor.to_owned()), what, expected)
            }
            other => other,
        }
    }

    /// The pieces of the tensors at a site.
    fn pieces(&self, layer: usize, site: Site) -> Vec<Piece> {
        let names = site.tensors().into_iter().map(|name| format!("blk.{layer}.{name}"));
        let piece = |name: String| {
            let tensor = self.run.checkpoint.tensor(&name)?;
            let part = site.expert().unwrap_or(0);
            let stored = self.run.formats.stored(&name, &tensor.dims);
            let (columns, rows) = (*tensor.dims.first()?, *tensor.dims.get(1)?);
            Some(Piece { name, part, first: part * rows, rows, columns, stored })
        };
        names.filter_map(piece).collect()
    }

    /// Finds the codes of a piece, with its columns multiplied by `factors` if there are any, and logs them. Returns the decoded
    /// weights `(rows, columns)`.
    fn solve(
        &mut self,
        piece: &Piece,
        grouped: &GroupedFormat,
        tensor: &Tensor<'_>,
        moments: Option<&Moments>,
        factors: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let started = Instant::now();
        let fault = |error| self.fault(&piece.name, error);
        let weights = read_rows(tensor, piece.first, piece.rows)?;
        let known = moments.filter(|moments| moments.tokens >= MIN_TOKENS);
        let (hessian, magnitude) = known.map_or((&[][..], &[][..]), |known| (&known.hessian, &known.magnitude));
        let plain = LayerProblem::new(&weights, piece.rows, piece.columns, hessian, magnitude).map_err(fault)?;
        let importance = self.run.context.importance.filter(|_| known.is_none());
        let squares = importance.map_or(&[][..], |importance| importance.of(&piece.name, piece.part, piece.columns));
        // An embedding is looked up, so that its zeros would save nothing.
        let sparsity = self.sparsity.filter(|_| piece.name.starts_with("blk."));
        let plain = LayerProblem { squares, sparsity, ..plain };
        let scaled =
            factors.map(|factors| (awq::scale_columns(&weights, factors), awq::scale_moments(&plain, factors)));
        let problem = match &scaled {
            Some((weights, (hessian, magnitude))) => LayerProblem { weights, hessian, magnitude, ..plain },
            None => plain,
        };
        let name = match moments {
            Some(moments) if known.is_none() => format!("rtn ({} tokens of the text reached it)", moments.tokens),
            None if self.recipe.needs_text() => "rtn".to_owned(),
            _ => self.recipe.name().to_owned(),
        };
        // Weights that are in few bits already and that the format holds are not rounded again.
        let is_changed = factors.is_some() || sparsity.is_some();
        let held = if !is_changed { exact::exact(tensor, piece.first, piece.rows, grouped) } else { None };
        let name = if held.is_some() { EXACT.to_owned() } else { name };
        let solution = held.unwrap_or_else(|| self.recipe.solve(&problem, grouped, &self.compute));
        let decoded = solution.decode(grouped, piece.columns);
        let error = self.compute.error(&problem, &decoded);
        let zeros = decoded.iter().filter(|weight| **weight == 0.0).count();
        // An interrupted computation returns a meaningless solution.
        self.run.check()?;
        let description = json!({
            "name": piece.name,
            "part": piece.part,
            "recipe": name,
            "tokens": moments.map(|moments| moments.tokens),
            "relative_error": error,
            "zeros": zeros,
            "seconds": started.elapsed().as_secs_f64(),
        });
        self.log.add(&piece.name, piece.part, description, &solution.encode(grouped, piece.columns))?;
        Ok(decoded)
    }

    /// The factors of a site's columns, from the log or found now; `None` if the recipe or the model does not scale them.
    fn factors(
        &mut self,
        layer: usize,
        site: Site,
        pieces: &[Piece],
        moments: Option<&Moments>,
    ) -> Result<Option<Vec<f32>>> {
        if !self.recipe.scales_columns() {
            return Ok(None);
        }
        let checkpoint = self.run.checkpoint;
        let is_held = |piece: &Piece| match (piece.stored, checkpoint.tensor(&piece.name)) {
            (Stored::Solved(grouped), Some(tensor)) => exact::is_exact(&tensor, &grouped),
            _ => false,
        };
        if pieces.iter().any(is_held) {
            return Ok(None);
        }
        let Some(scaling) = NormScaling::before(checkpoint, layer, site) else { return Ok(None) };
        if let Some(moments) = moments.filter(|_| !scaling.is_done(self.log)) {
            let mut layers = Vec::new();
            for piece in pieces {
                if let (Stored::Solved(grouped), Some(tensor)) = (piece.stored, checkpoint.tensor(&piece.name)) {
                    layers.push((read_rows(&tensor, piece.first, piece.rows)?, grouped));
                }
            }
            scaling.find(&layers, moments, self.log, &self.compute)?;
        }
        scaling.factors(self.log)
    }
}

/// Whether the log has all linear layers as the source has them.
pub(super) fn is_exact(run: &OpenRun<'_>, log: &ResumeLog) -> bool {
    let checkpoint = run.checkpoint;
    checkpoint.names().into_iter().filter_map(|name| Some((name, checkpoint.tensor(name)?.dims))).all(|(name, dims)| {
        let is_solved = matches!(run.formats.stored(name, &dims), Stored::Solved(_));
        let mut parts = 0..dims.iter().skip(2).product();
        let is_held = |part| log.description(name, part).is_some_and(|known| known["recipe"] == EXACT);
        !is_solved || parts.all(is_held)
    })
}

impl Visitor for Quantizer<'_, '_> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        let is_open = |piece: &Piece| {
            matches!(piece.stored, Stored::Solved(_)) && self.log.description(&piece.name, piece.part).is_none()
        };
        self.pieces(layer, site).iter().any(is_open)
    }

    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()> {
        let pieces = self.pieces(layer, site);
        let factors = self.factors(layer, site, &pieces, moments.as_ref())?;
        let factors = factors.as_deref();
        for piece in pieces {
            self.run.check()?;
            let Some(tensor) = self.run.checkpoint.tensor(&piece.name) else { continue };
            let mut values = match (piece.stored, self.log.blocks(&piece.name, piece.part)?) {
                (stored, Some(blocks)) => {
                    let mut values = vec![0.0; piece.rows * piece.columns];
                    stored.block_type().decode(&blocks, &mut values)?;
                    values
                }
                (Stored::Solved(grouped), None) => self.solve(&piece, &grouped, &tensor, moments.as_ref(), factors)?,
                (Stored::Encoded(block_type), None) => {
                    let mut values = read_rows(&tensor, piece.first, piece.rows)?;
                    if let Some(factors) = factors {
                        values = awq::scale_columns(&values, factors);
                    }
                    let mut blocks = Vec::new();
                    // A tensor that has the type already is copied.
                    if factors.is_some() || tensor.rows.block_type() != block_type {
                        block_type.encode(&values, &mut blocks)?;
                        block_type.decode(&blocks, &mut values)?;
                    }
                    if factors.is_some() {
                        let description = json!({ "name": piece.name, "part": piece.part, "recipe": "encoded" });
                        self.log.add(&piece.name, piece.part, description, &blocks)?;
                    }
                    values
                }
            };
            // The calibration continues with the original norm, so the factors are divided out again.
            for row in values.chunks_mut(piece.columns).filter(|_| factors.is_some()) {
                row.iter_mut().zip(factors.unwrap_or_default()).for_each(|(value, factor)| *value /= factor);
            }
            self.patched.replace(&piece.name, piece.first, values);
        }
        Ok(())
    }

    fn checkpoint(&self) -> &dyn Checkpoint {
        &self.patched
    }

    fn step(&self, layer: usize, site: Site, window: usize) -> Result<()> {
        self.run.check()?;
        let (sites, at) = match site {
            Site::Qkv => (4, 0),
            Site::AttentionOutput => (4, 1),
            Site::Up(_) => (4, 2),
            Site::Down(_) => (4, 3),
        };
        let (windows, layers) = (self.run.context.windows.len(), self.run.layers.config().layers.len());
        let within = (at * windows + window) * UNITS / (sites * windows.max(1));
        self.run.report(&format!("layer {}", layer + 1), layer * UNITS + within, layers * UNITS);
        Ok(())
    }
}
