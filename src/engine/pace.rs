//! How many rows of prompts go beside running texts, so that these keep coming.

/// A step with rows of prompts may take this many times the usual one. Promised are 4: the estimate may be wrong by half.
const STRETCH: f64 = 2.5;
/// Rows of prompts in a step where no text waits for its next token.
const ALONE: usize = 256;
/// Fewest and most rows of prompts beside running texts.
const FEWEST: usize = 8;
const MOST: usize = 256;
/// Rows of prompts without running texts that tell what each takes.
const TELLING: usize = 32;
/// So many steps with rows of prompts in a row are followed by one without, to see what the usual step takes by now.
const REFRESH: u32 = 64;
/// How far a single measurement moves an estimate.
const WEIGHT: f64 = 0.25;
/// A single measurement counts as so many times the estimate at most: it may have been taken while the machine stood still.
const OUTLIER: f64 = 2.0;

/// The rows of prompts for a step, from what steps have taken so far. It decides how long texts wait, never what they are.
#[derive(Debug)]
pub(super) struct Pace {
    fixed: Option<usize>,
    /// Seconds of a step without prompts, by the number of texts.
    usual: Vec<Option<f64>>,
    /// Seconds that each row of a prompt adds.
    row: Option<f64>,
    /// Steps with rows of prompts since the last one without.
    mixed: u32,
}

impl Pace {
    /// `fixed` rows a step, or as many as the measurements allow.
    pub(super) fn new(fixed: Option<usize>) -> Pace {
        Pace { fixed, usual: Vec::new(), row: None, mixed: 0 }
    }

    /// Rows of prompts for the next step, beside `texts` running texts.
    pub(super) fn rows(&self, texts: usize) -> usize {
        match (self.fixed, self.usual.get(texts)) {
            (Some(rows), _) => rows,
            (None, _) if texts == 0 => ALONE,
            (None, Some(Some(usual))) if self.mixed < REFRESH => {
                let rows = self.row.map_or(0.0, |row| (STRETCH - 1.0) * usual / row);
                (rows as usize).clamp(FEWEST, MOST)
            }
            // What so many texts take is measured first.
            _ => 0,
        }
    }

    /// Notes what a step took.
    pub(super) fn observe(&mut self, texts: usize, prompt_rows: usize, seconds: f64) {
        if prompt_rows == 0 {
            self.mixed = 0;
            if self.usual.len() <= texts {
                self.usual.resize(texts + 1, None);
            }
            self.usual[texts] = Some(moved(self.usual[texts], seconds));
        } else {
            self.mixed += u32::from(texts > 0);
            let usual = if texts == 0 { Some(0.0) } else { self.usual.get(texts).copied().flatten() };
            // A handful of rows takes about as long as one, so it says little of what each adds.
            let enough = if texts == 0 { TELLING } else { FEWEST };
            if let Some(usual) = usual
                && prompt_rows >= enough
            {
                let row = (seconds - usual).max(seconds * 0.01) / prompt_rows as f64;
                self.row = Some(moved(self.row, row));
            }
        }
    }
}

fn moved(known: Option<f64>, measured: f64) -> f64 {
    known.map_or(measured, |known| known + WEIGHT * (measured.min(OUTLIER * known) - known))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of `fixed` seconds plus `row` a row, with as many rows of prompts as the pace says.
    fn longest(pace: &mut Pace, texts: usize, steps: usize, fixed: f64, row: f64) -> f64 {
        let mut longest: f64 = 0.0;
        for _ in 0..steps {
            let rows = pace.rows(texts);
            let seconds = fixed + row * rows as f64;
            pace.observe(texts, rows, seconds);
            longest = longest.max(seconds);
        }
        longest
    }

    #[test]
    fn prompts_stretch_a_step_as_far_as_allowed_and_no_further() {
        let mut pace = Pace::new(None);
        pace.observe(0, 256, 256.0 * 0.004);
        for (texts, fixed) in [(1, 0.05), (16, 0.2), (3, 0.08)] {
            let longest = longest(&mut pace, texts, 200, fixed, 0.004);
            assert!(longest <= STRETCH * fixed + 1e-9, "{texts} texts: {longest}");
            assert!(pace.rows(texts) as f64 * 0.004 > 0.9 * (STRETCH - 1.0) * fixed - 0.004);
        }
    }

    #[test]
    fn without_measurements_texts_go_first_and_prompts_begin_small() {
        let mut pace = Pace::new(None);
        assert_eq!(pace.rows(2), 0);
        pace.observe(2, 0, 0.1);
        assert_eq!(pace.rows(2), FEWEST);
        assert_eq!(pace.rows(0), ALONE);
    }

    #[test]
    fn one_step_that_the_machine_slept_through_does_not_stop_prompts_for_long() {
        let mut pace = Pace::new(None);
        longest(&mut pace, 2, 50, 0.05, 0.001);
        let before = pace.rows(2);
        pace.observe(2, before, 60.0);
        assert!(pace.rows(2) >= FEWEST);
        longest(&mut pace, 2, 20, 0.05, 0.001);
        assert!(pace.rows(2) > before / 2);
    }

    #[test]
    fn a_fixed_number_of_rows_stays() {
        let mut pace = Pace::new(Some(5));
        pace.observe(1, 5, 9.0);
        assert_eq!([pace.rows(0), pace.rows(1)], [5, 5]);
    }
}
