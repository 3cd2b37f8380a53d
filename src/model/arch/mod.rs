//! The families as data, grouped with their relatives: one entry per family.

mod alibi;
mod encoders;
mod family;
mod gemma;
mod gpt;
mod llama;
mod modern;
mod phi;
mod qwen;
mod recurrent;

pub(super) use family::DEFAULT_QUIRKS;
pub use family::{
    Family, FeedForwardKind, Gating, LayerKind, MixerKind, NormKind, Position, Quirks, RecurrentLayers, Residual,
    Rotated, Temperature,
};

/// Every family that is supported.
pub fn families() -> impl Iterator<Item = &'static Family> {
    let older = [llama::FAMILIES, qwen::FAMILIES, gemma::FAMILIES, phi::FAMILIES, gpt::FAMILIES, alibi::FAMILIES];
    older.into_iter().chain([modern::FAMILIES, recurrent::FAMILIES, encoders::FAMILIES]).flatten()
}

/// The family called `name`.
pub fn by_name(name: &str) -> Option<&'static Family> {
    families().find(|family| family.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_name_of_its_own_and_at_least_one_kind_of_layer() {
        let mut names: Vec<_> = families().map(|family| family.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), families().count());
        assert!(families().all(|family| !family.layers.is_empty()));
    }
}
