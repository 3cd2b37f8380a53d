//! Damaged adapters are refused with their file, or load and compute; nothing panics.

use std::fs;
use std::path::{Path, PathBuf};

use crate::hf_folder::ODD_VALUES;
use crate::logits::load;
use crate::rewrite::rewrite;
use crate::tiny_model::Random;
use nybble::model::{Input, Logits, Model, Quantize};
use nybble::{Error, Place};
use tempfile::TempDir;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn base() -> Model {
    load(&data().join("goldens/llama"), Quantize::Stored, 1, None)
}

/// A copy of the adapter called `name`.
fn copied(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(data().join("adapters").join(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Loads the adapter at `path`: it computes, or is refused with its place. Returns whether it loaded.
fn try_load(model: &Model, path: &Path, what: &str) -> bool {
    match model.load_adapter("damaged", path) {
        Ok(_) => {
            let (mut session, mut logits) = (model.session_with_adapter("damaged").unwrap(), Vec::new());
            // Numbers that are finite may still become infinite.
            let input = Input::new(&mut session, &[1, 2, 3], Logits::Last);
            model.forward(&mut [input], &mut logits, &|| false).unwrap();
            true
        }
        Err(
            error @ (Error::Malformed { .. } | Error::Missing { .. } | Error::Unsupported { .. } | Error::Io { .. }),
        ) => {
            let text = error.to_string();
            let root = path.to_string_lossy().into_owned();
            assert!(text.starts_with(&root), "{what}: {text}");
            false
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

/// Damages the bytes: bits that are flipped, bytes that are replaced, an end that is missing.
fn damage(random: &mut Random, bytes: &mut Vec<u8>, header: usize) {
    let mut below = |limit: usize| ((random.next() + 1.0) / 2.0 * limit as f32) as usize % limit.max(1);
    for _ in 0..=below(3) {
        // Most damage goes to the header, where it matters.
        let range = if below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = below(range);
        match below(10) {
            0 => bytes.truncate(at.max(1)),
            1..4 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'"', b'{'][below(9)],
            _ => bytes[at] ^= 1 << below(8),
        }
    }
}

#[test]
fn damaged_files_of_adapters_are_refused_or_compute() {
    let (model, mut random) = (base(), Random(5));
    let folder = copied("llama-layers");
    let matrices = folder.path().join("adapter_model.safetensors");
    let gguf = folder.path().join("adapter.gguf");
    let original = [fs::read(&matrices).unwrap(), fs::read(data().join("adapters/gguf/llama-layers.gguf")).unwrap()];
    let mut loaded = [0, 0];
    for case in 0..3000 {
        let kind = case % 2;
        let mut bytes = original[kind].clone();
        damage(&mut random, &mut bytes, [700, 900][kind]);
        rewrite([&matrices, &gguf][kind], &bytes);
        let path = [folder.path(), &gguf][kind];
        loaded[kind] += usize::from(try_load(&model, path, &format!("case {case}")));
    }
    // Damage of a number leaves an adapter, and most other damage does not.
    assert!(loaded.iter().all(|count| (10..1400).contains(count)), "{loaded:?}");
}

#[test]
fn every_setting_with_another_type_is_refused_or_without_influence() {
    let model = base();
    let folder = copied("llama-patterns");
    let path = folder.path().join("adapter_config.json");
    let original: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for key in original.as_object().unwrap().keys() {
        for value in ODD_VALUES {
            let mut config = original.clone();
            config[key] = serde_json::from_str(value).unwrap();
            rewrite(&path, config.to_string());
            try_load(&model, folder.path(), &format!("{key}: {value}"));
        }
    }
    let text = original.to_string();
    for end in (0..text.len()).step_by(7) {
        rewrite(&path, &text[..end]);
        assert!(!try_load(&model, folder.path(), &format!("the first {end} bytes")));
    }
}

#[test]
fn an_adapter_without_a_matrix_is_refused() {
    let model = base();
    let folder = copied("llama-layers");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    // Every other name is unknown, and one of a pair is not enough.
    for (from, to, found) in
        [("lora_A", "lora_C", "lora_C"), ("q_proj", "x_proj", "_proj.lora_A"), ("layers.1", "layers.7", "_proj.lora_A")]
    {
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, &changed).unwrap();
        let error = model.load_adapter("a", folder.path()).unwrap_err();
        assert!(error.to_string().contains(found), "{error}");
    }
    fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
    let error = model.load_adapter("a", folder.path()).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { place: Place::Key(key), .. } if key == "peft_type"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = model.load_adapter("a", folder.path()).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { .. }), "{error}");
}
