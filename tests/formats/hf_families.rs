//! Differences between the families of Hugging Face: order of rows, stacked and fused matrices, windows and rotation.

use crate::hf_folder::{
    Checkpoint as Folder, assert_refused, gemma3, gpt2, has, llama, number, open, order, qwen3, read, renamed,
};
use nybble::format::Checkpoint as _;
use nybble::format::gguf::Value;
use nybble::model::config::Config;
use serde_json::json;

// --- Names and layouts -------------------------------------------------------------------------------------------------

#[test]
fn gpt2_is_transposed_and_may_lack_the_name_prefix() {
    for base in ["transformer.", ""] {
        let folder = gpt2(base);
        let (dims, values) = read(&open(&folder), "blk.0.attn_qkv.weight");
        assert_eq!(dims, [4, 12]);
        let source = format!("{base}h.0.attn.c_attn.weight");
        // Row 1 is column 1 of 4 rows of 12.
        let expected = [1, 13, 25, 37].map(|i| folder.value(&source, i));
        assert_eq!(values[4..8], expected);
        let (_, bias) = read(&open(&folder), "blk.0.attn_qkv.bias");
        assert_eq!(bias[1], folder.value(&format!("{base}h.0.attn.c_attn.bias"), 1));
    }
}

#[test]
fn buffers_of_masks_are_ignored() {
    let folder = gpt2("").tensor("h.0.attn.bias", &[1, 1, 6, 6]).tensor("h.0.attn.masked_bias", &[1]);
    assert_eq!(open(&folder).names(), open(&gpt2("")).names());
}

#[test]
fn gpt_neox_is_reordered_to_queries_keys_values() {
    let config = json!({
        "model_type": "gpt_neox", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 8, "vocab_size": 5, "max_position_embeddings": 6, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu", "rotary_pct": 1.0, "rotary_emb_base": 20000, "use_parallel_residual": false,
    });
    let folder = Folder::new(config)
        .listed("gpt_neox.", "embed_in 5x4, final_layer_norm 4, final_layer_norm.bias 4")
        .listed("", "embed_out 5x4")
        .listed(
            "gpt_neox.layers.0.",
            "input_layernorm 4, input_layernorm.bias 4, post_attention_layernorm 4, post_attention_layernorm.bias 4, \
             attention.query_key_value 12x4, attention.query_key_value.bias 12, attention.dense 4x4, \
             attention.dense.bias 4, mlp.dense_h_to_4h 8x4, mlp.dense_h_to_4h.bias 8, mlp.dense_4h_to_h 4x8, \
             mlp.dense_4h_to_h.bias 4",
        )
        .tensor("gpt_neox.layers.0.attention.rotary_emb.inv_freq", &[1]);
    let expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11];
    let source = "gpt_neox.layers.0.attention.query_key_value";
    assert_eq!(order(&folder, "blk.0.attn_qkv.weight", &format!("{source}.weight")), expected);
    assert_eq!(order(&folder, "blk.0.attn_qkv.bias", &format!("{source}.bias")), expected);
    let opened = open(&folder);
    assert_eq!(number(&opened, "gptneox.rope.freq_base"), 20000.0);
    assert_eq!(opened.metadata().get("gptneox.use_parallel_residual"), Some(&Value::Bool(false)));
}

/// A Falcon of one layer with 4 heads of 2 dimensions, this many rows of queries, keys and values, and these norms.
fn falcon(qkv: usize, norms: &[&str], more: &[(&str, serde_json::Value)]) -> Folder {
    let config = json!({
        "model_type": "falcon", "hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 5,
        "layer_norm_epsilon": 1e-5,
    });
    let mut folder = Folder::new(config)
        .listed("transformer.", "word_embeddings 5x8, ln_f 8, ln_f.bias 8")
        .tensor("transformer.h.0.self_attention.query_key_value.weight", &[qkv, 8])
        .listed("transformer.h.0.", "self_attention.dense 8x8, mlp.dense_h_to_4h 32x8, mlp.dense_4h_to_h 8x32");
    for norm in norms {
        folder = folder.tensor(&format!("transformer.h.0.{norm}.weight"), &[8]);
        folder = folder.tensor(&format!("transformer.h.0.{norm}.bias"), &[8]);
    }
    more.iter().fold(folder, |folder, (key, value)| folder.set(key, value.clone()))
}

#[test]
fn all_three_falcon_architectures_have_norms_and_groups() {
    let source = "transformer.h.0.self_attention.query_key_value.weight";
    let narrow = falcon(12, &["input_layernorm"], &[("ffn_hidden_size", json!(16))]);
    assert_refused(&narrow, &["dense_h_to_4h.weight", "[32, 8]", "[16, 8]"]);
    let one = falcon(12, &["input_layernorm"], &[("multi_query", json!(true)), ("num_kv_heads", json!(4))]);
    assert_eq!(order(&one, "blk.0.attn_qkv.weight", source), (0..12).collect::<Vec<_>>());
    assert_eq!(number(&open(&one), "falcon.attention.head_count_kv"), 1.0);

    let new = [("new_decoder_architecture", json!(true)), ("num_kv_heads", json!(2))];
    let two = falcon(16, &["ln_attn", "ln_mlp"], &new);
    let expected = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15];
    assert_eq!(order(&two, "blk.0.attn_qkv.weight", source), expected);
    // The oldest configuration.
    let first = falcon(16, &["ln_attn", "ln_mlp"], &[("model_type", json!("RefinedWeb")), ("n_head_kv", json!(2))]);
    assert_eq!(order(&first, "blk.0.attn_qkv.weight", source), expected);
    let opened = open(&two);
    assert_eq!(read(&opened, "blk.0.attn_norm_2.weight").1[0], two.value("transformer.h.0.ln_attn.weight", 0));
    assert_eq!(read(&opened, "blk.0.attn_norm.weight").1[0], two.value("transformer.h.0.ln_mlp.weight", 0));
    assert!(!has(&opened, "falcon.attention.max_alibi_bias"));

    let old = [("multi_query", json!(false)), ("alibi", json!(true)), ("parallel_attn", json!(false))];
    let opened = open(&falcon(24, &["input_layernorm", "post_attention_layernorm"], &old));
    assert!(opened.tensor("blk.0.ffn_norm.weight").is_some());
    assert_eq!(opened.metadata().get("falcon.use_parallel_residual"), Some(&Value::Bool(false)));
    assert_eq!(number(&opened, "falcon.attention.max_alibi_bias"), 8.0);
    assert_eq!(number(&opened, "falcon.attention.alibi_scale"), 2.0f32.sqrt().recip());
    assert!(!has(&opened, "falcon.rope.freq_base"));
}

#[test]
fn gemma3_writes_norms_plus_one_scale_window_and_bases() {
    let folder = gemma3().set("rope_local_base_freq", json!(1e4)).set("rope_theta", json!(1e6));
    let opened = open(&folder);
    for (name, source) in [
        ("output_norm", "model.norm"),
        ("blk.0.ffn_norm", "model.layers.0.pre_feedforward_layernorm"),
        ("blk.0.attn_q_norm", "model.layers.0.self_attn.q_norm"),
    ] {
        let first = folder.value(&format!("{source}.weight"), 0);
        assert_eq!(read(&opened, &format!("{name}.weight")).1[0], first + 1.0, "{name}");
    }
    assert_eq!(number(&opened, "gemma3.attention.scale"), 0.25);
    assert_eq!(number(&opened, "gemma3.attention.sliding_window"), 3.0);
    assert_eq!(number(&opened, "gemma3.rope.freq_base"), 1e6);
    assert_eq!(number(&opened, "gemma3.rope.freq_base_swa"), 1e4);
    assert!(opened.tensor("output.weight").is_none());
}

#[test]
fn the_text_part_of_a_multimodal_model_is_read() {
    let mut folder = gemma3();
    for tensor in &mut folder.tensors {
        tensor.name = format!("language_model.{}", tensor.name);
    }
    let text = folder.config.clone();
    folder.config = json!({"model_type": "gemma3", "text_config": text});
    let folder = folder.tensor("vision_tower.vision_model.embeddings.weight", &[3, 3]);
    let opened = open(&folder.tensor("multi_modal_projector.weight", &[3, 3]));
    assert_eq!(opened.names(), open(&gemma3()).names());
    assert_eq!(opened.metadata().get("general.architecture"), Some(&Value::from("gemma3")));
}

#[test]
fn a_cap_of_null_in_gemma2_overrides_the_default() {
    let norms = [
        ("input_layernorm", 8),
        ("post_attention_layernorm", 8),
        ("pre_feedforward_layernorm", 8),
        ("post_feedforward_layernorm", 8),
    ];
    let folder =
        renamed("gemma2", &norms).without("lm_head.weight").set("head_dim", json!(4)).unset("tie_word_embeddings");
    let caps = |folder: &Folder| {
        let config = Config::read(&open(folder)).expect("a configuration");
        (config.attention_cap, config.logit_cap)
    };
    assert_eq!(caps(&folder), (Some(50.0), Some(30.0)));
    let folder = folder.set("attn_logit_softcapping", json!(null)).set("final_logit_softcapping", json!(20));
    assert_eq!(caps(&folder), (None, Some(20.0)));
}

fn with_experts(folder: Folder, gate: &str, experts: &str, [up, down]: [&[&str]; 2], width: usize) -> Folder {
    let mut folder = folder.tensor(&format!("model.layers.0.{gate}.weight"), &[3, 8]);
    for part in ["gate", "up", "down"] {
        folder = folder.without(&format!("model.layers.0.mlp.{part}_proj.weight"));
    }
    for e in 0..3 {
        for name in up {
            folder = folder.tensor(&format!("model.layers.0.{experts}.{e}.{name}.weight"), &[width, 8]);
        }
        for name in down {
            folder = folder.tensor(&format!("model.layers.0.{experts}.{e}.{name}.weight"), &[8, width]);
        }
    }
    folder
}

#[test]
fn mixtral_stacks_its_experts() {
    let folder = llama().set("model_type", json!("mixtral")).set("num_local_experts", json!(3));
    let experts = "block_sparse_moe.experts";
    let folder = with_experts(folder, "block_sparse_moe.gate", experts, [&["w1", "w3"], &["w2"]], 6);
    let opened = open(&folder);
    let (dims, values) = read(&opened, "blk.0.ffn_up_exps.weight");
    assert_eq!(dims, [8, 6, 3]);
    let third = folder.value("model.layers.0.block_sparse_moe.experts.2.w3.weight", 0);
    assert_eq!(values[2 * 6 * 8], third);
    assert_eq!(read(&opened, "blk.0.ffn_down_exps.weight").0, [6, 8, 3]);
    assert_eq!(number(&opened, "llama.expert_count"), 3.0);
    assert_eq!(number(&opened, "llama.expert_used_count"), 2.0);
    assert_eq!(opened.metadata().get("llama.expert_weights_norm"), Some(&Value::Bool(true)));
    let missing = folder.without("model.layers.0.block_sparse_moe.experts.1.w2.weight");
    assert_refused(&missing, &["experts.1.w2.weight", "missing", "[8, 6]"]);
}

#[test]
fn qwen2_moe_has_experts_in_some_layers_and_a_shared_expert() {
    let folder = llama()
        .set("model_type", json!("qwen2_moe"))
        .set("num_experts", json!(3))
        .set("num_experts_per_tok", json!(2))
        .set("moe_intermediate_size", json!(4))
        .set("shared_expert_intermediate_size", json!(2))
        .set("qkv_bias", json!(false));
    let sparse =
        with_experts(folder.clone(), "mlp.gate", "mlp.experts", [&["gate_proj", "up_proj"], &["down_proj"]], 4)
            .tensors([
                ("model.layers.0.mlp.shared_expert.gate_proj.weight", &[2, 8][..]),
                ("model.layers.0.mlp.shared_expert.up_proj.weight", &[2, 8]),
                ("model.layers.0.mlp.shared_expert.down_proj.weight", &[8, 2]),
                ("model.layers.0.mlp.shared_expert_gate.weight", &[1, 8]),
            ]);
    let opened = open(&sparse);
    assert_eq!(read(&opened, "blk.0.ffn_gate_inp_shexp.weight").0, [8]);
    assert_eq!(read(&opened, "blk.0.ffn_down_shexp.weight").0, [2, 8]);
    assert_eq!(number(&opened, "qwen2moe.expert_shared_feed_forward_length"), 2.0);
    assert!(opened.tensor("blk.0.ffn_up.weight").is_none());

    let dense = open(&folder.set("mlp_only_layers", json!([0])));
    assert!(dense.tensor("blk.0.ffn_up.weight").is_some());
    assert!(dense.tensor("blk.0.ffn_up_exps.weight").is_none());
}

#[test]
fn stablelm_stacks_the_norms_of_its_heads() {
    let folder = llama()
        .set("model_type", json!("stablelm"))
        .set("layer_norm_eps", json!(1e-5))
        .set("partial_rotary_factor", json!(0.5))
        .set("qk_layernorm", json!(true))
        .set("use_parallel_residual", json!(true))
        .without("model.layers.0.post_attention_layernorm.weight")
        .tensors([
            ("model.norm.bias", &[8][..]),
            ("model.layers.0.input_layernorm.bias", &[8]),
            ("model.layers.0.self_attn.q_layernorm.norms.0.weight", &[4]),
            ("model.layers.0.self_attn.q_layernorm.norms.1.weight", &[4]),
            ("model.layers.0.self_attn.k_layernorm.norms.0.weight", &[4]),
        ]);
    let opened = open(&folder);
    let (dims, values) = read(&opened, "blk.0.attn_q_norm.weight");
    assert_eq!(dims, [4, 2]);
    assert_eq!(values[4], folder.value("model.layers.0.self_attn.q_layernorm.norms.1.weight", 0));
    assert_eq!(number(&opened, "stablelm.rope.dimension_count"), 2.0);
    assert_refused(
        &folder.clone().set("partial_rotary_factor", json!(0.25)),
        &["partial_rotary_factor", "1 dimensions"],
    );
    // Rotated in halves, so no row moves.
    let q = order(&folder, "blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q, (0..8).collect::<Vec<_>>());
}

#[test]
fn olmo2_has_norms_over_all_heads() {
    let norms = [
        ("post_attention_layernorm", 8),
        ("post_feedforward_layernorm", 8),
        ("self_attn.q_norm", 8),
        ("self_attn.k_norm", 4),
    ];
    let opened = open(&renamed("olmo2", &norms));
    assert_eq!(read(&opened, "blk.0.attn_q_norm.weight").0, [8]);
    assert_eq!(read(&opened, "blk.0.attn_k_norm.weight").0, [4]);
    assert!(opened.tensor("blk.0.attn_norm.weight").is_none());
}

#[test]
fn phi3_keeps_fused_matrices_and_writes_its_factors() {
    let folder = llama()
        .set("model_type", json!("phi3"))
        .without("model.layers.0.self_attn.q_proj.weight")
        .without("model.layers.0.self_attn.k_proj.weight")
        .without("model.layers.0.self_attn.v_proj.weight")
        .without("model.layers.0.mlp.gate_proj.weight")
        .without("model.layers.0.mlp.up_proj.weight")
        .tensor("model.layers.0.self_attn.qkv_proj.weight", &[16, 8])
        .tensor("model.layers.0.mlp.gate_up_proj.weight", &[12, 8])
        .set("sliding_window", json!(7));
    let opened = open(&folder);
    assert_eq!(read(&opened, "blk.0.attn_qkv.weight").0, [8, 16]);
    assert_eq!(read(&opened, "blk.0.ffn_up.weight").0, [8, 12]);
    assert_eq!(number(&opened, "phi3.attention.sliding_window"), 7.0);

    let long = folder
        .set("original_max_position_embeddings", json!(8))
        .set("rope_scaling", json!({"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}));
    let opened = open(&long);
    assert_eq!(read(&opened, "rope_factors_long.weight"), (vec![2], vec![2.0, 3.0]));
    assert_eq!(read(&opened, "rope_factors_short.weight"), (vec![2], vec![1.0, 1.5]));
    assert_eq!(number(&opened, "phi3.rope.scaling.original_context_length"), 8.0);
    // sqrt(1 + ln(32 / 8) / ln(8))
    let expected = (1.0 + 4.0f64.ln() / 8.0f64.ln()).sqrt() as f32;
    assert_eq!(number(&opened, "phi3.rope.scaling.attn_factor"), expected);
    let short = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [2.0, 3.0]});
    assert_refused(&long.set("rope_scaling", short), &["rope_scaling.short_factor", "1 numbers", "2 positive"]);
}

/// An OPT of one layer.
fn opt() -> Folder {
    let config = json!({
        "model_type": "opt", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 6,
        "vocab_size": 5, "max_position_embeddings": 3, "enable_bias": false, "word_embed_proj_dim": 4,
    });
    Folder::new(config)
        .listed("model.decoder.", "embed_tokens 5x4, embed_positions 5x4, final_layer_norm 4, final_layer_norm.bias 4")
        .listed(
            "model.decoder.layers.0.",
            "self_attn_layer_norm 4, self_attn_layer_norm.bias 4, self_attn.q_proj 4x4, self_attn.k_proj 4x4, \
             self_attn.v_proj 4x4, self_attn.out_proj 4x4, final_layer_norm 4, final_layer_norm.bias 4, fc1 6x4, \
             fc2 4x6",
        )
}

#[test]
fn opt_skips_the_two_positions_of_padding() {
    let folder = opt();
    let source = "model.decoder.embed_positions.weight";
    assert_eq!(order(&folder, "position_embd.weight", source), [2, 3, 4]);
}

#[test]
fn opt_350m_has_norms_after_layers_and_a_projected_embedding() {
    let after = opt()
        .without("model.decoder.final_layer_norm.weight")
        .without("model.decoder.final_layer_norm.bias")
        .set("do_layer_norm_before", json!(false));
    let opened = open(&after);
    for (name, source) in [("attn_output_norm", "self_attn_layer_norm"), ("layer_output_norm", "final_layer_norm")] {
        let first = after.value(&format!("model.decoder.layers.0.{source}.bias"), 0);
        assert_eq!(read(&opened, &format!("blk.0.{name}.bias")).1[0], first);
    }
    assert!(opened.tensor("blk.0.attn_norm.weight").is_none());

    let narrow = opt().set("word_embed_proj_dim", json!(2));
    assert_refused(&narrow, &["embed_tokens.weight", "[5, 4]", "[5, 2]"]);
    let narrow = narrow.without("model.decoder.embed_tokens.weight").tensors([
        ("model.decoder.embed_tokens.weight", &[5, 2][..]),
        ("model.decoder.project_in.weight", &[4, 2]),
        ("model.decoder.project_out.weight", &[2, 4]),
    ]);
    let opened = open(&narrow);
    assert_eq!(read(&opened, "token_embd_proj.weight").0, [2, 4]);
    assert_eq!(read(&opened, "output_proj.weight").0, [4, 2]);
    assert_refused(&narrow.without("model.decoder.project_out.weight"), &["project_out.weight", "missing", "[2, 4]"]);
}

#[test]
fn opt_may_lack_the_output_norm() {
    let tensors = opt().without("model.decoder.final_layer_norm.weight").without("model.decoder.final_layer_norm.bias");
    assert_refused(&tensors, &["final_layer_norm.weight", "missing"]);
    assert!(open(&tensors.set("_remove_final_layer_norm", json!(true))).tensor("output_norm.weight").is_none());
}

// --- Windows, rotation and scaling --------------------------------------------------------------------------------------

#[test]
fn a_window_is_written_only_where_transformers_applies_it() {
    let window = |folder: Folder| open(&folder);
    let folder = llama().set("sliding_window", json!(3));
    assert!(!has(&window(folder.clone()), "llama.attention.sliding_window"), "Llama has none");
    let mistral = folder.set("model_type", json!("mistral"));
    let opened = window(mistral.clone());
    assert_eq!(number(&opened, "llama.attention.sliding_window"), 3.0);
    assert!(!has(&opened, "llama.attention.sliding_window_pattern"), "all layers have it");
    assert!(!has(&window(mistral.clone().set("sliding_window", json!(null))), "llama.attention.sliding_window"));
    assert_eq!(number(&window(mistral.unset("sliding_window")), "llama.attention.sliding_window"), 4096.0);
}

#[test]
fn qwen_windows_begin_at_a_layer_when_switched_on() {
    let folder = qwen3().set("sliding_window", json!(3)).set("max_window_layers", json!(1));
    assert!(!has(&open(&folder), "qwen3.attention.sliding_window"));
    let on = folder.set("use_sliding_window", json!(true));
    let pattern = open(&on).metadata().get("qwen3.attention.sliding_window_pattern").cloned();
    assert_eq!(pattern, Some(Value::from(vec![false, true, true])));
    let listed = on.set("layer_types", json!(["sliding_attention", "full_attention", "sliding_attention"]));
    let pattern = open(&listed).metadata().get("qwen3.attention.sliding_window_pattern").cloned();
    assert_eq!(pattern, Some(Value::U32(2)));
    assert_refused(&listed.set("layer_types", json!(["full_attention"])), &["layer_types", "a list of 3"]);
}

#[test]
fn smollm3_writes_which_layers_rotate() {
    let folder = qwen3().set("model_type", json!("smollm3"));
    let names: Vec<_> = folder.tensors.iter().filter(|t| t.name.contains("_norm.")).map(|t| t.name.clone()).collect();
    let folder = names.iter().fold(folder, |folder, name| folder.without(name));
    let rotates = |folder: &Folder| open(folder).metadata().get("smollm3.attention.rope_pattern").cloned();
    assert_eq!(rotates(&folder), Some(Value::from(vec![true; 3])));
    let folder = folder.set("no_rope_layer_interval", json!(2));
    assert_eq!(rotates(&folder), Some(Value::from(vec![true, false, true])));
    assert_eq!(rotates(&folder.set("no_rope_layers", json!([0, 1, 1]))), Some(Value::from(vec![false, true, true])));
}

#[test]
fn partial_rotation_has_no_influence_in_families_that_do_not_have_it() {
    // As in transformers, whose class does not read it.
    for share in [0.5, 1.0] {
        let folder = llama().set("partial_rotary_factor", json!(share));
        assert_eq!(number(&open(&folder), "llama.rope.dimension_count"), 4.0, "{share}");
    }
}

#[test]
fn old_and_new_style_rope_parameters_are_equivalent() {
    let new = llama().unset("rope_theta").set(
        "rope_parameters",
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 7000.0}),
    );
    let old = llama()
        .set("rope_theta", json!(7000.0))
        .set("rope_scaling", json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}));
    let keys = |folder: &Folder| {
        let folder = open(folder);
        let all = folder.metadata().iter().filter(|(key, _)| key.starts_with("llama."));
        all.map(|(key, value)| (key.to_owned(), value.clone())).collect::<Vec<_>>()
    };
    assert_eq!(keys(&new), keys(&old));
    let opened = open(&new);
    assert_eq!(opened.metadata().get("llama.rope.scaling.type"), Some(&Value::from("yarn")));
    assert_eq!(number(&opened, "llama.rope.scaling.factor"), 4.0);
    assert_eq!(number(&opened, "llama.rope.scaling.original_context_length"), 8.0);
    assert_eq!(number(&opened, "llama.rope.freq_base"), 7000.0);
    assert!(!has(&opened, "llama.rope.scaling.attn_factor"), "the one that the method prescribes");
}

#[test]
fn a_magnitude_beyond_that_of_yarn_is_written_as_a_factor() {
    let scaling = |more: &[(&str, f64)]| {
        let mut scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8});
        for (key, value) in more {
            scaling[*key] = json!(value);
        }
        open(&llama().set("rope_scaling", scaling))
    };
    let prescribed = 0.1 * 4.0f64.ln() + 1.0;
    let one = scaling(&[("attention_factor", 1.0), ("beta_fast", 24.0)]);
    assert_eq!(number(&one, "llama.rope.scaling.attn_factor"), prescribed.recip() as f32);
    assert_eq!(number(&one, "llama.rope.scaling.yarn_beta_fast"), 24.0);
    let two = scaling(&[("mscale", 2.0), ("mscale_all_dim", 0.5)]);
    let expected = (0.2 * 4.0f64.ln() + 1.0) / (0.05 * 4.0f64.ln() + 1.0) / prescribed;
    assert_eq!(number(&two, "llama.rope.scaling.attn_factor"), expected as f32);
}

#[test]
fn llama3_scaling_becomes_divisors_of_the_frequencies() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let folder = llama().set("rope_theta", json!(10.0)).set("rope_scaling", scaling.clone());
    let (dims, divisors) = read(&open(&folder), "rope_freqs.weight");
    assert_eq!(dims, [2]);
    // Wavelengths 2 pi and 2 pi sqrt(10) = 19.87: the first is below 64 / 4, the second between that and 64.
    let smooth = (64.0 / (std::f64::consts::TAU * 10.0f64.sqrt()) - 1.0) / 3.0;
    assert_eq!(divisors[0], 1.0);
    assert!((f64::from(divisors[1]) - 1.0 / ((1.0 - smooth) / 8.0 + smooth)).abs() < 1e-6);
    let slow = folder.set("rope_theta", json!(1e9));
    assert_eq!(read(&open(&slow), "rope_freqs.weight").1, [1.0, 8.0]);
    let mut wrong = scaling;
    wrong["low_freq_factor"] = json!(4.0);
    assert_refused(&slow.set("rope_scaling", wrong), &["rope_scaling.high_freq_factor", "more than low_freq_factor"]);
}

#[test]
fn dynamic_scaling_keeps_the_original_length() {
    let opened = open(&llama().set("rope_scaling", json!({"type": "dynamic", "factor": 2.0})));
    assert_eq!(number(&opened, "llama.rope.scaling.dynamic_factor"), 2.0);
    assert_eq!(number(&opened, "llama.rope.scaling.original_context_length"), 32.0);
    assert_eq!(number(&opened, "llama.context_length"), 64.0);
}
