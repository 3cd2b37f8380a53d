//! Keys of GGUF: read, listed or refused.

use std::path::Path;

use super::*;
use crate::error::Error;
use crate::format::gguf::{Array, Metadata, Value};
use crate::format::{Checkpoint, Tensor};
use crate::model::config::namespace::{NEUTRAL, READ, READ_LATENT, READ_MTP, READ_RECURRENT, WITHOUT_INFLUENCE};

struct Keys(Metadata);

impl Checkpoint for Keys {
    fn path(&self) -> &Path {
        Path::new("test.gguf")
    }

    fn metadata(&self) -> &Metadata {
        &self.0
    }

    fn tensor(&self, _: &str) -> Option<Tensor<'_>> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }

    fn release(&self, _: &str) {}
}

/// Keys with which every other one is read that a model of `family` has.
fn metadata(family: &str) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", family);
    metadata.set(format!("{family}.embedding_length"), 4u32);
    for key in ["block_count", "context_length", "attention.head_count", "expert_count"] {
        metadata.set(format!("{family}.{key}"), 2u32);
    }
    metadata.set(format!("{family}.expert_used_count"), if family == "phimoe" { 2u32 } else { 1 });
    metadata.set(format!("{family}.rope.scaling.type"), "yarn");
    // What only some families have.
    for (key, value) in [("altup.num_inputs", 4u32), ("attention.kv_lora_rank", 2), ("rope.dimension_count", 2)] {
        if family == "deepseek2" || (family == "gemma3n" && key.starts_with("altup")) {
            metadata.set(format!("{family}.{key}"), value);
        }
    }
    if arch::by_name(family).is_some_and(|family| family.recurrent.is_some()) {
        for (key, value) in [("conv_kernel", 4u32), ("inner_size", 8), ("state_size", 2), ("time_step_rank", 2)] {
            metadata.set(format!("{family}.ssm.{key}"), value);
        }
        metadata.set(format!("{family}.shortconv.l_cache"), 3u32);
        metadata.set(format!("{family}.kda.head_dim"), 2u32);
        metadata.set(format!("{family}.attention.head_count_kv"), vec![0u32, 1]);
    }
    if family == "kimi-linear" {
        for key in ["attention.key_length_mla", "attention.value_length_mla"] {
            metadata.set(format!("{family}.{key}"), 4u32);
        }
        metadata.set(format!("{family}.attention.kv_lora_rank"), 2u32);
        metadata.set(format!("{family}.rope.dimension_count"), 2u32);
    }
    if family == "deepseek2" {
        metadata.set(format!("{family}.attention.key_length"), 4u32);
        metadata.set(format!("{family}.attention.value_length"), 4u32);
    }
    for key in ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"] {
        metadata.set(format!("{family}.{key}"), 1e-5f32);
    }
    metadata
}

/// The error of a model of `family` in which `key` has `value`.
fn error(family: &str, key: &str, value: Value) -> Option<String> {
    let mut metadata = metadata(family);
    let key = format!("{family}.{key}");
    metadata.set(&*key, value);
    let error = Config::read(&Keys(metadata)).err()?;
    let (Error::Malformed { place, .. } | Error::Unsupported { place, .. }) = &error else {
        panic!("{error}");
    };
    assert!(place.to_string().contains(&key), "{key}: {error}");
    Some(error.to_string())
}

#[test]
fn every_key_that_counts_as_read_is_read() {
    let wrong = || Value::Array(Array::F64(vec![0.5]));
    for key in READ {
        // The kind of norm decides which epsilon is read, that of the router which of its keys are, and so on.
        let families = ["llama", "bloom", "llama4", "phimoe", "gpt-oss", "gemma3n"];
        assert!(families.iter().any(|family| error(family, key, wrong()).is_some()), "{key}");
    }
    for key in READ_LATENT {
        assert!(error("deepseek2", key, wrong()).is_some(), "{key}");
        assert!(error("llama", key, Value::U32(1)).is_some(), "{key}");
    }
    for key in READ_RECURRENT {
        let families = ["qwen35", "kimi-linear", "lfm2", "mamba", "mamba2", "rwkv4"];
        assert!(families.iter().any(|family| error(family, key, wrong()).is_some()), "{key}");
        assert!(error("llama", key, Value::U32(1)).is_some(), "{key}");
    }
    for key in READ_MTP {
        assert!(error("glm4moe", key, wrong()).is_some(), "{key}");
        assert!(error("llama", key, Value::U32(1)).is_some(), "{key}");
    }
}

#[test]
fn layers_of_a_head_do_not_count_as_layers_of_the_model() {
    let mut keys = metadata("glm4moe");
    keys.set("glm4moe.nextn_predict_layers", 1u32);
    let config = Config::read(&Keys(keys)).unwrap();
    assert_eq!((config.layers.len(), config.mtp.map(|mtp| mtp.layers)), (1, Some(1)));
    assert_eq!(Config::read(&Keys(metadata("glm4moe"))).unwrap().mtp, None);
    // A file that counts as many layers for its head as it has has no model.
    let found = error("glm4moe", "nextn_predict_layers", Value::U32(2)).unwrap();
    assert!(found.contains("found 2, expected fewer than the 2 layers"), "{found}");
}

#[test]
fn every_key_of_gguf_is_read_listed_or_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf_keys.json");
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for key in list["keys"].as_array().unwrap().iter().map(|key| key.as_str().unwrap()) {
        let lists = [READ.contains(&key), WITHOUT_INFLUENCE.contains(&key)];
        let mut kept = NEUTRAL.iter().map(|known| known.0);
        if lists == [false, false] {
            let value = Value::from(vec![true, false]);
            assert!(error("llama", key, value).is_some(), "{key}");
        } else {
            assert!(lists != [true, true] && !kept.any(|known| known == key), "{key}: twice");
        }
    }
}

#[test]
fn keys_that_change_the_computation_are_refused_unless_they_are_neutral() {
    for (key, neutral, changed) in [
        ("nextn_predict_layers", Value::U32(0), Value::U32(1)),
        ("rope.scaling.yarn_ext_factor", Value::F32(-1.0), Value::F32(0.5)),
        ("attention.output_scale", Value::F32(1.0), Value::I32(3)),
    ] {
        for family in ["llama", "qwen2", "bloom", "gemma3"] {
            assert_eq!(error(family, key, neutral.clone()), None);
            assert!(error(family, key, changed.clone()).is_some());
        }
    }
    assert_eq!(error("gemma3", "vision.block_count", Value::U32(27)), None);
    assert!(error("gemma3", "visionary", Value::U32(27)).is_some());
}
