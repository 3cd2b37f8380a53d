//! Configurations of families with recurrent layers: spellings as published, switches, and what is refused.

use crate::hf_folder::{Checkpoint as Folder, ODD_VALUES, Stored, assert_refused, has, number, open, read, recurrent};
use nybble::format::Checkpoint as _;
use nybble::format::gguf::Value;
use nybble::model::hf::HfFolder;
use serde_json::{Value as Json, json};

// --- Spellings of configurations --------------------------------------------------------------------------------------

/// The checkpoint with the keys of `set`, and without those of `unset`.
fn respelled(name: &str, unset: &[&str], set: &Json) -> Folder {
    let folder = unset.iter().fold(recurrent(name), |folder, key| folder.unset(key));
    set.as_object().unwrap().iter().fold(folder, |folder, (key, value)| folder.set(key, value.clone()))
}

#[test]
fn configurations_as_published_mean_what_those_of_transformers_mean() {
    let rope = json!({"rope_theta": 10000.0, "rope_scaling": null});
    let with = |more: Json| {
        let mut all = rope.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let kinds = ["mamba", "mamba", "attention", "mamba"];
    let linear = json!({
        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4,
    });
    let published: &[(&str, &[&str], Json)] = &[
        ("granitemoehybrid", &["rope_parameters"], with(json!({"layer_types": kinds, "mamba_d_head": "auto"}))),
        ("bamba", &["rope_parameters"], with(json!({"attn_rotary_emb": 4, "mamba_d_head": "auto"}))),
        ("bamba", &["rope_parameters"], with(json!({}))),
        (
            "nemotron_h",
            &["layers_block_type", "n_groups", "conv_kernel", "use_conv_bias", "head_dim"],
            json!({
                "hybrid_override_pattern": "M-M*-", "num_hidden_layers": 5, "mamba_n_groups": 2, "mamba_d_conv": 4,
                "mamba_conv_bias": true, "attention_head_dim": 16, "time_step_limit": [0.0, "Infinity"],
            }),
        ),
        ("nemotron_h-moe", &["layers_block_type"], json!({"hybrid_override_pattern": "MEM*E", "num_hidden_layers": 5})),
        (
            "kimi_linear",
            &[
                "layer_types",
                "mlp_layer_types",
                "linear_conv_kernel_dim",
                "linear_head_dim",
                "linear_num_heads",
                "qk_head_dim",
            ],
            json!({"linear_attn_config": linear, "first_k_dense_replace": 1, "mla_use_nope": true, "moe_layer_freq": 1}),
        ),
        (
            "qwen3_next",
            &["layer_types", "rope_parameters"],
            with(json!({"full_attention_interval": 4, "partial_rotary_factor": 0.5})),
        ),
        (
            "qwen3_5",
            &["layer_types", "rope_parameters"],
            json!({
                "rope_theta": 10000.0, "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"},
                "attn_output_gate": true,
            }),
        ),
        (
            "lfm2",
            &["layer_types", "rope_parameters", "intermediate_size"],
            with(json!({"full_attn_idxs": [2], "block_ff_dim": 48})),
        ),
        ("olmo_hybrid", &["layer_types", "rope_parameters", "linear_value_head_dim"], with(json!({}))),
        ("mamba", &["intermediate_size"], json!({"n_layer": 2, "d_model": 32})),
        ("mamba2", &["time_step_limit"], json!({})),
        ("rwkv", &["attention_hidden_size"], json!({"rescale_every": 6})),
    ];
    for (name, unset, set) in published {
        let (ours, theirs) = (open(&respelled(name, unset, set)), open(&recurrent(name)));
        let keys = |folder: &HfFolder| -> Vec<(String, Value)> {
            let all = folder.metadata().iter().filter(|(key, _)| *key != "general.name");
            all.map(|(key, value)| (key.to_owned(), value.clone())).collect()
        };
        assert_eq!(keys(&ours), keys(&theirs), "{name}");
        for tensor in theirs.names() {
            assert_eq!(read(&ours, tensor), read(&theirs, tensor), "{name}: {tensor}");
        }
    }
}

/// Removes the number of each expert from names, and stacks what they name, as transformers holds it in memory.
fn fused(mut folder: Folder) -> Folder {
    let experts: Vec<Stored> =
        folder.tensors.iter().filter(|tensor| tensor.name.contains("experts.")).cloned().collect();
    folder.tensors.retain(|tensor| !tensor.name.contains("experts."));
    for layer in 0..4 {
        let of = |expert: usize, part: &str| {
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight");
            experts.iter().find(|tensor| tensor.name == name).unwrap().bytes.clone()
        };
        let gate_up = (0..6).flat_map(|expert| [of(expert, "gate"), of(expert, "up")].concat()).collect();
        let down = (0..6).flat_map(|expert| of(expert, "down")).collect();
        let dtype = experts[0].dtype;
        for (part, shape, bytes) in [("gate_up", [6, 32, 32], gate_up), ("down", [6, 32, 16], down)] {
            let name = format!("model.layers.{layer}.mlp.experts.{part}_proj");
            folder.tensors.push(Stored { name, shape: shape.to_vec(), dtype, bytes });
        }
    }
    folder
}

#[test]
fn tensors_under_other_names_are_the_same() {
    let (ours, theirs) = (open(&fused(recurrent("qwen3_5_moe"))), open(&recurrent("qwen3_5_moe")));
    for part in ["gate", "up", "down"] {
        let name = format!("blk.1.ffn_{part}_exps.weight");
        assert_eq!(read(&ours, &name), read(&theirs, &name), "{name}");
    }
    let (ours, theirs) = (open(&recurrent("qwen3_5-nested")), open(&recurrent("qwen3_5")));
    assert_eq!(ours.names(), theirs.names());
    let mut codestral = recurrent("mamba2");
    codestral.tensors.iter_mut().for_each(|tensor| tensor.name.insert_str(0, "model."));
    assert_eq!(read(&open(&codestral), "output.weight"), read(&open(&recurrent("mamba2")), "output.weight"));
    // Published checkpoints of OLMo Hybrid have convolutions as wide as what they read, or all in one tensor.
    let mut hybrid = recurrent("olmo_hybrid");
    let parts = ["q", "k", "v"].map(|part| format!("model.layers.0.linear_attn.{part}_conv1d.weight"));
    let bytes = parts.iter().flat_map(|part| hybrid.find(part).bytes.clone()).collect::<Vec<_>>();
    let mut one = parts.iter().fold(hybrid.clone(), |folder, part| folder.without(part));
    let of = |name: &str, shape: &[usize], bytes: &[u8]| Stored {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: safetensors::Dtype::F32,
        bytes: bytes.to_vec(),
    };
    one.tensors.push(of("model.layers.0.linear_attn.conv1d.weight", &[96, 1, 4], &bytes));
    for (part, rows) in parts.iter().zip([0..24, 24..48, 48..96]) {
        *hybrid.find(part) = of(part, &[rows.len(), 1, 4], &bytes[rows.start * 16..rows.end * 16]);
    }
    for folder in [hybrid, one] {
        let name = "blk.0.ssm_conv1d.weight";
        assert_eq!(read(&open(&folder), name), read(&open(&recurrent("olmo_hybrid")), name));
    }
}

// --- Switches ----------------------------------------------------------------------------------------------------------

#[test]
fn limits_of_time_steps_become_keys() {
    for (name, family) in [("mamba2", "mamba2"), ("bamba", "granitehybrid"), ("falcon_h1", "falcon-h1")] {
        let limited = open(&recurrent(name).set("time_step_limit", json!([0.25, 0.5])));
        assert_eq!(number(&limited, &format!("{family}.ssm.time_step_min")), 0.25);
        assert_eq!(number(&limited, &format!("{family}.ssm.time_step_max")), 0.5);
        let open_ended = open(&recurrent(name).set("time_step_limit", json!([0.25, {"__float__": "Infinity"}])));
        assert!(!has(&open_ended, &format!("{family}.ssm.time_step_max")));
        assert_refused(&recurrent(name).set("time_step_limit", json!([1.0, 0.5])), &["time_step_limit", "[1.0,0.5]"]);
    }
}

#[test]
fn switches_of_delta_rules_become_keys() {
    let hybrid = || recurrent("olmo_hybrid");
    assert_eq!(number(&open(&hybrid()), "olmo-hybrid.ssm.beta_scale"), 2.0);
    assert!(!has(&open(&hybrid().set("linear_allow_neg_eigval", json!(false))), "olmo-hybrid.ssm.beta_scale"));
    let plain = hybrid().set("rope_parameters", json!({"rope_theta": null, "rope_type": "default"}));
    let flags = open(&plain).metadata().get("olmo-hybrid.attention.rope_pattern").cloned();
    assert_eq!(flags, Some(Value::from(vec![false; 4])));
    assert!(!has(&open(&hybrid()), "olmo-hybrid.attention.rope_pattern"));
    let listed = ["linear_attention", "full_attention", "linear_attention", "full_attention"];
    let key = "qwen35.attention.recurrent_layers";
    let every_other = recurrent("qwen3_5").set("full_attention_interval", json!(2)).unset("layer_types");
    assert_refused(&every_other, &["model.layers.1.", "missing"]);
    assert_refused(&recurrent("qwen3_5").set("layer_types", json!(listed)), &["model.layers.1.", "missing"]);
    assert_eq!(open(&recurrent("qwen3_5")).metadata().get(key), Some(&Value::from(vec![true, true, true, false])));
}

#[test]
fn rotation_of_granite_is_a_key() {
    let key = "granitehybrid.rope.scaling.finetuned";
    assert_eq!(open(&recurrent("granitemoehybrid")).metadata().get(key), Some(&Value::from(false)));
    let rotated = open(&recurrent("granitemoehybrid").set("position_embedding_type", json!("rope")));
    assert_eq!(rotated.metadata().get(key), Some(&Value::from(true)));
    assert_eq!(number(&rotated, "granitehybrid.context_length"), 256.0);
}

#[test]
fn factors_of_falcon_h1_become_part_of_weights_and_biases() {
    let folder = recurrent("falcon_h1")
        .set("attention_bias", json!(true))
        .set("mamba_proj_bias", json!(true))
        .set("projectors_bias", json!(true))
        .set("mlp_bias", json!(true));
    let biases: &[(&str, &[usize])] = &[
        ("self_attn.q_proj", &[64]),
        ("self_attn.k_proj", &[32]),
        ("self_attn.v_proj", &[32]),
        ("self_attn.o_proj", &[32]),
        ("mamba.in_proj", &[132]),
        ("mamba.out_proj", &[32]),
        ("feed_forward.gate_proj", &[48]),
        ("feed_forward.up_proj", &[48]),
        ("feed_forward.down_proj", &[32]),
    ];
    let folder = (0..2)
        .flat_map(|layer| biases.iter().map(move |bias| (layer, bias)))
        .fold(folder, |folder, (layer, (name, shape))| {
            folder.tensor(&format!("model.layers.{layer}.{name}.bias"), shape)
        });
    let opened = open(&folder);
    let factors = |name: &str, source: &str| -> Vec<f32> {
        let found = read(&opened, &format!("blk.0.{name}.bias")).1;
        let source = format!("model.layers.0.{source}.bias");
        found.iter().enumerate().map(|(i, value)| value / folder.value(&source, i)).collect()
    };
    // Biases of queries and values are added after the factor of the input.
    for (name, source, factor) in [
        ("attn_v", "self_attn.v_proj", 1.0),
        ("attn_k", "self_attn.k_proj", 0.6),
        ("attn_output", "self_attn.o_proj", 0.8),
        ("ssm_out", "mamba.out_proj", 0.7),
        ("ffn_gate", "feed_forward.gate_proj", 0.9),
        ("ffn_up", "feed_forward.up_proj", 1.0),
        ("ffn_down", "feed_forward.down_proj", 0.8),
    ] {
        assert!(factors(name, source).iter().all(|found| (found - factor).abs() < 1e-6), "{name}");
    }
    let mixer = factors("ssm_in", "mamba.in_proj");
    for (rows, factor) in [(0..48, 0.9), (48..96, 0.8), (96..112, 0.7), (112..128, 1.1), (128..132, 1.2)] {
        assert!(mixer[rows.clone()].iter().all(|found: &f32| (found - factor).abs() < 1e-6), "{rows:?}");
    }
    let key = "falcon-h1.ssm.norm_before_gate";
    assert!(!has(&opened, key), "a mixer without a norm");
    let mut normed = recurrent("falcon_h1").set("mamba_rms_norm", json!(true));
    for layer in 0..2 {
        normed = normed.tensor(&format!("model.layers.{layer}.mamba.norm.weight"), &[48]);
    }
    assert_eq!(open(&normed).metadata().get(key), Some(&Value::from(true)));
    assert_eq!(read(&open(&normed), "blk.0.ssm_norm.weight").0, [48, 1]);
    assert!(!has(&open(&normed.set("mamba_norm_before_gate", json!(false))), key));
    let tied = recurrent("falcon_h1").set("tie_word_embeddings", json!(true)).without("lm_head.weight");
    let embedding = tied.value("model.embed_tokens.weight", 0);
    assert_eq!(read(&open(&tied), "output.weight").1[0], embedding * 0.7);
    assert_eq!(read(&open(&tied), "token_embd.weight").1[0], embedding * 3.0);
}

#[test]
fn biases_of_mixers_follow_the_configuration() {
    let mamba = recurrent("mamba")
        .set("use_bias", json!(true))
        .set("use_conv_bias", json!(false))
        .listed(
            "backbone.layers.",
            "0.mixer.in_proj.bias 128, 0.mixer.out_proj.bias 32, 1.mixer.in_proj.bias 128, 1.mixer.out_proj.bias 32",
        )
        .without("backbone.layers.0.mixer.conv1d.bias")
        .without("backbone.layers.1.mixer.conv1d.bias");
    let opened = open(&mamba);
    assert!(opened.tensor("blk.0.ssm_conv1d.bias").is_none());
    assert_eq!(read(&opened, "blk.1.ssm_in.bias").0, [128]);
    assert_refused(&mamba.set("use_bias", json!(false)), &["in_proj.bias", "expected none"]);
    let lfm2 = recurrent("lfm2").set("conv_bias", json!(true)).listed(
        "model.layers.",
        "0.conv.conv.bias 32, 0.conv.in_proj.bias 96, 0.conv.out_proj.bias 32, 1.conv.conv.bias 32, \
         1.conv.in_proj.bias 96, 1.conv.out_proj.bias 32, 3.conv.conv.bias 32, 3.conv.in_proj.bias 96, \
         3.conv.out_proj.bias 32",
    );
    assert_eq!(read(&open(&lfm2), "blk.3.shortconv.in_proj.bias").0, [96]);
    let nemotron = recurrent("nemotron_h").set("mlp_bias", json!(true)).set("use_bias", json!(true)).listed(
        "backbone.layers.",
        "1.mixer.up_proj.bias 48, 1.mixer.down_proj.bias 32, 4.mixer.up_proj.bias 48, 4.mixer.down_proj.bias 32, \
         0.mixer.in_proj.bias 196, 0.mixer.out_proj.bias 32, 2.mixer.in_proj.bias 196, 2.mixer.out_proj.bias 32",
    );
    let opened = open(&nemotron);
    assert_eq!(read(&opened, "blk.4.ffn_up.bias").0, [48]);
    assert_eq!(read(&opened, "blk.2.ssm_in.bias").0, [196]);
}

#[test]
fn experts_of_nemotron_may_work_on_a_latent_vector_next_to_dense_layers() {
    let mut folder = recurrent("nemotron_h-moe").set("moe_latent_size", json!(8));
    for layer in [1, 4] {
        for expert in 0..6 {
            for (part, shape) in [("up", [16, 8]), ("down", [8, 16])] {
                let name = format!("backbone.layers.{layer}.mixer.experts.{expert}.{part}_proj.weight");
                folder = folder.without(&name).tensor(&name, &shape);
            }
        }
        folder =
            folder.listed(&format!("backbone.layers.{layer}.mixer."), "fc1_latent_proj 8x32, fc2_latent_proj 32x8");
    }
    let opened = open(&folder);
    assert_eq!(number(&opened, "nemotron_h_moe.moe_latent_size"), 8.0);
    assert_eq!(read(&opened, "blk.1.ffn_up_exps.weight").0, [8, 16, 6]);
    assert_eq!(read(&opened, "blk.1.ffn_down_exps.weight").0, [16, 8, 6]);
    assert_eq!(read(&opened, "blk.1.ffn_latent_down.weight").0, [32, 8]);
    let dense = recurrent("nemotron_h").tensors.into_iter().filter(|tensor| tensor.name.contains("layers.4."));
    let mut both =
        recurrent("nemotron_h-moe").set("hybrid_override_pattern", json!("MEM*-")).unset("layers_block_type");
    both.tensors.retain(|tensor| !tensor.name.contains("layers.4."));
    both.tensors.extend(dense);
    let widths = open(&both).metadata().get("nemotron_h_moe.feed_forward_length").cloned();
    assert_eq!(widths, Some(Value::from(vec![0u32, 16, 0, 0, 48])));
}

#[test]
fn settings_that_are_not_computed_are_refused() {
    for name in ["mamba", "mamba2", "bamba", "falcon_h1", "jamba", "granitemoehybrid", "qwen3_next", "kimi_linear"] {
        assert_refused(
            &recurrent(name).set("hidden_act", json!("gelu")),
            &["config.json", "hidden_act", "gelu", "silu"],
        );
    }
    let cases: &[(&str, &str, Json, &str)] = &[
        ("nemotron_h", "mamba_hidden_act", json!("gelu"), "supported in this family: silu"),
        ("nemotron_h", "layers_block_type", json!(["mamba", "sparse"]), "linear_attention, full_attention, mlp or moe"),
        ("rwkv", "attention_hidden_size", json!(64), "supported: 32"),
        ("jamba", "attn_layer_offset", json!(4), "less than attn_layer_period, 4"),
        ("mamba2", "n_groups", json!(3), "a divisor of the 4 heads"),
        ("mamba2", "head_dim", json!(8), "64 in all"),
        ("granitemoehybrid", "layer_types", json!(["mamba"]), "a list of 4, one per layer"),
        ("kimi_linear", "moe_layer_freq", json!(2), "supported: 1"),
        ("kimi_linear", "moe_router_activation_func", json!("softmax"), "supported: sigmoid"),
        ("kimi_linear", "mla_use_nope", json!(false), "supported: true"),
        ("qwen3_5", "attn_output_gate", json!(false), "supported: true"),
        ("qwen3_5", "linear_num_value_heads", json!(3), "a multiple of the 2 heads of keys"),
        ("lfm2", "block_ffn_dim_multiplier", json!(0), "more than 0"),
        ("falcon_h1", "ssm_multipliers", json!([1.0]), "5 numbers"),
    ];
    for (name, key, value, expected) in cases {
        assert_refused(&recurrent(name).set(key, value.clone()), &["config.json", key, expected]);
    }
    let lists = json!({"full_attn_layers": [4], "kda_layers": [1, 2]});
    let kimi = recurrent("kimi_linear").unset("layer_types").set("linear_attn_config", lists);
    assert_refused(&kimi, &["linear_attn_config.kda_layers", "layer 3 in neither list"]);
}

#[test]
fn no_value_of_a_recurrent_familys_key_panics() {
    let names =
        ["mamba2", "jamba", "granitemoehybrid", "nemotron_h-moe", "falcon_h1", "lfm2_moe", "qwen3_5", "kimi_linear"];
    for name in names {
        let folder = recurrent(name);
        let written = folder.write();
        let unread = ["id", "version", "dropout", "range", "time_step_", "use_"];
        let keys = folder.config.as_object().expect("an object").keys();
        for key in keys.filter(|key| !unread.iter().any(|part| key.contains(part))) {
            for value in ODD_VALUES {
                let config = folder.clone().set(key, serde_json::from_str(value).expect("a value")).config;
                std::fs::write(written.path().join("config.json"), config.to_string()).expect("config.json");
                if let Ok(folder) = HfFolder::open(written.path()) {
                    folder.names().iter().for_each(|name| drop(read(&folder, name)));
                }
            }
        }
    }
}
