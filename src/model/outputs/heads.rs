//! What follows the hidden states of a text: dense modules of its embedding, and a classification head.

use crate::error::Result;
use crate::kernels::Kernel;
use crate::model::buffer::Buffer;
use crate::model::config::{Config, FIRST_DENSE, HeadActivation};
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::norm::Norm;
use crate::model::pass::Pass;
use crate::model::weights::loader::{Loader, Part};

/// The heads of a model.
#[derive(Debug, Default)]
pub(in crate::model) struct Heads {
    /// Matrices that a pooled vector passes in order.
    dense: Vec<Dense>,
    pub(in crate::model) classifier: Option<Classifier>,
}

/// A matrix and an activation.
#[derive(Debug)]
struct Dense {
    /// `(out, in)`
    linear: Linear,
    activation: HeadActivation,
}

/// The matrices that turn a pooled vector into a score for each label.
#[derive(Debug)]
pub(in crate::model) struct Classifier {
    /// `(width, hidden)`
    dense: Option<Dense>,
    /// Of the output of `dense`.
    norm: Option<Norm>,
    /// `(labels, width)`
    output: Linear,
}

impl Dense {
    /// Reads the matrix called `name` with `columns` columns, if the file has it.
    fn load(loader: &Loader<'_>, name: &str, columns: usize, activation: HeadActivation) -> Result<Option<Dense>> {
        let Some(rows) = rows(loader, name) else { return Ok(None) };
        let linear = loader.linear(&[Part::new(name, rows)], columns)?;
        Ok(Some(Dense { linear, activation }))
    }

    fn width(&self) -> usize {
        self.linear.parts()[0].rows()
    }

    /// Replaces the input `(rows, columns)` by `(rows, width)`.
    fn compute(&self, pass: &Pass<'_>, input: &mut LinearInput, branch: &mut Buffer) {
        matrix(pass, &self.linear, input, branch);
        self.activation.apply(pass.kernel, &mut input.values);
    }
}

impl HeadActivation {
    fn apply(self, kernel: &Kernel, x: &mut [f32]) {
        match self {
            HeadActivation::Identity => {}
            // The same bits on every platform.
            HeadActivation::Tanh => x.iter_mut().for_each(|x| *x = libm::tanhf(*x)),
            HeadActivation::Of(activation) => kernel.activate(activation, x),
        }
    }
}

/// Rows of the matrix called `name`, if the file has it. A matrix of one row may have one dimension.
fn rows(loader: &Loader<'_>, name: &str) -> Option<usize> {
    loader.dims(&format!("{name}.weight")).map(|dims| dims.get(1).copied().unwrap_or(1))
}

/// Replaces the input `(rows, columns)` by the product `(rows, its rows)`.
fn matrix(pass: &Pass<'_>, linear: &Linear, input: &mut LinearInput, branch: &mut Buffer) {
    pass.linear(linear, input, branch);
    let (width, stride) = (linear.parts()[0].rows(), linear.width());
    input.resize(branch.len() / stride, width);
    for (out, row) in input.values.chunks_exact_mut(width).zip(branch.chunks_exact(stride)) {
        out.copy_from_slice(&row[..width]);
    }
}

impl Heads {
    /// Reads the heads that the file has.
    ///
    /// # Errors
    /// Those of [`Loader::linear`]; [`Error::Missing`](crate::Error::Missing) for a dense module without a matrix;
    /// [`Error::Malformed`](crate::Error::Malformed) where the names of labels do not fit the matrix.
    pub(in crate::model) fn load(loader: &Loader<'_>, config: &Config) -> Result<Heads> {
        let mut dense: Vec<Dense> = Vec::new();
        let mut width = config.hidden;
        loop {
            let activation = config.dense.get(dense.len());
            let name = format!("dense_{}", FIRST_DENSE + dense.len());
            let fallback = activation.copied().unwrap_or(HeadActivation::Identity);
            match Dense::load(loader, &name, width, fallback)? {
                Some(module) => {
                    width = module.width();
                    dense.push(module);
                }
                None if activation.is_some() => {
                    return Err(loader.missing(&format!("{name}.weight"), "the matrix of a dense module"));
                }
                None => break,
            }
        }
        Ok(Heads { dense, classifier: Classifier::load(loader, config)? })
    }

    /// Width of an embedding.
    pub(in crate::model) fn width(&self, config: &Config) -> usize {
        self.dense.last().map_or(config.hidden, Dense::width)
    }

    pub(in crate::model) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let classifier = self.classifier.iter().flat_map(Classifier::linears);
        self.dense.iter().map(|dense| &dense.linear).chain(classifier)
    }

    pub(in crate::model) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        // Hashed only where they exist, so that models without them keep their fingerprints.
        self.linears().for_each(|linear| hasher.linear(linear));
        if let Some(norm) = self.classifier.as_ref().and_then(|classifier| classifier.norm.as_ref()) {
            hasher.norm(norm);
        }
    }

    /// Takes the pooled vectors in the input `(texts, hidden)` through the dense modules.
    pub(in crate::model) fn embed(&self, pass: &Pass<'_>, input: &mut LinearInput, branch: &mut Buffer) {
        self.dense.iter().for_each(|dense| dense.compute(pass, input, branch));
    }
}

impl Classifier {
    fn load(loader: &Loader<'_>, config: &Config) -> Result<Option<Classifier>> {
        let Some(labels) = rows(loader, "cls.output") else { return Ok(None) };
        let named = config.classifier.labels.len();
        if named > 0 && named != labels {
            let expected = format_args!("rows for the {named} labels");
            return Err(loader.malformed("cls.output.weight", format_args!("{labels} rows"), expected));
        }
        let dense = Dense::load(loader, "cls", config.hidden, config.classifier.activation)?;
        let width = dense.as_ref().map_or(config.hidden, Dense::width);
        let norm = match dense.is_some() {
            true => loader.norm_of("cls.norm", config, width, config.norm_eps)?,
            false => None,
        };
        let output = loader.linear(&[Part::new("cls.output", labels)], width)?;
        Ok(Some(Classifier { dense, norm, output }))
    }

    /// Scores per text.
    pub(in crate::model) fn labels(&self) -> usize {
        self.output.parts()[0].rows()
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.dense.iter().map(|dense| &dense.linear).chain([&self.output])
    }

    /// Replaces the pooled vectors in the input `(texts, hidden)` by scores `(texts, labels)`.
    pub(in crate::model) fn compute(&self, pass: &Pass<'_>, input: &mut LinearInput, branch: &mut Buffer) {
        if let Some(dense) = &self.dense {
            dense.compute(pass, input, branch);
        }
        if let Some(norm) = &self.norm {
            pass.norm_rows(&mut input.values, norm, &mut Vec::new());
        }
        matrix(pass, &self.output, input, branch);
    }
}
