//! The options of one run.

use crate::error::{Error, Result};
use crate::quantize::format::Format;
use crate::quantize::overrides::TensorFormats;
use crate::quantize::recipes::{Recipe, prune};
use crate::quantize::sparsity::Sparsity;
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
    /// How many weights of linear layers become zero; `None` prunes none.
    #[doc(hidden)]
    pub sparsity: Option<Sparsity>,
}

setters!(QuantizeOptions {
    with_recipe(recipe: Recipe),
    with_tuning(tuning: impl Into<Option<TuningOptions>>),
    with_formats(formats: TensorFormats),
});

impl QuantizeOptions {
    /// Codes that `recipe` chooses, without tuning, in these formats.
    pub fn new(recipe: Recipe, formats: TensorFormats) -> QuantizeOptions {
        QuantizeOptions { recipe, tuning: None, formats, sparsity: None }
    }

    /// Makes `share` of the weights of each row zero, by the pattern called `unstructured` or `2:4`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a share outside of 0 to 0.95, other names, and 2:4 with another share than a half.
    pub fn with_sparsity(self, share: f32, pattern: &str) -> Result<QuantizeOptions> {
        Ok(QuantizeOptions { sparsity: Some(Sparsity::new(share, pattern)?), ..self })
    }

    /// The name in reports and on the command line, such as `gptq+tune`.
    pub fn name(&self) -> String {
        format!("{}{}", self.recipe.name(), if self.tuning.is_some() { "+tune" } else { "" })
    }

    /// Checks that layers that are pruned have a format with a zero.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(in crate::quantize) fn check(&self) -> Result<()> {
        self.formats.check()?;
        let overrides = self.formats.overrides.iter().filter_map(|(_, block_type)| Format::of(*block_type));
        let without = overrides.chain([self.formats.format]).find(|format| !prune::holds_zeros(*format));
        match without.filter(|_| self.sparsity.is_some()) {
            Some(format) => {
                let found = format!("{} with sparsity", format.block_type().name());
                Err(Error::argument("format", found, "a format that has a code for zero: q2_0, q4_0, q5_0 or q8_0"))
            }
            None => Ok(()),
        }
    }

    /// Whether a calibration text is needed.
    pub fn needs_text(&self) -> bool {
        self.recipe.needs_text() || self.tuning.is_some()
    }
}
