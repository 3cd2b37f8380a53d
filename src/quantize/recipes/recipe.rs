//! The choice of a recipe.

use super::gptq::{self, GptqOptions};
use super::signround::{self, SignroundOptions};
use super::{awq, prune, rtn};
use crate::error::{Error, Result};
use crate::quantize::compute::Compute;
use crate::quantize::format::GroupedFormat;
use crate::quantize::layer::{LayerProblem, Solution};

/// How the codes of a layer are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Recipe {
    /// Rounding to the nearest code.
    Rtn {
        /// Whether the best scale is searched.
        search: bool,
    },
    /// Rounding column by column, with each error compensated by later columns; then refinement of codes and scales.
    Gptq(GptqOptions),
    /// Columns scaled by the magnitude of their inputs, then rounding with clipped ranges, or GPTQ if it has options.
    Awq(Option<GptqOptions>),
    /// Rounding learned by signed gradient steps.
    Signround(SignroundOptions),
}

impl Recipe {
    /// The recipe called `rtn`, `gptq`, `awq`, `awq+gptq` or `signround`, with default options.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other names.
    pub fn by_name(name: &str) -> Result<Recipe> {
        Ok(match name {
            "rtn" => Recipe::Rtn { search: true },
            "gptq" => Recipe::Gptq(GptqOptions::default()),
            "awq" => Recipe::Awq(None),
            "awq+gptq" => Recipe::Awq(Some(GptqOptions::default())),
            "signround" => Recipe::Signround(SignroundOptions::default()),
            _ => {
                let expected = "rtn, gptq, awq, awq+gptq or signround";
                return Err(Error::argument("recipe", format_args!("{name:?}"), expected));
            }
        })
    }

    /// The name in reports and on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Recipe::Rtn { .. } => "rtn",
            Recipe::Gptq(_) => "gptq",
            Recipe::Awq(None) => "awq",
            Recipe::Awq(Some(_)) => "awq+gptq",
            Recipe::Signround(_) => "signround",
        }
    }

    /// Whether it needs the inputs of layers, and so a calibration text.
    pub fn needs_text(&self) -> bool {
        !matches!(self, Recipe::Rtn { .. })
    }

    /// Whether it scales columns before rounding.
    pub(in crate::quantize) fn scales_columns(&self) -> bool {
        matches!(self, Recipe::Awq(_))
    }

    /// Whether it compensates for the errors of some columns by others, where it knows the inputs.
    pub(in crate::quantize) fn compensates(&self) -> bool {
        matches!(self, Recipe::Gptq(_) | Recipe::Awq(Some(_)))
    }

    pub(in crate::quantize) fn solve(
        &self,
        problem: &LayerProblem<'_>,
        grouped: &GroupedFormat,
        compute: &Compute<'_>,
    ) -> Solution {
        // Recipes that compensate for errors prune as they round.
        let compensates = self.compensates() && !problem.hessian.is_empty();
        if problem.sparsity.is_some() && !compensates {
            let pruned = prune::pruned(problem);
            let weights = prune::without(problem.weights, &pruned);
            let mut solution =
                self.solve(&LayerProblem { weights: &weights, sparsity: None, ..*problem }, grouped, compute);
            prune::clear(&mut solution, grouped, &pruned);
            return solution;
        }
        match self {
            Recipe::Rtn { search } => rtn::solve(problem, grouped, *search, compute),
            Recipe::Gptq(options) | Recipe::Awq(Some(options)) => gptq::solve(problem, grouped, options, compute),
            Recipe::Awq(None) => awq::solve(problem, grouped, compute),
            Recipe::Signround(options) => signround::solve(problem, grouped, options, compute),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_found_by_its_name() {
        for name in ["rtn", "gptq", "awq", "awq+gptq", "signround"] {
            assert_eq!(Recipe::by_name(name).unwrap().name(), name);
        }
        let refused = Recipe::by_name("magic").unwrap_err().to_string();
        assert_eq!(refused, "recipe: found \"magic\", expected rtn, gptq, awq, awq+gptq or signround");
    }
}
