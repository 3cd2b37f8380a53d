//! The report of a run.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::quant::block::BlockType;

/// How one matrix was quantized.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TensorReport {
    /// The name of the tensor.
    pub name: String,
    /// The block type in the file.
    pub block_type: BlockType,
    /// Columns that share a scale.
    pub group: usize,
    /// How the codes were chosen; `encoded` for types that leave no choice.
    pub recipe: String,
    /// Relative squared error of the layer's outputs, or of its weights without calibration; `None` for encoded matrices.
    pub relative_error: Option<f64>,
    /// Seconds spent on it.
    pub seconds: f64,
    /// Number of weights.
    pub weights: usize,
    /// Number of those that are zero; 0 for encoded matrices.
    pub zeros: usize,
    /// Whether it is a linear layer inside of a block of the model.
    pub linear: bool,
    /// Why it is stored in another type than was asked for.
    pub note: Option<String>,
}

/// How many of the experts that tokens choose among were calibrated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertCounts {
    /// Experts of all layers.
    pub all: usize,
    /// Those that no token of the calibration text reached.
    pub unreached: usize,
    /// Those that so few tokens reached that they were rounded without calibration; the unreached ones are among them.
    pub rounded: usize,
}

/// The result of a run, tensor by tensor.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// The source.
    pub source: PathBuf,
    /// The output.
    pub out: PathBuf,
    /// The name of the recipe.
    pub recipe: String,
    /// Size of the output in bytes.
    pub size_bytes: u64,
    /// Seconds of this run, without those of interrupted runs before it.
    pub seconds: f64,
    /// All matrices.
    pub tensors: Vec<TensorReport>,
    /// Experts in a run with calibration; zeros otherwise.
    #[doc(hidden)]
    pub experts: ExpertCounts,
}

impl Report {
    pub(super) fn new(source: &Path, out: &Path, recipe: &str, size_bytes: u64) -> Report {
        let (source, out, recipe) = (source.to_path_buf(), out.to_path_buf(), recipe.to_owned());
        Report { source, out, recipe, size_bytes, seconds: 0.0, tensors: Vec::new(), experts: ExpertCounts::default() }
    }

    pub(super) fn add(&mut self, tensor: TensorReport) {
        self.tensors.push(tensor);
    }

    /// Adds the reasons why tensors are stored in another type, by name.
    pub(super) fn add_notes(&mut self, notes: Vec<(String, String)>) {
        for (name, note) in notes {
            if let Some(tensor) = self.tensors.iter_mut().find(|tensor| tensor.name == name) {
                tensor.note = Some(note);
            }
        }
    }

    /// Mean bits per weight over all linear layers, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        let linear = || self.tensors.iter().filter(|tensor| tensor.linear);
        let bits = |tensor: &TensorReport| {
            let block_type = tensor.block_type;
            tensor.weights as f64 * (8 * block_type.block_bytes()) as f64 / block_type.block_len() as f64
        };
        linear().map(bits).sum::<f64>() / linear().map(|tensor| tensor.weights).sum::<usize>().max(1) as f64
    }

    /// The share of zeros among the weights of linear layers.
    pub fn sparsity(&self) -> f64 {
        let linear = || self.tensors.iter().filter(|tensor| tensor.linear);
        let sum = |of: fn(&TensorReport) -> usize| linear().map(of).sum::<usize>();
        sum(|tensor| tensor.zeros) as f64 / sum(|tensor| tensor.weights).max(1) as f64
    }

    /// The report as JSON.
    pub fn to_json(&self) -> String {
        self.to_value().to_string()
    }

    pub(in crate::quantize) fn to_value(&self) -> Value {
        let tensor = |tensor: &TensorReport| {
            json!({
                "name": tensor.name,
                "type": tensor.block_type.name(),
                "group": tensor.group,
                "recipe": tensor.recipe,
                "relative_error": tensor.relative_error,
                "seconds": tensor.seconds,
                "note": tensor.note,
            })
        };
        json!({
            "source": self.source.to_string_lossy(),
            "out": self.out.to_string_lossy(),
            "recipe": self.recipe,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight(),
            "sparsity": self.sparsity(),
            "seconds": self.seconds,
            "experts": self.experts.all,
            "experts_unreached": self.experts.unreached,
            "experts_rounded": self.experts.rounded,
            "tensors": self.tensors.iter().map(tensor).collect::<Vec<_>>(),
        })
    }
}
