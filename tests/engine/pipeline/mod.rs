//! A model in stages computes bit for bit what it computes in one process, whatever happens to the stages.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use crate::jobs::{
    Job, PAGE, assert_cancelled_or_whole, assert_written, finish, greedy, jobs, kinds_of_options, run_and_cancel,
    scheduler, seeded, tokens,
};
use crate::stages::{Fault, Here, pipeline};
use crate::tiny_model::{ODD, Shape, llama};
use nybble::Error;
use nybble::engine::sampler::Sampled;
use nybble::engine::{SchedulerOptions, Sequence, Speculation};
use nybble::model::pipeline::{Cuts, Stage};
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Quantize};
use nybble::quant::block::BlockType;

const DEEP: Shape = Shape { layers: 5, ..ODD };

fn options() -> LoadOptions {
    LoadOptions::default().with_threads(1)
}

/// The golden folders; every eighth where the scalar kernel is the default, which takes ten times as long.
fn goldens() -> impl Iterator<Item = PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 91);
    let is_scalar = nybble::kernels::choose(None).unwrap().name() == "scalar";
    folders.into_iter().step_by(if is_scalar { 8 } else { 1 })
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// Logits of a prompt in pieces, of a fork of it, and of two other prompts in the same steps, after tokens were taken back.
fn all_logits(model: &Model) -> Vec<f32> {
    let vocabulary = model.vocabulary() as u32;
    let ids = |count: usize, seed: u32| -> Vec<u32> {
        (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % vocabulary).collect()
    };
    let (long, other) = (ids(model.context().min(97), 1), ids(model.context().min(31), 2));
    let (mut first, mut second, mut logits) = (model.session(), model.session(), Vec::new());
    let mut step = |inputs: &mut [Input<'_>]| model.forward(inputs, &mut logits, &|| false).unwrap();
    step(&mut [Input::new(&mut first, &long[..33], Logits::All), Input::new(&mut second, &other[..1], Logits::Last)]);
    let mut fork = first.fork();
    step(&mut [Input::new(&mut fork, &long[20..25], Logits::All), Input::new(&mut second, &other[1..7], Logits::None)]);
    let kept = fork.truncate(36);
    step(&mut [Input::new(&mut fork, &long[kept..40], Logits::All), Input::new(&mut first, &long[33..], Logits::Last)]);
    step(&mut [Input::new(&mut second, &other[7..], Logits::All)]);
    logits
}

#[test]
fn every_family_has_the_same_logits_in_one_two_and_three_stages() {
    let mut undivided = Vec::new();
    for folder in goldens() {
        for quantize in [Quantize::Stored, Quantize::Int4] {
            let options = options().with_quantize(quantize);
            let expected = bits(&all_logits(&Model::load(&folder, &options).unwrap()));
            for stages in 1..=3 {
                let (model, here) = pipeline(&folder, &options, stages);
                if here.weight_bytes().len() < stages {
                    undivided.push(folder.file_name().unwrap().to_string_lossy().into_owned());
                }
                let found = bits(&all_logits(&model));
                assert!(found == expected, "{}, {quantize:?}, {stages} stages", folder.display());
                assert_eq!((here.restarts(), here.left()), (0, 0), "{}", folder.display());
            }
        }
    }
    // The output can be a stage of its own, so each family can be divided into three, unless its layers share keys and values.
    assert!(undivided.iter().all(|name| name.starts_with("gemma4")), "{undivided:?}");
}

#[test]
fn every_family_generates_the_same_in_stages_with_many_requests() {
    for folder in goldens() {
        let model = Arc::new(Model::load(&folder, &options()).unwrap());
        if model.context() < 100 {
            continue;
        }
        let vocabulary = model.vocabulary() as u32;
        let jobs: Vec<_> = (0..20u32)
            .map(|i| {
                // Some share a prefix of a page.
                let shared = (0..if i % 3 == 0 { 70 } else { 0 }).map(|t| t * 7 % vocabulary);
                let own = (0..1 + i * 5 % 23).map(|t| (t * 31 + i) % vocabulary);
                let prompt: Vec<u32> = shared.chain(own).collect();
                Job::new(prompt, if i % 2 == 0 { greedy() } else { seeded(u64::from(i)) }, 2 + i as usize % 5)
            })
            .collect();
        let expected: Vec<_> = jobs.iter().map(|job| job.alone(&model)).collect();
        for (stages, speculation) in [(1, Speculation::On), (2, Speculation::Off), (3, Speculation::On)] {
            let (model, here) = pipeline(&folder, &options(), stages);
            let found = run_and_cancel(&model, &jobs, SchedulerOptions::default().with_speculation(speculation));
            assert_cancelled_or_whole(&found, &expected, &format!("{}, {stages} stages", folder.display()));
            assert_eq!((here.restarts(), here.left()), (0, 0), "{}", folder.display());
        }
    }
}

/// A model of several layers, a pipeline of it, and jobs with their tokens alone.
fn deep(stages: usize, cache_type: Option<CacheType>) -> (Arc<Model>, Here, Vec<Job>, Vec<Vec<Sampled>>) {
    // Stages open the file again when they are started again.
    static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pipeline");
        std::fs::create_dir_all(&folder).unwrap();
        llama(&folder, &DEEP, BlockType::Q4_0)
    });
    let path = &*FILE;
    let options = options().with_cache_type(cache_type);
    let whole = Arc::new(Model::load(path, &options).unwrap());
    let jobs = jobs(40);
    let alone = jobs.iter().map(|job| job.alone(&whole)).collect();
    let (model, here) = pipeline(path, &options, stages);
    (model, here, jobs, alone)
}

#[test]
fn batching_and_cancelling_in_stages_never_change_the_tokens() {
    for (cache_type, stages) in [(None, 2), (Some(CacheType::Int8), 4), (None, 6)] {
        let (model, here, jobs, alone) = deep(stages, cache_type);
        for options in kinds_of_options() {
            let what = format!("{stages} stages, {options:?}");
            assert_cancelled_or_whole(&run_and_cancel(&model, &jobs, options), &alone, &what);
        }
        assert_eq!((here.restarts(), here.left()), (0, 0));
    }
}

#[test]
fn no_answer_is_lost_when_stages_end() {
    for stages in 2..=3 {
        let (model, here, jobs, alone) = deep(stages, None);
        for (n, plan) in [3, 20, 21, 50, 90].into_iter().enumerate() {
            here.fault(plan, Fault::Ends(n % stages));
        }
        here.fault(35, Fault::Misses(stages - 1));
        let options = SchedulerOptions::default().with_speculation(Speculation::On);
        assert_cancelled_or_whole(&run_and_cancel(&model, &jobs, options), &alone, "with stages that end");
        // Two of them end in the same step.
        assert!(here.restarts() >= 5, "{} restarts", here.restarts());
        assert_eq!(here.left(), 0);
    }
}

#[test]
fn a_stage_that_always_ends_is_an_error() {
    let (model, here, jobs, alone) = deep(2, None);
    (1..=4).for_each(|plan| here.fault(plan, Fault::Ends(1)));
    let mut failing = scheduler(&model, SchedulerOptions::default());
    failing.submit(jobs[3].sequence(&model), jobs[3].limit).unwrap();
    assert!(matches!(failing.step(&|| false), Err(Error::StageLost(_))));
    assert_eq!(here.restarts(), 3);
    // Another scheduler tries again.
    drop(failing);
    assert_cancelled_or_whole(
        &run_and_cancel(&model, &jobs[..1], SchedulerOptions::default()),
        &alone[..1],
        "afterwards",
    );
}

#[test]
fn sequences_are_computed_again_where_a_stage_has_no_memory() {
    let (model, here, jobs, alone) = deep(3, None);
    for (n, plan) in [4, 9, 10, 40].into_iter().enumerate() {
        here.fault(plan, Fault::LacksMemory(n % 3));
    }
    assert_cancelled_or_whole(&run_and_cancel(&model, &jobs, SchedulerOptions::default()), &alone, "without memory");
    assert_eq!((here.restarts(), here.left()), (0, 0));
}

#[test]
fn a_small_cache_preempts_in_stages_as_in_one_process() {
    let (model, here, jobs, alone) = deep(2, None);
    for pages in [6, 9, 20] {
        let cache_bytes = pages * model.cache_bytes_per_page();
        let options = SchedulerOptions::default().with_cache_bytes(cache_bytes).with_speculation(Speculation::On);
        let mut scheduler = scheduler(&model, options);
        assert_written(&model, &jobs, &alone, &mut scheduler);
        assert!(scheduler.stats().cache_bytes <= cache_bytes);
    }
    assert_eq!((here.restarts(), here.left()), (0, 0));
}

#[test]
fn interrupted_steps_of_stages_continue() {
    let (model, here, jobs, alone) = deep(3, None);
    let mut scheduler = scheduler(&model, SchedulerOptions::default().with_speculation(Speculation::On));
    let ids: Vec<_> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
    let mut written: HashMap<u64, Vec<Sampled>> = HashMap::new();
    while !scheduler.is_idle() {
        // Each step is interrupted once, which these stages never ask about: they have ended by then.
        for event in scheduler.step(&|| true).unwrap() {
            written.entry(event.id).or_default().push(event.result.unwrap());
        }
    }
    for (id, alone) in ids.iter().zip(&alone) {
        assert!(written[id] == *alone);
    }
    assert_eq!(here.left(), 0);
}

#[test]
fn prefixes_and_sessions_are_shared_in_stages() {
    let (model, _, _, _) = deep(2, None);
    let folder = tempfile::tempdir().unwrap();
    let whole = Arc::new(Model::load(llama(folder.path(), &DEEP, BlockType::Q4_0), &options()).unwrap());
    let shared = tokens(2 * PAGE + 30, 1);
    let with = |more: &[u32]| Job::new([&shared[..], more].concat(), seeded(3), 12);
    let jobs = [with(&[5, 6, 7]), with(&[9]), with(&[5, 6, 9])];
    let mut scheduler = scheduler(&model, SchedulerOptions::default());
    for job in &jobs {
        let id = scheduler.submit(job.sequence(&model), job.limit).unwrap();
        assert!(finish(&mut scheduler)[&id] == job.alone(&whole));
    }
    assert!(scheduler.stats().reused_tokens >= 4 * PAGE);
    assert_eq!(scheduler.stats().cached_pages, 2);
}

#[test]
fn a_beam_search_in_stages_finds_the_same() {
    let (model, _, _, _) = deep(3, None);
    let folder = tempfile::tempdir().unwrap();
    let whole = Arc::new(Model::load(llama(folder.path(), &DEEP, BlockType::Q4_0), &options()).unwrap());
    let jobs: Vec<_> = (0..4).map(|i| Job::new(tokens(20 + 50 * i, 3), greedy().with_num_beams(3), 9)).collect();
    let all = |model: &Arc<Model>| {
        let mut scheduler = scheduler(model, SchedulerOptions::default());
        let ids: Vec<_> = jobs.iter().map(|job| scheduler.submit(job.sequence(model), job.limit).unwrap()).collect();
        let mut written = finish(&mut scheduler);
        ids.iter().map(|id| written.remove(id).unwrap()).collect::<Vec<_>>()
    };
    assert!(all(&model) == all(&whole));
}

#[test]
fn a_session_continues_after_its_stages_were_started_again() {
    let (model, here, jobs, alone) = deep(2, None);
    let (job, expected) = (&jobs[7], &alone[7]);
    let mut first = scheduler(&model, SchedulerOptions::default());
    let id = first.submit(job.sequence(&model), 3).unwrap();
    let mut sequence = None;
    while !first.is_idle() {
        for event in first.step(&|| false).unwrap() {
            assert_eq!(event.id, id);
            sequence = event.sequence;
        }
    }
    here.fault(here.plans() + 1, Fault::Ends(1));
    let mut sequence: Sequence = sequence.unwrap();
    let mut written = expected[..3].to_vec();
    let mut second = scheduler(&model, SchedulerOptions::default());
    second.submit(Sequence::new(&model, &[1, 2], greedy()).unwrap(), 2).unwrap();
    finish(&mut second);
    assert_eq!(here.restarts(), 1);
    // Its session is lost, so it is computed again from its tokens.
    second.submit(std::mem::replace(&mut sequence, jobs[0].sequence(&model)), expected.len() - 3).unwrap();
    written.extend(finish(&mut second).into_values().flatten());
    assert!(written == *expected);
}

#[test]
fn each_stage_has_only_its_part_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &DEEP, BlockType::Q4_0);
    let whole = Model::load(&path, &options()).unwrap();
    let (model, here) = pipeline(&path, &options(), 3);
    assert_eq!(model.weight_bytes(), 0);
    assert_eq!(here.weight_bytes().iter().sum::<usize>(), whole.weight_bytes());
    assert!(here.weight_bytes().iter().all(|bytes| *bytes > 0 && *bytes < whole.weight_bytes() / 2));
    assert_eq!(model.cache_bytes_per_page(), whole.cache_bytes_per_page());
    assert_eq!(model.cache_type(), whole.cache_type());
}

#[test]
fn layers_that_share_keys_and_values_stay_in_one_stage() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens/gemma3n");
    let cuts = Cuts::read(&folder, &options()).unwrap();
    // The last two of five layers read the keys and values of earlier ones.
    assert!(!cuts.possible.contains(&4) && cuts.possible.contains(&5), "{:?}", cuts.possible);
    let error = Stage::load(&folder, &options(), 4..6, None).unwrap_err().to_string();
    assert!(error.contains("layer 4") && error.contains("reads the keys and values of layer"), "{error}");
    let error = cuts.divide(9).unwrap_err().to_string();
    assert!(error.contains("stages: found 9, expected 1 to"), "{error}");
    for units in [3..3, 0..9] {
        assert!(Stage::load(&folder, &options(), units, None).unwrap_err().to_string().contains("layers"));
    }
}
