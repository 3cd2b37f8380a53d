//! The learned factors of scales and norms, with the state of the Adam optimizer.

use crate::error::Result;
use crate::quantize::resume::SnapshotFile;

/// The decay rates of the mean gradient and of the mean squared gradient.
const DECAY: (f32, f32) = (0.9, 0.99);

/// Factors close to 1, with their optimizer state.
pub(super) struct AdamFactors {
    /// The factors minus 1.
    pub(super) deltas: Vec<f32>,
    /// The decaying mean of the gradient.
    gradient: Vec<f32>,
    /// The decaying mean of the squared gradient.
    square: Vec<f32>,
}

impl AdamFactors {
    pub(super) fn new(count: usize) -> AdamFactors {
        let zeros = || vec![0.0; count];
        AdamFactors { deltas: zeros(), gradient: zeros(), square: zeros() }
    }

    /// Takes step `number`, counted from 1. `of(i)` is the gradient of factor `i`.
    pub(super) fn step(&mut self, number: usize, rate: f32, of: impl Fn(usize) -> f32) {
        let corrected = |decay: f32| 1.0 - libm::powf(decay, number as f32);
        let (first, second) = (corrected(DECAY.0), corrected(DECAY.1));
        let factors = self.deltas.iter_mut().zip(self.gradient.iter_mut().zip(&mut self.square)).enumerate();
        for (i, (delta, (gradient, square))) in factors {
            let now = of(i);
            *gradient = DECAY.0 * *gradient + (1.0 - DECAY.0) * now;
            *square = DECAY.1 * *square + (1.0 - DECAY.1) * now * now;
            // A factor that nothing depends on does not move.
            *delta -= rate * (*gradient / first) / ((*square / second).sqrt() + 1e-12);
        }
    }
}

/// The factors of a block.
pub(super) struct BlockFactors {
    /// Per matrix: the size of its groups, and one factor per group; `None` for matrices that no recipe quantized.
    pub(super) groups: [Option<(usize, AdamFactors)>; 7],
    pub(super) norms: [AdamFactors; 2],
}

impl BlockFactors {
    fn all(&mut self) -> impl Iterator<Item = &mut AdamFactors> {
        self.groups.iter_mut().flatten().map(|(_, factors)| factors).chain(&mut self.norms)
    }
}

/// The factors of the whole model.
pub(super) struct TuningState {
    pub(super) blocks: Vec<BlockFactors>,
    /// The weights of the last norm without their factors, and the factors.
    pub(super) output_norm: (Vec<f32>, AdamFactors),
}

impl TuningState {
    /// All factors, always in the same order.
    fn all(&mut self) -> impl Iterator<Item = &mut AdamFactors> {
        self.blocks.iter_mut().flat_map(BlockFactors::all).chain(std::iter::once(&mut self.output_norm.1))
    }

    /// Reads a snapshot and returns the number of steps before it: 0 without a snapshot.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn resume(&mut self, file: &SnapshotFile) -> Result<usize> {
        let count = self.all().map(|factors| 3 * factors.deltas.len()).sum();
        let Some(snapshot) = file.open(count)? else { return Ok(0) };
        let mut at = 0;
        for AdamFactors { deltas, gradient, square } in self.all() {
            for numbers in [deltas, gradient, square] {
                snapshot.read(at, numbers)?;
                at += numbers.len();
            }
        }
        Ok(snapshot.position as usize)
    }

    /// Saves a snapshot after `steps` steps.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn save(&mut self, file: &SnapshotFile, steps: usize) -> Result<()> {
        let mut writer = file.create(steps as u64)?;
        for AdamFactors { deltas, gradient, square } in self.all() {
            for numbers in [deltas, gradient, square] {
                writer.write(numbers)?;
            }
        }
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TuningState {
        let block = || BlockFactors {
            groups: std::array::from_fn(|part| (part != 2).then(|| (32, AdamFactors::new(part)))),
            norms: [AdamFactors::new(3), AdamFactors::new(3)],
        };
        TuningState { blocks: vec![block(), block()], output_norm: (vec![1.0; 3], AdamFactors::new(3)) }
    }

    #[test]
    fn a_snapshot_restores_everything_that_the_next_step_depends_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.gguf.resume-tuning");
        let [own, other] = [7, 8].map(|key| SnapshotFile { path: path.clone(), key });
        let step = |state: &mut TuningState, number: usize| {
            for (at, factors) in state.all().enumerate() {
                factors.step(number, 0.01, |i| f32::sin((at * 31 + i * 7 + number) as f32));
            }
        };
        let mut before = state();
        assert_eq!(before.resume(&own).unwrap(), 0);
        (1..=5).for_each(|number| step(&mut before, number));
        before.save(&own, 5).unwrap();
        let mut after = state();
        assert_eq!(after.resume(&other).unwrap(), 0, "of another run");
        assert!(after.all().all(|factors| factors.deltas.iter().all(|delta| *delta == 0.0)));
        assert_eq!(after.resume(&own).unwrap(), 5);
        for (found, expected) in after.all().zip(before.all()) {
            assert_eq!(found.deltas, expected.deltas);
            assert_eq!((&found.gradient, &found.square), (&expected.gradient, &expected.square));
            assert!(found.deltas.iter().all(|delta| *delta != 0.0));
        }
    }

    #[test]
    fn steps_go_against_the_gradient_and_no_further_than_the_rate() {
        let mut factors = AdamFactors::new(3);
        for number in 1..=10 {
            factors.step(number, 0.01, |i| [2.0, -1e-5, 0.0][i]);
        }
        for (found, expected) in factors.deltas.iter().zip([-0.1, 0.1, 0.0]) {
            assert!((found - expected).abs() < 1e-4, "{:?}", factors.deltas);
        }
    }
}
