//! Tuning of scales and norms after a recipe, on the tiny checkpoints of plain decoder blocks.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use nybble::Error;
use nybble::format::gguf::Gguf;
use nybble::quant::block::BlockType;
use nybble::quantize::{
    AutoOptions, Format, GptqOptions, QuantizeOptions, Recipe, Report, RunContext, Target, TensorFormats,
    TuningOptions, auto, quantize,
};

use crate::sources::{self, VOCABULARY, run_forced, source};

fn options(tuning: Option<TuningOptions>) -> QuantizeOptions {
    let formats = TensorFormats::new(Format::Q4_0);
    QuantizeOptions::new(Recipe::Gptq(GptqOptions::default()), formats).with_tuning(tuning)
}

/// More and longer steps than the default, because there is little text.
fn tuning() -> TuningOptions {
    TuningOptions::default().with_rounds(8).with_batch(4).with_rate(4e-3).with_seed(0)
}

fn windows() -> Vec<Vec<u32>> {
    sources::windows(40..60)
}

fn logits(file: &Path) -> Vec<f32> {
    sources::logits(file, &windows())
}

fn run(source: &Path, out: &Path, options: &QuantizeOptions) -> nybble::Result<Report> {
    run_forced(source, out, &windows(), options, 1, &|| false)
}

/// The mean Kullback-Leibler divergence of the logits `found` from `wanted`.
fn divergence(wanted: &[f32], found: &[f32]) -> f64 {
    let log_probabilities = |row: &[f32]| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<_>>()
    };
    let rows = wanted.chunks(VOCABULARY).zip(found.chunks(VOCABULARY));
    let of_row = |(wanted, found)| {
        let (wanted, found) = (log_probabilities(wanted), log_probabilities(found));
        wanted.iter().zip(&found).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    };
    rows.map(of_row).sum::<f64>() / (wanted.len() / VOCABULARY) as f64
}

#[test]
fn tuning_reduces_the_divergence_and_keeps_codes() {
    for (name, format) in
        [("llama", Format::Q4_0), ("mistral", Format::Iq4Nl), ("qwen2", Format::Q4_1), ("llama", Format::Q5_0)]
    {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let wanted = logits(&source);
        let [plain, tuned] = [None, Some(tuning())].map(|tune| {
            let out = folder.path().join(if tune.is_some() { "tuned.gguf" } else { "plain.gguf" });
            let overrides = vec![("blk.1.ffn_up".to_owned(), BlockType::Q8_0)];
            let formats = options(None).formats.with_format(format).with_group(64).with_overrides(overrides);
            let report = run(&source, &out, &options(tune).with_formats(formats)).unwrap();
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
fn models_of_other_blocks_are_refused() {
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
fn neither_threads_nor_interruptions_change_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let options = options(Some(TuningOptions::default()));
    let asked = AtomicUsize::new(0);
    let count = || asked.fetch_add(1, Ordering::Relaxed) + 1;
    let whole = folder.path().join("whole.gguf");
    let stop = || count() == usize::MAX;
    run_forced(&source, &whole, &windows(), &options, 1, &stop).unwrap();
    let (whole, steps) = (std::fs::read(whole).unwrap(), asked.load(Ordering::Relaxed));
    let two = folder.path().join("two.gguf");
    run_forced(&source, &two, &windows(), &options, 2, &|| false).unwrap();
    assert!(std::fs::read(two).unwrap() == whole);

    let out = folder.path().join("out.gguf");
    let mut stops = 0;
    for limit in (1..).map(|i| i * steps / 8) {
        asked.store(0, Ordering::Relaxed);
        match run_forced(&source, &out, &windows(), &options, 1, &|| count() > limit) {
            Ok(_) => break,
            Err(Error::Interrupted) => stops += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(!out.exists());
    }
    assert!(stops > 2, "stopped {stops} times");
    assert!(std::fs::read(&out).unwrap() == whole);
}

/// Runs until the middle of the step after the first `limit` steps of this run, or to the end. Also returns the stages, without
/// repetition, and the number of the first step.
fn stopped(
    source: &Path,
    out: &Path,
    options: &QuantizeOptions,
    threads: usize,
    limit: usize,
) -> (nybble::Result<Report>, Vec<String>, Option<usize>) {
    const UNITS: usize = 4; // Units of progress per step: two layers, forward and backward.
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
    let stop = || now.load(Ordering::Relaxed) > limit * UNITS + 2;
    let windows = windows();
    let context =
        RunContext::new(source, out, &windows).with_threads(threads).with_progress(&progress).with_interrupted(&stop);
    let result = quantize(&context, options);
    (result, stages.into_inner(), first.get())
}

#[test]
fn the_seed_of_tuning_changes_the_output() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let [first, second, other] = [("a", 0), ("b", 0), ("c", 1)].map(|(name, seed)| {
        let out = folder.path().join(format!("{name}.gguf"));
        run(&source, &out, &options(Some(TuningOptions::default().with_seed(seed)))).unwrap();
        std::fs::read(out).unwrap()
    });
    assert!(first == second);
    assert!(first != other);
}

#[test]
fn tuning_stopped_at_any_step_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let options = options(Some(tuning().with_rounds(2)));
    let (report, stages, first) = stopped(&source, &out, &options, 1, usize::MAX / 8);
    report.unwrap();
    assert!(stages.contains(&"tuning: full precision".to_owned()), "{stages:?}");
    assert_eq!(first, Some(0));
    let whole = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();

    // Each run makes at least one step, on one thread or two.
    let mut made = Vec::new();
    for run in 1..=20 {
        let (result, stages, first) = stopped(&source, &out, &options, 1 + run % 2, run % 3);
        if run > 1 {
            assert_eq!(stages, ["tuning"], "nothing else is repeated");
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
fn damaged_snapshots_and_those_of_other_runs_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let tune = tuning().with_rounds(1);
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
    // Another rate is another run, although the codes are the same.
    std::fs::remove_file(&out).unwrap();
    assert!(stopped(&source, &out, &options, 1, 2).0.is_err());
    let other = options.with_tuning(tune.with_rate(2e-3));
    let (result, stages, first) = stopped(&source, &out, &other, 1, usize::MAX / 8);
    result.unwrap();
    assert_eq!((stages, first), (vec!["tuning: full precision".to_owned(), "tuning".to_owned()], Some(0)));
    assert!(std::fs::read(&out).unwrap() != whole);
}

/// The codes of each row of each matrix of layers.
fn rows_of_codes(file: &Path) -> Vec<Vec<u8>> {
    let file = Gguf::open(file).unwrap();
    let matrices = file.tensors().iter().filter(|tensor| tensor.name().starts_with("blk.") && tensor.dims().len() == 2);
    matrices
        .flat_map(|tensor| {
            assert_eq!(tensor.block_type(), BlockType::Q4_0);
            let bytes = file.data(tensor);
            let row_bytes = tensor.dims()[0] as usize / 32 * 18;
            let codes = |row: &[u8]| {
                let blocks = row.chunks(18).map(|block| &block[2..]);
                blocks.flat_map(|b| b.iter().map(|b| b & 15).chain(b.iter().map(|b| b >> 4))).collect::<Vec<u8>>()
            };
            bytes.chunks(row_bytes).map(codes).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn pruned_weights_stay_zero_through_gptq_and_tuning() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let wanted = logits(&source);
    for pattern in ["unstructured", "2:4"] {
        let [rounded, pruned, tuned] = ["rounded", "pruned", "tuned"].map(|name| {
            let out = folder.path().join(format!("{name}-{}.gguf", &pattern[..1]));
            let mut options = options((name == "tuned").then(tuning)).with_sparsity(0.5, pattern).unwrap();
            if name == "rounded" {
                options = options.with_recipe(Recipe::Rtn { search: true });
            }
            let report = run(&source, &out, &options).unwrap();
            assert!((0.5..0.65).contains(&report.sparsity()), "{pattern}: {}", report.sparsity());
            out
        });
        let codes = rows_of_codes(&pruned);
        assert!(!codes.is_empty() && codes == rows_of_codes(&tuned), "tuning changes scales, not codes");
        for row in codes {
            let zeros = |codes: &[u8]| codes.iter().filter(|code| **code == 8).count();
            assert!(2 * zeros(&row) >= row.len(), "{pattern}");
            assert!(pattern != "2:4" || row.chunks(4).all(|four| zeros(four) >= 2));
        }
        let [rounded, pruned, tuned] = [&rounded, &pruned, &tuned].map(|file| divergence(&wanted, &logits(file)));
        println!("{pattern}: {rounded:.5} by magnitude, {pruned:.5} with compensation, {tuned:.5} tuned");
        assert!(pruned < rounded && tuned < pruned, "{pattern}: {rounded}, {pruned}, {tuned}");
    }
}

#[test]
fn formats_without_a_zero_cannot_be_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let options = options(None).with_sparsity(0.5, "2:4").unwrap();
    for format in [Format::Q4_1, Format::Iq4Nl] {
        let formats = options.formats.clone().with_format(format);
        let name = format.block_type().name();
        let expected = format!(
            "format: found {name} with sparsity, expected a format that has a code for zero: q2_0, q4_0, q5_0 or q8_0"
        );
        let error = run(&source, &out, &options.clone().with_formats(formats.clone())).unwrap_err();
        assert_eq!(error.to_string(), expected);
        let (windows, auto_options) = (windows(), AutoOptions::new(formats).with_sparsity(0.5, "2:4").unwrap());
        let error = auto(&RunContext::new(&source, &out, &windows), &auto_options, &windows).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    assert!(!out.exists());
}

#[test]
fn an_interrupted_search_continues_and_leaves_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let evaluation: Vec<Vec<u32>> = windows().iter().map(|window| window[..40].to_vec()).collect();
    let options = AutoOptions::new(options(None).formats).with_target(Target::Divergence(0.0));
    let windows = windows();
    let search = |stop: &(dyn Fn() -> bool + Sync)| {
        let context = RunContext::new(&source, &out, &windows).with_threads(1).with_interrupted(stop);
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

    // Stops in the last candidate.
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
