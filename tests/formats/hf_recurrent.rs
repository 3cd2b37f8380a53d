//! Folders of families with recurrent layers, tensor by tensor and key by key against llama.cpp's files of the same
//! checkpoints.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::hf_folder::{number, open, read, recurrent};
use nybble::format::Checkpoint;
use nybble::format::gguf::{Gguf, Value};
use nybble::model::convert::convert_path;
use nybble::model::hf::HfFolder;
use nybble::quant::block::BlockType;
use serde_json::json;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// The checkpoints with a folder and a file of llama.cpp's converter.
const NAMES: [&str; 17] = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "granitemoehybrid-attention",
    "granitemoehybrid-dense",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "nemotron_h",
    "nemotron_h-moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
];

/// Keys of llama.cpp's files that ours lack, and why.
const NOT_WRITTEN: &[(&str, &str)] = &[
    ("nemotron_h.rope.dimension_count", "queries are not rotated"),
    ("nemotron_h_moe.rope.dimension_count", "queries are not rotated"),
    ("nemotron_h_moe.expert_group_count", "one group is none"),
    ("nemotron_h_moe.expert_group_used_count", "one group is none"),
    ("granite.expert_count", "0 is none"),
    ("granite.expert_used_count", "0 is none"),
    ("granitehybrid.expert_count", "0 is none"),
    ("granitehybrid.expert_used_count", "0 is none"),
];

/// Keys of ours that llama.cpp's files lack, without the family: defaults of its readers, and our own.
const ADDED: &[&str] = &[
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_weights_norm",
    "hidden_activation",
    "leading_dense_block_count",
    "rope.dimension_count",
    "rope.freq_base",
    "ssm.dt_b_c_rms_epsilon",
    "vocab_size",
];

/// The numbers of a value, or of the elements of a list.
fn numbers(value: &Value) -> Option<Vec<f64>> {
    let floats = |list: &[f32]| list.iter().map(|number| f64::from(*number)).collect();
    match value.as_array() {
        Some(all) => match all.as_bools() {
            Some(flags) => Some(flags.iter().map(|flag| f64::from(u8::from(*flag))).collect()),
            None => all
                .to_integers::<i32>()
                .map(|all| all.into_iter().map(f64::from).collect())
                .or_else(|| all.to_f32().map(|all| floats(&all))),
        },
        None => {
            let integer = value.as_u32().or(value.as_bool().map(u32::from));
            integer.map(f64::from).or(value.as_f32().map(f64::from)).map(|number| vec![number])
        }
    }
}

/// Whether two values say the same. One number stands for a list of equal ones.
fn agree(ours: &Value, theirs: &Value) -> bool {
    match (numbers(ours), numbers(theirs)) {
        (Some(ours), Some(theirs)) => {
            let same = |all: &[f64], one: f64| all.iter().all(|number| *number == one);
            ours == theirs || ours.len() == 1 && same(&theirs, ours[0]) || theirs.len() == 1 && same(&ours, theirs[0])
        }
        _ => ours == theirs,
    }
}

/// The dimensions of a tensor, and the bits of its values.
fn tensor(checkpoint: &dyn Checkpoint, name: &str) -> (Vec<usize>, Vec<u32>) {
    let tensor = checkpoint.tensor(name).unwrap_or_else(|| panic!("{name} is there"));
    assert_eq!(tensor.rows.block_type(), BlockType::F32, "{name}");
    let (mut bits, mut scratch) = (Vec::new(), Vec::new());
    for row in 0..tensor.dims[1..].iter().product() {
        let row = tensor.rows.row(row, &mut scratch);
        bits.extend(row.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
    }
    (tensor.dims, bits)
}

/// The faults of the folder as the GGUF file with the same checkpoint.
fn faults(name: &str, folder: &HfFolder, file: &Gguf) -> Vec<String> {
    let mut faults = Vec::new();
    let own = |checkpoint: &dyn Checkpoint| -> BTreeSet<String> {
        let keys = checkpoint.metadata().iter().map(|(key, _)| key.to_owned());
        keys.filter(|key| !key.starts_with("general.") && !key.starts_with("tokenizer.")).collect()
    };
    let (ours, theirs) = (own(folder), own(file));
    let architecture = |checkpoint: &dyn Checkpoint| checkpoint.metadata().get("general.architecture").cloned();
    if architecture(folder) != architecture(file) {
        faults.push(format!("{name}: {:?}, expected {:?}", architecture(folder), architecture(file)));
    }
    for key in &theirs {
        let expected = Checkpoint::metadata(file).get(key).unwrap();
        match Checkpoint::metadata(folder).get(key) {
            None if NOT_WRITTEN.iter().any(|(known, _)| known == key) => {}
            None => faults.push(format!("{name}: {key} is missing, expected {expected:?}")),
            Some(found) if agree(found, expected) => {}
            Some(found) => faults.push(format!("{name}: {key} is {found:?}, expected {expected:?}")),
        }
    }
    for key in ours.difference(&theirs) {
        if !ADDED.iter().any(|known| key.split_once('.').is_some_and(|(_, key)| key == *known)) {
            faults.push(format!("{name}: {key} is only ours"));
        }
    }
    let names = |checkpoint: &dyn Checkpoint| -> BTreeSet<String> {
        checkpoint.names().into_iter().map(str::to_owned).collect()
    };
    let (ours, theirs) = (names(folder), names(file));
    for tensor in ours.symmetric_difference(&theirs) {
        faults.push(format!("{name}: {tensor} is only {}", if ours.contains(tensor) { "ours" } else { "theirs" }));
    }
    for common in ours.intersection(&theirs) {
        let ((dims, bits), (expected_dims, expected)) = (tensor(folder, common), tensor(file, common));
        if dims != expected_dims {
            faults.push(format!("{name}: {common}: {dims:?}, expected {expected_dims:?}"));
        }
        // Exponentials are rounded in other ways elsewhere.
        let tolerance = u32::from(common.ends_with("ssm_a"));
        let differs = bits.iter().zip(&expected).filter(|(a, b)| a.abs_diff(**b) > tolerance).count();
        if bits.len() != expected.len() || differs > 0 {
            faults.push(format!("{name}: {common}: {differs} of {} values differ", expected.len()));
        }
    }
    faults
}

#[test]
fn folders_become_the_files_of_llama_cpp() {
    let mut all = Vec::new();
    for name in NAMES {
        let file = Gguf::open(data().join("gguf").join(format!("{name}.gguf"))).unwrap();
        match HfFolder::open(data().join("goldens").join(name)) {
            Ok(folder) => all.extend(faults(name, &folder, &file)),
            Err(error) => all.push(format!("{name}: {error}")),
        }
    }
    assert!(all.is_empty(), "{all:#?}");
}

#[test]
fn families_that_llama_cpp_does_not_have_get_the_names_of_their_relatives() {
    let folder = open(&recurrent("olmo_hybrid"));
    let expected: &[(&str, &[usize])] = &[
        ("blk.0.attn_norm.weight", &[32]),
        ("blk.0.ffn_norm.weight", &[32]),
        ("blk.0.attn_qkv.weight", &[32, 96]),
        ("blk.0.ssm_conv1d.weight", &[4, 96]),
        ("blk.0.attn_gate.weight", &[32, 48]),
        ("blk.0.ssm_alpha.weight", &[32, 2]),
        ("blk.0.ssm_beta.weight", &[32, 2]),
        ("blk.0.ssm_dt.bias", &[2]),
        ("blk.0.ssm_a", &[2]),
        ("blk.0.ssm_norm.weight", &[24]),
        ("blk.0.ssm_out.weight", &[48, 32]),
        ("blk.3.post_attention_norm.weight", &[32]),
        ("blk.3.post_ffw_norm.weight", &[32]),
        ("blk.3.attn_q_norm.weight", &[32]),
    ];
    for (name, dims) in expected {
        assert_eq!(read(&folder, name).0, *dims, "{name}");
    }
    assert!(folder.tensor("blk.3.attn_norm.weight").is_none() && folder.tensor("blk.0.post_ffw_norm.weight").is_none());
    let source = recurrent("olmo_hybrid");
    let rows = read(&folder, "blk.0.attn_qkv.weight").1;
    for (part, first) in [("q", 0), ("k", 24), ("v", 48)] {
        assert_eq!(
            rows[first * 32],
            source.value(&format!("model.layers.0.linear_attn.{part}_proj.weight"), 0),
            "{part}"
        );
    }
    for (key, expected) in [
        ("state_size", 12.0),
        ("inner_size", 48.0),
        ("group_count", 2.0),
        ("time_step_rank", 2.0),
        ("norm_epsilon", 1e-5),
    ] {
        assert_eq!(number(&folder, &format!("olmo-hybrid.ssm.{key}")), expected, "{key}");
    }
    let folder = open(&recurrent("rwkv"));
    let expected: &[(&str, &[usize])] = &[
        ("token_embd_norm.bias", &[32]),
        ("output_norm.bias", &[32]),
        ("output.weight", &[32, 288]),
        ("blk.2.attn_norm.bias", &[32]),
        ("blk.2.attn_norm_2.weight", &[32]),
        ("blk.2.time_mix_lerp_k.weight", &[32]),
        ("blk.2.time_mix_decay.weight", &[32]),
        ("blk.2.time_mix_output.weight", &[32, 32]),
        ("blk.2.channel_mix_lerp_r.weight", &[32]),
        ("blk.2.channel_mix_key.weight", &[32, 48]),
        ("blk.2.channel_mix_value.weight", &[48, 32]),
    ];
    for (name, dims) in expected {
        assert_eq!(read(&folder, name).0, *dims, "{name}");
    }
    for (key, expected) in [
        ("attention.head_count", 0.0),
        ("attention.layer_norm_epsilon", 1e-5),
        ("context_length", 256.0),
        ("feed_forward_length", 48.0),
        ("output_norm_epsilon", 1e-5),
        ("rescale_every", 6.0),
    ] {
        assert_eq!(number(&folder, &format!("rwkv4.{key}")), expected, "{key}");
    }
    assert_eq!(number(&open(&recurrent("rwkv").set("rescale_every", json!(-1))), "rwkv4.rescale_every"), 0.0);
}

#[test]
fn small_tensors_of_mixers_stay_floats_in_converted_files() {
    for name in ["mamba", "mamba2", "kimi_linear", "qwen3_5_moe", "lfm2", "rwkv"] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.gguf");
        convert_path(&data().join("goldens").join(name), &out, BlockType::Q8_0, None).unwrap();
        let file = Gguf::open(&out).unwrap();
        let mut blocks = 0;
        for (tensor, block_type) in file.tensors().iter().map(|tensor| (tensor.name(), tensor.block_type())) {
            let small = ["conv1d", "shortconv.conv", "_norm", "time_mix_lerp", "ffn_gate_inp.weight", ".bias"];
            if small.iter().any(|part| tensor.contains(part)) || tensor.ends_with("ssm_a") || tensor.ends_with("ssm_d")
            {
                assert_eq!(block_type, BlockType::F32, "{name}: {tensor}");
            }
            blocks += usize::from(block_type == BlockType::Q8_0);
        }
        assert!(blocks > 4, "{name}: matrices are in blocks");
    }
}
