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
    /// Whether it is a linear layer inside of a block of the model.
    pub linear: bool,
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
}

impl Report {
    pub(super) fn new(source: &Path, out: &Path, recipe: &str, size_bytes: u64) -> Report {
        let (source, out, recipe) = (source.to_path_buf(), out.to_path_buf(), recipe.to_owned());
        Report { source, out, recipe, size_bytes, seconds: 0.0, tensors: Vec::new() }
    }

    pub(super) fn add(&mut self, tensor: TensorReport) {
        self.tensors.push(tensor);
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
            })
        };
        json!({
            "source": self.source.to_string_lossy(),
            "out": self.out.to_string_lossy(),
            "recipe": self.recipe,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight(),
            "seconds": self.seconds,
            "tensors": self.tensors.iter().map(tensor).collect::<Vec<_>>(),
        })
    }
}
