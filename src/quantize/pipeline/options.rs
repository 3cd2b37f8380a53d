//! The options of one run.

use crate::quantize::overrides::TensorFormats;
use crate::quantize::recipes::Recipe;
use crate::quantize::tuning::TuningOptions;

/// How to quantize a checkpoint.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct QuantizeOptions {
    /// How codes are chosen.
    pub recipe: Recipe,
    /// How scales and norms are tuned afterwards; `None` leaves them as the recipe chose them.
    pub tuning: Option<TuningOptions>,
    /// How each tensor is stored.
    pub formats: TensorFormats,
}

setters!(QuantizeOptions {
    with_recipe(recipe: Recipe),
    with_tuning(tuning: impl Into<Option<TuningOptions>>),
    with_formats(formats: TensorFormats),
});

impl QuantizeOptions {
    /// Codes that `recipe` chooses, without tuning, in these formats.
    pub fn new(recipe: Recipe, formats: TensorFormats) -> QuantizeOptions {
        QuantizeOptions { recipe, tuning: None, formats }
    }

    /// The name in reports and on the command line, such as `gptq+tune`.
    pub fn name(&self) -> String {
        format!("{}{}", self.recipe.name(), if self.tuning.is_some() { "+tune" } else { "" })
    }

    /// Whether a calibration text is needed.
    pub fn needs_text(&self) -> bool {
        self.recipe.needs_text() || self.tuning.is_some()
    }
}
