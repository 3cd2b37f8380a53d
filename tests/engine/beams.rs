//! Beam search: the sequences of transformers, and the same ones in any batch, with interruptions and little memory.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::jobs::{Job, PAGE, finish, finish_interrupted, greedy, limited, load, load_as, scheduler, seeded, tokens};
use crate::tiny_model::{ODD, Shape, metadata, tensors, write};
use nybble::engine::sampler::{EarlyStopping, Sampled, SamplingOptions};
use nybble::engine::{Scheduler, SchedulerOptions, Sequence, Speculation, step};
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Quantize};
use nybble::quant::block::BlockType;

fn searching(beams: u32) -> SamplingOptions {
    greedy().with_num_beams(beams)
}

fn search(model: &Arc<Model>, scheduler: &mut Scheduler, prompt: &[u32], search: &Search) -> Vec<Sampled> {
    let id = scheduler.submit(search.sequence(model, prompt), search.limit).unwrap();
    finish(scheduler).remove(&id).unwrap()
}

/// A beam search of one prompt.
#[derive(Clone, Debug)]
struct Search {
    options: SamplingOptions,
    ends: Vec<u32>,
    limit: usize,
}

impl Search {
    fn sequence(&self, model: &Model, prompt: &[u32]) -> Sequence {
        Sequence::new(model, prompt, self.options.clone()).unwrap().with_ends(self.ends.clone())
    }

    fn score(&self, logprob: f64, length: usize) -> f64 {
        logprob / (length as f64).powf(f64::from(self.options.length_penalty))
    }

    /// The search as it is defined, each continuation computed from its first token on: tokens with their log-probabilities.
    fn naive(&self, model: &Model, prompt: &[u32]) -> Vec<(u32, f64)> {
        let count = self.options.num_beams as usize;
        let mut open: Vec<Vec<(u32, f64)>> = vec![Vec::new()];
        let mut ended: Vec<(f64, Vec<(u32, f64)>)> = Vec::new();
        let sum = |continuation: &[(u32, f64)]| continuation.iter().map(|(_, logprob)| logprob).sum::<f64>();
        for length in 1..=self.limit {
            let mut all = Vec::new();
            for continuation in &open {
                let text: Vec<u32> =
                    prompt.iter().copied().chain(continuation.iter().map(|(token, _)| *token)).collect();
                for (token, logprob) in log_softmax(model, &text).into_iter().enumerate() {
                    all.push([&continuation[..], &[(token as u32, logprob)]].concat());
                }
            }
            all.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
            all.truncate(count * (self.ends.len() + 1).max(2));
            let is_full = ended.len() == count && self.options.early_stopping == EarlyStopping::Always;
            let ends = |continuation: &Vec<(u32, f64)>| {
                length == self.limit || self.ends.contains(&continuation.last().unwrap().0)
            };
            for continuation in all.iter().take(count).filter(|continuation| !is_full && ends(continuation)) {
                ended.push((self.score(sum(continuation), length), continuation.clone()));
            }
            ended.sort_by(|a, b| b.0.total_cmp(&a.0));
            ended.truncate(count);
            open = all.into_iter().filter(|continuation| !ends(continuation)).take(count).collect();
            let longest = match self.options.early_stopping {
                EarlyStopping::Never if self.options.length_penalty > 0.0 => self.limit,
                _ => length,
            };
            let can_improve = |best: &Vec<(u32, f64)>| {
                ended.len() < count || self.score(sum(best), longest) > ended.last().unwrap().0
            };
            let is_done = ended.len() == count && self.options.early_stopping == EarlyStopping::Always;
            if is_done || !open.first().is_some_and(can_improve) {
                break;
            }
        }
        ended.remove(0).1
    }
}

fn log_softmax(model: &Model, text: &[u32]) -> Vec<f64> {
    let mut logits = Vec::new();
    let mut session = model.session();
    model.forward(&mut [Input::new(&mut session, text, Logits::Last)], &mut logits, &|| false).unwrap();
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - largest) - sum.ln()).collect()
}

fn assert_found(found: &[Sampled], expected: &[(u32, f64)], context: &dyn std::fmt::Debug) {
    let ids = |sampled: &[Sampled]| sampled.iter().map(|sampled| sampled.token).collect::<Vec<_>>();
    assert_eq!(ids(found), expected.iter().map(|(token, _)| *token).collect::<Vec<_>>(), "{context:?}");
    for (sampled, (_, logprob)) in found.iter().zip(expected) {
        assert!((f64::from(sampled.logprob.unwrap()) - logprob).abs() < 1e-4, "{context:?}");
    }
}

/// A model whose layers but every third see 40 tokens.
fn windowed() -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape { layers: 3, ..ODD };
    let mut metadata = metadata(&shape);
    metadata.set("llama.attention.sliding_window", 40_u32).set("llama.attention.sliding_window_pattern", 3_u32);
    let path = write(&folder.path().join("model.gguf"), &metadata, &tensors(&shape), BlockType::Q4_0);
    Arc::new(Model::load(path, &LoadOptions::default().with_threads(2)).unwrap())
}

fn golden(name: &str) -> Arc<Model> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(name);
    Arc::new(Model::load(path, &LoadOptions::default().with_threads(2)).unwrap())
}

/// Searches of many kinds.
fn searches() -> Vec<Search> {
    let stopping = [EarlyStopping::Heuristic, EarlyStopping::Always, EarlyStopping::Never];
    let search = |i: usize| {
        let options = searching([2, 3, 5, 8][i % 4])
            .with_length_penalty([1.0, 0.0, -0.7, 2.0, 0.5][i % 5])
            .with_early_stopping(stopping[i % 3]);
        let ends = [vec![], vec![7], vec![3, 50, 99], (0..30).collect()][i / 2 % 4].clone();
        Search { options, ends, limit: [1, 6, 17, 9][i / 3 % 4] }
    };
    (0..30).map(search).collect()
}

#[test]
fn sequences_and_scores_are_those_of_transformers() {
    let mut count = 0;
    for name in ["llama", "qwen3", "gpt_neox"] {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        let options = LoadOptions::default().with_quantize(Quantize::Stored).with_cache_type(CacheType::F32);
        let model = Arc::new(Model::load(data.join("goldens").join(name), &options).unwrap());
        let text = std::fs::read_to_string(data.join("beams").join(name).with_extension("json")).unwrap();
        let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
        for case in &cases {
            let ids = |key: &str| case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            let early_stopping = match &case["early_stopping"] {
                Value::Bool(true) => EarlyStopping::Always,
                Value::Bool(false) => EarlyStopping::Heuristic,
                _ => EarlyStopping::Never,
            };
            let options = searching(case["num_beams"].as_u64().unwrap() as u32)
                .with_length_penalty(case["length_penalty"].as_f64().unwrap() as f32)
                .with_early_stopping(early_stopping);
            let ends = case["eos"].as_u64().map(|id| id as u32).into_iter().collect();
            let golden = Search { options, ends, limit: 16 };
            let (prompt, expected): (Vec<u32>, Vec<u32>) = (ids("input_ids"), ids("sequence"));
            let found = search(&model, &mut scheduler(&model, SchedulerOptions::default()), &prompt, &golden);
            let tokens: Vec<u32> = found.iter().map(|sampled| sampled.token).collect();
            assert_eq!(tokens, expected, "{name}: {golden:?}");
            let logprob: f64 = found.iter().map(|sampled| f64::from(sampled.logprob.unwrap())).sum();
            let score = golden.score(logprob, found.len());
            assert!((score - case["score"].as_f64().unwrap()).abs() < 2e-3, "{name}: {golden:?}: {score}");
            count += 1;
        }
    }
    assert_eq!(count, 18);
}

#[test]
fn searches_find_what_the_definition_says() {
    let models = [
        ("f16", load()),
        ("int8", load_as(&ODD, Some(CacheType::Int8))),
        ("window", windowed()),
        ("attention and states", golden("jamba")),
        ("states alone", golden("mamba2")),
    ];
    for (name, model) in models {
        let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(Speculation::On));
        for (i, case) in searches().into_iter().enumerate() {
            let prompt = tokens([1, 20, 63, 64, 130][i % 5], i as u32 % 3);
            let expected = case.naive(&model, &prompt);
            assert_found(&search(&model, &mut scheduler, &prompt, &case), &expected, &(name, i, &case));
        }
        assert!(scheduler.stats().reused_tokens > 0, "prompts share their pages with later ones");
    }
}

#[test]
fn a_batch_with_interruptions_and_little_memory_changes_nothing() {
    let cases = searches();
    let prompt = |i: usize| tokens(40 + i * 29 % 150, i as u32 % 4);
    let (model, mut scheduler) = limited(24);
    let expected: Vec<_> = cases.iter().enumerate().map(|(i, case)| case.naive(&model, &prompt(i))).collect();
    let other = Job::new(tokens(90, 9), seeded(1), 30);
    let alone = other.alone(&model);
    let ids: Vec<u64> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| scheduler.submit(case.sequence(&model, &prompt(i)), case.limit).unwrap())
        .collect();
    let last = scheduler.submit(other.sequence(&model), other.limit).unwrap();
    let limit = 24 * model.cache_bytes_per_page();
    let written = finish_interrupted(&mut scheduler, |scheduler, _| assert!(scheduler.stats().cache_bytes <= limit));
    for (i, (id, expected)) in ids.iter().zip(&expected).enumerate() {
        assert_found(&written[id], expected, &(i, &cases[i]));
    }
    assert!(written[&last] == alone, "a sequence that samples next to beams");
}

#[test]
fn the_sequence_returns_with_its_continuation() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let case = Search { options: searching(3), ends: vec![5], limit: 70 };
    let prompt = tokens(PAGE + 3, 2);
    let id = scheduler.submit(case.sequence(&model, &prompt), case.limit).unwrap();
    let mut events = Vec::new();
    while !scheduler.is_idle() {
        events.extend(scheduler.step(&|| false).unwrap());
    }
    let found: Vec<u32> = events.iter().map(|event| event.result.as_ref().unwrap().token).collect();
    assert!(events.iter().all(|event| event.id == id));
    let mut sequence = events.pop().unwrap().sequence.unwrap();
    assert_eq!(sequence.tokens(), [&prompt[..], &found].concat());
    assert_eq!(sequence.has_ended(), found.last() == Some(&5));
    assert_eq!(sequence.session().len() + sequence.pending().len(), sequence.tokens().len());
    sequence.push(&[1]).unwrap();
}

#[test]
fn a_cancelled_search_can_be_submitted_again() {
    let (window, states) = (windowed(), golden("jamba"));
    for (model, prompt) in [
        (load(), tokens(PAGE + 3, 2)),
        (load(), tokens(5, 1)),
        (window.clone(), tokens(3 * PAGE, 1)),
        (window, tokens(3 * PAGE + 1, 1)),
        (states.clone(), tokens(PAGE + 3, 2)),
        (states, tokens(5, 1)),
    ] {
        let mut scheduler = scheduler(&model, SchedulerOptions::default());
        let case = Search { options: searching(4), ends: vec![], limit: 30 };
        let expected = case.naive(&model, &prompt);
        let id = scheduler.submit(case.sequence(&model, &prompt), case.limit).unwrap();
        while scheduler.stats().steps < 6 {
            assert!(scheduler.step(&|| false).unwrap().is_empty());
        }
        let sequence = scheduler.cancel(id).unwrap();
        assert_eq!(sequence.tokens(), prompt);
        let again = scheduler.submit(sequence, case.limit).unwrap();
        assert_found(&finish(&mut scheduler).remove(&again).unwrap(), &expected, &prompt);
    }
}

#[test]
fn what_a_search_does_not_use_is_refused_by_name() {
    let model = load();
    let refused = |options: SamplingOptions| Sequence::new(&model, &[1], options).unwrap_err().to_string();
    let beams = || searching(2);
    for (options, name) in [
        (beams().with_repetition_penalty(1.1), "repetition_penalty"),
        (beams().with_presence_penalty(0.1), "presence_penalty"),
        (beams().with_frequency_penalty(0.1), "frequency_penalty"),
        (beams().with_logprobs(3), "logprobs"),
        (searching(0), "num_beams"),
        (searching(257), "num_beams"),
        (searching(2).with_length_penalty(f32::NAN), "length_penalty"),
    ] {
        assert!(refused(options).starts_with(name), "{name}");
    }
    let mut sequence = Sequence::new(&model, &[1], beams()).unwrap();
    let error = step(&model, &mut [&mut sequence], &|| false).unwrap_err().to_string();
    assert!(error.contains("beam search"), "{error}");
    let processed = sequence.with_logits_processor(|_, _| Ok(()));
    let error = scheduler(&model, SchedulerOptions::default()).submit(processed, 3).unwrap_err().to_string();
    assert!(error.starts_with("logits_processor"), "{error}");
}

#[test]
fn bias_and_ends_that_are_held_back_concern_beams() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let prompt = tokens(30, 1);
    let mut run = |options: SamplingOptions, ends: Vec<u32>| {
        let sequence = Sequence::new(&model, &prompt, options).unwrap().with_ends(ends);
        let id = scheduler.submit(sequence, 12).unwrap();
        finish(&mut scheduler).remove(&id).unwrap().into_iter().map(|sampled| sampled.token).collect::<Vec<_>>()
    };
    let all: Vec<u32> = (0..101).filter(|id| *id != 4).collect();
    assert_eq!(run(searching(3), all.clone()).len(), 1, "nearly every token ends it");
    assert_eq!(run(searching(3).with_min_tokens(5), all.clone())[..5], [4; 5]);
    assert_eq!(run(searching(3).with_ignore_eos(true), all), [4; 12]);
    let forbidden: Vec<_> = (0..100).map(|id| (id, f32::NEG_INFINITY)).collect();
    assert_eq!(run(searching(3).with_logit_bias(forbidden), vec![]), [100; 12]);
}
