//! Tuning of scales and norms after a recipe, on the tiny checkpoints of plain decoder blocks.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nybble::Error;
use nybble::format::gguf::{Gguf, Metadata};
use nybble::model::hf::HfFolder;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, convert};
use nybble::quant::block::BlockType;
use nybble::quantize::{
    AutoOptions, Format, GptqOptions, QuantizeOptions, Recipe, Report, RunContext, Target, TensorFormats,
    TuningOptions, auto, quantize,
};
use tempfile::TempDir;

const VOCABULARY: usize = 320;

fn options(tuning: Option<TuningOptions>) -> QuantizeOptions {
    let formats = TensorFormats { format: Format::Q4_0, group: 32, output_type: BlockType::Q8_0, overrides: vec![] };
    QuantizeOptions { recipe: Recipe::Gptq(GptqOptions::default()), tuning, formats }
}

/// More and longer steps than the default, because there is little text.
fn tuning() -> TuningOptions {
    TuningOptions { rounds: 8, batch: 4, rate: 4e-3, seed: 0 }
}

fn windows() -> Vec<Vec<u32>> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % VOCABULARY as u32
    };
    (0..20).map(|window| (0..40 + window).map(|_| next()).collect()).collect()
}

fn source(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(format!("{name}-f32.gguf"));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(name);
    convert::convert(&HfFolder::open(golden).unwrap(), &Metadata::new(), &path, BlockType::F32, None).unwrap();
    path
}

fn run(source: &Path, out: &Path, options: &QuantizeOptions) -> nybble::Result<Report> {
    run_until(source, out, options, 1, &|| false)
}

fn run_until(
    source: &Path,
    out: &Path,
    options: &QuantizeOptions,
    threads: usize,
    stop: &(dyn Fn() -> bool + Sync),
) -> nybble::Result<Report> {
    let windows = windows();
    let context =
        RunContext { threads: Some(threads), force: true, interrupted: stop, ..RunContext::new(source, out, &windows) };
    quantize(&context, options)
}

/// The logits of all windows, from the weights of a file in F32.
fn logits(file: &Path) -> Vec<f32> {
    let floats = file.with_extension("floats.gguf");
    convert::convert_path(file, &floats, BlockType::F32, None).unwrap();
    let options = LoadOptions { quantize: Quantize::Stored, threads: Some(1), ..LoadOptions::default() };
    let model = Model::load(&floats, &options).unwrap();
    let mut all = Vec::new();
    for tokens in &windows() {
        let (mut session, mut logits) = (model.session(), Vec::new());
        let input = Input { session: &mut session, tokens, logits: Logits::All };
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
        all.extend(logits);
    }
    all
}

/// The mean divergence of logits from others.
fn divergence(wanted: &[f32], found: &[f32]) -> f64 {
    let likelihoods = |row: &[f32]| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<_>>()
    };
    let rows = wanted.chunks(VOCABULARY).zip(found.chunks(VOCABULARY));
    let of_row = |(wanted, found)| {
        let (wanted, found) = (likelihoods(wanted), likelihoods(found));
        wanted.iter().zip(&found).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    };
    rows.map(of_row).sum::<f64>() / (wanted.len() / VOCABULARY) as f64
}

#[test]
fn tuning_brings_predictions_closer_and_leaves_codes_and_format_as_they_are() {
    for (name, format) in
        [("llama", Format::Q4_0), ("mistral", Format::Iq4Nl), ("qwen2", Format::Q4_1), ("llama", Format::Q5_0)]
    {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let wanted = logits(&source);
        let [plain, tuned] = [None, Some(tuning())].map(|tune| {
            let out = folder.path().join(if tune.is_some() { "tuned.gguf" } else { "plain.gguf" });
            let overrides = vec![("blk.1.ffn_up".to_owned(), BlockType::Q8_0)];
            let formats = TensorFormats { format, group: 64, overrides, ..options(None).formats };
            let report = run(&source, &out, &QuantizeOptions { formats, ..options(tune) }).unwrap();
            assert_eq!(report.recipe, if tune.is_some() { "gptq+tune" } else { "gptq" });
            out
        });
        let [before, after] = [&plain, &tuned].map(|file| divergence(&wanted, &logits(file)));
        println!("{name}, {format:?}: {before:.5} before, {after:.5} after");
        assert!(after < 0.9 * before, "{name}, {format:?}: {after}, before tuning {before}");

        let [plain, tuned] = [&plain, &tuned].map(|file| Gguf::open(file).unwrap());
        for tensor in plain.tensors() {
            let other = tuned.tensor(tensor.name()).unwrap();
            assert_eq!(tensor.block_type(), other.block_type(), "{}", tensor.name());
            let (bytes, others) = (plain.data(tensor), tuned.data(other));
            let scales = if format.has_min() { 4 } else { 2 };
            if tensor.block_type() == format.block_type() {
                let size = format.block_type().block_bytes();
                let pairs: Vec<_> = bytes.chunks(size).zip(others.chunks(size)).collect();
                assert!(pairs.iter().all(|(block, other)| block[scales..] == other[scales..]), "{}", tensor.name());
                assert!(pairs.iter().any(|(block, other)| block[..scales] != other[..scales]), "{}", tensor.name());
                // A group is two blocks.
                assert!(others.chunks(2 * size).all(|group| group[..scales] == group[size..][..scales]));
            } else {
                assert_eq!(bytes == others, !tensor.name().contains("norm"), "{}", tensor.name());
            }
        }
    }
}

#[test]
fn models_of_other_blocks_are_refused_before_anything_is_done() {
    for (name, expected) in [
        ("gpt2", "tune: found the tensor "),
        ("qwen3", "tune: found the tensor blk."),
        ("mixtral", "tune: found the tensor blk."),
        ("gemma", "tune: found a model of the family gemma, expected a model of plain decoder blocks"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (source(&folder, name), folder.path().join("out.gguf"));
        let error = run(&source, &out, &options(Some(tuning()))).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{name}: {error}");
        assert!(!out.exists());
    }
}

#[test]
fn neither_threads_nor_being_stopped_change_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let options = options(Some(TuningOptions::default()));
    let asked = AtomicUsize::new(0);
    let count = || asked.fetch_add(1, Ordering::Relaxed) + 1;
    let whole = folder.path().join("whole.gguf");
    let stop = || count() == usize::MAX;
    run_until(&source, &whole, &options, 1, &stop).unwrap();
    let (whole, steps) = (std::fs::read(whole).unwrap(), asked.load(Ordering::Relaxed));
    let two = folder.path().join("two.gguf");
    run_until(&source, &two, &options, 2, &|| false).unwrap();
    assert!(std::fs::read(two).unwrap() == whole);

    let out = folder.path().join("out.gguf");
    let mut stops = 0;
    for patience in (1..).map(|i| i * steps / 8) {
        asked.store(0, Ordering::Relaxed);
        match run_until(&source, &out, &options, 1, &|| count() > patience) {
            Ok(_) => break,
            Err(Error::Interrupted) => stops += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(!out.exists());
    }
    assert!(stops > 2, "stopped {stops} times");
    assert!(std::fs::read(&out).unwrap() == whole);
}

/// A run that is stopped in the middle of a step, the first one after `patience` of them that this run began, or that ends. Also
/// what it was doing, each only once, and how many steps were made when it went on with them.
fn stopped(
    source: &Path,
    out: &Path,
    options: &QuantizeOptions,
    threads: usize,
    patience: usize,
) -> (nybble::Result<Report>, Vec<String>, Option<usize>) {
    const UNITS: usize = 4; // of a step: two layers there and back
    let (stages, first, now) = (RefCell::new(Vec::<String>::new()), Cell::new(None), AtomicUsize::new(0));
    let progress = |stage: &str, done: usize, _: usize| {
        if stage != "quantize" && stages.borrow().last().is_none_or(|last| last != stage) {
            stages.borrow_mut().push(stage.to_owned());
        }
        if stage == "tuning" {
            first.set(first.get().or(Some(done / UNITS)));
            now.store(done - first.get().unwrap_or(0) * UNITS, Ordering::Relaxed);
        }
    };
    let stop = || now.load(Ordering::Relaxed) > patience * UNITS + 2;
    let windows = windows();
    let context = RunContext {
        threads: Some(threads),
        progress: &progress,
        interrupted: &stop,
        ..RunContext::new(source, out, &windows)
    };
    let result = quantize(&context, options);
    (result, stages.into_inner(), first.get())
}

#[test]
fn tuning_that_is_stopped_at_any_step_goes_on_there_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let options = options(Some(TuningOptions { rounds: 2, ..tuning() }));
    let (report, stages, first) = stopped(&source, &out, &options, 1, usize::MAX / 8);
    report.unwrap();
    assert!(stages.contains(&"tuning: full precision".to_owned()), "{stages:?}");
    assert_eq!(first, Some(0));
    let whole = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();

    // Each run makes at least one step more than it found, whoever it is that computes.
    let mut made = Vec::new();
    for run in 1..=20 {
        let (result, stages, first) = stopped(&source, &out, &options, 1 + run % 2, run % 3);
        if run > 1 {
            assert_eq!(stages, ["tuning"], "nothing else is done again");
        }
        made.extend(first);
        match result {
            Ok(_) => break,
            Err(Error::Interrupted) => assert!(!out.exists()),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(made.len() > 3 && made.is_sorted() && made.last() > Some(&5), "{made:?}");
    assert!(std::fs::read(&out).unwrap() == whole);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "the source and the file are left");
}

#[test]
fn what_tuning_saved_counts_only_whole_and_for_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let tune = TuningOptions { rounds: 1, ..tuning() };
    let options = options(Some(tune));
    stopped(&source, &out, &options, 1, usize::MAX / 8).0.unwrap();
    let whole = std::fs::read(&out).unwrap();
    for damaged in ["out.gguf.resume-tuning", "out.gguf.resume-reference", "out.gguf.resume-state"] {
        std::fs::remove_file(&out).unwrap();
        assert!(stopped(&source, &out, &options, 1, 2).0.is_err());
        let path = folder.path().join(damaged);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (result, _, first) = stopped(&source, &out, &options, 1, usize::MAX / 8);
        result.unwrap();
        assert_eq!(first == Some(0), damaged.ends_with("tuning"), "{damaged}: {first:?}");
        assert!(std::fs::read(&out).unwrap() == whole, "{damaged}");
    }
    // Other steps are another run, although the codes are the same.
    std::fs::remove_file(&out).unwrap();
    assert!(stopped(&source, &out, &options, 1, 2).0.is_err());
    let other = QuantizeOptions { tuning: Some(TuningOptions { rate: 2e-3, ..tune }), ..options };
    let (result, stages, first) = stopped(&source, &out, &other, 1, usize::MAX / 8);
    result.unwrap();
    assert_eq!((stages, first), (vec!["tuning: full precision".to_owned(), "tuning".to_owned()], Some(0)));
    assert!(std::fs::read(&out).unwrap() != whole);
}

#[test]
fn a_search_goes_on_with_what_is_done_and_leaves_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let evaluation: Vec<Vec<u32>> = windows().iter().map(|window| window[..40].to_vec()).collect();
    let options =
        AutoOptions { formats: options(None).formats, target: Target::Divergence(0.0), budget: None, seed: 0 };
    let windows = windows();
    let search = |stop: &(dyn Fn() -> bool + Sync)| {
        let context = RunContext { threads: Some(1), interrupted: stop, ..RunContext::new(&source, &out, &windows) };
        auto(&context, &options, &evaluation)
    };
    let asked = AtomicUsize::new(0);
    let count = || asked.fetch_add(1, Ordering::Relaxed) + 1;
    let stop = || count() == usize::MAX;
    let found = search(&stop).unwrap();
    assert_eq!(found.names, ["rtn", "gptq", "gptq+tune"]);
    assert_eq!(found.outcome.tried.len(), 3);
    let (whole, steps) = (std::fs::read(&out).unwrap(), asked.load(Ordering::Relaxed));
    std::fs::remove_file(&out).unwrap();

    // In the last candidate.
    asked.store(0, Ordering::Relaxed);
    let stop = || count() > steps * 4 / 5;
    let stopped = search(&stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(!out.exists());
    asked.store(0, Ordering::Relaxed);
    let stop = || count() == usize::MAX;
    search(&stop).unwrap();
    assert!(std::fs::read(&out).unwrap() == whole);
    assert!(asked.load(Ordering::Relaxed) < steps, "{} of {steps} steps", asked.load(Ordering::Relaxed));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "the source and the file are left");
}
