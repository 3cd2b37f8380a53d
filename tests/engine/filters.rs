//! Mirostat, XTC's probability, DRY, end tokens that are ignored, and logits processors.

use crate::jobs::{Job, finish, greedy, load, scheduler, seeded, tokens};
use nybble::Error;
use nybble::engine::sampler::{Sampler, SamplingOptions};
use nybble::engine::{SchedulerOptions, Sequence, Speculation, step};

/// Logits of a geometric distribution: each token has half the probability of the one before it.
fn halving(count: usize) -> Vec<f32> {
    (0..count).map(|id| -(id as f32) * std::f32::consts::LN_2).collect()
}

fn neutral() -> SamplingOptions {
    SamplingOptions::default().with_temperature(1.0).with_top_k(0).with_top_p(1.0).with_min_p(0.0).with_seed(3)
}

#[test]
fn mirostat_follows_its_definition() {
    let logits: Vec<f32> = (0..200).map(|i| ((i * 37 % 101) as f32 / 13.0).sin() * 4.0).collect();
    let (tau, eta, temperature) = (2.5_f64, 0.3_f64, 0.8_f64);
    let options =
        neutral().with_temperature(0.8).with_mirostat(2).with_mirostat_tau(2.5).with_mirostat_eta(0.3).with_top_k(1);
    let mut sampler = Sampler::new(options, 200).unwrap();
    let mut limit = 2.0 * tau;
    for round in 0..200 {
        let scaled: Vec<f64> = logits.iter().map(|logit| f64::from(*logit) / temperature).collect();
        let sum: f64 = scaled.iter().map(|logit| logit.exp()).sum();
        let surprise = |id: usize| -(scaled[id].exp() / sum).log2();
        let token = sampler.sample(&mut logits.clone()).unwrap().token as usize;
        let least = (0..200).map(surprise).fold(f64::INFINITY, f64::min);
        assert!(surprise(token) <= limit.max(least) + 1e-4, "round {round}: {} bits of {limit}", surprise(token));
        let kept: f64 = (0..200).filter(|id| surprise(*id) <= limit.max(least)).map(|id| scaled[id].exp()).sum();
        limit -= eta * (-(scaled[token].exp() / kept).log2() - tau);
    }
    assert!((limit - tau).abs() < 3.0, "the limit follows the target: {limit} bits");
    // Of 1,024 equal tokens, each has more bits than the limit: the most likely are left.
    let mut sampler = Sampler::new(neutral().with_mirostat(2), 1024).unwrap();
    assert!(sampler.sample(&mut [0.0; 1024]).is_ok());
}

#[test]
fn xtc_acts_with_its_probability() {
    let logits = halving(8);
    let mut sampler = Sampler::new(neutral().with_xtc_probability(0.3).with_xtc_threshold(0.2), 8).unwrap();
    let draws = 20_000;
    let firsts = (0..draws).filter(|_| sampler.sample(&mut logits.clone()).unwrap().token == 0).count();
    // The first token has half of the probability, and none when XTC acts.
    let share = firsts as f64 / f64::from(draws);
    assert!((share - 0.7 * 0.502).abs() < 0.015, "{share}");
}

#[test]
fn dry_ends_a_repetition_that_greedy_decoding_continues() {
    let options = greedy().with_dry_multiplier(3.0);
    let mut sampler = Sampler::new(options.clone(), 4).unwrap();
    [1, 2, 3, 0, 1, 2].into_iter().for_each(|token| sampler.accept(token));
    let logits = [0.0, 1.0, 2.0, 4.0];
    assert_eq!(sampler.sample(&mut logits.clone()).unwrap().token, 2, "3 loses 3, as it continues 1 2");
    let mut fresh = Sampler::new(options, 4).unwrap();
    assert_eq!(fresh.sample(&mut logits.clone()).unwrap().token, 3);

    // The same in a batch with draft tokens, and not what comes without it: three tokens are likely enough to repeat.
    let model = load();
    let likely = [(1, 50.0), (2, 50.0), (3, 50.0)];
    let prompt = tokens(20, 1).repeat(4);
    let dry = |options: SamplingOptions| options.with_dry_multiplier(5.0).with_dry_window(60).with_logit_bias(likely);
    for options in [dry(greedy()), dry(seeded(4))] {
        let job = Job::new(prompt.clone(), options.clone(), 40);
        let plain = Job::new(prompt.clone(), options.with_dry_multiplier(0.0), 40);
        assert!(job.alone(&model) != plain.alone(&model));
        let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(Speculation::On));
        let id = scheduler.submit(job.sequence(&model), job.limit).unwrap();
        assert!(finish(&mut scheduler)[&id] == job.alone(&model));
    }
}

#[test]
fn ignored_ends_are_sampled_only_if_nothing_else_is_allowed() {
    let mut sampler = Sampler::new(greedy(), 4).unwrap();
    sampler.ignore([2, 3]);
    assert_eq!(sampler.sample(&mut [0.0, 1.0, 5.0, 6.0]).unwrap().token, 1);
    let rest = f32::NEG_INFINITY;
    assert_eq!(sampler.sample(&mut [rest, rest, 5.0, 6.0]).unwrap().token, 3);

    let model = load();
    let ends: Vec<u32> = (0..90).collect();
    let sequence = || Sequence::new(&model, &[1, 2], greedy().with_ignore_eos(true)).unwrap().with_ends(ends.clone());
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let id = scheduler.submit(sequence(), 30).unwrap();
    let written = finish(&mut scheduler).remove(&id).unwrap();
    assert!(written.len() == 30 && written.iter().all(|sampled| sampled.token >= 90));
}

#[test]
fn a_processor_sees_the_tokens_and_decides() {
    let model = load();
    // Forces the next token to follow the last one.
    let counting = |tokens: &[u32], logits: &mut [f32]| {
        let next = (tokens.last().unwrap() + 1) % 101;
        logits.iter_mut().enumerate().filter(|(id, _)| *id != next as usize).for_each(|(_, l)| *l = f32::NEG_INFINITY);
        Ok(())
    };
    let sequence = || Sequence::new(&model, &[7], seeded(1)).unwrap().with_ends([]).with_logits_processor(counting);
    let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(Speculation::On));
    let id = scheduler.submit(sequence(), 12).unwrap();
    let written = finish(&mut scheduler).remove(&id).unwrap();
    assert_eq!(written.iter().map(|sampled| sampled.token).collect::<Vec<_>>(), (8..20).collect::<Vec<_>>());
    assert!(written.iter().all(|sampled| sampled.logprob.unwrap() < 0.0), "log-probabilities are the model's own");
    assert_eq!(step(&model, &mut [&mut sequence()], &|| false).unwrap()[0].token, 8);
}

#[test]
fn errors_of_a_processor_end_its_sequence_alone() {
    let model = load();
    let fails = |_: &[u32], _: &mut [f32]| Err("no more".into());
    let nan = |_: &[u32], logits: &mut [f32]| {
        logits[3] = f32::NAN;
        Ok(())
    };
    let nothing = |_: &[u32], logits: &mut [f32]| {
        logits.fill(f32::NEG_INFINITY);
        Ok(())
    };
    let sequence = || Sequence::new(&model, &[1], greedy()).unwrap();
    let failing = [
        ("a logits processor failed: no more", sequence().with_logits_processor(fails)),
        (
            "logits_processor: found a processor that sets the logit of token 3 to NaN",
            sequence().with_logits_processor(nan),
        ),
        (
            "logits_processor: found a processor that sets all logits to minus infinity",
            sequence().with_logits_processor(nothing),
        ),
    ];
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let other = Job::new(tokens(10, 1), greedy(), 5);
    let alone = other.alone(&model);
    for (message, sequence) in failing {
        let (bad, good) =
            (scheduler.submit(sequence, 4).unwrap(), scheduler.submit(other.sequence(&model), 5).unwrap());
        let (mut errors, mut written) = (Vec::new(), Vec::new());
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                match event.result {
                    Ok(sampled) if event.id == good => written.push(sampled),
                    Err(error) if event.id == bad => errors.push(error),
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(written == alone);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].to_string().starts_with(message), "{}", errors[0]);
    }
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let refused = |options: SamplingOptions| match Sampler::new(options, 4) {
        Err(Error::InvalidArgument { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(neutral().with_xtc_probability(1.1)), "xtc_probability");
    assert_eq!(refused(neutral().with_xtc_threshold(-0.1)), "xtc_threshold");
    assert_eq!(refused(neutral().with_top_n_sigma(f32::NAN)), "top_n_sigma");
    assert_eq!(refused(neutral().with_dynatemp_range(-1.0)), "dynatemp_range");
    assert_eq!(refused(neutral().with_dynatemp_exponent(f32::INFINITY)), "dynatemp_exponent");
    assert_eq!(refused(neutral().with_mirostat(1)), "mirostat");
    assert_eq!(refused(neutral().with_mirostat_tau(-1.0)), "mirostat_tau");
    assert_eq!(refused(neutral().with_mirostat_eta(f32::NAN)), "mirostat_eta");
    assert_eq!(refused(neutral().with_dry_multiplier(-1.0)), "dry_multiplier");
    assert_eq!(refused(neutral().with_dry_base(0.9)), "dry_base");
    assert_eq!(refused(neutral().with_dry_sequence_breakers([vec![]])), "dry_sequence_breakers");
}
