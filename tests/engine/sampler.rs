//! The sampler, mostly compared with a naive reference in F64 that sorts everything.

use nybble::Error;
use nybble::engine::sampler::{Sampled, Sampler, SamplingOptions};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Options that change nothing: the model's own distribution.
fn neutral() -> SamplingOptions {
    SamplingOptions::default().with_temperature(1.0).with_top_k(0).with_top_p(1.0).with_min_p(0.0).with_seed(0)
}

fn sampler(options: &SamplingOptions, vocab_size: usize) -> Sampler {
    Sampler::new(options.clone(), vocab_size).unwrap()
}

/// The token that a fresh sampler chooses.
fn first(options: &SamplingOptions, logits: &[f32]) -> Sampled {
    sampler(options, logits.len()).sample(&mut logits.to_vec()).unwrap()
}

/// How often each token is drawn in `draws` draws from the same logits.
fn histogram(options: &SamplingOptions, logits: &[f32], draws: usize) -> Vec<usize> {
    let (mut sampler, mut logits) = (sampler(options, logits.len()), logits.to_vec());
    let mut counts = vec![0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(&mut logits).unwrap().token as usize] += 1;
    }
    counts
}

/// The tokens that the filters keep. A high temperature makes them equally likely, so that each is drawn.
fn kept(options: &SamplingOptions, logits: &[f32]) -> Vec<usize> {
    let options = options.clone().with_temperature(1e9);
    let counts = histogram(&options, logits, 50 * logits.len());
    (0..logits.len()).filter(|id| counts[*id] > 0).collect()
}

/// Plausible logits, different for each seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 6.0 - 18.0).collect()
}

mod reference {
    use super::*;

    fn softmax(logits: &[(usize, f64)]) -> Vec<f64> {
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, (_, logit)| max.max(*logit));
        let weights: Vec<f64> = logits.iter().map(|(_, logit)| (logit - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    }

    pub(super) fn log_softmax(logits: &[f32]) -> Vec<f64> {
        let all: Vec<_> = logits.iter().map(|logit| f64::from(*logit)).enumerate().collect();
        softmax(&all).into_iter().map(f64::ln).collect()
    }

    /// Sorts by the key, lower ids first among equals, and keeps the first that together reach `mass`.
    fn prefix(logits: &mut Vec<(usize, f64)>, mass: f64, key: impl Fn(f64, f64) -> f64) {
        let mut rows: Vec<_> = logits.iter().zip(softmax(logits)).map(|(l, p)| (key(l.1, p), l.0, l.1, p)).collect();
        rows.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap().then(a.1.cmp(&b.1)));
        let mut sum = 0.0;
        let count = rows.iter().position(|row| {
            sum += row.3;
            sum >= mass
        });
        rows.truncate(count.map_or(rows.len(), |count| count + 1));
        *logits = rows.into_iter().map(|row| (row.1, row.2)).collect();
    }

    /// The probability of each token after all steps, as they are documented, if XTC removes tokens.
    pub(super) fn probabilities(options: &SamplingOptions, history: &[u32], logits: &[f32]) -> Vec<f64> {
        let mut all: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
        for (id, bias) in &options.logit_bias {
            all[*id as usize] += f64::from(*bias);
        }
        let window = if options.penalty_window == 0 { history.len() } else { options.penalty_window as usize };
        let history = &history[history.len().saturating_sub(window)..];
        for (id, logit) in all.iter_mut().enumerate() {
            let count = history.iter().filter(|token| **token as usize == id).count();
            if count > 0 {
                let penalty = f64::from(options.repetition_penalty);
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                *logit -= f64::from(options.presence_penalty) + count as f64 * f64::from(options.frequency_penalty);
            }
        }
        let mut left: Vec<(usize, f64)> = all.into_iter().enumerate().filter(|l| l.1 > f64::NEG_INFINITY).collect();
        if options.top_n_sigma > 0.0 {
            let mean = left.iter().map(|l| l.1).sum::<f64>() / left.len() as f64;
            let variance = left.iter().map(|l| (l.1 - mean).powi(2)).sum::<f64>() / left.len() as f64;
            let largest = left.iter().fold(f64::NEG_INFINITY, |max, l| max.max(l.1));
            let least = largest - f64::from(options.top_n_sigma) * variance.sqrt();
            left.retain(|l| l.1 >= least);
        }
        if options.top_k > 0 {
            left.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0))); // -0 ties with 0
            left.truncate(options.top_k as usize);
        }
        if options.typical_p < 1.0 {
            let entropy: f64 = softmax(&left).iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            prefix(&mut left, f64::from(options.typical_p), |_, p| (-p.ln() - entropy).abs());
        }
        if options.top_p < 1.0 {
            prefix(&mut left, f64::from(options.top_p), |logit, _| -logit);
        }
        let highest = softmax(&left).into_iter().fold(0.0, f64::max);
        let mut rows: Vec<_> = left.iter().copied().zip(softmax(&left)).collect();
        rows.retain(|row| row.1 >= highest * f64::from(options.min_p) * (1.0 - 1e-12));
        let mut left: Vec<_> = rows.into_iter().map(|(l, _)| l).collect();
        if options.xtc_probability > 0.0 {
            let mut likely: Vec<_> = left.iter().copied().zip(softmax(&left)).collect();
            likely.retain(|row| row.1 >= f64::from(options.xtc_threshold) * (1.0 - 1e-12));
            likely.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.0.cmp(&b.0.0)));
            likely.pop();
            left.retain(|l| likely.iter().all(|row| row.0.0 != l.0));
        }
        let mut temperature = f64::from(options.temperature);
        if options.dynatemp_range > 0.0 {
            let range = f64::from(options.dynatemp_range);
            let entropy: f64 = softmax(&left).iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let most = (left.len() as f64).ln();
            let share = if most > 0.0 { (entropy / most).powf(f64::from(options.dynatemp_exponent)) } else { 0.0 };
            let lowest = (temperature - range).max(0.0);
            temperature = (lowest + (temperature + range - lowest) * share).max(1e-6);
        }
        let left: Vec<_> = left.iter().map(|l| (l.0, l.1 / temperature)).collect();
        let mut probabilities = vec![0.0; logits.len()];
        for ((id, _), p) in left.iter().zip(softmax(&left)) {
            probabilities[*id] = p;
        }
        probabilities
    }

    /// The n-th number of the generator, in [0, 1). SplitMix64: its n-th state is seed + n * gamma.
    pub(super) fn uniform(seed: u64, n: u64) -> f64 {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n));
        for (shift, factor) in [(30, 0xbf58_476d_1ce4_e5b9), (27, 0x94d0_49bb_1331_11eb)] {
            z = (z ^ (z >> shift)).wrapping_mul(factor);
        }
        (z ^ (z >> 31)) as f64 / 2.0_f64.powi(64)
    }
}

fn any_options() -> impl Strategy<Value = SamplingOptions> {
    let share = || prop_oneof![Just(1.0_f32), 0.02_f32..1.0];
    let penalties = prop_oneof![Just((1.0_f32, 0.0_f32, 0.0_f32)), (0.5_f32..2.0, -1.0_f32..2.0, -1.0_f32..1.0)];
    let bias = prop_oneof![Just(f32::NEG_INFINITY), -5.0_f32..5.0];
    let sigma = prop_oneof![Just(0.0_f32), 0.3_f32..3.0];
    let xtc = prop_oneof![Just((0.0_f32, 0.1_f32)), (Just(1.0_f32), 0.005_f32..0.4)];
    let dynamic = prop_oneof![Just((0.0_f32, 1.0_f32)), (0.1_f32..1.5, prop_oneof![Just(1.0_f32), 0.2_f32..3.0])];
    (
        prop_oneof![Just(1.0_f32), 0.2_f32..3.0],
        prop_oneof![Just(0_u32), 1_u32..50, Just(1000)],
        (share(), share(), prop_oneof![Just(0.0_f32), 0.0_f32..0.5]),
        penalties,
        prop_oneof![Just(0_u32), 1_u32..12],
        prop::collection::vec((1_u32..20, bias), 0..4),
        any::<u64>(),
        (sigma, xtc, dynamic),
    )
        .prop_map(|(temperature, top_k, shares, penalties, penalty_window, logit_bias, seed, filters)| {
            let (sigma, xtc, dynamic) = filters;
            SamplingOptions::default()
                .with_top_n_sigma(sigma)
                .with_xtc_probability(xtc.0)
                .with_xtc_threshold(xtc.1)
                .with_dynatemp_range(dynamic.0)
                .with_dynatemp_exponent(dynamic.1)
                .with_temperature(temperature)
                .with_top_k(top_k)
                .with_top_p(shares.0)
                .with_typical_p(shares.1)
                .with_min_p(shares.2)
                .with_repetition_penalty(penalties.0)
                .with_presence_penalty(penalties.1)
                .with_frequency_penalty(penalties.2)
                .with_penalty_window(penalty_window)
                .with_logit_bias(logit_bias)
                .with_seed(seed)
                .with_logprobs(0)
        })
}

/// Logits of 20 to 600 tokens, peaked or flat; some are on a coarse grid, so that many tie.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    (20_usize..600, any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(count, seed, ties, flat)| {
        let steepness = if flat { 0.1 } else { 1.0 };
        let shape = |logit: f32| if ties { (logit / 2.0).round() * 2.0 * steepness } else { logit * steepness };
        noise(count, seed).into_iter().map(shape).collect()
    })
}

proptest! {
    // The same cases in every run: in rare cases a logit is so close to a limit that F32 and F64 differ.
    #![proptest_config(ProptestConfig {
        cases: 1000,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_token_is_the_one_of_the_reference(
        options in any_options(),
        logits in any_logits(),
        history in prop::collection::vec(0_u32..20, 0..30),
    ) {
        let mut sampler = sampler(&options, logits.len());
        let mut history = history;
        history.iter().for_each(|token| sampler.accept(*token));
        let mut working = logits.clone();
        for n in 1..=5 {
            let Sampled { token, logprob, .. } = sampler.sample(&mut working).unwrap();
            prop_assert_eq!(&working, &logits, "the logits are as before");
            prop_assert!((f64::from(logprob.unwrap()) - reference::log_softmax(&logits)[token as usize]).abs() < 1e-4);

            // The token's share of [0, 1), in order of ids, contains the random number. If the reference is within a
            // rounding error of another limit, nudged options may match instead.
            let share_of = |options: &SamplingOptions| {
                let shares = reference::probabilities(options, &history, &logits);
                let start: f64 = shares[..token as usize].iter().sum();
                (start, start + shares[token as usize])
            };
            // XTC takes a number for itself before it.
            let count = if options.xtc_probability > 0.0 { 2 } else { 1 };
            let number = reference::uniform(options.seed.unwrap(), count * n);
            let fits = |options: &SamplingOptions| {
                let (start, end) = share_of(options);
                start - 1e-5 <= number && number <= end + 1e-5
            };
            let nudged = |by: f32| options.clone().with_top_n_sigma(options.top_n_sigma * by).with_xtc_threshold(options.xtc_threshold * by).with_top_p(if options.top_p < 1.0 { options.top_p * by } else { 1.0 }).with_typical_p(if options.typical_p < 1.0 { options.typical_p * by } else { 1.0 }).with_min_p(options.min_p * by);
            let agrees = fits(&options) || [1.0 - 1e-5, 1.0 + 1e-5].into_iter().any(|by| fits(&nudged(by)));
            prop_assert!(agrees, "token {token} for {number}: {:?}", share_of(&options));
            sampler.accept(token);
            history.push(token);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest(logits in any_logits(), top_k in 0_u32..3) {
        let mut expected = 0;
        for (id, logit) in logits.iter().enumerate() {
            if *logit > logits[expected] {
                expected = id;
            }
        }
        let options = SamplingOptions::greedy().with_top_k(top_k);
        prop_assert_eq!(first(&options, &logits).token as usize, expected);
    }

    #[test]
    fn the_top_log_probabilities_are_those_of_a_full_sort(logits in any_logits(), logprobs in 0_u32..700) {
        let mut expected: Vec<_> = reference::log_softmax(&logits).into_iter().enumerate().collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        expected.truncate(logprobs as usize);
        let options = neutral().with_logprobs(logprobs).with_logit_bias([(3, 7.0)]);
        let top = first(&options, &logits).top;
        prop_assert_eq!(top.len(), expected.len());
        for ((id, logprob), (expected_id, expected)) in top.into_iter().zip(expected) {
            prop_assert_eq!(id as usize, expected_id);
            prop_assert!((f64::from(logprob) - expected).abs() < 1e-4);
        }
    }

    #[test]
    fn odd_logits_give_a_possible_token_or_an_error(
        logits in prop::collection::vec(prop_oneof![any::<f32>(), Just(f32::NEG_INFINITY), -9.0_f32..9.0], 20..100),
        options in any_options(),
        temperature in prop_oneof![Just(0.0_f32), Just(1e-45), Just(f32::MAX), 0.1_f32..2.0],
        huge in prop_oneof![Just(f32::MAX), Just(f32::MIN), Just(1e-45)],
    ) {
        let options = options.with_temperature(temperature).with_frequency_penalty(huge).with_repetition_penalty(huge.abs()).with_logit_bias([(0, huge), (0, huge), (1, f32::NEG_INFINITY)]);
        let mut sampler = sampler(&options, logits.len());
        [0, 0, 1, 2, 2, 5, u32::MAX].into_iter().for_each(|token| sampler.accept(token));
        let mut working = logits.clone();
        let unusable = logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY);
        match sampler.sample(&mut working) {
            Ok(sampled) => {
                prop_assert!(!unusable);
                prop_assert!(sampled.token != 1 && logits[sampled.token as usize].is_finite());
                prop_assert!(sampled.logprob.unwrap() <= 0.0);
            }
            Err(error) => prop_assert!(matches!(error, Error::BadLogits)),
        }
        prop_assert!(working.iter().zip(&logits).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn tokens_are_drawn_as_often_as_they_are_likely() {
    let logits: Vec<f32> = noise(50, 3).iter().map(|logit| logit * 0.3).collect();
    let draws = 200_000;
    let options = [
        neutral(),
        neutral().with_temperature(0.7),
        neutral().with_temperature(2.0).with_top_k(12),
        SamplingOptions::default().with_seed(11),
    ];
    for options in options {
        let counts = histogram(&options, &logits, draws);
        let expected = reference::probabilities(&options, &[], &logits);
        let mut chi_square = 0.0;
        let mut cells = 0;
        for (count, p) in counts.into_iter().zip(expected) {
            let expected = p * draws as f64;
            assert!(p > 0.0 || count == 0, "a token that was dropped came up");
            if expected > 5.0 {
                chi_square += (count as f64 - expected).powi(2) / expected;
                cells += 1;
            }
        }
        // Its mean is the number of cells and its variance twice that: 5 deviations are generous. The seed is fixed.
        let bound = f64::from(cells) + 5.0 * f64::from(2 * cells).sqrt();
        assert!(cells > 3 && chi_square < bound, "{options:?}: chi square {chi_square} of {cells} cells");
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens_in_every_version() {
    let draw = |seed| {
        let mut sampler = sampler(&SamplingOptions::default().with_seed(seed), 1000);
        (0..10).map(|step| sampler.sample(&mut noise(1000, step)).unwrap().token).collect::<Vec<_>>()
    };
    assert_eq!(draw(Some(7)), GOLDEN);
    assert_eq!(draw(Some(7)), draw(Some(7)));
    assert_ne!(draw(Some(7)), draw(Some(8)));
    assert_ne!(draw(None), draw(None));
}

/// Tokens of the first version. If they change, so does the completion of every seed.
const GOLDEN: [u32; 10] = [663, 155, 931, 753, 439, 706, 332, 372, 326, 464];

#[test]
fn each_filter_keeps_the_documented_tokens() {
    // Probabilities 0.4, 0.3, 0.2, 0.05, 0.05 in a shuffled order.
    let logits: Vec<f32> = [0.05_f32, 0.3, 0.4, 0.05, 0.2].iter().map(|p| p.ln() + 3.0).collect();
    let keeps = |options: SamplingOptions| kept(&options, &logits);
    assert_eq!(keeps(neutral()), [0, 1, 2, 3, 4]);
    assert_eq!(keeps(neutral().with_top_k(1)), [2]);
    assert_eq!(keeps(neutral().with_top_k(4)), [0, 1, 2, 4], "the lower id of a tie");
    assert_eq!(keeps(neutral().with_top_p(0.39)), [2]);
    assert_eq!(keeps(neutral().with_top_p(0.41)), [1, 2]);
    assert_eq!(keeps(neutral().with_top_p(0.89)), [1, 2, 4]);
    assert_eq!(keeps(neutral().with_top_p(0.94)), [0, 1, 2, 4]);
    assert_eq!(keeps(neutral().with_min_p(0.51)), [1, 2]);
    assert_eq!(keeps(neutral().with_min_p(0.49)), [1, 2, 4]);
    assert_eq!(keeps(neutral().with_min_p(1.0)), [2]);
    // The entropy is 1.35 nats; the surprises are 0.92, 1.20, 1.61 and twice 3.00.
    assert_eq!(keeps(neutral().with_typical_p(0.29)), [1]);
    assert_eq!(keeps(neutral().with_typical_p(0.31)), [1, 4]);
    assert_eq!(keeps(neutral().with_typical_p(0.51)), [1, 2, 4]);
    // The standard deviation of the logits is 0.89; they are 0, 0.29, 0.69 and twice 2.08 below the largest.
    assert_eq!(keeps(neutral().with_top_n_sigma(0.32)), [2]);
    assert_eq!(keeps(neutral().with_top_n_sigma(0.33)), [1, 2]);
    assert_eq!(keeps(neutral().with_top_n_sigma(0.9)), [1, 2, 4]);
    let xtc = |threshold: f32| neutral().with_xtc_probability(1.0).with_xtc_threshold(threshold);
    assert_eq!(keeps(xtc(0.5)), [0, 1, 2, 3, 4], "no token is that likely");
    assert_eq!(keeps(xtc(0.35)), [0, 1, 2, 3, 4], "one token is");
    assert_eq!(keeps(xtc(0.25)), [0, 1, 3, 4]);
    assert_eq!(keeps(xtc(0.15)), [0, 3, 4]);
    assert_eq!(keeps(xtc(0.04)), [3], "the higher id of a tie");
    // 0.4 of 0.9 is 0.44: one token reaches 0.43 only with probabilities renormalized after top_k.
    assert_eq!(keeps(neutral().with_top_k(3).with_top_p(0.43)), [2]);
}

#[test]
fn penalties_change_only_tokens_of_the_window() {
    let greedy = |options: SamplingOptions, history: &[u32], logits: [f32; 3]| {
        let mut sampler = sampler(&options.with_temperature(0.0), 3);
        history.iter().for_each(|token| sampler.accept(*token));
        sampler.sample(&mut logits.to_vec()).unwrap().token
    };
    let repetition = neutral().with_repetition_penalty(2.0);
    assert_eq!(greedy(repetition.clone(), &[], [3.0, 2.0, 1.0]), 0);
    assert_eq!(greedy(repetition.clone(), &[0, 0, 0], [3.0, 1.4, 1.0]), 0, "halved once, not three times");
    assert_eq!(greedy(repetition.clone(), &[0], [3.0, 1.6, 1.0]), 1);
    assert_eq!(greedy(repetition.clone(), &[0], [-1.0, -1.9, -3.0]), 1, "a negative logit is doubled");
    let presence = neutral().with_presence_penalty(1.0);
    assert_eq!(greedy(presence.clone(), &[0, 0, 0], [3.0, 1.9, 0.0]), 0);
    assert_eq!(greedy(presence, &[0, 0, 0], [3.0, 2.1, 0.0]), 1);
    let frequency = neutral().with_frequency_penalty(1.0).with_penalty_window(2);
    assert_eq!(greedy(frequency.clone(), &[0, 0, 0], [3.0, 0.9, 0.0]), 0, "two of the three are in the window");
    assert_eq!(greedy(frequency.clone(), &[0, 0, 0], [3.0, 1.1, 0.0]), 1);
    assert_eq!(greedy(frequency.clone(), &[0, 0, 0, 2, 2], [3.0, 2.9, 4.0]), 0);
    let all = frequency.with_penalty_window(0);
    assert_eq!(greedy(all, &[0; 500], [400.0, -99.0, -200.0]), 1);
}

#[test]
fn log_probabilities_are_the_models_own() {
    let options = neutral()
        .with_temperature(0.0)
        .with_logit_bias([(0, f32::NEG_INFINITY)])
        .with_presence_penalty(1.0)
        .with_logprobs(2);
    let logits = [0.5_f32, 0.25, 0.125, 0.125].map(f32::ln);
    let mut sampler = sampler(&options, 4);
    sampler.accept(1);
    let sampled = sampler.sample(&mut logits.to_vec()).unwrap();
    assert_eq!(sampled.token, 2);
    assert!((sampled.logprob.unwrap() - 0.125_f32.ln()).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1]);
    assert!((sampled.top[0].1 - 0.5_f32.ln()).abs() < 1e-6);
    let unasked = first(&options.with_logprobs(None), &logits);
    assert_eq!((unasked.logprob, unasked.top), (None, vec![]));
}

#[test]
fn impossible_tokens_are_not_among_the_most_likely() {
    let options = neutral().with_logprobs(3);
    let top = first(&options, &[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0]).top;
    assert_eq!(top, [(1, 0.5_f32.ln()), (3, 0.5_f32.ln())]);
}

#[test]
fn excluded_ids_are_never_sampled_and_have_no_share_of_the_probability() {
    let logits = [1.0_f32, 9.0, 2.0, 9.0, 9.0, 9.0];
    let options = neutral().with_logprobs(6).with_logit_bias([(4, 50.0)]);
    for (temperature, seed) in (0..200).map(|seed| ([0.0, 1.0, 50.0][seed % 3], seed as u64)) {
        let options = options.clone().with_temperature(temperature).with_seed(seed);
        let mut sampler = sampler(&options, logits.len());
        // The last range ends beyond the vocabulary.
        sampler.exclude([1..2, 3..99]);
        let sampled = sampler.sample(&mut logits.to_vec()).unwrap();
        assert!([0, 2].contains(&sampled.token), "{sampled:?}");
        assert_eq!(sampled.top, first(&options_without_bias(&options), &[1.0, f32::NEG_INFINITY, 2.0]).top);
    }
    let mut all = sampler(&neutral(), 3);
    all.exclude([0..1, 1..3]);
    assert!(matches!(all.sample(&mut [1.0; 3]), Err(Error::BadLogits)));
}

fn options_without_bias(options: &SamplingOptions) -> SamplingOptions {
    options.clone().with_logit_bias(Vec::new())
}

#[test]
fn a_bias_or_penalty_that_overflows_still_counts_as_large() {
    let boosts = [
        neutral().with_logit_bias([(1, f32::MAX)]),
        neutral().with_presence_penalty(f32::MIN),
        neutral().with_repetition_penalty(1e-45),
    ];
    for options in boosts {
        for temperature in [0.0, 1.0] {
            let mut sampler = sampler(&options.clone().with_temperature(temperature), 3);
            sampler.accept(1);
            assert_eq!(sampler.sample(&mut [2e38, 1e38, 0.0]).unwrap().token, 1, "{options:?}");
        }
    }
}

#[test]
fn logits_without_a_possible_token_are_refused() {
    let bad = [vec![1.0, f32::NAN, 2.0], vec![f32::NAN; 3], vec![1.0, f32::INFINITY, 2.0], vec![f32::NEG_INFINITY; 3]];
    for options in [neutral(), SamplingOptions::default(), SamplingOptions::greedy()] {
        for logits in &bad {
            let result = sampler(&options, 3).sample(&mut logits.clone());
            assert!(matches!(result, Err(Error::BadLogits)), "{logits:?}");
        }
        let ban = |ids: &[u32]| ids.iter().map(|id| (*id, f32::NEG_INFINITY)).collect::<Vec<_>>();
        let none = options.clone().with_logit_bias(ban(&[0, 1, 2]));
        assert!(matches!(sampler(&none, 3).sample(&mut [1.0, 2.0, 3.0]), Err(Error::BadLogits)));
        let one = options.clone().with_logit_bias(ban(&[0, 2]));
        assert_eq!(first(&one, &[9.0, -50.0, 9.0]).token, 1);
        assert!(matches!(sampler(&options, 3).sample(&mut [1.0]), Err(Error::InvalidArgument { name: "logits", .. })));
    }
}

#[test]
fn an_option_out_of_its_range_is_refused_by_name() {
    type Change = fn(&mut SamplingOptions, f32);
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let cases: [(&str, Change, &[f32], &[f32]); 8] = [
        ("temperature", |o, x| o.temperature = x, &[nan, inf, -0.1], &[0.0, 1e-45, 100.0]),
        ("top_p", |o, x| o.top_p = x, &[nan, inf, 0.0, -0.1, 1.1], &[1e-45, 1.0]),
        ("typical_p", |o, x| o.typical_p = x, &[nan, inf, 0.0, -0.1, 1.1], &[1e-45, 1.0]),
        ("min_p", |o, x| o.min_p = x, &[nan, inf, -0.1, 1.1], &[0.0, 1.0]),
        ("repetition_penalty", |o, x| o.repetition_penalty = x, &[nan, inf, 0.0, -1.0], &[0.5, 2.0]),
        ("presence_penalty", |o, x| o.presence_penalty = x, &[nan, inf, -inf], &[-2.0, 2.0]),
        ("frequency_penalty", |o, x| o.frequency_penalty = x, &[nan, inf, -inf], &[-2.0, 2.0]),
        ("logit_bias", |o, x| o.logit_bias = vec![(1, x)], &[nan, inf], &[-inf, -100.0, 100.0]),
    ];
    for (name, change, bad, good) in cases {
        for value in bad {
            let mut options = SamplingOptions::default();
            change(&mut options, *value);
            let message = options.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{name}: found {value}")), "{message}");
            assert!(Sampler::new(options, 10).is_err());
        }
        for value in good {
            let mut options = SamplingOptions::default();
            change(&mut options, *value);
            options.validate().unwrap();
        }
    }
    let far = SamplingOptions::default().with_logit_bias([(9, 1.0), (10, 1.0)]);
    let message = Sampler::new(far, 10).unwrap_err().to_string();
    assert_eq!(message, "logit_bias: found token 10, expected tokens below 10, the size of the vocabulary");
    for vocab_size in [0, usize::MAX] {
        let result = Sampler::new(SamplingOptions::default(), vocab_size);
        assert!(matches!(result, Err(Error::InvalidArgument { name: "vocab_size", .. })));
    }
}

#[test]
fn a_vocabulary_of_262144_tokens_is_filtered_like_a_small_one() {
    // All logits on a coarse grid: thousands of ties at every limit.
    let logits: Vec<f32> = noise(262_144, 5).into_iter().map(|logit| (logit * 4.0).round() / 4.0).collect();
    let mut sorted: Vec<usize> = (0..logits.len()).collect();
    sorted.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
    for top_k in [1_u32, 40, 1000] {
        let options = neutral().with_logprobs(top_k).with_top_k(top_k);
        let top = first(&options, &logits).top;
        assert!(top.iter().map(|(id, _)| *id as usize).eq(sorted.iter().copied().take(top_k as usize)));
        let kept = &sorted[..top_k as usize];
        let (mut sampler, mut working) = (sampler(&options.with_temperature(9.0), 262_144), logits.clone());
        for _ in 0..50 {
            assert!(kept.contains(&(sampler.sample(&mut working).unwrap().token as usize)));
        }
    }
    let options = neutral().with_top_p(0.9);
    let expected = reference::probabilities(&options, &[], &logits);
    let (mut sampler, mut working) = (sampler(&options, 262_144), logits.clone());
    for _ in 0..20 {
        assert!(expected[sampler.sample(&mut working).unwrap().token as usize] > 0.0);
    }
}

#[test]
fn ends_are_not_sampled_before_the_least_number_of_tokens() {
    for options in [SamplingOptions::greedy(), neutral()] {
        let mut held = sampler(&options.clone().with_min_tokens(3), 4);
        held.set_ends([1, 3, 99]);
        let before = [0.5, 9.0, 1.5, 8.0];
        let mut logits = before;
        let tokens: Vec<_> = (0..60).map(|_| held.sample(&mut logits).unwrap().token).collect();
        assert!(tokens[..3].iter().all(|token| [0, 2].contains(token)), "{tokens:?}");
        assert!(tokens[3..].iter().any(|token| [1, 3].contains(token)), "{tokens:?}");
        assert_eq!(logits, before, "logits are restored");
    }
}

#[test]
fn an_end_is_sampled_early_where_nothing_else_is_left() {
    let ban = |id: u32| (id, f32::NEG_INFINITY);
    let mut held = sampler(&neutral().with_min_tokens(5).with_logit_bias([ban(0), ban(2)]), 3);
    held.set_ends([1]);
    assert_eq!(held.sample(&mut [0.0, 0.0, 0.0]).unwrap().token, 1);
}

#[test]
fn the_least_number_of_tokens_changes_nothing_without_ends() {
    let logits = noise(50, 3);
    assert_eq!(histogram(&neutral().with_min_tokens(9), &logits, 40), histogram(&neutral(), &logits, 40));
}
