//! Models with recurrent states: the same bits in any batch, after a fork, from a file, after tokens are taken back, and with
//! prefixes and draft tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::jobs::{Job, PAGE, assert_same, greedy, seeded};
use crate::tiny_model::Random;
use nybble::engine::{Scheduler, SchedulerOptions, Speculation};
use nybble::format::gguf::{Metadata, NewTensor, Writer};
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session};
use nybble::quant::block::BlockType;
use nybble::{Error, Place, kernels};

/// One model for each kind of recurrent layer.
const MODELS: [&str; 9] =
    ["qwen3_5", "qwen3_next", "kimi_linear", "lfm2", "granitehybrid", "nemotron_h-moe", "falcon_h1", "jamba", "mamba2"];

fn file(name: &str) -> PathBuf {
    let name = if name == "granitehybrid" { "granitemoehybrid" } else { name };
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf").join(format!("{name}.gguf"))
}

fn load(name: &str, kernel: Option<&str>, threads: usize) -> Arc<Model> {
    let options = LoadOptions::default().with_quantize(Quantize::Stored).with_threads(threads);
    Arc::new(Model::load(file(name), &options.with_kernel(kernel.map(str::to_owned))).unwrap())
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % 280).collect()
}

/// The bits of the logits of all tokens.
fn feed(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<u32> {
    let mut logits = Vec::new();
    model.forward(&mut [Input::new(session, tokens, Logits::All)], &mut logits, &|| false).unwrap();
    assert!(logits.iter().all(|x| x.is_finite()));
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn pieces_kernels_threads_and_crowds_do_not_change_the_bits() {
    for name in MODELS {
        let text = tokens(150, 1);
        let model = load(name, None, 2);
        let expected = feed(&model, &mut model.session(), &text);
        assert!(
            expected.iter().any(|bits| f32::from_bits(*bits).abs() > 0.01),
            "{name}: logits of zeros prove nothing"
        );
        for piece in [1, 7, 16, 17, 64] {
            let mut session = model.session();
            let found: Vec<u32> = text.chunks(piece).flat_map(|text| feed(&model, &mut session, text)).collect();
            assert!(found == expected, "{name}: pieces of {piece}");
        }
        for kernel in kernels::available() {
            for threads in [1, 3] {
                let other = load(name, Some(kernel.name()), threads);
                let mut session = other.session();
                let found: Vec<u32> = [&text[..60], &text[60..61], &text[61..]]
                    .iter()
                    .flat_map(|t| feed(&other, &mut session, t))
                    .collect();
                assert!(found == expected, "{name}: {} on {threads} threads", kernel.name());
            }
        }
        // Sixteen sessions at different positions, several steps together: long pieces next to single tokens, more rows than go
        // through the layers together.
        let mut sessions: Vec<Session> = (0..16).map(|_| model.session()).collect();
        let mut seen = [0; 16];
        for step in 0..12 {
            let mut inputs = Vec::new();
            let mut ranges = Vec::new();
            for (i, session) in sessions.iter_mut().enumerate() {
                let count = [1, 3, 60, 16, 40][(i + step) % 5].min(text.len() - seen[i]);
                if count > 0 {
                    ranges.push(seen[i]..seen[i] + count);
                    inputs.push(Input::new(session, &text[seen[i]..seen[i] + count], Logits::All));
                    seen[i] += count;
                }
            }
            let mut logits = Vec::new();
            model.forward(&mut inputs, &mut logits, &|| false).unwrap();
            let expected = ranges
                .into_iter()
                .flat_map(|range| &expected[range.start * model.vocabulary()..range.end * model.vocabulary()]);
            assert!(logits.iter().map(|x| x.to_bits()).eq(expected.copied()), "{name}: step {step} of a crowd");
        }
    }
}

#[test]
fn the_last_tokens_are_taken_back_and_forks_go_their_own_way() {
    for name in MODELS {
        let model = load(name, None, 2);
        let (text, other) = (tokens(120, 1), tokens(120, 2));
        let expected = feed(&model, &mut model.session(), &text);
        let rest = |from: usize| &expected[from * model.vocabulary()..];
        for kept in [0, 1, 5, 8, 9] {
            // Nine draft tokens, some of them right, twice.
            let mut session = model.session();
            feed(&model, &mut session, &text[..50]);
            for start in [50, 50 + kept] {
                let draft = [&text[start..start + kept], &other[..9 - kept]].concat();
                feed(&model, &mut session, &draft);
                assert_eq!(session.truncate(start + kept), start + kept, "{name}");
            }
            let mut fork = session.fork();
            assert!(feed(&model, &mut session, &text[50 + 2 * kept..]) == rest(50 + 2 * kept), "{name}: {kept} kept");
            feed(&model, &mut session, &other);
            assert!(feed(&model, &mut fork, &text[50 + 2 * kept..]) == rest(50 + 2 * kept), "{name}: {kept}, a fork");
        }
    }
}

#[test]
fn an_interrupted_step_leaves_the_state_as_it_was() {
    for name in MODELS {
        let model = load(name, None, 2);
        let text = tokens(100, 1);
        let expected = feed(&model, &mut model.session(), &text);
        for start in [0, 40, 43] {
            // Few tokens, and many.
            for count in [1, 7, 30] {
                for layers in 0..4 {
                    let mut session = model.session();
                    if start > 0 {
                        feed(&model, &mut session, &text[..40]);
                    }
                    if start > 40 {
                        feed(&model, &mut session, &text[40..start]);
                    }
                    let calls = AtomicUsize::new(0);
                    let interrupted = || calls.fetch_add(1, Ordering::Relaxed) >= layers;
                    let input = Input::new(&mut session, &text[start..start + count], Logits::Last);
                    let result = model.forward(&mut [input], &mut Vec::new(), &interrupted);
                    if let Err(error) = result {
                        assert!(matches!(error, Error::Interrupted), "{error}");
                        assert_eq!(session.len(), start);
                        let mut fork = session.fork();
                        for session in [&mut session, &mut fork] {
                            let found = feed(&model, session, &text[start..start + 1]);
                            let found = [found, feed(&model, session, &text[start + 1..])].concat();
                            assert!(found == expected[start * model.vocabulary()..], "{name}: {count} after {start}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_session_goes_back_to_a_snapshot() {
    let model = load("mamba2", None, 2);
    let (text, other) = (tokens(1100, 1), tokens(1100, 2));
    let expected = feed(&model, &mut model.session(), &text);
    let mut session = model.session();
    text.chunks(128).for_each(|text| drop(feed(&model, &mut session, text)));
    let left = session.truncate(1060);
    assert!(left > 0 && left <= 1060 && left.is_multiple_of(PAGE), "{left}");
    assert!(feed(&model, &mut session, &text[left..]) == expected[left * model.vocabulary()..]);
    assert_eq!(session.truncate(3), 0);
    feed(&model, &mut session, &other);
    assert_eq!(session.truncate(0), 0);
    assert!(feed(&model, &mut session, &text) == expected);
}

#[test]
fn a_session_file_holds_the_states() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    for name in MODELS {
        let model = load(name, None, 2);
        let text = tokens(150, 1);
        let expected = feed(&model, &mut model.session(), &text);
        for pieces in [&[100][..], &[64], &[90, 5], &[63, 1]] {
            let mut session = model.session();
            let mut seen = 0;
            for piece in pieces {
                feed(&model, &mut session, &text[seen..seen + piece]);
                seen += piece;
            }
            session.save(&model, &text[..seen], &path).unwrap();
            let other = load(name, Some("scalar"), 1);
            let (mut loaded, tokens) = Session::load(&other, &path).unwrap();
            assert_eq!(tokens, text[..seen]);
            for (model, session) in [(&model, &mut session), (&other, &mut loaded)] {
                assert!(
                    feed(model, session, &text[seen..]) == expected[seen * model.vocabulary()..],
                    "{name}: {pieces:?}"
                );
            }
        }
        let mut truncated = model.session();
        feed(&model, &mut truncated, &text[..9]);
        assert_eq!(truncated.truncate(0), 0);
        for session in [model.session(), truncated] {
            session.save(&model, &[], &path).unwrap();
            let (mut empty, _) = Session::load(&model, &path).unwrap();
            assert!(feed(&model, &mut empty, &text) == expected, "{name}: an empty session");
        }
    }
    // A file that is shorter or longer than its state.
    let model = load("lfm2", None, 2);
    let mut session = model.session();
    feed(&model, &mut session, &tokens(20, 1));
    session.save(&model, &tokens(20, 1), &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[8..12], 3u32.to_le_bytes());
    for damaged in [&bytes[..bytes.len() - 4], &[&bytes[..], &[0; 4]].concat()] {
        std::fs::write(&path, damaged).unwrap();
        let error = Session::load(&model, &path).unwrap_err();
        assert!(matches!(&error, Error::Malformed { place: Place::File, .. }), "{error}");
    }
    for version in [1u32, 2] {
        std::fs::write(&path, [&bytes[..8], &version.to_le_bytes(), &bytes[12..]].concat()).unwrap();
        let error = Session::load(&model, &path).unwrap_err();
        assert!(matches!(&error, Error::Malformed { place: Place::Key(key), .. } if key == "version"), "{error}");
    }
}

#[test]
fn prefixes_with_snapshots_are_shared() {
    let model = load("mamba2", None, 2);
    let shared = tokens(700, 1);
    let with = |length: usize, last: u32, limit| Job::new([&shared[..length], &[last]].concat(), seeded(3), limit);
    for (speculation, chunk) in [(Speculation::Off, None), (Speculation::On, None), (Speculation::Off, Some(50))] {
        let options = SchedulerOptions::default().with_speculation(speculation).with_prefill_chunk(chunk);
        let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
        assert_same(&model, &[with(700, 5, 90)], &mut scheduler);
        assert_eq!(scheduler.stats().reused_tokens, 0);
        // Up to the last whole page of the first prompt, where a snapshot is.
        assert_same(&model, &[with(700, 9, 40)], &mut scheduler);
        assert_eq!(scheduler.stats().reused_tokens, 640);
        let before = scheduler.stats().reused_tokens;
        assert_same(&model, &[with(690, 7, 3), with(300, 8, 100)], &mut scheduler);
        assert_eq!(scheduler.stats().reused_tokens, before + 640, "{speculation:?} {chunk:?}");
    }
}

#[test]
fn states_are_kept_where_prompts_part() {
    let model = load("mamba2", None, 2);
    let shared = tokens(700, 1);
    let jobs: Vec<Job> = (0..8).map(|i| Job::new([&shared[..], &tokens(90, 10 + i)].concat(), greedy(), 5)).collect();
    let mut scheduler = Scheduler::new(model.clone(), None, SchedulerOptions::default()).unwrap();
    assert_same(&model, &jobs, &mut scheduler);
    // The second computes the shared pages again, since the states after them were not kept; the others continue from there.
    let shared = 700 / PAGE * PAGE;
    assert_eq!(scheduler.stats().reused_tokens, 6 * shared, "{:?}", scheduler.stats());
    assert_same(&model, &jobs[3..5], &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, 6 * shared + 2 * (790 / PAGE * PAGE), "{:?}", scheduler.stats());
}

#[test]
fn sequences_wait_for_a_prefix_that_another_computes() {
    let model = load("mamba2", None, 2);
    let shared = tokens(600, 1);
    let jobs: Vec<Job> = (0..12).map(|i| Job::new([&shared[..], &[10 + i]].concat(), greedy(), 5)).collect();
    for chunk in [None, Some(30)] {
        let options = SchedulerOptions::default().with_prefill_chunk(chunk);
        let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
        assert_same(&model, &jobs, &mut scheduler);
        // Each computes what follows the last whole page: 25 tokens, and one of its own.
        let computed = scheduler.stats().prompt_tokens;
        assert!(computed <= 601 + 11 * 26, "{computed} tokens with {chunk:?}");
    }
}

#[test]
fn a_draft_model_with_states_goes_back_to_before_its_drafts() {
    for name in ["mamba2", "qwen3_5"] {
        let model = load(name, None, 2);
        let jobs: Vec<Job> = (0..3).map(|i| Job::new(tokens(40 + 9 * i, i as u32), greedy(), 60)).collect();
        let options = SchedulerOptions::default().with_speculation(Speculation::On);
        // A model drafts its own tokens, unless what it has computed is wrong; the drafts of another one are bad.
        let mut scheduler = Scheduler::new(model.clone(), Some(model.clone()), options.clone()).unwrap();
        assert_same(&model, &jobs, &mut scheduler);
        let stats = scheduler.stats();
        assert!(stats.drafted_tokens > 100 && stats.accepted_tokens == stats.drafted_tokens, "{name}: {stats:?}");
        let other = load("lfm2", None, 2);
        let mut scheduler = Scheduler::new(model.clone(), Some(other), options).unwrap();
        assert_same(&model, &jobs, &mut scheduler);
        assert!(scheduler.stats().drafted_tokens > 100, "{name}");
    }
}

#[test]
fn a_small_cache_changes_no_token() {
    let model = load("mamba2", None, 2);
    let jobs: Vec<Job> = (0..6).map(|i| Job::new(tokens(200 + 70 * i, i as u32), seeded(i as u64), 60)).collect();
    for states in [6, 9, 15] {
        let options = SchedulerOptions::default().with_cache_bytes(states * model.state_bytes() * 2);
        let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
        assert_same(&model, &jobs, &mut scheduler);
        assert!(scheduler.stats().cache_bytes <= states * model.state_bytes() * 2 + model.state_bytes());
    }
}

/// A Mamba-2 model of one layer whose state is larger than three logs of a short step: larger than those of the other models.
fn with_a_large_state(folder: &Path) -> Arc<Model> {
    const HIDDEN: usize = 32;
    const INNER: usize = 1024;
    const STATE: usize = 256;
    const HEADS: usize = 16;
    const CHANNELS: usize = INNER + 2 * STATE;
    let mut metadata = Metadata::new();
    metadata
        .set("general.architecture", "mamba2")
        .set("mamba2.context_length", 2048u32)
        .set("mamba2.embedding_length", HIDDEN as u32)
        .set("mamba2.feed_forward_length", 0u32)
        .set("mamba2.attention.head_count", 0u32)
        .set("mamba2.block_count", 1u32)
        .set("mamba2.ssm.conv_kernel", 4u32)
        .set("mamba2.ssm.inner_size", INNER as u32)
        .set("mamba2.ssm.state_size", STATE as u32)
        .set("mamba2.ssm.time_step_rank", HEADS as u32)
        .set("mamba2.ssm.group_count", 1u32)
        .set("mamba2.attention.layer_norm_rms_epsilon", 1e-5f32);
    // Values around the second number, as far from it as the third.
    let tensors: [(&str, &[usize], f32, f32); 11] = [
        ("token_embd.weight", &[HIDDEN, 300], 0.0, 1.0),
        ("blk.0.attn_norm.weight", &[HIDDEN], 1.0, 0.3),
        ("blk.0.ssm_in.weight", &[HIDDEN, INNER + CHANNELS + HEADS], 0.0, 0.3),
        ("blk.0.ssm_conv1d.weight", &[4, CHANNELS], 0.0, 0.5),
        ("blk.0.ssm_conv1d.bias", &[CHANNELS], 0.0, 0.1),
        ("blk.0.ssm_dt.bias", &[HEADS], 0.0, 0.5),
        ("blk.0.ssm_a", &[1, HEADS], -1.0, 0.9),
        ("blk.0.ssm_d", &[1, HEADS], 0.0, 1.0),
        ("blk.0.ssm_norm.weight", &[INNER, 1], 1.0, 0.3),
        ("blk.0.ssm_out.weight", &[INNER, HIDDEN], 0.0, 0.1),
        ("output_norm.weight", &[HIDDEN], 1.0, 0.3),
    ];
    let path = folder.join("large_state.gguf");
    let dims = |dims: &[usize]| dims.iter().map(|dim| *dim as u64).collect::<Vec<_>>();
    let infos = tensors.iter().map(|(name, shape, ..)| NewTensor::new(*name, BlockType::F32, dims(shape)));
    let mut writer = Writer::create(&path, &metadata, infos).unwrap();
    let mut random = Random(5);
    for (name, shape, middle, distance) in tensors {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.next().mul_add(distance, middle)).collect();
        writer.write_values(name, &values).unwrap();
    }
    writer.finish().unwrap();
    Arc::new(Model::load(path, &LoadOptions::default().with_threads(2)).unwrap())
}

#[test]
fn a_cache_that_holds_one_state_is_enough_for_one_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_a_large_state(folder.path());
    let state = model.state_bytes();
    let log = (model.session().bytes_for(16) - model.session().bytes_for(1)) / 15 * 16;
    assert!(3 * log < state, "a limit below two states allows three logs: {log}, {state}");
    // The states after 1,024 tokens are kept as long as there is memory.
    let jobs = [Job::new(tokens(1100, 1), greedy(), 10), Job::new(tokens(1060, 2), seeded(1), 30)];
    for (prefix_cache, speculation) in [(false, Speculation::Off), (true, Speculation::Off), (false, Speculation::On)] {
        for (limit, is_enough) in [(2 * state - 1, true), (state, false)] {
            let options = SchedulerOptions::default().with_cache_bytes(limit).with_prefix_cache(prefix_cache);
            let mut scheduler = Scheduler::new(model.clone(), None, options.with_speculation(speculation)).unwrap();
            if is_enough {
                assert_same(&model, &jobs, &mut scheduler);
                continue;
            }
            scheduler.submit(jobs[0].sequence(&model), 10).unwrap();
            let events = scheduler.step(&|| false).unwrap();
            assert!(matches!(events[0].result, Err(Error::OutOfMemory { .. })), "{events:?}");
            assert!(scheduler.is_idle());
        }
    }
}

#[test]
fn every_model_generates_the_same_text_in_a_crowd() {
    for name in MODELS {
        let model = load(name, None, 2);
        let jobs: Vec<Job> =
            (0..8).map(|i| Job::new(tokens(20 + 13 * i, i as u32 % 3), seeded(i as u64), 30)).collect();
        for speculation in [Speculation::Off, Speculation::On, Speculation::Auto] {
            let options = SchedulerOptions::default().with_speculation(speculation);
            let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
            assert_same(&model, &jobs, &mut scheduler);
        }
    }
}
