//! Tests of pruning that need whole recipes.

use super::fixtures::*;
use super::{GptqOptions, Recipe, SignroundOptions};
use crate::quantize::format::{Format, GroupedFormat};
use crate::quantize::layer::LayerProblem;
use crate::quantize::sparsity::Sparsity;

fn recipes() -> [Recipe; 5] {
    [
        Recipe::Rtn { search: true },
        Recipe::Gptq(GptqOptions::default()),
        Recipe::Awq(None),
        Recipe::Awq(Some(GptqOptions::default())),
        Recipe::Signround(SignroundOptions::default()),
    ]
}

#[test]
fn every_recipe_leaves_the_share_of_zeros_that_is_asked_for() {
    let patterns = [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")];
    with_layer(2, |problem, compute| {
        for (share, pattern) in patterns {
            let sparsity = Sparsity::new(share, pattern).unwrap();
            let problem = LayerProblem { sparsity: Some(sparsity), ..*problem };
            for recipe in recipes() {
                for format in [Format::Q4_0, Format::Q5_0, Format::Q8_0] {
                    let grouped = GroupedFormat { format, group: 32 };
                    let decoded = recipe.solve(&problem, &grouped, compute).decode(&grouped, problem.columns);
                    for row in decoded.chunks(problem.columns) {
                        let zeros = row.iter().filter(|weight| **weight == 0.0).count();
                        let least = (share * row.len() as f32).round() as usize;
                        assert!(zeros >= least, "{recipe:?}, {format:?}, {pattern}: {zeros} zeros, not {least}");
                        assert!(zeros <= least + row.len() / 4, "{recipe:?}, {format:?}, {pattern}: {zeros} zeros");
                    }
                    if pattern == "2:4" {
                        let fours = decoded.chunks(4).map(|four| four.iter().filter(|w| **w == 0.0).count());
                        assert!(fours.min().is_some_and(|least| least >= 2), "{recipe:?}, {format:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn compensation_loses_less_than_pruning_alone() {
    with_layer(2, |problem, compute| {
        let grouped = GroupedFormat { format: Format::Q4_0, group: 32 };
        for pattern in ["unstructured", "2:4"] {
            let problem = LayerProblem { sparsity: Some(Sparsity::new(0.5, pattern).unwrap()), ..*problem };
            let [plain, compensated] = [recipes()[0], recipes()[1]]
                .map(|recipe| error_of(&problem, &grouped, &recipe.solve(&problem, &grouped, compute)));
            assert!(compensated < 0.7 * plain, "{pattern}: {compensated}, {plain} without compensation");
        }
    });
}
