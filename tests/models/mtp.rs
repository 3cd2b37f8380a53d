//! Heads for multi-token prediction: their drafts against those of transformers, and what is refused.

use std::path::Path;

use crate::logits::{bits, distance, load, logits, top};
use crate::mtp_goldens::{MtpGolden, mtp_goldens};
use nybble::format::gguf::{Gguf, Metadata, NewTensor, Value, Writer};
use nybble::kernels;
use nybble::model::{CacheType, LoadOptions, Model, Quantize};
use nybble::quant::block::BlockType;

/// The logits `(tokens - 1, vocabulary)` of the head.
fn head_logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    model.mtp_logits(tokens, &|| false).unwrap()
}

fn assert_agrees(golden: &MtpGolden, model: &Model, what: &str) {
    let (name, vocabulary) = (&golden.name, model.vocabulary());
    assert!(model.has_mtp() && model.notes().is_empty(), "{name}, {what}: {:?}", model.notes());
    for (row, expected) in golden.logits.iter().enumerate() {
        let worst = distance(&head_logits(model, &golden.input[row]), expected);
        assert!(worst < 2e-3, "{name}, {what}: the head's logits of row {row} differ by up to {worst}");
    }
    for (row, input) in golden.input.iter().enumerate() {
        let (greedy, tokens) = (&golden.greedy[row], [&input[..], &golden.greedy[row]].concat());
        let found = head_logits(model, &tokens);
        let drafts: Vec<u32> = found.chunks(vocabulary).skip(input.len() - 1).map(top).take(47).collect();
        assert_eq!(drafts, golden.drafts[row], "{name}, {what}: drafts of row {row}");
        // Also where the prompt comes in larger pieces.
        for piece in [1, 7, 64] {
            let found = model.mtp_drafts(input, piece, greedy[0], 3).unwrap();
            let chain: Vec<u32> = found.chunks(vocabulary).map(top).collect();
            assert_eq!(chain, golden.chain[row], "{name}, {what}: drafts in a row after row {row}, pieces of {piece}");
        }
    }
}

#[test]
fn heads_draft_what_they_draft_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    for golden in mtp_goldens() {
        assert_agrees(&golden, &load(&golden.folder, Quantize::Stored, 2, None), "as a folder");
        let path = golden.convert(folder.path(), BlockType::F32);
        let file = Gguf::open(&path).unwrap();
        let architecture = file.get_str("general.architecture").unwrap().unwrap();
        let number = |key: &str| file.metadata().get(&format!("{architecture}.{key}")).and_then(|value| value.as_u64());
        assert_eq!(number("nextn_predict_layers"), Some(1), "{}", golden.name);
        let last = number("block_count").unwrap() - 1;
        assert!(file.tensor(&format!("blk.{last}.nextn.eh_proj.weight")).is_some());
        assert_agrees(&golden, &load(&path, Quantize::Auto, 1, None), "as a file");
    }
}

#[test]
fn a_head_changes_neither_logits_nor_fingerprint_nor_memory_until_it_is_used() {
    for golden in mtp_goldens() {
        let options = LoadOptions::default().with_threads(2).with_quantize(Quantize::Stored);
        let load = |mtp: Option<bool>| Model::load(&golden.folder, &options.clone().with_mtp(mtp)).unwrap();
        let (without, lazy, eager) = (load(Some(false)), load(None), load(Some(true)));
        assert!(without.weight_bytes() == lazy.weight_bytes() && lazy.weight_bytes() < eager.weight_bytes());
        assert!(without.fingerprint() == lazy.fingerprint() && lazy.fingerprint() == eager.fingerprint());
        assert_eq!(without.bytes_per_token(), eager.bytes_per_token());
        let expected = bits(&logits(&without, &golden.input[0], 40));
        assert!(bits(&logits(&eager, &golden.input[0], 40)) == expected);
        // The copies of embedding and output are not kept.
        let folder = tempfile::tempdir().unwrap();
        let (path, plain) = (golden.convert(folder.path(), BlockType::F32), folder.path().join("plain.gguf"));
        let is_copy = |name: &str| name.contains("nextn.embed_tokens") || name.contains("nextn.shared_head_head");
        changed(&path, &plain, |name, dims, bytes| (!is_copy(name)).then_some((dims, bytes)));
        let bytes = |path: &Path| Model::load(path, &options.clone().with_mtp(true)).unwrap().weight_bytes();
        assert_eq!(bytes(&path), bytes(&plain), "{}", golden.name);
        let error = without.mtp_logits(&[1, 2], &|| false).unwrap_err().to_string();
        assert!(error.contains("which has none"), "{error}");
    }
}

#[test]
fn every_kernel_drafts_the_same_bits_in_any_pieces() {
    for golden in mtp_goldens() {
        let tokens = [&golden.input[0][..], &golden.greedy[0], &golden.input[1], &golden.greedy[1]].concat();
        for (quantize, cache) in
            [(Quantize::Stored, None), (Quantize::Int4, None), (Quantize::Int4, Some(CacheType::Int8))]
        {
            let load = |kernel: &str, threads: usize| {
                let options = LoadOptions::default().with_kernel(kernel.to_owned()).with_threads(threads);
                Model::load(&golden.folder, &options.with_quantize(quantize).with_cache_type(cache)).unwrap()
            };
            let drafts = |model: &Model, piece: usize| bits(&model.mtp_drafts(&tokens, piece, 7, 4).unwrap());
            let expected = drafts(&load("scalar", 1), 1);
            for (i, kernel) in kernels::available().iter().enumerate() {
                let model = load(kernel.name(), 1 + i % 3);
                for piece in [1, 7, 64, 200] {
                    assert!(
                        drafts(&model, piece) == expected,
                        "{}, {quantize:?}, {}: {piece}",
                        golden.name,
                        kernel.name()
                    );
                }
            }
        }
    }
}

/// Writes a copy of a GGUF file whose tensors `change` changes: each name with its dimensions and bytes, or nothing.
fn changed(source: &Path, to: &Path, change: impl Fn(&str, Vec<u64>, Vec<u8>) -> Option<(Vec<u64>, Vec<u8>)>) {
    rewritten(source, to, change, &[]);
}

/// As [`changed`], with other values of keys.
fn rewritten(
    source: &Path,
    to: &Path,
    change: impl Fn(&str, Vec<u64>, Vec<u8>) -> Option<(Vec<u64>, Vec<u8>)>,
    keys: &[(&str, Value)],
) {
    let file = Gguf::open(source).unwrap();
    let mut kept = Vec::new();
    for tensor in file.tensors() {
        if let Some((dims, bytes)) = change(tensor.name(), tensor.dims().to_vec(), file.data(tensor).to_vec()) {
            kept.push((tensor.name(), NewTensor::new(tensor.name(), tensor.block_type(), dims), bytes));
        }
    }
    let mut metadata: Metadata = file.metadata().clone();
    for (key, value) in keys {
        metadata.set(*key, value.clone());
    }
    let mut writer = Writer::create(to, &metadata, kept.iter().map(|kept| kept.1.clone())).unwrap();
    for (name, _, bytes) in &kept {
        writer.write_tensor(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_damaged_head_is_named_and_does_not_keep_the_model_from_loading() {
    let folder = tempfile::tempdir().unwrap();
    for golden in mtp_goldens() {
        let path = golden.convert(folder.path(), BlockType::F32);
        let whole = load(&path, Quantize::Auto, 1, None);
        let expected = bits(&logits(&whole, &golden.input[0], 40));
        let last = whole.config().layers.len();
        let damaged = folder.path().join("damaged.gguf");
        for suffix in ["nextn.eh_proj.weight", "nextn.enorm.weight", "attn_norm.weight", "attn_output.weight"] {
            let name = format!("blk.{last}.{suffix}");
            for kind in ["missing", "short", "not finite"] {
                changed(&path, &damaged, |found, mut dims, mut bytes| {
                    match kind {
                        _ if found != name => {}
                        "missing" => return None,
                        "short" => {
                            let rows = dims.last_mut().unwrap();
                            bytes.truncate(bytes.len() / *rows as usize * (*rows as usize - 1));
                            *rows -= 1;
                        }
                        _ => bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
                    }
                    Some((dims, bytes))
                });
                let model = load(&damaged, Quantize::Auto, 1, None);
                assert!(bits(&logits(&model, &golden.input[0], 40)) == expected, "{name}, {kind}");
                let error = model.mtp_logits(&golden.input[0], &|| false).unwrap_err().to_string();
                assert!(error.contains(&name), "{name}, {kind}: {error}");
                // Values of matrices are read with the head.
                let is_read_late = kind == "not finite" && !suffix.contains("norm");
                let notes = model.notes();
                assert_eq!(notes.len(), usize::from(!is_read_late), "{name}, {kind}: {notes:?}");
                assert!(notes.iter().all(|note| note.contains(&name)), "{notes:?}");
            }
        }
    }
}

#[test]
fn a_head_that_is_not_a_layer_of_attention_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let recurrent = vec![true, true, true, false, true];
    for (name, key, value) in [
        ("glm4_moe", "glm4moe.attention.shared_kv_layers", Value::U32(1)),
        ("qwen3_5", "qwen35.attention.recurrent_layers", recurrent.into()),
    ] {
        let golden = mtp_goldens().into_iter().find(|golden| golden.name == name).unwrap();
        let (path, to) = (golden.convert(folder.path(), BlockType::F32), folder.path().join("changed.gguf"));
        rewritten(&path, &to, |_, dims, bytes| Some((dims, bytes)), &[(key, value)]);
        let model = load(&to, Quantize::Auto, 1, None);
        assert!(!model.has_mtp() && model.notes().len() == 1, "{name}: {:?}", model.notes());
        let expected = bits(&logits(&load(&path, Quantize::Auto, 1, None), &golden.input[0], 40));
        assert!(bits(&logits(&model, &golden.input[0], 40)) == expected, "{name}");
        let error = model.mtp_logits(&[1, 2], &|| false).unwrap_err().to_string();
        assert!(error.contains("nextn_predict_layers") && error.contains("no attention of its own"), "{error}");
    }
}

#[test]
fn a_model_without_a_head_says_so() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let model = load(&folder.join("qwen3"), Quantize::Stored, 1, None);
    assert!(!model.has_mtp() && model.notes().is_empty());
    let error = model.mtp_logits(&[1, 2], &|| false).unwrap_err().to_string();
    assert!(error.starts_with("speculation: found \"mtp\" for ") && error.contains("qwen3"), "{error}");
    // A part of a head.
    let model = load(&folder.join("deepseek_v3"), Quantize::Stored, 1, None);
    let notes = model.notes();
    assert!(notes.len() == 1 && notes[0].contains("model.layers.2.input_layernorm.weight"), "{notes:?}");
    let error = model.mtp_logits(&[1, 2], &|| false).unwrap_err().to_string();
    assert!(error.contains("model.layers.2.input_layernorm.weight"), "{error}");
}
