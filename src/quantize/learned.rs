//! What tuning learns: factors of scales and of norms' weights, with what their next step depends on.

use std::path::Path;

use super::saved::{Saved, Writer};
use crate::error::Result;

/// How much of the mean of slopes, and of their squares, stays from one step to the next.
const MEMORY: (f32, f32) = (0.9, 0.99);
/// Factors that are learned.
pub(super) struct Factors {
    /// What is added to 1.
    pub(super) more: Vec<f32>,
    /// The mean slope, and the mean of its square.
    slope: Vec<f32>,
    square: Vec<f32>,
}

impl Factors {
    pub(super) fn new(count: usize) -> Factors {
        let zeros = || vec![0.0; count];
        Factors { more: zeros(), slope: zeros(), square: zeros() }
    }

    /// One step of Adam, the `number`th, against the slope that `of` gives for each factor.
    pub(super) fn step(&mut self, number: usize, rate: f32, of: impl Fn(usize) -> f32) {
        let corrected = |kept: f32| 1.0 - libm::powf(kept, number as f32);
        let (first, second) = (corrected(MEMORY.0), corrected(MEMORY.1));
        let factors = self.more.iter_mut().zip(self.slope.iter_mut().zip(&mut self.square)).enumerate();
        for (i, (more, (slope, square))) in factors {
            let now = of(i);
            *slope = MEMORY.0 * *slope + (1.0 - MEMORY.0) * now;
            *square = MEMORY.1 * *square + (1.0 - MEMORY.1) * now * now;
            // Where nothing depends on a factor there is no step.
            *more -= rate * (*slope / first) / ((*square / second).sqrt() + 1e-12);
        }
    }
}

/// What is learned of a block.
pub(super) struct Learned {
    /// A factor a group of each matrix, and the size of the groups; none for those whose codes no recipe found.
    pub(super) groups: [Option<(usize, Factors)>; 7],
    pub(super) norms: [Factors; 2],
}

impl Learned {
    fn factors(&mut self) -> impl Iterator<Item = &mut Factors> {
        self.groups.iter_mut().flatten().map(|(_, factors)| factors).chain(&mut self.norms)
    }
}

/// What is learned of the model.
pub(super) struct State {
    pub(super) blocks: Vec<Learned>,
    /// The last norm without its factors, and these.
    pub(super) output_norm: (Vec<f32>, Factors),
}

impl State {
    /// All factors, in one order.
    fn factors(&mut self) -> impl Iterator<Item = &mut Factors> {
        self.blocks.iter_mut().flat_map(Learned::factors).chain(std::iter::once(&mut self.output_norm.1))
    }

    /// Takes over what the run with that `key` has saved at `path`, and returns the number of steps that it had made: none if
    /// there is nothing.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn resume(&mut self, path: &Path, key: u64) -> Result<usize> {
        let count = self.factors().map(|factors| 3 * factors.more.len()).sum();
        let Some(saved) = Saved::open(path, key, count)? else { return Ok(0) };
        let mut at = 0;
        for Factors { more, slope, square } in self.factors() {
            for numbers in [more, slope, square] {
                saved.read(at, numbers)?;
                at += numbers.len();
            }
        }
        Ok(saved.number as usize)
    }

    /// Writes what was learned in `steps` steps to `path`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn save(&mut self, path: &Path, key: u64, steps: usize) -> Result<()> {
        let mut writer = Writer::create(path, key, steps as u64)?;
        for Factors { more, slope, square } in self.factors() {
            for numbers in [more, slope, square] {
                writer.write(numbers)?;
            }
        }
        writer.finish()
    }
}

/// Weights times their factors.
pub(super) fn scaled(plain: &[f32], factors: &Factors) -> Vec<f32> {
    plain.iter().zip(&factors.more).map(|(x, more)| x * (1.0 + more)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let block = || Learned {
            groups: std::array::from_fn(|part| (part != 2).then(|| (32, Factors::new(part)))),
            norms: [Factors::new(3), Factors::new(3)],
        };
        State { blocks: vec![block(), block()], output_norm: (vec![1.0; 3], Factors::new(3)) }
    }

    #[test]
    fn all_that_the_next_step_depends_on_is_there_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf.resume-tuning");
        let step = |state: &mut State, number: usize| {
            for (at, factors) in state.factors().enumerate() {
                factors.step(number, 0.01, |i| f32::sin((at * 31 + i * 7 + number) as f32));
            }
        };
        let mut before = state();
        assert_eq!(before.resume(&path, 7).unwrap(), 0);
        (1..=5).for_each(|number| step(&mut before, number));
        before.save(&path, 7, 5).unwrap();
        let mut after = state();
        assert_eq!(after.resume(&path, 8).unwrap(), 0, "of another run");
        assert!(after.factors().all(|factors| factors.more.iter().all(|more| *more == 0.0)));
        assert_eq!(after.resume(&path, 7).unwrap(), 5);
        for (found, expected) in after.factors().zip(before.factors()) {
            assert_eq!((&found.more, &found.slope, &found.square), (&expected.more, &expected.slope, &expected.square));
            assert!(found.more.iter().all(|more| *more != 0.0));
        }
    }

    #[test]
    fn steps_go_against_the_slope_and_no_further_than_the_rate() {
        let mut factors = Factors::new(3);
        for number in 1..=10 {
            factors.step(number, 0.01, |i| [2.0, -1e-5, 0.0][i]);
        }
        for (found, expected) in factors.more.iter().zip([-0.1, 0.1, 0.0]) {
            assert!((found - expected).abs() < 1e-4, "{:?}", factors.more);
        }
    }
}
