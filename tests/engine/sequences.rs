//! Sequences and sessions: a scheduler continues them where they were left, and hands them back.

use crate::jobs::{Job, PAGE, finish, greedy, limited, load, scheduler, seeded, tokens};
use nybble::Error;
use nybble::engine::sampler::{Sampled, SamplingOptions};
use nybble::engine::{SchedulerOptions, Sequence, Speculation, step};
use nybble::model::{Input, Logits, Session};

#[test]
fn a_sequence_continues_in_a_scheduler_where_it_was_left() {
    let model = load();
    for (len, before) in [(5, 1), (PAGE - 1, 2), (3 * PAGE, 40)] {
        let job = Job::new(tokens(len, 1), seeded(7), before + 70);
        let alone = job.alone(&model);
        for speculation in [Speculation::Off, Speculation::On] {
            let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(speculation));
            // A second sequence on the same prompt shares the pages that the first one brings along.
            let other = scheduler.submit(job.sequence(&model), job.limit).unwrap();
            let mut sequence = job.sequence(&model);
            let mut written: Vec<Sampled> =
                (0..before).map(|_| step(&model, &mut [&mut sequence], &|| false).unwrap().remove(0)).collect();
            let id = scheduler.submit(sequence, 70).unwrap();
            let mut rest = finish(&mut scheduler);
            written.append(rest.get_mut(&id).unwrap());
            assert!(written == alone, "{len} tokens, {speculation:?}");
            assert!(rest[&other] == alone, "{len} tokens, {speculation:?}");
        }
    }
}

#[test]
fn a_session_continues_in_a_scheduler_without_computing_its_tokens() {
    let model = load();
    let all = tokens(2 * PAGE + 9, 5);
    let alone = Job::new(all.clone(), seeded(3), 30).alone(&model);
    let mut session = model.session();
    let input = Input::new(&mut session, &all, Logits::None);
    model.forward(&mut [input], &mut Vec::new(), &|| false).unwrap();
    for prefix_cache in [true, false] {
        let mut scheduler = scheduler(&model, SchedulerOptions::default().with_prefix_cache(prefix_cache));
        let sequence = Sequence::resume(&model, session.fork(), &all, seeded(3)).unwrap();
        let id = scheduler.submit(sequence, 30).unwrap();
        let mut written = Vec::new();
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                assert_eq!((event.id, event.reused), (id, all.len() - 1));
                written.push(event.result.unwrap());
            }
        }
        assert!(written == alone, "prefix cache: {prefix_cache}");
        assert_eq!(scheduler.stats().prompt_tokens, 1, "the last token is computed again for its logits");
    }
}

#[test]
fn a_scheduler_hands_back_the_session_of_a_sequence_that_leaves() {
    let model = load();
    let job = Job::new(tokens(PAGE + 3, 2), seeded(9), 20);
    let alone = job.alone(&model);
    let whole = |count: usize| [&job.prompt[..], &alone[..count].iter().map(|s| s.token).collect::<Vec<_>>()].concat();
    let continues = |session: Session, count: usize| {
        assert_eq!(session.len(), job.prompt.len() + count - 1, "the last token was sampled only");
        let options = SamplingOptions::greedy();
        let mut resumed = Sequence::resume(&model, session, &whole(count), options.clone()).unwrap();
        let mut new = Sequence::new(&model, &whole(count), options).unwrap();
        for _ in 0..5 {
            let next = step(&model, &mut [&mut resumed, &mut new], &|| false).unwrap();
            assert!(next[0] == next[1], "after {count} tokens");
        }
    };
    for speculation in [Speculation::Off, Speculation::On] {
        let options = SchedulerOptions::default().with_speculation(speculation);
        let mut scheduler = scheduler(&model, options);
        // At its limit.
        scheduler.submit(job.sequence(&model), job.limit).unwrap();
        let mut last = None;
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                assert!(last.is_none(), "only the last event brings the sequence");
                last = event.sequence;
            }
        }
        continues(last.unwrap().into_session(), job.limit);
        // In the middle: a copy, then the sequence itself.
        let id = scheduler.submit(job.sequence(&model), job.limit).unwrap();
        let mut count = 0;
        while count < 5 {
            count += scheduler.step(&|| false).unwrap().len();
        }
        continues(scheduler.sequence(id).unwrap().session().fork(), count);
        continues(scheduler.cancel(id).unwrap().into_session(), count);
        assert!(scheduler.sequence(id).is_none());
    }
}

#[test]
fn a_sequence_that_fails_is_handed_back_with_what_it_has_computed() {
    let (model, mut scheduler) = limited(2);
    let job = Job::new(tokens(100, 2), greedy(), 60);
    scheduler.submit(job.sequence(&model), job.limit).unwrap();
    let mut failed = None;
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false).unwrap() {
            match event.result {
                Ok(_) => assert!(event.sequence.is_none()),
                Err(error) => failed = Some((error, event.sequence.unwrap())),
            }
        }
    }
    let Some((Error::OutOfMemory { .. }, mut sequence)) = failed else { panic!("{failed:?}") };
    assert_eq!(sequence.session().len(), 2 * PAGE);
    let next = step(&model, &mut [&mut sequence], &|| false).unwrap().remove(0);
    assert!(next == job.alone(&model)[29], "it continues outside the limit");
}
