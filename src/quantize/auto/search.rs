//! The choice of a candidate: they are tried cheapest first until one meets the target or the time is up.

use std::time::Duration;

use crate::error::{Error, Result};

/// The size and quality of a candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Figures {
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Perplexity on the held-out text.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence from the full-precision model, in nats per token.
    pub kl_mean: f64,
    /// Median of the divergence.
    pub kl_median: f64,
    /// 99th percentile of the divergence.
    pub kl_p99: f64,
    /// Share of positions at which both models predict the same token.
    pub top_agreement: f64,
}

/// The quality that a candidate must reach.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Target {
    /// A perplexity that exceeds that of the full-precision model by at most this share, and a mean divergence of at most
    /// three times the share: other predictions may happen to have the same perplexity.
    Perplexity(f64),
    /// A mean divergence of at most this many nats.
    Divergence(f64),
}

/// The mean divergence that a share of the perplexity allows, in nats.
const NATS_PER_SHARE: f64 = 3.0;

impl Default for Target {
    fn default() -> Self {
        Target::Perplexity(0.01)
    }
}

impl Target {
    /// Whether a candidate meets the target. `reference` is the perplexity of the full-precision model.
    fn is_met(self, figures: &Figures, reference: f64) -> bool {
        match self {
            Target::Perplexity(share) => {
                figures.perplexity <= reference * (1.0 + share) && figures.kl_mean <= NATS_PER_SHARE * share
            }
            Target::Divergence(most) => figures.kl_mean <= most,
        }
    }

    /// The target in words.
    fn text(self) -> String {
        match self {
            Target::Perplexity(share) => {
                let [percent, nats] = [share * 100.0, share * NATS_PER_SHARE].map(|x| (x * 1e6).round() / 1e6);
                format!("perplexity within {percent}% and mean KL divergence up to {nats}")
            }
            Target::Divergence(most) => format!("mean KL divergence up to {most}"),
        }
    }
}

/// The candidates that were tried, and the choice.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Outcome {
    /// Figures and duration of the candidates that were tried: the first ones.
    pub tried: Vec<(Figures, Duration)>,
    /// Index of the chosen candidate.
    pub chosen: usize,
    /// The reason, as a sentence without a full stop.
    pub because: String,
}

/// Tries the candidates `names` in order. `evaluate(index)` quantizes and measures one, or returns `None` if the time runs
/// out meanwhile. `reference` is the perplexity of the full-precision model.
///
/// The first candidate that meets the target is chosen. If none does, or if `clock`, the time since the start, passes `budget`,
/// the candidate with the least mean divergence is chosen, and the reason says by how much the target was missed. Candidates get
/// more expensive, so one that would take longer than the remaining budget is not started.
///
/// # Errors
/// Those of `evaluate`; [`Error::InvalidArgument`] without candidates.
pub(super) fn search(
    names: &[String],
    reference: f64,
    target: Target,
    budget: Option<Duration>,
    clock: &dyn Fn() -> Duration,
    evaluate: &mut dyn FnMut(usize) -> Result<Option<Figures>>,
) -> Result<Outcome> {
    let mut tried: Vec<(Figures, Duration)> = Vec::new();
    let mut late = None;
    for number in 0..names.len() {
        let begun = clock();
        let longest = tried.iter().map(|(_, duration)| *duration).max().unwrap_or_default();
        if budget.is_some_and(|budget| number > 0 && begun + longest > budget) {
            late = Some(number);
            break;
        }
        let Some(figures) = evaluate(number)? else {
            late = Some(number);
            break;
        };
        tried.push((figures, clock().saturating_sub(begun)));
        if target.is_met(&figures, reference) {
            let because = format!("{} is the cheapest candidate with {}", names[number], target.text());
            return Ok(Outcome { tried, chosen: number, because });
        }
    }
    let least = |a: &usize, b: &usize| tried[*a].0.kl_mean.total_cmp(&tried[*b].0.kl_mean);
    let Some(chosen) = (0..tried.len()).min_by(least) else {
        return Err(Error::argument("candidates", "none", "at least one"));
    };
    let figures = tried[chosen].0;
    let rest = match late {
        Some(first) => format!("; there was no time for {}", names[first..].join(", ")),
        None => String::new(),
    };
    let because = format!(
        "{} diverges least ({:.4}); none of {} has {} (perplexity {:.2}, full precision {reference:.2}){rest}",
        names[chosen],
        figures.kl_mean,
        if tried.len() > 1 { names[..tried.len()].join(", ") } else { "the candidates tried".to_owned() },
        target.text(),
        figures.perplexity,
    );
    Ok(Outcome { tried, chosen, because })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn names() -> Vec<String> {
        ["rtn", "gptq", "awq"].map(str::to_owned).to_vec()
    }

    fn figures(perplexity: f64, kl_mean: f64) -> Figures {
        Figures { size_bytes: 1, perplexity, kl_mean, kl_median: kl_mean, kl_p99: kl_mean, top_agreement: 0.9 }
    }

    const MEASURED: [(f64, f64); 3] = [(12.0, 0.3), (10.08, 0.03), (10.09, 0.02)];

    /// A search in which each candidate takes ten seconds.
    fn run(target: Target, budget: Option<u64>) -> Outcome {
        let now = Cell::new(0);
        let mut evaluate = |number: usize| {
            now.set(now.get() + 10);
            let (perplexity, kl) = MEASURED[number];
            Ok(Some(figures(perplexity, kl)))
        };
        let clock = || Duration::from_secs(now.get());
        search(&names(), 10.0, target, budget.map(Duration::from_secs), &clock, &mut evaluate).unwrap()
    }

    #[test]
    fn the_first_candidate_that_meets_the_target_ends_the_search() {
        let outcome = run(Target::default(), None);
        assert_eq!((outcome.chosen, outcome.tried.len()), (1, 2));
        assert_eq!(
            outcome.because,
            "gptq is the cheapest candidate with perplexity within 1% and mean KL divergence up to 0.03"
        );
        assert_eq!(run(Target::Divergence(0.025), None).chosen, 2);
    }

    #[test]
    fn a_close_perplexity_of_other_predictions_does_not_meet_the_target() {
        let measured = [(10.01, 0.1), (9.99, 0.04), (10.05, 0.05)];
        let mut evaluate = |number: usize| Ok(measured.get(number).map(|(perplexity, kl)| figures(*perplexity, *kl)));
        let clock = || Duration::ZERO;
        let outcome = search(&names(), 10.0, Target::default(), None, &clock, &mut evaluate).unwrap();
        assert_eq!((outcome.chosen, outcome.tried.len()), (1, 3));
    }

    #[test]
    fn without_a_candidate_that_meets_it_the_closest_is_chosen() {
        let outcome = run(Target::Divergence(0.01), None);
        assert_eq!((outcome.chosen, outcome.tried.len()), (2, 3));
        assert_eq!(outcome.tried[2].1, Duration::from_secs(10));
        let expected = "awq diverges least (0.0200); none of rtn, gptq, awq has mean KL divergence up to 0.01 \
                        (perplexity 10.09, full precision 10.00)";
        assert_eq!(outcome.because, expected);
    }

    #[test]
    fn a_candidate_that_would_end_too_late_is_not_begun() {
        for (budget, tried) in [(0, 1), (15, 1), (20, 2), (29, 2), (30, 3)] {
            let outcome = run(Target::Divergence(0.01), Some(budget));
            assert_eq!(outcome.tried.len(), tried, "{budget} seconds");
            assert_eq!(outcome.because.contains("no time for"), tried < 3, "{}", outcome.because);
        }
        let outcome = run(Target::Divergence(0.01), Some(15));
        assert!(outcome.because.ends_with("; there was no time for gptq, awq"), "{}", outcome.because);
    }

    #[test]
    fn a_candidate_that_runs_out_of_time_does_not_count() {
        let mut evaluate = |number: usize| Ok((number < 1).then(|| figures(12.0, 0.3)));
        let clock = || Duration::ZERO;
        let outcome = search(&names(), 10.0, Target::Perplexity(1e-5), None, &clock, &mut evaluate).unwrap();
        assert_eq!((outcome.chosen, outcome.tried.len()), (0, 1));
        let expected = "rtn diverges least (0.3000); none of the candidates tried has perplexity within 0.001% and mean KL \
                        divergence up to 0.00003 (perplexity 12.00, full precision 10.00); there was no time for gptq, awq";
        assert_eq!(outcome.because, expected);
    }

    #[test]
    fn a_search_without_candidates_is_refused() {
        let found =
            search(&[], 10.0, Target::default(), None, &|| Duration::ZERO, &mut |_| Ok(Some(figures(1.0, 1.0))));
        assert!(found.unwrap_err().to_string().contains("at least one"));
    }
}
