//! Where a model can be cut into stages, and where to, so that all take about as long.

use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::config::Config;
use crate::model::model::open;
use crate::model::weights::load_options::LoadOptions;
use crate::model::weights::loader::layer_of;
use crate::model::weights::sizes::packed_bytes;

/// The units of a model: its layers, and its output as the last one.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Cuts {
    /// Bytes of weights of each unit, about.
    pub bytes: Vec<usize>,
    /// The units before which a stage can begin, besides the first one.
    pub possible: Vec<usize>,
    /// The name of the family.
    pub family: &'static str,
}

/// Checks that a stage can begin with unit `cut`.
///
/// # Errors
/// [`Error::InvalidArgument`] with the layers that would be separated.
pub(super) fn check(config: &Config, cut: usize) -> Result<()> {
    let separated = |(_, layer): &(usize, &crate::model::config::LayerConfig)| layer.shares.is_some_and(|of| of < cut);
    match config.layers.iter().enumerate().skip(cut).find(separated) {
        Some((reader, layer)) => {
            let of = layer.shares.unwrap_or(0);
            let found = format_args!(
                "a cut before layer {cut} of {}, whose layer {reader} reads the keys and values of layer {of}",
                config.family.name
            );
            Err(Error::argument("layers", found, "layers that share keys and values in one stage"))
        }
        None => Ok(()),
    }
}

impl Cuts {
    /// Reads the header of the model at `path`.
    ///
    /// # Errors
    /// Those of [`Model::load`](crate::model::Model::load) for the header and the configuration.
    pub fn read(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Cuts> {
        open(path.as_ref(), options, |checkpoint| {
            let config = Config::read(checkpoint)?;
            Ok(Cuts::of(checkpoint, &config))
        })
    }

    fn of(checkpoint: &dyn Checkpoint, config: &Config) -> Cuts {
        let layers = config.layers.len();
        let mut bytes = vec![0usize; layers + 1];
        let output = if checkpoint.tensor("output.weight").is_some() { "output.weight" } else { "token_embd.weight" };
        for name in checkpoint.names() {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            let unit = match layer_of(name) {
                Some(layer) if layer < layers => layer,
                None if name == output => layers,
                _ => continue,
            };
            bytes[unit] = bytes[unit].saturating_add(packed_bytes(name, &tensor));
        }
        let possible = (1..=layers).filter(|cut| check(config, *cut).is_ok()).collect();
        Cuts { bytes, possible, family: config.family.name }
    }

    /// The units of each of `stages` stages: the largest stage has as few bytes as possible.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the model cannot be cut into as many.
    pub fn divide(&self, stages: usize) -> Result<Vec<Range<usize>>> {
        let ends: Vec<usize> = self.possible.iter().copied().chain([self.bytes.len()]).collect();
        if !(1..=ends.len()).contains(&stages) {
            let expected =
                format_args!("1 to {}, since {} can be cut before units {:?}", ends.len(), self.family, self.possible);
            return Err(Error::argument("stages", stages, expected));
        }
        // best[i]: the bytes of the largest of the stages so far if they end at ends[i], and where the last one begins.
        let sum = |range: Range<usize>| self.bytes[range].iter().fold(0usize, |sum, bytes| sum.saturating_add(*bytes));
        let mut best: Vec<Vec<Option<(usize, usize)>>> = vec![ends.iter().map(|end| Some((sum(0..*end), 0))).collect()];
        for stage in 1..stages {
            let before = &best[stage - 1];
            let next = ends.iter().enumerate().map(|(i, end)| {
                let begins = ends[..i].iter().zip(before);
                let options =
                    begins.filter_map(|(begin, found)| Some((found.as_ref()?.0.max(sum(*begin..*end)), *begin)));
                options.min_by_key(|(largest, _)| *largest)
            });
            let next = next.enumerate().map(|(i, found)| found.filter(|_| i >= stage)).collect();
            best.push(next);
        }
        let (mut ranges, mut end) = (Vec::new(), self.bytes.len());
        for stage in (0..stages).rev() {
            let at = ends.iter().position(|other| *other == end).unwrap_or(0);
            let begin = best[stage][at].map_or(0, |(_, begin)| begin);
            ranges.push(begin..end);
            end = begin;
        }
        ranges.reverse();
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_divided_where_it_can_be_cut() {
        let cuts = |bytes: &[usize], possible: &[usize]| Cuts {
            bytes: bytes.to_vec(),
            possible: possible.to_vec(),
            family: "x",
        };
        let even = cuts(&[4, 4, 4, 4, 1], &[1, 2, 3, 4]);
        assert_eq!(even.divide(1).unwrap().first(), Some(&(0..5)));
        assert_eq!(even.divide(2).unwrap(), [0..2, 2..5]);
        assert_eq!(even.divide(5).unwrap(), [0..1, 1..2, 2..3, 3..4, 4..5]);
        // The output is as large as two layers.
        assert_eq!(cuts(&[2, 2, 2, 2, 4], &[1, 2, 3, 4]).divide(2).unwrap(), [0..3, 3..5]);
        // Nothing between the first layer and the last two.
        assert_eq!(cuts(&[4, 4, 4, 4, 1], &[1, 3, 4]).divide(2).unwrap(), [0..3, 3..5]);
        assert!(cuts(&[4, 4, 1], &[2]).divide(3).is_err());
        assert!(even.divide(0).is_err() && even.divide(6).is_err());
    }
}
