//! Sequences with different adapters in one scheduler: each gets the tokens that it gets alone, from its own pages.

use std::sync::Arc;

use crate::jobs::{Job, PAGE, assert_same, greedy, jobs, load_as, scheduler, seeded, tokens};
use crate::tiny_model::{ODD, adapter};
use nybble::engine::{SchedulerOptions, Speculation};
use nybble::model::{CacheType, Model};

/// Adapters of different ranks, and the base.
const NAMES: [Option<&str>; 4] = [None, Some("a"), Some("b"), Some("c")];

fn load(cache_type: Option<CacheType>) -> Arc<Model> {
    let (model, folder) = (load_as(&ODD, cache_type), tempfile::tempdir().unwrap());
    for (name, rank) in [("a", 4), ("b", 16), ("c", 33)] {
        let path = adapter(&folder.path().join(name), &ODD, rank, rank as u64);
        model.load_adapter(name, path).unwrap();
    }
    model
}

fn with(job: &Job, name: Option<&str>) -> Job {
    Job { adapter: name.map(str::to_owned), ..job.clone() }
}

#[test]
fn batches_of_several_adapters_never_change_a_token() {
    let jobs: Vec<Job> = jobs(48).iter().zip(NAMES.iter().cycle()).map(|(job, name)| with(job, *name)).collect();
    for cache_type in [None, Some(CacheType::Int8)] {
        let model = load(cache_type);
        for (prefill_chunk, speculation, pages) in
            [(None, Speculation::Off, None), (Some(24), Speculation::On, None), (Some(7), Speculation::Auto, Some(14))]
        {
            let cache_bytes = pages.map_or(usize::MAX, |pages: usize| pages * model.cache_bytes_per_page());
            let options = SchedulerOptions::default()
                .with_prefill_chunk(prefill_chunk)
                .with_speculation(speculation)
                .with_cache_bytes(cache_bytes);
            let mut scheduler = scheduler(&model, options);
            // The second time, prompts continue pages of the prefix cache.
            for _ in 0..2 {
                assert_same(&model, &jobs, &mut scheduler);
            }
            assert!(pages.is_some() || scheduler.stats().reused_tokens > 0);
        }
    }
}

#[test]
fn prompts_with_different_adapters_share_no_pages() {
    let model = load(None);
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let job = Job::new(tokens(2 * PAGE + 5, 1), seeded(3), 12);
    for name in NAMES {
        assert_same(&model, &[with(&job, name)], &mut scheduler);
    }
    assert_eq!(scheduler.stats().reused_tokens, 0);
    for (done, name) in NAMES.into_iter().enumerate() {
        assert_same(&model, &[with(&Job { options: greedy(), ..job.clone() }, name)], &mut scheduler);
        assert_eq!(scheduler.stats().reused_tokens, (done + 1) * 2 * PAGE);
    }
}

#[test]
fn a_replaced_adapter_computes_its_prompts_again() {
    let (model, folder) = (load(None), tempfile::tempdir().unwrap());
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    let job = with(&Job::new(tokens(2 * PAGE + 5, 1), greedy(), 12), Some("a"));
    let before = job.alone(&model);
    assert_same(&model, std::slice::from_ref(&job), &mut scheduler);
    model.load_adapter("a", adapter(&folder.path().join("other"), &ODD, 5, 99)).unwrap();
    assert_same(&model, std::slice::from_ref(&job), &mut scheduler);
    assert_eq!(scheduler.stats().reused_tokens, 0);
    assert!(job.alone(&model) != before);
}
