//! Limits the prompt tokens in steps in which other sequences decode, so that decoding stays fast.

/// A step with prompt rows may take this many times as long as one without. nybble promises a factor of 4; the estimate
/// may be wrong by half.
const STRETCH: f64 = 2.5;
/// Prompt rows in a step without decoding sequences.
const ALONE: usize = 256;
/// Smallest and largest number of prompt rows in a step with decoding sequences.
const FEWEST: usize = 8;
const MOST: usize = 256;
/// In steps without decoding sequences, the smallest number of prompt rows from which the time per row is measured.
const MEASURABLE: usize = 32;
/// After this many consecutive steps with prompt rows, one step has none, to measure the decode time again.
const REFRESH: u32 = 64;
/// Weight of one measurement in a moving average.
const WEIGHT: f64 = 0.25;
/// One measurement counts as at most this many times the average: the machine may have been busy.
const OUTLIER: f64 = 2.0;

/// Chooses the number of prompt rows in a step from the times of earlier steps. It affects latency, never the output.
#[derive(Debug)]
pub(super) struct PrefillBudget {
    fixed: Option<usize>,
    /// Seconds of a step without prompt rows, by the number of decoding sequences.
    decode_seconds: Vec<Option<f64>>,
    /// Seconds that each prompt row adds.
    row_seconds: Option<f64>,
    /// Steps with prompt rows since the last one without.
    mixed: u32,
}

impl PrefillBudget {
    /// A budget of `fixed` rows per step, or one that follows the measurements.
    pub(super) fn new(fixed: Option<usize>) -> PrefillBudget {
        PrefillBudget { fixed, decode_seconds: Vec::new(), row_seconds: None, mixed: 0 }
    }

    /// Prompt rows for the next step, in which `decoding` sequences decode.
    pub(super) fn rows(&self, decoding: usize) -> usize {
        match (self.fixed, self.decode_seconds.get(decoding)) {
            (Some(rows), _) => rows,
            (None, _) if decoding == 0 => ALONE,
            (None, Some(Some(decode))) if self.mixed < REFRESH => {
                let rows = self.row_seconds.map_or(0.0, |row| (STRETCH - 1.0) * decode / row);
                (rows as usize).clamp(FEWEST, MOST)
            }
            // The decode time of this many sequences is measured first.
            _ => 0,
        }
    }

    /// Seconds that a prompt row takes, once that is measured.
    pub(super) fn row_seconds(&self) -> Option<f64> {
        self.row_seconds
    }

    /// Records the duration of a step.
    pub(super) fn observe(&mut self, decoding: usize, prompt_rows: usize, seconds: f64) {
        if prompt_rows == 0 {
            self.mixed = 0;
            if self.decode_seconds.len() <= decoding {
                self.decode_seconds.resize(decoding + 1, None);
            }
            self.decode_seconds[decoding] = Some(averaged(self.decode_seconds[decoding], seconds));
        } else {
            self.mixed += u32::from(decoding > 0);
            let decode = if decoding == 0 { Some(0.0) } else { self.decode_seconds.get(decoding).copied().flatten() };
            // A few rows take about as long as one, which says little about the time per row.
            let enough = if decoding == 0 { MEASURABLE } else { FEWEST };
            if let Some(decode) = decode
                && prompt_rows >= enough
            {
                let row = (seconds - decode).max(seconds * 0.01) / prompt_rows as f64;
                self.row_seconds = Some(averaged(self.row_seconds, row));
            }
        }
    }
}

fn averaged(average: Option<f64>, measured: f64) -> f64 {
    average.map_or(measured, |average| average + WEIGHT * (measured.min(OUTLIER * average) - average))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest of `steps` steps of `fixed` seconds plus `row` per row, with the rows that the budget allows.
    fn longest(budget: &mut PrefillBudget, decoding: usize, steps: usize, fixed: f64, row: f64) -> f64 {
        let mut longest: f64 = 0.0;
        for _ in 0..steps {
            let rows = budget.rows(decoding);
            let seconds = fixed + row * rows as f64;
            budget.observe(decoding, rows, seconds);
            longest = longest.max(seconds);
        }
        longest
    }

    #[test]
    fn prompt_rows_stretch_a_step_up_to_the_limit() {
        let mut budget = PrefillBudget::new(None);
        budget.observe(0, 256, 256.0 * 0.004);
        for (decoding, fixed) in [(1, 0.05), (16, 0.2), (3, 0.08)] {
            let longest = longest(&mut budget, decoding, 200, fixed, 0.004);
            assert!(longest <= STRETCH * fixed + 1e-9, "{decoding} sequences: {longest}");
            assert!(budget.rows(decoding) as f64 * 0.004 > 0.9 * (STRETCH - 1.0) * fixed - 0.004);
        }
    }

    #[test]
    fn decoding_is_measured_before_the_first_prompt_rows() {
        let mut budget = PrefillBudget::new(None);
        assert_eq!(budget.rows(2), 0);
        budget.observe(2, 0, 0.1);
        assert_eq!(budget.rows(2), FEWEST);
        assert_eq!(budget.rows(0), ALONE);
    }

    #[test]
    fn one_slow_step_reduces_prompt_rows_only_briefly() {
        let mut budget = PrefillBudget::new(None);
        longest(&mut budget, 2, 50, 0.05, 0.001);
        let before = budget.rows(2);
        budget.observe(2, before, 60.0);
        assert!(budget.rows(2) >= FEWEST);
        longest(&mut budget, 2, 20, 0.05, 0.001);
        assert!(budget.rows(2) > before / 2);
    }

    #[test]
    fn a_fixed_budget_ignores_measurements() {
        let mut budget = PrefillBudget::new(Some(5));
        budget.observe(1, 5, 9.0);
        assert_eq!([budget.rows(0), budget.rows(1)], [5, 5]);
    }
}
