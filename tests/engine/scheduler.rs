//! The scheduler: sequences in a batch get bit-identical tokens to those they get alone, and share common prefixes.

use std::collections::HashMap;

use crate::jobs::{
    Job, PAGE, assert_cancelled_or_whole, assert_same, finish, finish_interrupted, greedy, jobs, kinds_of_options,
    limited, load, load_as, run_and_cancel, scheduler, seeded, tokens,
};
use crate::tiny_model::{ODD, Shape};
use nybble::Error;
use nybble::engine::sampler::Sampled;
use nybble::engine::{Scheduler, SchedulerOptions, Speculation};
use nybble::model::{CacheType, Input, Logits, Session};

#[test]
fn batching_and_cancelling_never_change_the_tokens_of_a_sequence() {
    let jobs = jobs(64);
    for cache_type in [None, Some(CacheType::Int8)] {
        let model = load_as(&ODD, cache_type);
        let alone: Vec<_> = jobs.iter().map(|job| job.alone(&model)).collect();
        for options in kinds_of_options() {
            let what = format!("{options:?}, {cache_type:?}");
            assert_cancelled_or_whole(&run_and_cancel(&model, &jobs, options), &alone, &what);
        }
    }
}

#[test]
fn a_common_prefix_of_prompts_is_computed_once() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let shared = tokens(300, 1);
    let with = |more: &[u32]| Job::new([&shared[..], more].concat(), seeded(3), 12);
    assert_same(&model, &[with(&[5, 6, 7])], &mut scheduler);
    assert_eq!((scheduler.stats().prompt_tokens, scheduler.stats().reused_tokens), (303, 0));
    assert_eq!(scheduler.stats().cached_pages, 4);
    // Four pages are reused. The fifth was not full, so its tokens are computed again.
    assert_same(&model, &[with(&[9])], &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, 4 * PAGE);
    assert_eq!(scheduler.stats().prompt_tokens, 303 + 301 - 4 * PAGE);
}

#[test]
fn a_common_prefix_of_simultaneous_prompts_is_computed_once() {
    let model = load();
    let shared = tokens(2 * PAGE, 1);
    let jobs: Vec<_> = (0..8).map(|i| Job::new([&shared[..], &[i, i + 1]].concat(), seeded(7), 9)).collect();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    assert_same(&model, &jobs, &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, 7 * 2 * PAGE);
    assert_eq!(scheduler.stats().prompt_tokens, 2 * PAGE + 8 * 2);
}

#[test]
fn a_prompt_in_the_prefix_cache_computes_one_token_in_its_own_page() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let job = Job::new(tokens(3 * PAGE, 2), greedy(), 70);
    let other = Job { options: seeded(1), ..job.clone() };
    assert_same(&model, std::slice::from_ref(&job), &mut scheduler);
    // All continue the same last page, not all with the same tokens.
    assert_same(&model, &[job, other.clone(), other], &mut scheduler);
    assert_eq!(scheduler.stats().prompt_tokens, 3 * PAGE + 3);
    assert_eq!(scheduler.stats().reused_tokens, 3 * (3 * PAGE - 1));
}

#[test]
fn a_prompt_that_differs_within_a_page_reuses_the_beginning_of_the_page() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let first = tokens(2 * PAGE, 3);
    let mut second = first.clone();
    second[PAGE + 40] = (second[PAGE + 40] + 1) % 101;
    assert_same(&model, &[Job::new(first.clone(), greedy(), 3)], &mut scheduler);
    assert_same(&model, &[Job::new(second, greedy(), 80)], &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, PAGE + 40);
    assert_same(&model, &[Job::new(first, greedy(), 80)], &mut scheduler);
}

#[test]
fn the_next_turn_of_a_chat_does_not_compute_its_history() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let job = Job::new(tokens(50, 4), seeded(5), 100);
    let answer: Vec<u32> = job.alone(&model).iter().map(|sampled| sampled.token).collect();
    assert_same(&model, std::slice::from_ref(&job), &mut scheduler);
    let history = [&job.prompt[..], &answer, &tokens(9, 6)].concat();
    assert_same(&model, &[Job::new(history, greedy(), 4)], &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, 2 * PAGE);
}

#[test]
fn a_page_continues_only_in_its_own_model_and_position() {
    let (model, other) = (load(), load());
    let tokens = tokens(PAGE + 10, 1);
    let logits = |session: &mut Session, tokens: &[u32]| {
        let mut logits = Vec::new();
        model.forward(&mut [Input::new(session, tokens, Logits::Last)], &mut logits, &|| false).unwrap();
        logits
    };
    let mut first = model.session();
    let expected = logits(&mut first, &tokens);
    let page = first.page(0).unwrap();
    assert!(first.page(1).is_none(), "it is not full");
    assert!(page.is_shared());
    let bytes = model.cache_bytes_per_page();
    for held in [PAGE, 40] {
        let mut second = model.session();
        second.attach_page(&page, held).unwrap();
        assert_eq!((second.len(), second.bytes()), (held, bytes));
        assert_eq!(second.bytes_for(1), bytes, "a new page, or a copy");
        assert_eq!(logits(&mut second, &tokens[held..]), expected);
        assert!(second.attach_page(&page, 1).is_err(), "in the middle of a page");
    }
    for (session, held) in [(other.session(), PAGE), (model.session(), 0), (model.session(), PAGE + 1)] {
        let mut session = session;
        assert!(matches!(session.attach_page(&page, held), Err(Error::InvalidArgument { .. })));
        assert!(session.is_empty());
    }
}

#[test]
fn without_a_prefix_cache_no_page_is_kept() {
    let model = load();
    let options = SchedulerOptions::default().with_prefix_cache(false);
    let mut scheduler = scheduler(&model, options);
    let job = Job::new(tokens(200, 1), greedy(), 5);
    assert_same(&model, &[job.clone(), job], &mut scheduler);
    let stats = scheduler.stats();
    assert_eq!((stats.reused_tokens, stats.cached_pages, stats.cache_bytes), (0, 0, 0));
}

#[test]
fn the_least_recently_used_page_is_evicted_first() {
    let model = load();
    // A sequence takes three pages while it is computed; two of them stay.
    let cache_bytes = 6 * model.cache_bytes_per_page();
    let mut scheduler = scheduler(&model, SchedulerOptions::default().with_cache_bytes(cache_bytes));
    let job = |seed| Job::new(tokens(2 * PAGE + 1, seed), greedy(), 2);
    let mut reused = |seed| {
        let before = scheduler.stats().reused_tokens;
        assert_same(&model, &[job(seed)], &mut scheduler);
        assert!(scheduler.stats().cache_bytes <= cache_bytes);
        scheduler.stats().reused_tokens - before
    };
    assert_eq!([reused(1), reused(2)], [0, 0]);
    assert_eq!(reused(1), 2 * PAGE, "1 is younger than 2 now");
    assert_eq!([reused(3), reused(1)], [0, 2 * PAGE]);
    assert_eq!([reused(2), reused(4)], [PAGE, 0], "the last page of 2 was evicted first");
}

#[test]
fn the_memory_limit_holds_at_every_step_and_changes_no_token() {
    let model = load();
    let jobs = jobs(24);
    for (pages, speculation) in [(5, Speculation::Off), (9, Speculation::On)] {
        let cache_bytes = pages * model.cache_bytes_per_page();
        let mut scheduler =
            scheduler(&model, SchedulerOptions::default().with_cache_bytes(cache_bytes).with_speculation(speculation));
        let ids: Vec<u64> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
        let mut written: HashMap<u64, Vec<Sampled>> = HashMap::new();
        let mut most = 0;
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                written.entry(event.id).or_default().push(event.result.unwrap());
            }
            assert!(scheduler.stats().cache_bytes <= cache_bytes);
            most = most.max(scheduler.stats().running);
        }
        assert!(most > 1, "some fit together");
        for (id, job) in ids.iter().zip(&jobs) {
            assert!(written[id] == job.alone(&model));
        }
    }
}

#[test]
fn a_sequence_that_outgrows_the_memory_preempts_the_youngest() {
    let (model, mut scheduler) = limited(4);
    // Each begins in one page and ends in four.
    let jobs: Vec<_> = (0..3).map(|i| Job::new(tokens(10, i), seeded(u64::from(i)), 240)).collect();
    let ids: Vec<_> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
    let (mut most, mut fewest, mut ended, mut written) = (0, 3, Vec::new(), HashMap::<u64, Vec<Sampled>>::new());
    while !scheduler.is_idle() {
        let before = scheduler.stats().running + scheduler.stats().waiting;
        for event in scheduler.step(&|| false).unwrap() {
            let own = written.entry(event.id).or_default();
            own.push(event.result.unwrap());
            if own.len() == 240 {
                ended.push(event.id);
            }
        }
        most = most.max(scheduler.stats().running);
        if before == 3 && scheduler.stats().running > 0 {
            fewest = fewest.min(scheduler.stats().running);
        }
    }
    assert_eq!(most, 3, "all fit at the beginning");
    assert_eq!(fewest, 1, "the first needs all of the memory at its end");
    assert_eq!(ended, ids, "the oldest goes first");
    for (id, job) in ids.iter().zip(&jobs) {
        assert!(written[id] == job.alone(&model));
    }
}

#[test]
fn a_sequence_larger_than_the_memory_limit_fails_alone() {
    let (model, mut scheduler) = limited(2);
    let small = Job::new(tokens(20, 1), greedy(), 9);
    let grows = Job::new(tokens(100, 2), greedy(), 60);
    let large = Job::new(tokens(200, 3), greedy(), 5);
    let ids = [&small, &grows, &large].map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap());
    let mut written = [0; 3];
    let mut errors = Vec::new();
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false).unwrap() {
            let i = ids.iter().position(|id| *id == event.id).unwrap();
            match event.result {
                Ok(_) => written[i] += 1,
                Err(error) => errors.push((i, error)),
            }
        }
    }
    assert_eq!(written, [9, 29, 0], "the growing one fails at the end of its second page");
    let [(1, Error::OutOfMemory { .. }), (2, Error::OutOfMemory { .. })] = errors[..] else { panic!("{errors:?}") };
    assert_same(&model, &[small], &mut scheduler);
}

#[test]
fn drafts_from_a_repeating_sequence_are_accepted_and_change_nothing() {
    let model = load();
    // The bias forces one token, so the sequence repeats itself from its start.
    let forced = greedy().with_logit_bias([(7, 1000.0)]);
    let repeating = Job::new(tokens(20, 1), forced, 60);
    let greedy = Job::new(tokens(40, 1), greedy(), 200);
    for speculation in [Speculation::On, Speculation::Auto] {
        let options = SchedulerOptions::default().with_speculation(speculation);
        let mut scheduler = scheduler(&model, options);
        assert_same(&model, std::slice::from_ref(&repeating), &mut scheduler);
        let stats = scheduler.stats();
        assert!(stats.accepted_tokens > 40, "{stats:?}");
        assert!(stats.steps < 25, "{stats:?}");
        assert_same(&model, std::slice::from_ref(&greedy), &mut scheduler);
        assert_same(&model, &[repeating.clone(), greedy.clone(), repeating.clone()], &mut scheduler);
    }
}

#[test]
fn wrong_drafts_change_nothing_and_pause_speculation() {
    let model = load();
    // Four tokens in random order: there is always a draft, and it is mostly wrong.
    let logit_bias = [3, 14, 15, 92].map(|token| (token, 1000.0)).to_vec();
    let job = Job::new(tokens(10, 1), seeded(1).with_logit_bias(logit_bias).with_temperature(50.0), 200);
    let drafted = |speculation| {
        let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(speculation));
        assert_same(&model, std::slice::from_ref(&job), &mut scheduler);
        let stats = scheduler.stats();
        assert!(stats.accepted_tokens * 2 <= stats.drafted_tokens, "{stats:?}");
        stats.drafted_tokens
    };
    assert_eq!(drafted(Speculation::Off), 0);
    let (on, auto) = (drafted(Speculation::On), drafted(Speculation::Auto));
    assert!(auto > 0 && auto < on / 2, "{auto} of {on}");
}

#[test]
fn a_prompt_with_one_token_left_computes_it_before_any_draft() {
    let model = load();
    // Two alternating tokens, so that there is a draft at once. The second prompt waits for a page of the first and then has
    // one token left, while the first takes the whole prefill budget.
    let long: Vec<u32> = (0..150).map(|i| 3 + 8 * (i % 2)).collect();
    let jobs = [(150, 4), (65, 12)].map(|(len, limit)| Job::new(long[..len].to_vec(), seeded(2), limit));
    for speculation in [Speculation::On, Speculation::Auto] {
        for draft in [None, Some(load())] {
            let options = SchedulerOptions::default().with_speculation(speculation).with_prefill_chunk(1);
            let mut scheduler = Scheduler::new(model.clone(), draft, options).unwrap();
            assert_same(&model, &jobs, &mut scheduler);
        }
    }
}

#[test]
fn a_draft_model_never_changes_the_tokens() {
    let model = load();
    let twin = load();
    let stranger = load_as(&Shape { layers: 1, context: 150, ..ODD }, None);
    let jobs = [
        Job::new(tokens(30, 1), greedy(), 60),
        Job::new(tokens(90, 2), seeded(4), 60),
        Job::new(tokens(140, 3), seeded(5).with_repetition_penalty(1.4), 60),
    ];
    for speculation in [Speculation::On, Speculation::Auto] {
        let options = SchedulerOptions::default().with_speculation(speculation);
        let mut with_twin = Scheduler::new(model.clone(), Some(twin.clone()), options.clone()).unwrap();
        assert_same(&model, &jobs, &mut with_twin);
        let stats = with_twin.stats();
        assert_eq!(
            stats.accepted_tokens, stats.drafted_tokens,
            "the same model with the same random numbers is always right"
        );
        assert!(stats.accepted_tokens > 60, "{stats:?}");
        let mut with_stranger = Scheduler::new(model.clone(), Some(stranger.clone()), options).unwrap();
        assert_same(&model, &jobs, &mut with_stranger);
        let stats = with_stranger.stats();
        assert!(stats.drafted_tokens > 0 && stats.accepted_tokens < stats.drafted_tokens, "{stats:?}");
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_while_others_decode_at_each_step() {
    let model = load();
    let options = SchedulerOptions::default().with_prefill_chunk(16);
    let mut scheduler = scheduler(&model, options);
    for i in 0..3 {
        scheduler.submit(Job::new(tokens(4, i), greedy(), 100).sequence(&model), 100).unwrap();
    }
    while scheduler.step(&|| false).unwrap().len() < 3 {}
    let long = scheduler.submit(Job::new(tokens(400, 9), greedy(), 1).sequence(&model), 1).unwrap();
    let mut steps = 0;
    loop {
        let before = scheduler.stats();
        let events = scheduler.step(&|| false).unwrap();
        assert!(scheduler.stats().prompt_tokens - before.prompt_tokens <= 16);
        assert_eq!(events.iter().filter(|event| event.id != long).count(), 3);
        steps += 1;
        if events.iter().any(|event| event.id == long) {
            break;
        }
    }
    assert_eq!(steps, 400 / 16);
}

#[test]
fn a_short_prompt_does_not_wait_for_the_prefill_of_a_long_one() {
    let model = load();
    let options = SchedulerOptions::default().with_prefill_chunk(32);
    let mut scheduler = scheduler(&model, options);
    let long = scheduler.submit(Job::new(tokens(600, 1), greedy(), 1).sequence(&model), 1).unwrap();
    let short = scheduler.submit(Job::new(tokens(30, 2), greedy(), 1).sequence(&model), 1).unwrap();
    let mut order = Vec::new();
    let mut steps = Vec::new();
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false).unwrap() {
            order.push(event.id);
            steps.push(scheduler.stats().steps);
        }
    }
    assert_eq!(order, [short, long]);
    assert_eq!(steps, [2, (600_usize + 30).div_ceil(32)], "half of each step each, and no row is wasted");
}

#[test]
fn slots_are_given_in_order_and_a_cancelled_one_is_free_at_once() {
    let model = load();
    let options = SchedulerOptions::default().with_max_batch(2);
    let mut scheduler = scheduler(&model, options);
    let mut submit = |i| scheduler.submit(Job::new(tokens(5, i), greedy(), 50).sequence(&model), 50).unwrap();
    let ids = [submit(0), submit(1), submit(2), submit(3)];
    let seen = |scheduler: &mut Scheduler| {
        let mut ids: Vec<u64> = scheduler.step(&|| false).unwrap().iter().map(|event| event.id).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(seen(&mut scheduler), ids[..2]);
    assert_eq!((scheduler.stats().running, scheduler.stats().waiting), (2, 2));
    assert!(scheduler.cancel(ids[0]).is_some());
    assert!(scheduler.cancel(ids[2]).is_some(), "a waiting sequence leaves, too");
    assert!(scheduler.cancel(ids[0]).is_none());
    scheduler.step(&|| false).unwrap();
    assert_eq!((scheduler.stats().running, scheduler.stats().waiting), (2, 0));
    assert!(scheduler.cancel(ids[1]).is_some());
    assert_eq!(seen(&mut scheduler), [ids[3]]);
}

#[test]
fn an_interrupted_step_can_be_repeated() {
    let model = load();
    for speculation in [Speculation::Off, Speculation::On] {
        let draft = (speculation == Speculation::On).then(load);
        let options = SchedulerOptions::default().with_speculation(speculation).with_prefill_chunk(20);
        let mut scheduler = Scheduler::new(model.clone(), draft, options).unwrap();
        let jobs = jobs(6);
        let ids: Vec<_> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
        let written = finish_interrupted(&mut scheduler, |_, _| ());
        for (id, job) in ids.iter().zip(&jobs) {
            assert!(written[id] == job.alone(&model));
        }
    }
}

#[test]
fn a_sequence_whose_options_leave_no_token_fails_alone() {
    let model = load();
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let nothing = greedy().with_logit_bias((0..101).map(|i| (i, f32::NEG_INFINITY)).collect::<Vec<_>>());
    let bad = scheduler.submit(Job::new(tokens(5, 1), nothing, 9).sequence(&model), 9).unwrap();
    let good = scheduler.submit(Job::new(tokens(5, 2), greedy(), 2).sequence(&model), 2).unwrap();
    let mut events = scheduler.step(&|| false).unwrap();
    events.extend(scheduler.step(&|| false).unwrap());
    assert!(events.iter().any(|event| event.id == bad && matches!(event.result, Err(Error::BadLogits))));
    assert_eq!(events.iter().filter(|event| event.id == good && event.result.is_ok()).count(), 2);
    assert!(scheduler.is_idle());
}

#[test]
fn a_sequence_leaves_when_the_context_is_full() {
    let model = load();
    let options = SchedulerOptions::default().with_speculation(Speculation::On);
    let mut scheduler = scheduler(&model, options);
    let forced = greedy().with_logit_bias([(7, 1000.0)]);
    scheduler.submit(Job::new(tokens(680, 1), forced, 0).sequence(&model), 1000).unwrap();
    let written = finish(&mut scheduler);
    assert_eq!(written[&1].len(), 700 - 680 + 1);
}

#[test]
fn invalid_options_and_sequences_are_refused() {
    let (model, other) = (load(), load_as(&Shape { vocabulary: 77, ..ODD }, None));
    let refused = |result: nybble::Result<Scheduler>| matches!(result, Err(Error::InvalidArgument { .. }));
    let options = SchedulerOptions::default();
    assert!(refused(Scheduler::new(model.clone(), None, options.clone().with_max_batch(0))));
    assert!(refused(Scheduler::new(model.clone(), None, options.clone().with_prefill_chunk(0))));
    assert!(refused(Scheduler::new(model.clone(), Some(other.clone()), options.clone())));
    let mut scheduler = scheduler(&model, options);
    let job = Job::new(tokens(5, 1), greedy(), 5);
    let mut refused = |sequence, limit| matches!(scheduler.submit(sequence, limit), Err(Error::InvalidArgument { .. }));
    assert!(refused(job.sequence(&model), 0));
    assert!(refused(Job::new(vec![1], greedy(), 5).sequence(&other), 5));
    assert!(scheduler.step(&|| false).unwrap().is_empty());
}
