//! Every family in unusual shapes, with every switch that changes the result, against the logits of transformers. See
//! tests/data/README.md.

use std::path::Path;

use crate::hf_folder::{Checkpoint, Stored};
use crate::logits::{bits, distance, feed, load, logits, sample_if_scalar, unknown_fingerprint};
use nybble::model::hf::HfFolder;
use nybble::model::{Quantize, convert};
use nybble::quant::block::BlockType;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

/// Tokens of each variant.
const TOKENS: usize = 40;

struct Variant {
    name: String,
    folder: TempDir,
    input: Vec<u32>,
    /// `(TOKENS, vocabulary)`
    logits: Vec<f32>,
}

fn variants() -> Vec<Variant> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/variants");
    let mut files: Vec<_> = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 114);
    let variant = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().as_ref().unwrap();
        let json = |key: &str| serde_json::from_str(&metadata[key]).unwrap();
        let tensors: Vec<(String, Vec<usize>)> = serde_json::from_value(json("tensors")).unwrap();
        let mut checkpoint = Checkpoint::new(json("config"));
        checkpoint.tensors = tensors.into_iter().map(|(name, shape)| stored(name, shape)).collect();
        let ids: Vec<i32> = bytemuck::pod_collect_to_vec(file.tensor("input_ids").unwrap().data());
        Variant {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            folder: checkpoint.write(),
            input: ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect(),
            logits: bytemuck::pod_collect_to_vec(file.tensor("logits").unwrap().data()),
        }
    };
    files.iter().map(variant).collect()
}

/// A tensor with the values that follow from its name, as in `scripts/make_variants.py`.
fn stored(name: String, shape: Vec<usize>) -> Stored {
    let seed = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325, |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let value = |count: u64| {
        let mut z = seed.wrapping_add(count.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        let even = ((z ^ z >> 31) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match shape.len() {
            1 if name.ends_with(".bias") => even / 4.0,
            1 => 1.0 + even / 4.0,
            _ => even / 2.0,
        }
    };
    let count = shape.iter().product::<usize>() as u64;
    let bytes = (1..=count).flat_map(|count| value(count).to_le_bytes()).collect();
    Stored { name, shape, dtype: Dtype::F32, bytes }
}

#[test]
fn folder_and_file_compute_what_transformers_computes() {
    let mut faults = Vec::new();
    for Variant { name, folder, input, logits: expected } in variants() {
        let path = folder.path().join("model.gguf");
        let source = match HfFolder::open(folder.path()) {
            Ok(source) => source,
            Err(error) => {
                faults.push(format!("{name}: {error}"));
                continue;
            }
        };
        convert::convert(&source, &Default::default(), &path, BlockType::F32, None).unwrap();
        for (what, path) in [("as a folder", folder.path()), ("as a file", &path)] {
            // Some ways to stretch a rotation depend on the context.
            let model = load(path, Quantize::Stored, 2, Some(TOKENS));
            let worst = distance(&logits(&model, &input, TOKENS), &expected);
            if worst.is_nan() || worst > 2e-4 {
                faults.push(format!("{name}, {what}: the logits differ by up to {worst}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn bits_do_not_depend_on_threads_batches_or_other_sessions() {
    for Variant { name, folder, input, .. } in sample_if_scalar(variants()) {
        for quantize in [Quantize::Stored, Quantize::Int4] {
            let [one, two] = [1, 2].map(|threads| load(folder.path(), quantize, threads, Some(TOKENS)));
            let whole = bits(&logits(&one, &input, TOKENS));
            for piece in [1, 7] {
                assert!(bits(&logits(&two, &input, piece)) == whole, "{name}, {quantize:?}: pieces of {piece}");
            }
            // In one piece, next to another session.
            let (mut first, mut second) = (two.session(), two.session());
            feed(&two, &mut second, &input[..5]);
            assert!(bits(&feed(&two, &mut first, &input)) == whole, "{name}, {quantize:?}: next to another session");
        }
    }
}

#[test]
fn every_variant_keeps_the_fingerprint_of_saved_sessions() {
    let unknown = |Variant { name, folder, .. }: &Variant| {
        let model = load(folder.path(), Quantize::Int8, 1, Some(TOKENS));
        unknown_fingerprint(&format!("variant {name} Int8"), &model)
    };
    let unknown: Vec<String> = variants().iter().filter_map(unknown).collect();
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
}
