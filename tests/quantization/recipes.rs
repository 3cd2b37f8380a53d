//! Quantization of the tiny checkpoint of every family.

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use nybble::Error;
use nybble::format::Checkpoint;
use nybble::format::gguf::{Gguf, NewTensor, Writer};
use nybble::quant::block::BlockType;
use nybble::quantize::{
    AutoOptions, Format, GptqOptions, QuantizeOptions, Recipe, Report, RunContext, SignroundOptions, Target,
    TensorFormats, TensorReport, auto, quantize,
};

use crate::sources::{self, Stop, golden, source};

const RTN: Recipe = Recipe::Rtn { search: false };

fn gptq() -> Recipe {
    Recipe::Gptq(GptqOptions::default())
}

fn options(recipe: Recipe) -> QuantizeOptions {
    let formats = TensorFormats::new(Format::Q4_0);
    QuantizeOptions::new(recipe, formats)
}

fn windows() -> Vec<Vec<u32>> {
    sources::windows(std::iter::repeat_n(64, 20))
}

/// The logits of a file on a short text.
fn logits(file: &Path) -> Vec<f32> {
    sources::logits(file, &[(0..60).map(|i| (i * i * 31 + 7) % 288).collect()])
}

fn run(source: &Path, out: &Path, options: &QuantizeOptions) -> nybble::Result<Report> {
    run_on(source, out, options, 1, &|| false)
}

fn run_on(
    source: &Path,
    out: &Path,
    options: &QuantizeOptions,
    threads: usize,
    stop: Stop<'_>,
) -> nybble::Result<Report> {
    let windows = windows();
    quantize(&RunContext::new(source, out, &windows).with_threads(threads).with_interrupted(stop), options)
}

fn run_forced(source: &Path, out: &Path, options: &QuantizeOptions) -> nybble::Result<Report> {
    sources::run_forced(source, out, &windows(), options, 1, &|| false)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

/// Families that cannot be calibrated: with several streams, two mixers in a layer, and feed-forward layers with a state.
const NOT_CALIBRATED: [&str; 3] = ["falcon_h1", "gemma3n", "rwkv"];

/// The checkpoints of all families that can be calibrated.
fn calibrated_families() -> Vec<String> {
    let all = std::fs::read_dir(golden("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut families: Vec<String> = all.filter(|name| !NOT_CALIBRATED.contains(&&**name)).collect();
    families.sort();
    assert_eq!(families.len(), 88);
    families
}

/// Whether tokens choose among experts.
fn has_experts(source: &Path) -> bool {
    Gguf::open(source).unwrap().names().into_iter().any(|name| name.ends_with("ffn_gate_inp.weight"))
}

#[test]
fn families_that_cannot_be_calibrated_are_refused_by_name_and_rounded() {
    for name in NOT_CALIBRATED {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let out = folder.path().join("out.gguf");
        let error = run_forced(&source, &out, &options(gptq())).unwrap_err().to_string();
        assert!(error.contains("calibration of a model of the family"), "{error}");
        assert!(!out.exists());
        run_forced(&source, &out, &options(RTN)).unwrap();
        let (expected, found) = (logits(&source), logits(&out));
        assert!(distance(&found, &expected) < distance(&expected, &vec![0.0; expected.len()]), "{name}");
    }
}

#[test]
fn gptq_keeps_the_logits_of_every_family_better_than_rounding() {
    for name in calibrated_families() {
        let (name, folder) = (&*name, tempfile::tempdir().unwrap());
        let source = source(&folder, name);
        let expected = logits(&source);
        let distance_of = |recipe: Recipe| {
            let out = folder.path().join("out.gguf");
            let report = run_forced(&source, &out, &options(recipe)).unwrap();
            assert_eq!(report.size_bytes, out.metadata().unwrap().len());
            // Rows that blocks of 32 do not divide stay floats.
            let linear = || report.tensors.iter().filter(|tensor| tensor.linear);
            let whole = linear().all(|tensor| tensor.recipe != "encoded");
            for tensor in linear().filter(|tensor| tensor.recipe != "encoded") {
                let is_own = tensor.recipe == recipe.name() || tensor.recipe.contains("tokens of the text reached it");
                assert!(tensor.block_type == BlockType::Q4_0 && is_own, "{tensor:?}");
                assert!(tensor.relative_error.unwrap() < 0.02, "{name}: {tensor:?}");
            }
            // What decides how fast states decay has 8 bits.
            let finer = |tensor: &TensorReport| tensor.name.starts_with("blk.") && tensor.block_type == BlockType::Q8_0;
            assert!(report.bits_per_weight() == 4.5 || !whole || report.tensors.iter().any(finer));
            distance(&logits(&out), &expected)
        };
        let (rounded, own) = (distance_of(RTN), distance_of(gptq()));
        println!("{name}: {own:.3}, by rounding {rounded:.3}");
        // The smallest checkpoints have too few columns to make up for the error of one in others.
        let bound = if expected.len() == 60 * 288 { 1.25 } else { 0.95 };
        assert!(own < bound * rounded, "{name}: {own}, by rounding {rounded}");
    }
}

#[test]
fn awq_keeps_the_function_of_every_family_when_norms_are_scaled() {
    let mut scaled = 0;
    for name in calibrated_families() {
        let (name, folder) = (&*name, tempfile::tempdir().unwrap());
        let source = source(&folder, name);
        let expected = logits(&source);
        let out = folder.path().join("out.gguf");
        // Five bits keep the difference small. One tensor has an override, and must be scaled as well.
        let is_feed_forward = Gguf::open(&source).unwrap().names().iter().any(|name| name.contains(".ffn_up"));
        let pattern = if is_feed_forward { "blk.*.ffn_up*" } else { "blk.*.ssm_out*" };
        let overrides = vec![(pattern.to_owned(), BlockType::F32)];
        let formats = options(RTN).formats.with_format(Format::Q5_0).with_overrides(overrides);
        let distance_of = |recipe: Recipe| {
            run_forced(&source, &out, &options(recipe).with_formats(formats.clone())).unwrap();
            distance(&logits(&out), &expected)
        };
        let (rounded, own) = (distance_of(RTN), distance_of(Recipe::Awq(None)));
        // A small error sends a token to other experts, so with them both distances are mostly chance.
        let most = if has_experts(&source) { 2.0 } else { 1.3 };
        assert!(own < most * rounded, "{name}: {own}, by rounding {rounded}");
        let norm = |file: &Path| {
            let file = Gguf::open(file).unwrap();
            file.tensor("blk.1.attn_norm.weight").map(|tensor| file.data(tensor).to_vec())
        };
        scaled += usize::from(norm(&source) != norm(&out));
    }
    assert!(scaled >= 15, "{scaled} families have scaled norms");
}

#[test]
fn auto_takes_the_first_recipe_that_meets_the_target() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let evaluation: Vec<Vec<u32>> = windows().into_iter().take(4).collect();
    let search = |target: Target, force: bool| {
        let formats = options(RTN).formats.with_format(Format::Iq4Nl);
        let options = AutoOptions::new(formats).with_target(target);
        let windows = windows();
        let context = RunContext::new(&source, &out, &windows).with_threads(1).with_force(force);
        auto(&context, &options, &evaluation)
    };
    let found = search(Target::Divergence(100.0), false).unwrap();
    assert_eq!((found.outcome.chosen, found.outcome.tried.len()), (0, 1));
    assert_eq!((found.report.recipe.as_str(), found.report.out.as_path()), ("rtn", out.as_path()));
    assert!(search(Target::default(), false).unwrap_err().to_string().contains("which exists"));

    let found = search(Target::Divergence(0.0), true).unwrap();
    let divergences: Vec<f64> = found.outcome.tried.iter().map(|(figures, _)| figures.kl_mean).collect();
    assert_eq!(divergences.len(), found.names.len());
    assert!(divergences.iter().all(|kl| *kl >= divergences[found.outcome.chosen]), "{divergences:?}");
    let json: serde_json::Value = serde_json::from_str(&found.to_json()).unwrap();
    assert_eq!(json["candidates"].as_array().unwrap().len(), found.names.len());
    assert_eq!(json["size_bytes"], out.metadata().unwrap().len());
    assert!(json["chosen_because"].as_str().unwrap().contains("diverges least"));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "the source and the chosen file are left: {left:?}");
}

#[test]
fn spare_bits_go_to_sensitive_tensors_within_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let formats = options(RTN).formats;
    let output = folder.path().join("out.gguf");
    let spend_until = |formats: &TensorFormats, bits: f64, stop: &(dyn Fn() -> bool + Sync)| {
        let windows = windows();
        let context = RunContext::new(&source, &output, &windows).with_threads(1).with_interrupted(stop);
        formats.spend_bits(&context, bits)
    };
    let spend = |bits: f64| spend_until(&formats, bits, &|| false);
    assert_eq!(spend(4.5).unwrap(), formats);
    assert!(spend(4.4).unwrap_err().to_string().starts_with("bits_per_weight: found 4.4, expected at least 4.5"));
    let mut last = f64::INFINITY;
    for bits in [5.0, 5.5, 7.0, 8.5] {
        let out = folder.path().join(format!("{bits}.gguf"));
        let report = run(&source, &out, &options(gptq()).with_formats(spend(bits).unwrap())).unwrap();
        assert!(report.bits_per_weight() <= bits && report.bits_per_weight() > bits - 0.4, "{bits}: {report:?}");
        let lost = distance(&logits(&out), &logits(&source));
        assert!(lost < last, "{bits} bits: {lost}, with fewer {last}");
        last = lost;
    }
    // Measurements are kept, and a damaged end of the file is measured again.
    let kept = folder.path().join("out.gguf.bits.resume");
    let (whole, plan) = (std::fs::read(&kept).unwrap(), spend(5.5).unwrap());
    assert_eq!(std::fs::read(&kept).unwrap(), whole);
    std::fs::write(&kept, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(spend(5.5).unwrap(), plan);
    assert_eq!(std::fs::read(&kept).unwrap(), whole);
    let other = formats.clone().with_group(64);
    assert!(matches!(spend_until(&other, 5.5, &|| true), Err(Error::Interrupted)));
    assert!(std::fs::metadata(&kept).unwrap().len() < whole.len() as u64, "of another run");
    run(&source, &output, &options(RTN)).unwrap();
    assert!(!kept.exists());
}

#[test]
fn two_bits_are_left_to_the_least_sensitive_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let base = TensorFormats::new(Format::Q2_0);
    let spend = |bits: f64| {
        let (out, windows) = (folder.path().join("out.gguf"), windows());
        base.spend_bits(&RunContext::new(&source, &out, &windows).with_threads(1), bits)
    };
    let refused = spend(2.0).unwrap_err().to_string();
    assert!(refused.starts_with("bits_per_weight: found 2, expected at least "), "{refused}");
    let mut last = f64::INFINITY;
    for bits in [2.6, 3.2, 4.2] {
        let out = folder.path().join(format!("{bits}.gguf"));
        let report = run(&source, &out, &options(gptq()).with_formats(spend(bits).unwrap())).unwrap();
        assert!(report.bits_per_weight() <= bits && report.bits_per_weight() > bits - 0.6, "{bits}: {report:?}");
        let of = |block_type| report.tensors.iter().filter(|tensor| tensor.block_type == block_type).count();
        assert!(of(BlockType::Q2_0) > 0 && of(BlockType::IQ4_NL) > 0, "{bits}: {report:?}");
        let lost = distance(&logits(&out), &logits(&source));
        assert!(lost < last, "{bits} bits: {lost}, with fewer {last}");
        last = lost;
    }
}

#[test]
fn bits_that_embedding_and_output_leave_go_to_linear_layers() {
    for name in ["llama", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let base = TensorFormats::new(Format::Iq4Nl);
        let mut moved = 0;
        for bits in [None, Some(4.5), Some(5.0), Some(6.0)] {
            let (out, windows) = (folder.path().join("out.gguf"), windows());
            let context = RunContext::new(&source, &out, &windows).with_threads(1).with_force(true);
            let plain = bits.map_or(Ok(base.clone()), |bits| base.spend_bits(&context, bits)).unwrap();
            let all = base.spend_all_bits(&context, bits).unwrap();
            let of = |formats: &TensorFormats| {
                run_forced(&source, &out, &options(gptq()).with_formats(formats.clone())).unwrap()
            };
            let (plain, all) = (of(&plain), of(&all));
            assert!(all.size_bytes <= plain.size_bytes, "{name}, {bits:?}: {} bytes", all.size_bytes);
            let head =
                all.tensors.iter().filter(|tensor| ["token_embd.weight", "output.weight"].contains(&&*tensor.name));
            let types: Vec<_> = head.map(|tensor| tensor.block_type).collect();
            let known = [BlockType::IQ4_NL, BlockType::Q5_0, BlockType::Q8_0];
            assert!(types.iter().all(|block_type| known.contains(block_type)), "{types:?}");
            let is_moved = types.iter().any(|block_type| *block_type != BlockType::Q8_0);
            assert_eq!(is_moved, all.bits_per_weight() > plain.bits_per_weight(), "{name}, {bits:?}: {all:?}");
            moved += usize::from(is_moved);
        }
        assert!(moved > 0, "{name}");
    }
}

#[test]
fn the_output_matrix_is_calibrated_with_its_inputs() {
    for name in ["llama", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let others = ["blk.*", "token_embd"].map(|pattern| (pattern.to_owned(), BlockType::F16)).to_vec();
        let formats = TensorFormats::new(Format::Q4_0).with_output_type(BlockType::Q4_0).with_overrides(others);
        let lost = |recipe: Recipe| {
            let out = folder.path().join(format!("{}.gguf", recipe.name()));
            let report = run(&source, &out, &options(recipe).with_formats(formats.clone())).unwrap();
            let output = report.tensors.iter().find(|tensor| tensor.name == "output.weight").unwrap();
            assert_eq!(output.recipe, recipe.name(), "{report:?}");
            distance(&logits(&out), &logits(&source))
        };
        let (rounded, compensated) = (lost(RTN), lost(gptq()));
        assert!(compensated < 0.9 * rounded, "{name}: {compensated}, rounded {rounded}");
    }
}

#[test]
fn every_recipe_gives_the_same_bytes_on_one_and_two_threads() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    let signround = SignroundOptions::default().with_steps(20);
    for recipe in [Recipe::Awq(None), Recipe::Awq(Some(GptqOptions::default())), Recipe::Signround(signround)] {
        let of = |threads: usize| {
            let out = folder.path().join(format!("{}-{threads}.gguf", recipe.name()));
            run_on(&source, &out, &options(recipe), threads, &|| false).unwrap();
            std::fs::read(out).unwrap()
        };
        assert!(of(1) == of(2), "{}", recipe.name());
    }
}

#[test]
fn the_bytes_are_the_same_on_one_and_two_threads() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen2_moe"] {
        let source = source(&folder, name);
        let of = |threads: usize| {
            let out = folder.path().join(format!("{name}-{threads}.gguf"));
            run_on(&source, &out, &options(gptq()), threads, &|| false).unwrap();
            std::fs::read(out).unwrap()
        };
        assert!(of(1) == of(2), "{name}");
    }
}

#[test]
fn a_stopped_run_continues_to_the_same_bytes() {
    for (name, recipe) in [("llama", gptq()), ("qwen2_moe", gptq()), ("gpt2", RTN), ("bloom", Recipe::Awq(None))] {
        let folder = tempfile::tempdir().unwrap();
        let source = source(&folder, name);
        let whole = folder.path().join("whole.gguf");
        let asked = AtomicUsize::new(0);
        let options = options(recipe);
        let count = || asked.fetch_add(1, Ordering::Relaxed) + 1;
        let stop = || count() > usize::MAX - 1;
        run_on(&source, &whole, &options, 1, &stop).unwrap();
        let (whole, steps) = (std::fs::read(whole).unwrap(), asked.load(Ordering::Relaxed));
        assert!(steps > 4, "{name} can be stopped {steps} times");

        let out = folder.path().join("out.gguf");
        // Stops repeatedly, each time a little later.
        let mut stops = 0;
        for limit in (1..).map(|i| i * steps / 8) {
            asked.store(0, Ordering::Relaxed);
            let stop = || count() > limit;
            match run_on(&source, &out, &options, 1, &stop) {
                Ok(_) => break,
                Err(Error::Interrupted) => stops += 1,
                Err(error) => panic!("{name}: {error}"),
            }
            assert!(!out.exists(), "no file has the final name");
            // An incomplete record, as after a kill.
            let log = folder.path().join("out.gguf.resume");
            // There is no log while the scales of the source are checked.
            if let Ok(found) = log.metadata() {
                let length = found.len().saturating_sub(5);
                std::fs::File::options().write(true).open(&log).unwrap().set_len(length).unwrap();
            }
        }
        assert!(stops > 2, "{name} was stopped {stops} times");
        assert!(std::fs::read(&out).unwrap() == whole, "{name}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "the source and two files are left: {left:?}");
    }
}

#[test]
fn a_run_with_its_output_in_the_source_folder_continues() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden("llama").join(name), folder.path().join(name)).unwrap();
    }
    let out = folder.path().join("out.gguf");
    let asked = AtomicUsize::new(0);
    let run = |most: usize| {
        asked.store(0, Ordering::Relaxed);
        let stop = || asked.fetch_add(1, Ordering::Relaxed) >= most;
        run_on(folder.path(), &out, &options(gptq()), 1, &stop)
    };
    run(usize::MAX).unwrap();
    let (whole, steps) = (std::fs::read(&out).unwrap(), asked.load(Ordering::Relaxed));
    std::fs::remove_file(&out).unwrap();
    assert!(run(steps * 9 / 10).is_err());
    run(usize::MAX).unwrap();
    assert!(asked.load(Ordering::Relaxed) < steps / 2, "{steps}, then {}", asked.load(Ordering::Relaxed));
    assert!(std::fs::read(&out).unwrap() == whole);
}

#[test]
fn finished_work_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let asked = AtomicUsize::new(0);
    let all = || asked.fetch_add(1, Ordering::Relaxed) == usize::MAX;
    run_on(&source, &folder.path().join("all.gguf"), &options(gptq()), 1, &all).unwrap();
    let most = asked.swap(0, Ordering::Relaxed) * 9 / 10;
    // Far into the last layer.
    let stop = || asked.fetch_add(1, Ordering::Relaxed) > most;
    let first = run_on(&source, &out, &options(gptq()), 1, &stop);
    assert!(matches!(first, Err(Error::Interrupted)));
    let log = std::fs::read(folder.path().join("out.gguf.resume")).unwrap();
    let steps = asked.load(Ordering::Relaxed);
    let second = run_on(&source, &out, &options(gptq()), 1, &|| true);
    assert!(matches!(second, Err(Error::Interrupted)));
    assert!(std::fs::read(folder.path().join("out.gguf.resume")).unwrap() == log);
    // Finished layers are not computed again.
    asked.store(0, Ordering::Relaxed);
    let count = || asked.fetch_add(1, Ordering::Relaxed) == usize::MAX;
    let copy = folder.path().join("copy.gguf");
    for end in ["resume", "resume-state"] {
        let own = folder.path().join(format!("out.gguf.{end}"));
        std::fs::copy(own, folder.path().join(format!("copy.gguf.{end}"))).unwrap();
    }
    run_on(&source, &copy, &options(gptq()), 1, &count).unwrap();
    assert!(asked.load(Ordering::Relaxed) < steps, "{steps} and then {}", asked.load(Ordering::Relaxed));
    // Other options are another run.
    let formats = options(gptq()).formats.with_group(64);
    asked.store(0, Ordering::Relaxed);
    let stop = || asked.fetch_add(1, Ordering::Relaxed) > most / 2;
    let third = run_on(&source, &out, &options(gptq()).with_formats(formats), 1, &stop);
    assert!(matches!(third, Err(Error::Interrupted)));
    let other = std::fs::read(folder.path().join("out.gguf.resume")).unwrap();
    assert!(other != log && !other.starts_with(&log));
}

#[test]
fn progress_grows_and_stays_below_the_total() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "qwen3");
    let last = Cell::new(0);
    let progress = |stage: &str, done: usize, total: usize| {
        assert!(done >= last.get() || stage == "quantize", "{stage}: {done} after {}", last.get());
        assert!(done < total);
        last.set(done);
    };
    let (out, windows) = (folder.path().join("out.gguf"), windows());
    quantize(&RunContext::new(&source, &out, &windows).with_progress(&progress), &options(gptq())).unwrap();
    assert!(last.get() > 0);
}

#[test]
fn formats_and_overrides_are_written_as_requested() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(&folder, "llama");
    for (format, group, expected) in [
        (Format::Q4_0, 64, (BlockType::Q4_0, 64)),
        (Format::Q4_1, 128, (BlockType::Q4_1, 64)),
        (Format::Iq4Nl, 0, (BlockType::IQ4_NL, 64)),
        (Format::Q4_1, 32, (BlockType::Q4_1, 32)),
    ] {
        let overrides =
            [("blk.0.ffn_down", BlockType::Q8_0), ("output", BlockType::F16), ("*.1.attn_?", BlockType::Q4_1)];
        let overrides = overrides.map(|(pattern, block_type)| (pattern.to_owned(), block_type)).to_vec();
        let formats =
            TensorFormats::new(format).with_group(group).with_output_type(BlockType::Q4_0).with_overrides(overrides);
        let out = folder.path().join(format!("{format:?}-{group}.gguf"));
        run(&source, &out, &options(gptq()).with_formats(formats)).unwrap();
        let file = Gguf::open(&out).unwrap();
        let found = |name: &str| file.tensor(name).unwrap().block_type();
        assert_eq!(found("blk.0.attn_q.weight"), expected.0);
        assert_eq!(found("blk.0.ffn_down.weight"), BlockType::Q8_0);
        assert_eq!(found("blk.1.attn_v.weight"), BlockType::Q4_1);
        assert_eq!(found("output.weight"), BlockType::F16);
        assert_eq!(found("token_embd.weight"), BlockType::Q4_0);
        assert_eq!(found("blk.0.attn_norm.weight"), BlockType::F32);
        // The blocks of a group have the same scale.
        let tensor = file.tensor("blk.0.attn_q.weight").unwrap();
        let (bytes, blocks) = (file.data(tensor), expected.1 / 32);
        let scales: Vec<&[u8]> = bytes.chunks(expected.0.block_bytes()).map(|block| &block[..2]).collect();
        assert!(scales.chunks(blocks).all(|group| group.iter().all(|scale| *scale == group[0])), "{format:?} {group}");
        assert!(logits(&out).iter().all(|logit| logit.is_finite()));
    }
}

#[test]
fn experts_with_too_few_tokens_are_rounded_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (source(&folder, "qwen3_moe"), folder.path().join("out.gguf"));
    // The same token throughout: enough text, and experts that it never reaches.
    let windows = vec![vec![7; 32]; 20];
    let report = quantize(&RunContext::new(&source, &out, &windows), &options(gptq())).unwrap();
    let experts = report.tensors.iter().filter(|tensor| tensor.name.contains("_exps"));
    let recipes: Vec<&str> = experts.map(|tensor| &*tensor.recipe).collect();
    assert!(recipes.iter().any(|recipe| recipe.contains("rtn (0 tokens of the text reached it)")), "{recipes:?}");
    assert!(recipes.iter().any(|recipe| recipe.contains("gptq")), "{recipes:?}");
    assert!(logits(&out).iter().all(|logit| logit.is_finite()));
}

#[test]
fn errors_name_their_cause_and_leave_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (source(&folder, "llama"), folder.path().join("out.gguf"));
    let refused = |source: &Path, options: &QuantizeOptions, windows: &[Vec<u32>]| {
        let error = quantize(&RunContext::new(source, &out, windows), options).unwrap_err().to_string();
        assert!(!out.exists(), "{error}");
        error
    };
    for (name, at, expected) in [
        ("blk.1.ffn_up.weight", 70, "tensor \"blk.1.ffn_up.weight\": found NaN"),
        (
            "blk.0.attn_norm.weight",
            3,
            "tensor \"blk.0.attn_norm.weight\": found NaN at index 3, expected finite numbers",
        ),
        ("token_embd.weight", 64 * 5, "tensor \"token_embd.weight\": found NaN or an infinity in row 5"),
    ] {
        let damaged = folder.path().join("damaged.gguf");
        with_nan(&whole, &damaged, name, at);
        let error = refused(&damaged, &options(gptq()), &windows());
        assert!(error.contains(expected), "{error}");
        if name != "token_embd.weight" {
            assert!(refused(&damaged, &options(RTN), &[]).contains(expected));
        }
    }
    let few = vec![vec![1; 100]; 2];
    assert!(
        refused(&whole, &options(gptq()), &few).starts_with("calibration: found 200 tokens, expected at least 512")
    );
    let unknown = vec![vec![320; 100]; 6];
    assert_eq!(refused(&whole, &options(gptq()), &unknown), "token: found 320, expected an id below 320");
    let long = vec![vec![1; 100_000]];
    assert!(refused(&whole, &options(gptq()), &long).starts_with("window: found 100000 tokens"));
    let formats = options(RTN).formats.with_group(33);
    assert!(refused(&whole, &options(RTN).with_formats(formats), &[]).starts_with("group: found 33"));
    assert!(refused(Path::new("nowhere.gguf"), &options(RTN), &[]).starts_with("nowhere.gguf"));

    for (pattern, is_known) in [("blk.7.*", false), ("blk.0.ffn_up", true), ("ffn_up", false), ("*", true)] {
        let overrides = vec![(pattern.to_owned(), BlockType::Q8_0)];
        let formats = options(RTN).formats.with_overrides(overrides);
        let options = options(RTN).with_formats(formats);
        if is_known {
            run(&whole, &out, &options).unwrap();
            std::fs::remove_file(&out).unwrap();
        } else {
            let expected = format!("keep: found {pattern:?}, which matches no tensor, expected the name of a tensor");
            assert!(refused(&whole, &options, &[]).starts_with(&expected));
        }
    }
    let error = run_forced(&whole, &whole, &options(RTN)).unwrap_err().to_string();
    assert!(error.ends_with("which is read, expected another file"), "{error}");

    std::fs::write(&out, "mine").unwrap();
    let error = run(&whole, &out, &options(RTN)).unwrap_err().to_string();
    assert!(error.contains("which exists"), "{error}");
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
    run_forced(&whole, &out, &options(RTN)).unwrap();
    assert!(Gguf::open(&out).is_ok());
}

/// Copies a file of floats with one number replaced by NaN.
fn with_nan(source: &Path, out: &Path, name: &str, at: usize) {
    let file = Gguf::open(source).unwrap();
    let mut writer = Writer::create(out, file.metadata(), file.tensors().iter().map(NewTensor::from)).unwrap();
    for tensor in file.tensors() {
        let mut bytes = file.data(tensor).to_vec();
        if tensor.name() == name {
            bytes[4 * at..4 * at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        writer.write_tensor(tensor.name(), &bytes).unwrap();
    }
    writer.finish().unwrap();
}
