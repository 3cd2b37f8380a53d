//! Which experts of each layer a text uses least.
//!
//! All layers keep the same number of experts, as `expert_count` of a GGUF file is one number. Where experts form groups, each group
//! keeps the same number. Lu et al. 2024 (arXiv 2402.14800) compare all choices of two experts by the outputs of a layer; counting
//! works for any number.

use std::collections::BTreeMap;

use super::context::RunContext;
use super::eval::Reference;
use super::pruning::{PrunedCheckpoint, Pruning};
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::model::{Input, LoadOptions, Logits, Model, layer_of};

/// Windows on which the loss is measured, at most, and at most a quarter of all. The others count what is chosen.
const MEASURED: usize = 16;

impl Pruning {
    /// Counts the experts that the windows of the context choose, and keeps the `count` that are chosen most in each layer. The last
    /// quarter of the windows measures the loss.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a number of experts that the model cannot have, a model without experts, and fewer than four
    /// windows; [`Error::Unsupported`] for a model with experts that are not counted; those of [`Model::load`] and
    /// [`Model::forward`].
    pub fn choose(context: &RunContext<'_>, count: usize) -> Result<Pruning> {
        let windows = context.windows;
        let measured = (windows.len() / 4).min(MEASURED);
        if measured == 0 {
            let found = format!("{} windows of text", windows.len());
            return Err(Error::argument("prune_experts", found, "at least 4"));
        }
        let (counted, measured) = windows.split_at(windows.len() - measured);
        // A text of another length than the windows ends in a shorter one.
        let length = measured.iter().map(Vec::len).max().unwrap_or(0);
        let measured: Vec<Vec<u32>> = measured.iter().filter(|window| window.len() == length).cloned().collect();
        let options = LoadOptions { threads: context.threads, ..LoadOptions::default() }
            .with_free_memory_for_experts()
            .with_mtp(false);
        let progress = |done: usize, total: usize| {
            (context.progress)("measuring experts", done, total);
            Ok(())
        };
        let layers = context.with_source(|checkpoint| Ok(layers(checkpoint)))?;
        if layers.is_empty() {
            let found = format!("{count} for a model without experts");
            return Err(Error::argument("prune_experts", found, "None, or a model with experts"));
        }
        let model = Model::load(context.source, &options.clone().with_expert_skip(0.0))?;
        let before = model.config().experts.count;
        check_count(&model, count)?;
        for (done, window) in counted.iter().enumerate() {
            progress(done, windows.len())?;
            let mut session = model.session();
            let input = Input::new(&mut session, window, Logits::None);
            model.forward(&mut [input], &mut Vec::new(), context.interrupted)?;
        }
        let chosen = model.expert_use().chosen;
        let groups = model.config().experts.groups.map_or(1, |groups| groups.count);
        let mut reference = Reference::record(
            &model,
            &measured,
            &|done, _| progress(counted.len() + done, windows.len()),
            context.interrupted,
        )?;
        drop(model);
        if layers.len() != chosen.len() {
            return Err(Error::Unsupported {
                path: context.source.to_path_buf(),
                place: Place::File,
                what: "leaving out experts of a head for multi-token prediction".to_owned(),
                supported: "supported: models whose head has no experts".to_owned(),
            });
        }
        let kept: BTreeMap<usize, Vec<usize>> =
            layers.into_iter().zip(&chosen).map(|(layer, chosen)| (layer, most(chosen, count, groups))).collect();
        let all: u64 = chosen.iter().flatten().sum();
        let stay: u64 = kept.values().zip(&chosen).flat_map(|(kept, chosen)| kept.iter().map(|at| chosen[*at])).sum();
        let model = Model::load_changed(context.source, &options, &|all| PrunedCheckpoint::boxed(all, &kept, count))?;
        let evaluation = reference.compare(&model, &|_, _| Ok(()), context.interrupted)?;
        let divergence = evaluation.divergence.expect("a comparison");
        Ok(Pruning { kept, experts: [before, count], left_out: 1.0 - stay as f64 / all.max(1) as f64, divergence })
    }
}

/// Checks that layers of a model may have `count` experts.
fn check_count(model: &Model, count: usize) -> Result<()> {
    let experts = &model.config().experts;
    let (groups, least) = experts.groups.map_or((1, experts.used), |groups| {
        (groups.count, (experts.used.div_ceil(groups.used)).max(groups.best) * groups.count)
    });
    if count < least || count >= experts.count || !count.is_multiple_of(groups) {
        let of_groups = if groups > 1 { format!(", a multiple of {groups}") } else { String::new() };
        let expected = format_args!("{least} to {}{of_groups}", experts.count - 1);
        return Err(Error::argument("prune_experts", count, expected));
    }
    Ok(())
}

/// The layers with experts, in order.
fn layers(checkpoint: &dyn Checkpoint) -> Vec<usize> {
    let names = checkpoint.names();
    let mut layers: Vec<usize> =
        names.into_iter().filter(|name| name.ends_with(".ffn_down_exps.weight")).filter_map(layer_of).collect();
    layers.sort_unstable();
    layers
}

/// The `count` experts that were chosen most, equally many of each group, ties to the lower number; in ascending order.
fn most(chosen: &[u64], count: usize, groups: usize) -> Vec<usize> {
    let size = (chosen.len() / groups).max(1);
    let mut kept = Vec::with_capacity(count);
    for group in 0..groups {
        let mut own: Vec<usize> = (group * size..(group + 1) * size).collect();
        own.sort_by_key(|expert| std::cmp::Reverse(chosen[*expert]));
        kept.extend_from_slice(&own[..count / groups]);
    }
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_experts_that_are_chosen_most_stay() {
        assert_eq!(most(&[5, 9, 9, 1, 7], 3, 1), [1, 2, 4]);
        assert_eq!(most(&[5, 9, 9, 5], 3, 1), [0, 1, 2]);
        // As many of each group.
        assert_eq!(most(&[5, 9, 8, 1, 0, 2, 3, 4], 4, 2), [1, 2, 6, 7]);
    }
}
