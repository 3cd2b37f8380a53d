//! The choice of a recipe.

use super::gptq::{self, GptqOptions};
use super::signround::{self, SignroundOptions};
use super::{awq, rtn};
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

    pub(in crate::quantize) fn solve(
        &self,
        problem: &LayerProblem<'_>,
        grouped: &GroupedFormat,
        compute: &Compute<'_>,
    ) -> Solution {
        match self {
            Recipe::Rtn { search } => rtn::solve(problem, grouped, *search, compute),
            Recipe::Gptq(options) | Recipe::Awq(Some(options)) => gptq::solve(problem, grouped, options, compute),
            Recipe::Awq(None) => awq::solve(problem, grouped, compute),
            Recipe::Signround(options) => signround::solve(problem, grouped, options, compute),
        }
    }
}
