//! Sequences for the tests of the scheduler, and what each gives alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::tiny_model::{ODD, Shape, llama};
use nybble::Error;
use nybble::engine::sampler::{Sampled, SamplingOptions};
use nybble::engine::{Scheduler, SchedulerOptions, Sequence, Speculation, step};
use nybble::model::{CacheType, LoadOptions, Model};
use nybble::quant::block::BlockType;

pub(crate) const PAGE: usize = 64;

pub(crate) fn load_as(shape: &Shape, cache_type: Option<CacheType>) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let options = LoadOptions::default().with_threads(2).with_cache_type(cache_type);
    Arc::new(Model::load(llama(folder.path(), shape, BlockType::Q4_0), &options).unwrap())
}

pub(crate) fn load() -> Arc<Model> {
    load_as(&ODD, None)
}

pub(crate) fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % 101).collect()
}

pub(crate) fn greedy() -> SamplingOptions {
    SamplingOptions::greedy()
}

pub(crate) fn seeded(seed: u64) -> SamplingOptions {
    SamplingOptions::default().with_seed(seed).with_temperature(1.2).with_logprobs(2)
}

/// A prompt, options, and the number of tokens to sample.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    pub(crate) options: SamplingOptions,
    pub(crate) limit: usize,
    /// The name of the adapter, if any.
    pub(crate) adapter: Option<String>,
}

impl Job {
    pub(crate) fn new(prompt: Vec<u32>, options: SamplingOptions, limit: usize) -> Job {
        Job { prompt, options, limit, adapter: None }
    }

    pub(crate) fn sequence(&self, model: &Model) -> Sequence {
        // Tiny models with a vocabulary would end after a few tokens.
        let session = match &self.adapter {
            Some(name) => model.session_with_adapter(name).unwrap(),
            None => model.session(),
        };
        Sequence::resume(model, session, &self.prompt, self.options.clone()).unwrap().with_ends(Vec::new())
    }

    /// Its tokens without a scheduler.
    pub(crate) fn alone(&self, model: &Model) -> Vec<Sampled> {
        let mut sequence = self.sequence(model);
        (0..self.limit).map(|_| step(model, &mut [&mut sequence], &|| false).unwrap().remove(0)).collect()
    }
}

/// Jobs of many lengths; every third is greedy, some have penalties.
pub(crate) fn jobs(count: usize) -> Vec<Job> {
    let job = |i: usize| {
        let prompt = tokens(1 + i * 37 % 211, (i % 7) as u32);
        let options = match i % 3 {
            0 => greedy(),
            1 => seeded(i as u64),
            _ => seeded(i as u64).with_repetition_penalty(1.3).with_frequency_penalty(0.2),
        };
        Job::new(prompt, options, 1 + i * 11 % 43)
    };
    (0..count).map(job).collect()
}

pub(crate) fn scheduler(model: &Arc<Model>, options: SchedulerOptions) -> Scheduler {
    Scheduler::new(model.clone(), None, options).unwrap()
}

/// The model, and a scheduler whose memory limit is that many pages.
pub(crate) fn limited(pages: usize) -> (Arc<Model>, Scheduler) {
    let model = load();
    let cache_bytes = pages * model.cache_bytes_per_page();
    let scheduler = scheduler(&model, SchedulerOptions::default().with_cache_bytes(cache_bytes));
    (model, scheduler)
}

/// Steps until all sequences have left. Returns the tokens of each.
pub(crate) fn finish(scheduler: &mut Scheduler) -> HashMap<u64, Vec<Sampled>> {
    let mut written: HashMap<u64, Vec<Sampled>> = HashMap::new();
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false).unwrap() {
            written.entry(event.id).or_default().push(event.result.unwrap());
        }
    }
    written
}

/// Steps until all sequences have left, and interrupts most steps, each a little later. `after_step` sees what has been
/// written. Returns the tokens of each sequence.
pub(crate) fn finish_interrupted(
    scheduler: &mut Scheduler,
    mut after_step: impl FnMut(&mut Scheduler, &HashMap<u64, Vec<Sampled>>),
) -> HashMap<u64, Vec<Sampled>> {
    let mut written: HashMap<u64, Vec<Sampled>> = HashMap::new();
    let mut interruptions = 0;
    for after in (0..7).cycle() {
        if scheduler.is_idle() {
            break;
        }
        let asked = AtomicUsize::new(0);
        match scheduler.step(&|| after > 0 && asked.fetch_add(1, Ordering::Relaxed) == after - 1) {
            Ok(events) => {
                events.into_iter().for_each(|e| written.entry(e.id).or_default().push(e.result.unwrap()));
                after_step(scheduler, &written);
            }
            Err(Error::Interrupted) => interruptions += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(interruptions > 10);
    written
}

/// Options of schedulers that differ in what a step computes.
pub(crate) fn kinds_of_options() -> [SchedulerOptions; 3] {
    [(None, Speculation::Off, true), (Some(24), Speculation::On, true), (Some(7), Speculation::Auto, false)].map(
        |(prefill_chunk, speculation, prefix_cache)| {
            let options = SchedulerOptions::default().with_prefill_chunk(prefill_chunk);
            options.with_speculation(speculation).with_prefix_cache(prefix_cache)
        },
    )
}

/// Submits a few jobs at each step, cancels every fifth halfway, and returns the tokens of each.
pub(crate) fn run_and_cancel(model: &Arc<Model>, jobs: &[Job], options: SchedulerOptions) -> Vec<Vec<Sampled>> {
    let mut scheduler = scheduler(model, options);
    let mut ids = HashMap::new();
    let mut left = jobs.iter().enumerate();
    let mut written: Vec<Vec<Sampled>> = vec![Vec::new(); jobs.len()];
    loop {
        for (i, job) in left.by_ref().take(5) {
            ids.insert(scheduler.submit(job.sequence(model), job.limit).unwrap(), i);
        }
        if scheduler.is_idle() {
            return written;
        }
        for event in scheduler.step(&|| false).unwrap() {
            let i = ids[&event.id];
            written[i].push(event.result.unwrap());
            if i % 5 == 4 && written[i].len() > jobs[i].limit / 2 {
                scheduler.cancel(event.id);
            }
        }
    }
}

/// Checks that every job of [`run_and_cancel`] has its tokens in `expected`, and those that were cancelled the first of them.
pub(crate) fn assert_cancelled_or_whole(found: &[Vec<Sampled>], expected: &[Vec<Sampled>], what: &str) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_whole = found.len() == expected.len();
        assert!(is_whole || i % 5 == 4, "job {i} ended early, {what}");
        assert!(*found == expected[..found.len()], "job {i}, {what}");
    }
}

/// Runs all jobs together and checks that each gets the tokens that it gets alone.
pub(crate) fn assert_same(model: &Arc<Model>, jobs: &[Job], scheduler: &mut Scheduler) {
    let alone: Vec<_> = jobs.iter().map(|job| job.alone(model)).collect();
    assert_written(model, jobs, &alone, scheduler);
}

/// Runs all jobs together and checks that each gets its tokens in `expected`.
pub(crate) fn assert_written(model: &Arc<Model>, jobs: &[Job], expected: &[Vec<Sampled>], scheduler: &mut Scheduler) {
    let submit = |job: &Job| scheduler.submit(job.sequence(model), job.limit).unwrap();
    let ids: Vec<u64> = jobs.iter().map(submit).collect();
    let written = finish(scheduler);
    for (i, (id, expected)) in ids.iter().zip(expected).enumerate() {
        assert!(written[id] == *expected, "job {i}");
    }
}
