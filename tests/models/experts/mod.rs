//! Limits of the memory for experts, and experts that are left out.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use crate::logits::{bits, feed, logits};
use crate::tiny_model::{ODD, Shape, metadata, tensors, write};
use nybble::format::gguf::{Gguf, Metadata};
use nybble::kernels;
use nybble::model::convert::convert;
use nybble::model::hf::HfFolder;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};

const SHAPE: Shape = Shape { hidden: 256, heads: 8, kv_heads: 2, head_dim: 32, ffn: 256, layers: 3, ..ODD };
const COUNT: u64 = 8;
/// Experts that a row uses.
const USED: u32 = 3;

/// The metadata of a model whose rows use `used` experts.
fn expert_metadata(used: u32) -> Metadata {
    let mut metadata = metadata(&SHAPE);
    metadata.set("llama.expert_count", COUNT as u32).set("llama.expert_used_count", used);
    metadata
}

/// Writes a llama with experts, as Mixtral is one.
fn experts_of(path: &Path, block_type: BlockType, used: u32) -> PathBuf {
    let mut all = Vec::new();
    for (name, dims) in tensors(&SHAPE) {
        match name.split_once(".ffn_").and_then(|(layer, part)| Some((layer, part.strip_suffix(".weight")?))) {
            Some((layer, part @ ("gate" | "up" | "down"))) => {
                if part == "gate" {
                    all.push((format!("{layer}.ffn_gate_inp.weight"), vec![dims[0], COUNT]));
                }
                all.push((format!("{layer}.ffn_{part}_exps.weight"), vec![dims[0], dims[1], COUNT]));
            }
            _ => all.push((name, dims)),
        }
    }
    write(path, &expert_metadata(used), &all, block_type)
}

fn experts(folder: &Path, block_type: BlockType) -> PathBuf {
    experts_of(&folder.join("experts.gguf"), block_type, USED)
}

/// Bytes of the experts in a file. In memory they take about the same.
fn expert_bytes(path: &Path) -> usize {
    let file = Gguf::open(path).unwrap();
    let experts = file.tensors().iter().filter(|tensor| tensor.name().contains("_exps.weight"));
    experts.map(|tensor| tensor.nbytes()).sum()
}

fn options(threads: usize) -> LoadOptions {
    LoadOptions::default().with_threads(threads)
}

/// With this share of the experts in memory.
fn limited(path: &Path, share: f64, options: LoadOptions) -> LoadOptions {
    options.with_expert_memory((expert_bytes(path) as f64 * share) as usize)
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| i.wrapping_mul(2_654_435_761) % 101).collect()
}

#[test]
fn experts_that_are_read_again_have_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let types = [BlockType::Q4_0, BlockType::Q4_K, BlockType::Q6_K, BlockType::Q8_0, BlockType::F16, BlockType::MXFP4];
    for block_type in types {
        let path = experts(folder.path(), block_type);
        let whole = Model::load(&path, &options(2)).unwrap();
        let tokens = tokens(20);
        let expected = bits(&logits(&whole, &tokens, 20));
        assert_eq!(whole.expert_use().needed, 0);
        for (share, threads, piece) in [(0.25, 2, 1), (0.5, 1, 20), (0.5, 3, 7), (0.9, 2, 20)] {
            let what = format!("{block_type}, {share}, {threads} threads, pieces of {piece}");
            let model = Model::load(&path, &limited(&path, share, options(threads))).unwrap();
            assert!(model.weight_bytes() < whole.weight_bytes(), "{what}");
            assert_eq!(model.parameters(), whole.parameters(), "{what}");
            assert!(model.bytes_per_token().abs_diff(whole.bytes_per_token()) < 100, "{what}");
            for _ in 0..2 {
                assert!(bits(&logits(&model, &tokens, piece)) == expected, "{what}");
            }
            let used = model.expert_use();
            assert!(used.read > 0 && used.read < used.needed, "{what}: {used:?}");
        }
    }
}

#[test]
fn the_scalar_kernel_reads_experts_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let tokens = tokens(5);
    let expected = bits(&logits(&Model::load(&path, &options(2)).unwrap(), &tokens, 5));
    for kernel in kernels::available() {
        let options = limited(&path, 0.4, options(2)).with_kernel(kernel.name().to_owned());
        assert!(bits(&logits(&Model::load(&path, &options).unwrap(), &tokens, 2)) == expected, "{}", kernel.name());
    }
}

#[test]
fn long_prompts_leave_experts_in_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let model = Model::load(&path, &limited(&path, 0.6, options(2))).unwrap();
    let tokens = tokens(100);
    logits(&model, &tokens, 100);
    let before = model.expert_use();
    logits(&model, &tokens, 100);
    let after = model.expert_use();
    let (needed, read) = (after.needed - before.needed, after.read - before.read);
    // All experts of a layer are needed, one after the other. Those in memory are used before they lose their places.
    assert!(needed >= COUNT * SHAPE.layers as u64);
    assert!(read <= needed * 6 / 10, "{read} of {needed}");
}

#[test]
fn a_limit_above_all_experts_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let whole = Model::load(&path, &options(1)).unwrap();
    for options in [options(1).with_expert_memory(1 << 40), options(1).with_free_memory_for_experts()] {
        let model = Model::load(&path, &options).unwrap();
        logits(&model, &tokens(3), 3);
        assert_eq!((model.weight_bytes(), model.expert_use().needed), (whole.weight_bytes(), 0));
    }
}

#[test]
fn sessions_continue_with_more_or_fewer_experts_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_K);
    let whole = Model::load(&path, &options(2)).unwrap();
    let model = Model::load(&path, &limited(&path, 0.4, options(2))).unwrap();
    assert_eq!(model.fingerprint(), whole.fingerprint());
    assert_eq!(model.try_fingerprint().unwrap(), whole.try_fingerprint().unwrap());
    let tokens = tokens(20);
    let expected = bits(&logits(&whole, &tokens, 20));
    let file = folder.path().join("session");
    for [writer, reader] in [[&whole, &model], [&model, &whole]] {
        let mut session = writer.session();
        feed(writer, &mut session, &tokens[..10]);
        session.save(writer, &tokens[..10], &file).unwrap();
        let (mut session, _) = Session::load(reader, &file).unwrap();
        let found = bits(&feed(reader, &mut session, &tokens[10..]));
        assert!(found == expected[10 * whole.vocabulary()..]);
    }
}

#[test]
fn every_family_with_experts_reads_them_to_the_same_bits() {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let folder = tempfile::tempdir().unwrap();
    let mut found = 0;
    for entry in std::fs::read_dir(all).unwrap() {
        let source = entry.unwrap().path();
        let name = source.file_name().unwrap().to_string_lossy().into_owned();
        let path = folder.path().join("model.gguf");
        let source = HfFolder::open(&source).unwrap();
        convert(&source, &Default::default(), &path, BlockType::F32, None).unwrap();
        if expert_bytes(&path) == 0 {
            continue;
        }
        let whole = Model::load(&path, &options(2)).unwrap();
        // Rows of a few numbers take more memory than in the file, and an expert that is being read a good part of it.
        let limits = [0.5, 0.7, 0.9, 1.2, 1.6, 2.2].map(|share| limited(&path, share, options(2)));
        let model = limits.iter().find_map(|options| Model::load(&path, options).ok());
        let model = model.unwrap_or_else(|| panic!("{name}"));
        let vocabulary = whole.vocabulary() as u32;
        let tokens: Vec<u32> = tokens(30).into_iter().map(|token| token % vocabulary).collect();
        assert!(bits(&logits(&model, &tokens, 4)) == bits(&logits(&whole, &tokens, 30)), "{name}");
        assert_eq!(model.fingerprint(), whole.fingerprint(), "{name}");
        assert!(model.expert_use().read > 0, "{name}");
        found += 1;
    }
    assert!(found >= 15, "{found} families with experts");
}

#[test]
fn a_file_that_changes_is_an_error_and_the_session_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let model = Model::load(&path, &limited(&path, 0.3, options(2))).unwrap();
    let tokens = tokens(30);
    let mut session = model.session();
    feed(&model, &mut session, &tokens[..10]);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    for _ in 0..2 {
        let mut found = vec![7.0];
        let input = Input::new(&mut session, &tokens[10..], Logits::All);
        let error = model.forward(&mut [input], &mut found, &|| false).unwrap_err();
        assert!(matches!(&error, Error::Malformed { path: of, place: Place::File, .. } if *of == path), "{error}");
        assert!(error.to_string().contains("load the model again"), "{error}");
        assert_eq!((session.len(), found.as_slice()), (10, &[7.0][..]));
    }
    let error = model.try_fingerprint().unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert!(session.save(&model, &tokens, folder.path().join("session")).is_err());
}

#[test]
fn weights_that_are_not_finite_are_found_when_the_model_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::F16);
    let mut damaged = std::fs::read(&path).unwrap();
    let at = position_of_last_expert_weight(&path);
    damaged[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
    std::fs::write(&path, damaged).unwrap();
    let error = Model::load(&path, &limited(&path, 0.3, options(2))).unwrap_err().to_string();
    assert!(error.contains("blk.2.ffn_down_exps.weight") && error.contains("NaN"), "{error}");
}

/// Where the last weight of the last layer's experts is in the file.
fn position_of_last_expert_weight(path: &Path) -> usize {
    let file = Gguf::open(path).unwrap();
    let data = file.data(file.tensor("blk.2.ffn_down_exps.weight").unwrap());
    let needle = &data[data.len() - 64..];
    let bytes = std::fs::read(path).unwrap();
    bytes.windows(64).position(|window| window == needle).unwrap() + 62
}

fn refusal(path: &Path, options: &LoadOptions) -> String {
    Model::load(path, options).unwrap_err().to_string()
}

#[test]
fn limits_that_cannot_be_kept_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let one = options(1).with_expert_memory(1);
    let text = refusal(&path, &one);
    assert!(text.starts_with("expert_memory: found 0.000000001 GB, expected at least 0.001 GB"), "{text}");
    let dense = crate::tiny_model::llama(folder.path(), &ODD, BlockType::Q4_0);
    let text = refusal(&dense, &one);
    assert!(text.starts_with("expert_memory: found 0.000000001 GB for a model without experts"), "{text}");
    assert!(Model::load(&dense, &options(1).with_free_memory_for_experts()).is_ok());
    let text = refusal(&dense, &options(1).with_expert_skip(0.2));
    assert!(text.starts_with("expert_skip: found 0.2 for a model without experts"), "{text}");
    for ratio in [-0.1, 1.1, f32::NAN] {
        let text = refusal(&path, &options(1).with_expert_skip(ratio));
        assert!(text.ends_with("expected a number from 0 to 1"), "{text}");
    }
    // Weights that are quantized while they load are not in the file.
    let floats = experts(folder.path(), BlockType::F16);
    let options = limited(&floats, 0.1, options(1)).with_quantize(Quantize::Int4);
    let text = refusal(&floats, &options);
    assert!(text.contains("_exps.weight") && text.contains("nybble convert"), "{text}");
}

#[test]
fn leaving_out_all_but_the_best_expert_is_a_model_that_uses_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let one = experts_of(&folder.path().join("one.gguf"), BlockType::Q4_0, 1);
    let tokens = tokens(20);
    let expected = bits(&logits(&Model::load(&one, &options(1)).unwrap(), &tokens, 20));
    let skipping = |ratio: f32| Model::load(&path, &options(2).with_expert_skip(ratio)).unwrap();
    // Mixtral divides by the sum of the weights, so the best one has a weight of 1.
    assert!(bits(&logits(&skipping(1.0), &tokens, 20)) == expected);
    let whole = Model::load(&path, &options(2)).unwrap();
    let all = bits(&logits(&whole, &tokens, 20));
    assert!(all != expected && bits(&logits(&skipping(0.0), &tokens, 20)) == all);
}

#[test]
fn what_is_left_out_does_not_depend_on_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let path = experts(folder.path(), BlockType::Q4_0);
    let tokens = tokens(40);
    let load = |threads: usize| options(threads).with_expert_skip(0.6);
    let model = Model::load(&path, &load(1)).unwrap();
    let expected = bits(&logits(&model, &tokens, 40));
    let shares = model.expert_use().weight_shares;
    assert_eq!(shares.len(), SHAPE.layers);
    for layer in &shares {
        assert_eq!((layer.len(), layer.iter().sum::<u64>()), (101, 40 * u64::from(USED)));
        assert!(layer[100] >= 40 && layer[..60].iter().sum::<u64>() > 0, "{layer:?}");
    }
    let used = model.expert_use().chosen;
    assert!(used.iter().all(|layer| layer.len() == COUNT as usize && layer.iter().sum::<u64>() == 120), "{used:?}");
    let limited = limited(&path, 0.4, load(2));
    for options in [load(3), limited] {
        let other = Model::load(&path, &options).unwrap();
        assert!(bits(&logits(&other, &tokens, 3)) == expected);
        assert_eq!(other.fingerprint(), model.fingerprint());
    }
    let whole = Model::load(&path, &options(1)).unwrap();
    assert!(whole.expert_use().weight_shares.is_empty());
    assert!(bits(&logits(&whole, &tokens, 40)) != expected && whole.fingerprint() != model.fingerprint());
    let counting = Model::load(&path, &options(1).with_expert_skip(0.0)).unwrap();
    assert_eq!(counting.fingerprint(), whole.fingerprint());
}

#[test]
fn every_family_may_leave_out_experts() {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let (mut found, mut changed) = (0, 0);
    for entry in std::fs::read_dir(all).unwrap() {
        let source = entry.unwrap().path();
        let name = source.file_name().unwrap().to_string_lossy().into_owned();
        let load =
            |ratio: f32| Model::load(&source, &options(2).with_quantize(Quantize::Stored).with_expert_skip(ratio));
        let (Ok(whole), Ok(model)) = (load(0.0), load(0.999)) else { continue };
        let vocabulary = whole.vocabulary() as u32;
        let tokens: Vec<u32> = tokens(12).into_iter().map(|token| token % vocabulary).collect();
        let [expected, skipped] = [&whole, &model].map(|model| logits(model, &tokens, 12));
        assert!(skipped.iter().all(|logit| logit.is_finite()), "{name}");
        assert!(bits(&logits(&model, &tokens, 5)) == bits(&skipped), "{name}");
        found += 1;
        changed += usize::from(bits(&expected) != bits(&skipped));
    }
    assert!(found >= 15 && changed + 2 >= found, "{changed} of {found} families");
}
