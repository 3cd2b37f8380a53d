//! Draft tokens of a model's own head: as many are accepted as the goldens say, and no token changes.

use std::sync::Arc;

use crate::jobs::{Job, assert_same, assert_written, finish_interrupted, greedy, scheduler, seeded};
use crate::mtp_goldens::{GENERATED, MtpGolden, mtp_goldens};
use nybble::engine::{Scheduler, SchedulerOptions, Speculation};
use nybble::model::{LoadOptions, Model, Quantize};

fn load(golden: &MtpGolden, quantize: Quantize) -> Arc<Model> {
    let options = LoadOptions::default().with_threads(2).with_quantize(quantize);
    Arc::new(Model::load(&golden.folder, &options).unwrap())
}

fn options(draft_tokens: impl Into<Option<usize>>) -> SchedulerOptions {
    SchedulerOptions::default().with_speculation(Speculation::Mtp).with_draft_tokens(draft_tokens)
}

/// Prompts of several pages with common beginnings, greedy and with seeds.
fn jobs(golden: &MtpGolden) -> Vec<Job> {
    let all: Vec<u32> = golden.input.iter().zip(&golden.greedy).flat_map(|(a, b)| [&a[..], b].concat()).collect();
    let of = |len: usize, more: &[u32], options, limit| Job::new([&all[..len], more].concat(), options, limit);
    vec![
        of(20, &[], greedy(), 90),
        of(64, &[], greedy(), 70),
        of(64, &[9, 8], seeded(3), 30),
        of(128, &[], greedy(), 64),
        of(128, &[], seeded(4).with_repetition_penalty(1.3), 40),
        of(100, &[5], greedy(), 30),
        of(130, &[], greedy(), 20),
        of(1, &[], greedy(), 60),
    ]
}

#[test]
fn one_draft_token_in_a_step_is_accepted_as_often_as_the_goldens_say() {
    for golden in mtp_goldens() {
        let model = load(&golden, Quantize::Stored);
        for (row, input) in golden.input.iter().enumerate() {
            let mut scheduler = scheduler(&model, options(1));
            let job = Job::new(input.clone(), greedy(), GENERATED);
            let id = scheduler.submit(job.sequence(&model), GENERATED).unwrap();
            let mut tokens = Vec::new();
            while !scheduler.is_idle() {
                tokens.extend(scheduler.step(&|| false).unwrap().into_iter().map(|event| event.result.unwrap().token));
            }
            assert_eq!(tokens, golden.greedy[row], "{}, row {row}, id {id}", golden.name);
            let stats = scheduler.stats();
            let found = (stats.accepted_tokens, stats.drafted_tokens);
            assert_eq!(found, golden.accepted(row), "{}: accepted and drafted in row {row}", golden.name);
        }
    }
}

#[test]
fn a_head_drafts_after_a_prefix_from_disk() {
    for golden in mtp_goldens() {
        let (folder, jobs, model) = (tempfile::tempdir().unwrap(), jobs(&golden), load(&golden, Quantize::Stored));
        let alone: Vec<_> = jobs.iter().map(|job| job.alone(&model)).collect();
        let options = options(None).with_cache_dir(folder.path().join("cache"));
        for restored in [0, 2 * 64] {
            let model = load(&golden, Quantize::Stored);
            let mut scheduler = scheduler(&model, options.clone());
            assert_written(&model, &jobs, &alone, &mut scheduler);
            scheduler.save_prefixes(std::time::Duration::from_secs(600));
            let stats = scheduler.stats();
            assert!(stats.restored_tokens >= restored && stats.drafted_tokens > 100, "{}: {stats:?}", golden.name);
        }
    }
}

#[test]
fn drafts_of_a_head_never_change_a_token_in_any_batch() {
    for golden in mtp_goldens() {
        let jobs = jobs(&golden);
        for quantize in [Quantize::Stored, Quantize::Int4] {
            let model = load(&golden, quantize);
            let alone: Vec<_> = jobs.iter().map(|job| job.alone(&model)).collect();
            for (speculation, draft_tokens) in [
                (Speculation::Mtp, Some(1)),
                (Speculation::Mtp, Some(3)),
                (Speculation::Mtp, None),
                (Speculation::Auto, None),
                (Speculation::Auto, Some(2)),
            ] {
                for (chunk, prefix_cache, max_batch) in [(None, true, 16), (Some(7), true, 3), (Some(24), false, 16)] {
                    let options = options(draft_tokens)
                        .with_speculation(speculation)
                        .with_prefill_chunk(chunk)
                        .with_prefix_cache(prefix_cache)
                        .with_max_batch(max_batch);
                    let mut scheduler = scheduler(&model, options);
                    assert_written(&model, &jobs, &alone, &mut scheduler);
                    // Again, with what is in the prefix cache.
                    assert_written(&model, &jobs, &alone, &mut scheduler);
                    let stats = scheduler.stats();
                    assert!(stats.drafted_tokens > 100, "{stats:?}");
                    let share = stats.accepted_tokens as f64 / stats.drafted_tokens as f64;
                    // Heads in INT4 draft almost as well as they do in F32.
                    assert!(share > 0.2, "{}, {speculation:?}, {draft_tokens:?}: {stats:?}", golden.name);
                }
            }
        }
    }
}

/// The tokens accepted and drafted for one greedy job after another.
fn accepted(model: &Arc<Model>, jobs: &[Job], options: SchedulerOptions) -> Vec<(usize, usize)> {
    let mut scheduler = scheduler(model, options);
    let mut before = (0, 0);
    let mut all = Vec::new();
    for job in jobs {
        assert_same(model, std::slice::from_ref(job), &mut scheduler);
        let stats = scheduler.stats();
        all.push((stats.accepted_tokens - before.0, stats.drafted_tokens - before.1));
        before = (stats.accepted_tokens, stats.drafted_tokens);
    }
    all
}

#[test]
fn drafts_after_a_prefix_hit_are_those_of_a_whole_prompt() {
    for golden in mtp_goldens() {
        let model = load(&golden, Quantize::Stored);
        let jobs = jobs(&golden);
        // The second time, prompts end after whole pages, inside of one, and before the last token of one.
        let twice = [&jobs[..], &jobs].concat();
        let expected = accepted(&model, &twice, options(2).with_prefix_cache(false));
        for chunk in [None, Some(13)] {
            let found = accepted(&model, &twice, options(2).with_prefill_chunk(chunk));
            assert_eq!(found, expected, "{}, {chunk:?}", golden.name);
        }
    }
}

#[test]
fn a_session_that_its_head_did_not_follow_gets_drafts() {
    for golden in mtp_goldens() {
        let model = load(&golden, Quantize::Stored);
        for row in 0..2 {
            let tokens = [&golden.input[row][..], &golden.greedy[row][..10]].concat();
            let mut session = model.session();
            let input = nybble::model::Input::new(&mut session, &tokens[..25], nybble::model::Logits::None);
            model.forward(&mut [input], &mut Vec::new(), &|| false).unwrap();
            let sequence = nybble::engine::Sequence::resume(&model, session, &tokens, greedy()).unwrap();
            let mut scheduler = scheduler(&model, options(2));
            scheduler.submit(sequence.with_ends(Vec::new()), GENERATED - 10).unwrap();
            let (mut found, mut session) = (Vec::new(), None);
            while !scheduler.is_idle() {
                for event in scheduler.step(&|| false).unwrap() {
                    found.push(event.result.unwrap().token);
                    session = event.sequence.map(|sequence| sequence.into_session()).or(session);
                }
            }
            assert_eq!(found, golden.greedy[row][10..], "{}", golden.name);
            assert!(scheduler.stats().accepted_tokens > 5, "{}: {:?}", golden.name, scheduler.stats());
            // The session continues with other tokens than those that it has ended with.
            let mut session = session.unwrap();
            session.truncate(30);
            let other = [&tokens[..30], &golden.input[row + 1]].concat();
            let expected = Job::new(other.clone(), greedy(), 20).alone(&model);
            let sequence = nybble::engine::Sequence::resume(&model, session, &other, greedy()).unwrap();
            scheduler.submit(sequence.with_ends(Vec::new()), 20).unwrap();
            let mut found = Vec::new();
            while !scheduler.is_idle() {
                found.extend(scheduler.step(&|| false).unwrap().into_iter().map(|event| event.result.unwrap()));
            }
            assert!(found == expected, "{}", golden.name);
        }
    }
}

#[test]
fn interrupted_steps_preemption_and_cancellation_change_no_token() {
    for golden in mtp_goldens() {
        let model = load(&golden, Quantize::Stored);
        let jobs = jobs(&golden);
        // Memory for about three of the sequences.
        let limit = 9 * model.cache_bytes_per_page() * 3 / 2;
        let mut scheduler = scheduler(&model, options(3).with_prefill_chunk(20).with_cache_bytes(limit));
        let ids: Vec<_> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
        let written = finish_interrupted(&mut scheduler, |scheduler, written| {
            if written.get(&ids[4]).is_some_and(|written| written.len() > 9) {
                scheduler.cancel(ids[4]);
            }
            assert!(scheduler.stats().cache_bytes < 2 * limit);
        });
        for (id, job) in ids.iter().zip(&jobs) {
            let alone = job.alone(&model);
            assert!(written[id] == alone[..written[id].len()], "{}", golden.name);
            assert!(written[id].len() == alone.len() || *id == ids[4]);
        }
    }
}

#[test]
fn options_that_need_a_head_are_refused_without_one() {
    let golden = &mtp_goldens()[0];
    let model = load(golden, Quantize::Stored);
    let without = LoadOptions::default().with_threads(1).with_mtp(false);
    let without = Arc::new(Model::load(&golden.folder, &without).unwrap());
    let error = |model: &Arc<Model>, draft: Option<Arc<Model>>, options: SchedulerOptions| {
        Scheduler::new(model.clone(), draft, options).unwrap_err().to_string()
    };
    assert!(error(&without, None, options(1)).starts_with("speculation: found \"mtp\" for "));
    assert!(error(&model, Some(without.clone()), options(1)).starts_with("draft: found a model, expected none"));
    assert_eq!(error(&model, None, options(0)), "draft_tokens: found 0, expected 1 to 8");
    assert_eq!(error(&model, None, options(9)), "draft_tokens: found 9, expected 1 to 8");
    // Without a head, `auto` drafts from the text.
    assert!(Scheduler::new(without, None, SchedulerOptions::default().with_speculation(Speculation::Auto)).is_ok());
}
