//! The prefix cache on disk: the same tokens with and without it, from whatever is in its folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::jobs::{Job, PAGE, assert_same, assert_written, finish_interrupted, greedy, jobs, seeded, tokens};
use crate::tiny_model::{ODD, Random, Shape, adapter, llama, metadata, tensors, write};
use nybble::engine::sampler::Sampled;
use nybble::engine::{Scheduler, SchedulerOptions, Speculation, Stats};
use nybble::model::{CacheType, LoadOptions, Model};
use nybble::quant::block::BlockType;
use nybble::{Error, kernels};
use tempfile::TempDir;

mod trust;

/// Longer than writing takes: the tests wait for the end of it.
const LONG: Duration = Duration::from_secs(600);
/// A shape whose files are small enough to change every byte.
const SMALL: Shape = Shape { hidden: 32, heads: 2, kv_heads: 1, head_dim: 4, ffn: 32, layers: 1, ..ODD };

/// A model in a file, which can be loaded again, and an empty folder for the cache.
struct Place {
    _folder: TempDir,
    file: PathBuf,
    cache: PathBuf,
}

impl Place {
    fn new(shape: &Shape) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let (file, cache) = (llama(folder.path(), shape, BlockType::Q4_0), folder.path().join("cache"));
        Place { _folder: folder, file, cache }
    }

    fn load(&self) -> Arc<Model> {
        load(&self.file, LoadOptions::default().with_threads(2))
    }

    fn options(&self) -> SchedulerOptions {
        SchedulerOptions::default().with_cache_dir(self.cache.clone())
    }

    /// The pages on disk, in the order of their names.
    fn files(&self) -> Vec<PathBuf> {
        let folders = self.cache.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let files = folders.flat_map(|folder| folder.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        files
    }
}

fn load(file: &Path, options: LoadOptions) -> Arc<Model> {
    Arc::new(Model::load(file, &options).unwrap())
}

/// A scheduler that waits for a slow disk.
fn scheduler(model: &Arc<Model>, options: SchedulerOptions) -> Scheduler {
    let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
    scheduler.set_disk_patience(LONG);
    scheduler
}

/// Runs jobs over a new scheduler, which ends after it has written its cache. Returns its counts and reports.
fn run(model: &Arc<Model>, jobs: &[Job], expected: &[Vec<Sampled>], options: SchedulerOptions) -> (Stats, Vec<String>) {
    let mut scheduler = scheduler(model, options);
    assert_written(model, jobs, expected, &mut scheduler);
    scheduler.save_prefixes(LONG);
    (scheduler.stats(), scheduler.take_reports())
}

fn alone(model: &Model, jobs: &[Job]) -> Vec<Vec<Sampled>> {
    jobs.iter().map(|job| job.alone(model)).collect()
}

/// Runs a job, then runs it again after a restart with other threads and another kernel. The prompt's whole pages are read.
fn assert_restored(file: &Path, options: &LoadOptions, length: usize, vocabulary: u32) {
    let name = format!("{} {:?}", file.display(), options.cache_type);
    let folder = tempfile::tempdir().unwrap();
    let model = load(file, options.clone().with_threads(2));
    let length = length.min(model.context() - 8);
    let prompt = tokens(length, 1).into_iter().map(|token| token % vocabulary).collect();
    let jobs = [Job::new(prompt, greedy(), 6)];
    let expected = alone(&model, &jobs);
    let disk = SchedulerOptions::default().with_cache_dir(folder.path().join("cache"));
    let (stats, reports) = run(&model, &jobs, &expected, disk.clone());
    assert_eq!((stats.restored_tokens, stats.disk_cache_errors, &reports), (0, 0, &Vec::new()), "{name}");
    drop(model);
    // The last token is computed in any case.
    let whole = length / PAGE * PAGE;
    let (reused, hits) = (whole.min(length - 1), usize::from(whole > 0));
    for (i, kernel) in kernels::available().iter().enumerate() {
        let options = options.clone().with_threads(1 + i % 3).with_kernel(kernel.name().to_owned());
        let (stats, reports) = run(&load(file, options), &jobs, &expected, disk.clone());
        assert_eq!((stats.disk_cache_errors, &reports), (0, &Vec::new()), "{name}");
        assert_eq!((stats.restored_tokens, stats.reused_tokens), (whole, reused), "{name} on {}", kernel.name());
        assert_eq!(
            (stats.prompt_tokens, stats.disk_cache_hits),
            (length - reused, hits),
            "{name} on {}",
            kernel.name()
        );
    }
}

#[test]
fn after_a_restart_every_family_reads_its_prefix() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut files: Vec<PathBuf> = ["goldens", "gguf"]
        .iter()
        .flat_map(|folder| data.join(folder).read_dir().unwrap().map(|entry| entry.unwrap().path()))
        .collect();
    files.sort();
    assert!(files.len() > 140);
    for (i, file) in files.iter().enumerate() {
        // Each family with one type of cache, relatives with others.
        let cache_type = [None, Some(CacheType::F16), Some(CacheType::Int8), Some(CacheType::F32)][i % 4];
        assert_restored(file, &LoadOptions::default().with_cache_type(cache_type), 3 * PAGE + 20, 90);
    }
}

#[test]
fn every_cache_type_and_window_is_read_as_it_was_computed() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape { layers: 6, context: 1500, ..ODD };
    let windowed = |key: &str, length: u32| {
        let mut metadata = metadata(&shape);
        metadata.set(key, length).set("llama.attention.sliding_window_pattern", shape.layers as u32);
        write(&folder.path().join(format!("{key}.gguf")), &metadata, &tensors(&shape), BlockType::Q4_0)
    };
    let files = [
        llama(folder.path(), &shape, BlockType::Q4_0),
        windowed("llama.attention.sliding_window", 100),
        windowed("llama.attention.chunk_length", 192),
    ];
    for file in files {
        for cache_type in [CacheType::F32, CacheType::F16, CacheType::Int8] {
            for length in [PAGE, PAGE + 1, 20 * PAGE, 20 * PAGE + 1] {
                assert_restored(&file, &LoadOptions::default().with_cache_type(cache_type), length, 101);
            }
        }
    }
}

#[test]
fn batches_with_a_cache_on_disk_have_the_same_tokens() {
    let place = Place::new(&ODD);
    let (model, jobs) = (place.load(), jobs(40));
    let expected = alone(&model, &jobs);
    let mut restored = 0;
    for (speculation, chunk, pages) in [
        (Speculation::Off, None, None),
        (Speculation::On, Some(24), None),
        (Speculation::Auto, Some(7), Some(14)),
        (Speculation::Off, Some(50), Some(8)),
    ] {
        let bytes = pages.map_or(usize::MAX, |pages: usize| pages * model.cache_bytes_per_page());
        let options = place.options().with_speculation(speculation).with_prefill_chunk(chunk).with_cache_bytes(bytes);
        let (stats, reports) = run(&place.load(), &jobs, &expected, options);
        assert_eq!((stats.disk_cache_errors, reports), (0, Vec::new()));
        assert_eq!(stats.running + stats.waiting, 0);
        restored += stats.restored_tokens;
    }
    assert!(restored > 0);
}

#[test]
fn interrupted_steps_and_cancelled_requests_lose_nothing() {
    let place = Place::new(&ODD);
    let (model, jobs) = (place.load(), jobs(24));
    let expected = alone(&model, &jobs);
    run(&model, &jobs, &expected, place.options());
    let mut scheduler = scheduler(&model, place.options());
    let ids: Vec<u64> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
    // Jobs that are cancelled before, and while their pages are read.
    let others: Vec<u64> = (0..6)
        .map(|seed| scheduler.submit(Job::new(tokens(300, seed), greedy(), 5).sequence(&model), 5).unwrap())
        .collect();
    scheduler.cancel(others[0]);
    let mut steps = 0;
    let written = finish_interrupted(&mut scheduler, |scheduler, _| {
        steps += 1;
        others.get(steps).map(|id| scheduler.cancel(*id));
    });
    for (id, expected) in ids.iter().zip(&expected) {
        assert!(written[id] == *expected);
    }
    assert!(scheduler.stats().restored_tokens > 0);
    // Pages that nobody waits for any more.
    scheduler.submit(jobs[20].sequence(&model), 1).unwrap();
    let _ = scheduler.step(&|| true);
    drop(scheduler);
}

#[test]
fn pages_are_written_when_shared_or_long_and_all_at_the_end() {
    let place = Place::new(&Shape { context: 1500, ..ODD });
    let model = place.load();
    let mut scheduler = scheduler(&model, place.options());
    let count = |scheduler: &mut Scheduler, job: &Job| {
        assert_same(&model, std::slice::from_ref(job), scheduler);
        scheduler.flush_disk_cache(LONG);
        place.files().len()
    };
    let short = |last: u32| Job::new([tokens(2 * PAGE + 9, 1), vec![last]].concat(), greedy(), 3);
    assert_eq!(count(&mut scheduler, &short(1)), 0);
    assert_eq!(count(&mut scheduler, &short(2)), 2);
    assert_eq!(count(&mut scheduler, &short(3)), 2);
    assert_eq!(count(&mut scheduler, &Job::new(tokens(16 * PAGE - 1, 2), greedy(), 2)), 2 + 16);
    assert_eq!(count(&mut scheduler, &Job::new(tokens(PAGE + 1, 3), greedy(), 2)), 2 + 16);
    scheduler.save_prefixes(LONG);
    assert_eq!(place.files().len(), 2 + 16 + 1);
    // Every page once: the same work writes nothing.
    let inodes = |files: Vec<PathBuf>| files.iter().map(|file| inode(file)).collect::<Vec<_>>();
    let before = inodes(place.files());
    assert_same(&model, &[short(4), short(5)], &mut scheduler);
    scheduler.save_prefixes(LONG);
    assert_eq!(inodes(place.files()), before);
}

fn inode(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap().ino()
}

#[test]
fn requests_without_pages_do_not_wait_for_the_disk() {
    let place = Place::new(&ODD);
    let model = place.load();
    let stored = |seed, limit| Job::new(tokens(4 * PAGE + 1, seed), greedy(), limit);
    let first = [stored(1, 3), stored(2, 3)];
    run(&model, &first, &alone(&model, &first), place.options());
    let jobs =
        [stored(1, 40), stored(2, 40), Job::new(tokens(9, 3), greedy(), 2), Job::new(tokens(70, 4), greedy(), 2)];
    let expected = alone(&model, &jobs);
    for max_batch in [1, 2, 4] {
        let mut scheduler = scheduler(&model, place.options().with_max_batch(max_batch));
        scheduler.hold_disk_reader(true);
        let ids: Vec<u64> = jobs.iter().map(|job| scheduler.submit(job.sequence(&model), job.limit).unwrap()).collect();
        let mut written: Vec<Vec<Sampled>> = vec![Vec::new(); jobs.len()];
        let mut ended = Vec::new();
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                let at = ids.iter().position(|id| *id == event.id).unwrap();
                written[at].push(event.result.unwrap());
                if event.sequence.is_some() {
                    ended.push(at);
                }
            }
            // The disk answers once those two have ended.
            scheduler.hold_disk_reader(ended.len() < 2);
        }
        assert_eq!(written, expected, "{max_batch}");
        assert_eq!(ended[..2], [2, 3], "{max_batch}");
    }
}

#[test]
fn pages_of_a_disk_that_does_not_answer_are_computed() {
    let place = Place::new(&SMALL);
    let (model, jobs) = (place.load(), [Job::new(tokens(4 * PAGE + 1, 1), greedy(), 2)]);
    let expected = alone(&model, &jobs);
    run(&model, &jobs, &expected, place.options());
    let mut scheduler = scheduler(&model, place.options());
    scheduler.set_disk_patience(Duration::from_millis(100));
    scheduler.hold_disk_reader(true);
    // A step that is interrupted meanwhile says so.
    scheduler.submit(jobs[0].sequence(&model), 1).unwrap();
    assert!(matches!(scheduler.step(&|| true), Err(Error::Interrupted)));
    assert_written(&model, &jobs, &expected, &mut scheduler);
    let reports = scheduler.take_reports();
    assert_eq!((scheduler.stats().restored_tokens, scheduler.stats().disk_cache_errors), (0, 1));
    assert!(reports.len() == 1 && reports[0].contains("reading takes longer than computing"), "{reports:?}");
}

#[test]
fn a_folder_that_cannot_be_made_is_reported_and_nothing_else() {
    let place = Place::new(&SMALL);
    let (model, jobs) = (place.load(), [Job::new(tokens(PAGE + 1, 1), greedy(), 2)]);
    let expected = alone(&model, &jobs);
    fs::write(&place.cache, "a file").unwrap();
    let error = Scheduler::new(model.clone(), None, place.options()).unwrap_err();
    assert!(error.to_string().contains("expected a folder"), "{error}");
    let inside = SchedulerOptions::default().with_cache_dir(place.cache.join("inside"));
    let (stats, reports) = run(&model, &jobs, &expected, inside);
    assert_eq!((stats.disk_cache_bytes, reports.len()), (0, 1));
    assert!(reports[0].contains("inside") && reports[0].contains("is not kept on disk"), "{reports:?}");
    let error = Scheduler::new(model, None, place.options().with_prefix_cache(false)).unwrap_err();
    assert!(error.to_string().contains("prefix_cache"), "{error}");
}

/// A page on disk, its bytes, and the job that reads it.
struct OnePage {
    place: Place,
    model: Arc<Model>,
    jobs: [Job; 1],
    expected: Vec<Vec<Sampled>>,
    file: PathBuf,
    bytes: Vec<u8>,
}

impl OnePage {
    fn new() -> OnePage {
        let place = Place::new(&SMALL);
        let (model, jobs) = (place.load(), [Job::new(tokens(PAGE + 1, 1), greedy(), 2)]);
        let expected = alone(&model, &jobs);
        run(&model, &jobs, &expected, place.options());
        let [file] = place.files().try_into().unwrap();
        let bytes = fs::read(&file).unwrap();
        OnePage { place, model, jobs, expected, file, bytes }
    }

    /// Runs the job, which computes the same tokens. Returns the counts and the reports.
    fn run(&self) -> (Stats, Vec<String>) {
        let mut scheduler = scheduler(&self.model, self.place.options());
        assert_written(&self.model, &self.jobs, &self.expected, &mut scheduler);
        (scheduler.stats(), scheduler.take_reports())
    }

    /// Runs the job over a damaged file, which is removed, or left alone if it is `foreign`.
    fn assert_ignored(&self, bytes: &[u8], foreign: bool) {
        fs::write(&self.file, bytes).unwrap();
        let (stats, reports) = self.run();
        assert_eq!((stats.restored_tokens, stats.disk_cache_errors, reports.len()), (0, 1, 1), "{reports:?}");
        assert!(reports[0].contains(self.file.to_str().unwrap()), "{reports:?}");
        assert_eq!(self.file.exists(), foreign, "{reports:?}");
        if foreign {
            assert_eq!(fs::read(&self.file).unwrap(), bytes);
        }
    }
}

#[test]
fn a_page_with_any_byte_changed_is_never_used() {
    let one = OnePage::new();
    assert_eq!(one.run().0.restored_tokens, PAGE);
    for at in 0..one.bytes.len() {
        let mut bytes = one.bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        // Without the magic or the version, nobody knows whose file it is.
        one.assert_ignored(&bytes, at < 12);
    }
    for length in (0..one.bytes.len()).step_by(7).chain([383, 384, 385, one.bytes.len() - 1]) {
        one.assert_ignored(&one.bytes[..length], false);
    }
    one.assert_ignored(&[&one.bytes[..], &[0]].concat(), false);
    let mut random = Random(7);
    for round in 0..1000 {
        let mut bytes = one.bytes.clone();
        // Numbers of the header, with a correct hash.
        for _ in 0..1 + round % 3 {
            let at = 12 + ((random.next() + 1.0) * 185.0) as usize;
            bytes[at] = bytes[at].wrapping_add(1 + (random.next().abs() * 254.0) as u8);
        }
        let content = bytes.len() - 32;
        let hash = blake3::hash(&bytes[..content]);
        bytes[content..].copy_from_slice(hash.as_bytes());
        if bytes[..content] != one.bytes[..content] {
            one.assert_ignored(&bytes, false);
        }
    }
    fs::write(&one.file, &one.bytes).unwrap();
    assert_eq!(one.run().0.restored_tokens, PAGE);
}

#[test]
fn files_of_others_are_neither_read_nor_removed_nor_replaced() {
    let one = OnePage::new();
    one.assert_ignored(b"a letter to somebody", true);
    // A newer version.
    let mut newer = one.bytes.clone();
    newer[8..12].copy_from_slice(&600u32.to_le_bytes());
    one.assert_ignored(&newer, true);
    // A session in the place of a page.
    let mut session = one.model.session();
    let text = &one.jobs[0].prompt[..PAGE];
    let input = nybble::model::Input::new(&mut session, text, nybble::model::Logits::Last);
    one.model.forward(&mut [input], &mut Vec::new(), &|| false).unwrap();
    let saved = one.place.cache.with_file_name("session");
    session.save(&one.model, text, &saved).unwrap();
    one.assert_ignored(&fs::read(&saved).unwrap(), true);
    // And a page in the place of a session.
    fs::write(&saved, &one.bytes).unwrap();
    let error = nybble::model::Session::load(&one.model, &saved).unwrap_err();
    assert!(error.to_string().contains("\"version\": found 514"), "{error}");
    // A link to a page, a folder, and names that are not those of pages.
    let target = one.place.cache.with_file_name("target");
    fs::write(&target, &one.bytes).unwrap();
    fs::remove_file(&one.file).unwrap();
    std::os::unix::fs::symlink(&target, &one.file).unwrap();
    let other = one.file.with_file_name("notes.txt");
    fs::write(&other, "notes").unwrap();
    fs::create_dir(one.place.cache.join("nybble-photos")).unwrap();
    let (stats, _) = run(&one.model, &one.jobs, &one.expected, one.place.options().with_cache_dir_bytes(1));
    assert_eq!(stats.restored_tokens, 0);
    assert!(one.file.is_symlink() && other.exists() && one.place.cache.join("nybble-photos").is_dir());
    assert_eq!(fs::read(&target).unwrap(), one.bytes);
    fs::remove_file(&one.file).unwrap();
    fs::create_dir(&one.file).unwrap();
    let (stats, _) = run(&one.model, &one.jobs, &one.expected, one.place.options());
    assert_eq!(stats.restored_tokens, 0);
    assert!(one.file.is_dir());
}

#[test]
fn a_page_of_another_prefix_or_model_is_not_used_under_a_new_name() {
    let place = Place::new(&SMALL);
    let model = place.load();
    let job = |seed| [Job::new(tokens(2 * PAGE + 1, seed), greedy(), 2)];
    for seed in [1, 2] {
        run(&model, &job(seed), &alone(&model, &job(seed)), place.options());
    }
    let files = place.files();
    assert_eq!(files.len(), 4);
    for (from, to) in [(0, 1), (2, 3), (0, 2)] {
        let bytes = fs::read(&files[to]).unwrap();
        fs::copy(&files[from], &files[to]).unwrap();
        let mut errors = 0;
        for seed in [1, 2] {
            errors += run(&model, &job(seed), &alone(&model, &job(seed)), place.options()).0.disk_cache_errors;
        }
        assert_eq!(errors, 1);
        // It was computed and written again.
        assert_eq!(fs::read(&files[to]).unwrap(), bytes);
    }
    // A model with other weights shares the folder, and nothing in it.
    let other = Place::new(&Shape { ffn: 64, ..SMALL });
    let other = load(&other.file, LoadOptions::default());
    for cache_type in [CacheType::F32, CacheType::Int8] {
        let model = load(&place.file, LoadOptions::default().with_cache_type(cache_type));
        assert_eq!(run(&model, &job(1), &alone(&model, &job(1)), place.options()).0.restored_tokens, 0);
    }
    assert_eq!(run(&other, &job(1), &alone(&other, &job(1)), place.options()).0.restored_tokens, 0);
    assert_eq!(place.cache.read_dir().unwrap().count(), 4);
    // Also where its pages have the same shape and are moved to the folder of the model.
    let folder = files[0].parent().unwrap().to_path_buf();
    for entry in place.cache.read_dir().unwrap().map(|entry| entry.unwrap().path()).filter(|path| *path != folder) {
        for file in entry.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
    }
    assert_eq!(run(&model, &job(1), &alone(&model, &job(1)), place.options()).0.restored_tokens, 2 * PAGE);
}

#[test]
fn an_adapter_reads_only_pages_of_the_same_weights() {
    let place = Place::new(&ODD);
    let folder = tempfile::tempdir().unwrap();
    let path = |rank: usize| adapter(&folder.path().join(rank.to_string()), &ODD, rank, rank as u64);
    let (four, five) = (path(4), path(5));
    let with = |names: &[(&str, &Path)]| {
        let model = place.load();
        names.iter().for_each(|(name, path)| drop(model.load_adapter(name, path).unwrap()));
        model
    };
    let job = |name: Option<&str>| {
        let job = Job::new(tokens(2 * PAGE + 5, 1), seeded(3), 8);
        [Job { adapter: name.map(str::to_owned), ..job }]
    };
    let restored = |model: &Arc<Model>, name| {
        run(model, &job(name), &alone(model, &job(name)), place.options()).0.restored_tokens / PAGE
    };
    let model = with(&[("a", &four), ("b", &five)]);
    assert_eq!([Some("a"), Some("b"), None].map(|name| restored(&model, name)), [0, 0, 0]);
    // Other names and ids, another order.
    let model = with(&[("x", &five), ("y", &four), ("z", &path(6))]);
    assert_eq!([None, Some("x"), Some("y"), Some("z")].map(|name| restored(&model, name)), [2, 2, 2, 0]);
    // The name of one with the weights of another.
    let model = with(&[("a", &path(7))]);
    assert_eq!(restored(&model, Some("a")), 0);
    let model = with(&[("z", &four)]);
    assert_eq!(restored(&model, Some("z")), 2);
    assert_eq!(place.files().len(), 5 * 2);
}

#[test]
fn the_folder_stays_within_its_limit_and_keeps_what_was_used_last() {
    let place = Place::new(&SMALL);
    let model = place.load();
    let one = OnePage::new().bytes.len() as u64;
    let limit = 12 * one + one / 2;
    let options = || place.options().with_cache_dir_bytes(limit);
    let job = |seed| [Job::new(tokens(3 * PAGE + 1, seed), greedy(), 1)];
    let size = || place.files().iter().map(|file| file.metadata().unwrap().len()).sum::<u64>();
    for seed in 0..20 {
        let (stats, _) = run(&model, &job(seed), &alone(&model, &job(seed)), options());
        assert!(size() <= limit && stats.disk_cache_bytes == size(), "{} {}", size(), stats.disk_cache_bytes);
        // The first prompt is used in each round.
        let restored = run(&model, &job(0), &alone(&model, &job(0)), options()).0.restored_tokens;
        assert_eq!(restored, 3 * PAGE);
    }
    assert!(size() > limit / 2);
    // What is left of a prompt are its first pages.
    let (names, mut left) = (place.files(), 0);
    for seed in 0..20 {
        left += run(&model, &job(seed), &alone(&model, &job(seed)), place.options()).0.restored_tokens / PAGE;
    }
    assert_eq!(left, names.len());
    // A smaller limit holds from the start, and none at all.
    drop(scheduler(&model, place.options().with_cache_dir_bytes(4 * one)));
    assert!(size() <= 4 * one && size() > 0);
    let (stats, reports) = run(&model, &job(1), &alone(&model, &job(1)), place.options().with_cache_dir_bytes(0));
    assert_eq!((size(), stats.disk_cache_bytes, reports), (0, 0, Vec::new()));
}

#[test]
fn two_schedulers_share_a_folder() {
    let place = Place::new(&ODD);
    let jobs = jobs(20);
    let expected = alone(&place.load(), &jobs);
    let threads = [0, 1, 2].map(|number: u64| {
        // One of them removes what the others write.
        let options = place.options().with_cache_dir_bytes(if number == 0 { 100_000 } else { u64::MAX });
        let (model, jobs, expected) = (place.load(), jobs.clone(), expected.clone());
        std::thread::spawn(move || {
            for _ in 0..6 {
                let (stats, reports) = run(&model, &jobs, &expected, options.clone());
                assert_eq!((stats.disk_cache_errors, reports), (0, Vec::new()));
            }
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(place.files().iter().all(|file| file.extension().is_some_and(|kind| kind == "page")));
}

#[test]
fn pages_that_somebody_removes_are_computed_and_written_again() {
    let place = Place::new(&SMALL);
    let (model, jobs) = (place.load(), [Job::new(tokens(4 * PAGE + 1, 1), greedy(), 2)]);
    let expected = alone(&model, &jobs);
    run(&model, &jobs, &expected, place.options());
    for removed in 0..4 {
        let mut scheduler = scheduler(&model, place.options());
        place.files()[removed..].iter().for_each(|file| fs::remove_file(file).unwrap());
        assert_written(&model, &jobs, &expected, &mut scheduler);
        assert_eq!(scheduler.stats().restored_tokens, removed * PAGE);
        scheduler.save_prefixes(LONG);
        assert_eq!((scheduler.stats().disk_cache_errors, place.files().len()), (0, 4));
    }
    fs::remove_dir_all(&place.cache).unwrap();
    let mut scheduler = scheduler(&model, place.options());
    fs::remove_dir_all(&place.cache).unwrap();
    assert_written(&model, &jobs, &expected, &mut scheduler);
    scheduler.save_prefixes(LONG);
    assert_eq!(place.files().len(), 4);
}

#[test]
fn what_a_killed_process_has_left_is_removed() {
    let one = OnePage::new();
    let left = one.file.with_file_name(".nybble-0123456789abcdef-1-2.tmp");
    fs::write(&left, &one.bytes[..100]).unwrap();
    assert_eq!(one.run().0.restored_tokens, PAGE);
    assert_eq!(one.place.files(), std::slice::from_ref(&one.file));
}

#[test]
fn a_small_memory_limit_restores_what_fits() {
    let place = Place::new(&ODD);
    let model = place.load();
    let jobs = [Job::new(tokens(6 * PAGE + 3, 1), greedy(), 4), Job::new(tokens(5 * PAGE, 2), seeded(1), 4)];
    let expected = alone(&model, &jobs);
    run(&model, &jobs, &expected, place.options());
    for pages in 7..16 {
        let options = place.options().with_cache_bytes(pages * model.cache_bytes_per_page());
        let (stats, _) = run(&place.load(), &jobs, &expected, options);
        assert!(stats.restored_tokens >= 5 * PAGE, "{pages}: {stats:?}");
    }
}
