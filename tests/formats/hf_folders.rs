//! Hugging Face folders as checkpoints: names, shapes and keys, and the errors for inconsistent folders.

use crate::hf_folder::{assert_refused, gemma3, gpt2, llama, number, open, order, qwen3, read};
use nybble::format::Checkpoint as _;
use nybble::format::gguf::Value;
use nybble::model::hf::HfFolder;
use serde_json::json;

// --- Names, shapes and keys --------------------------------------------------------------------------------------------

#[test]
fn a_llama_has_the_names_shapes_and_keys_of_its_gguf_file() {
    let folder = open(&llama());
    let expected: [(&str, &[usize]); 12] = [
        ("token_embd.weight", &[8, 5]),
        ("output_norm.weight", &[8]),
        ("output.weight", &[8, 5]),
        ("blk.0.attn_norm.weight", &[8]),
        ("blk.0.ffn_norm.weight", &[8]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[8, 4]),
        ("blk.0.attn_v.weight", &[8, 4]),
        ("blk.0.attn_output.weight", &[8, 8]),
        ("blk.0.ffn_gate.weight", &[8, 6]),
        ("blk.0.ffn_up.weight", &[8, 6]),
        ("blk.0.ffn_down.weight", &[6, 8]),
    ];
    assert_eq!(folder.names(), expected.map(|tensor| tensor.0));
    for (name, dims) in expected {
        assert_eq!(read(&folder, name).0, dims, "{name}");
    }
    assert_eq!(folder.metadata().get("general.architecture"), Some(&Value::from("llama")));
    for (key, expected) in [
        ("llama.vocab_size", 5.0),
        ("llama.context_length", 32.0),
        ("llama.embedding_length", 8.0),
        ("llama.block_count", 1.0),
        ("llama.feed_forward_length", 6.0),
        ("llama.attention.head_count", 2.0),
        ("llama.attention.head_count_kv", 1.0),
        ("llama.attention.key_length", 4.0),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5),
        ("llama.rope.dimension_count", 4.0),
        ("llama.rope.freq_base", 5000.0),
    ] {
        assert_eq!(number(&folder, key), expected, "{key}");
    }
    assert_eq!(folder.metadata().get("llama.hidden_activation"), Some(&Value::from("silu")));
    assert!(folder.tensor("blk.1.attn_q.weight").is_none());
}

#[test]
fn query_and_key_rows_of_a_llama_are_paired() {
    let folder = llama();
    let q = order(&folder, "blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q, [0, 2, 1, 3, 4, 6, 5, 7]);
    let k = order(&folder, "blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight");
    assert_eq!(k, [0, 2, 1, 3]);
    let v = order(&folder, "blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight");
    assert_eq!(v, [0, 1, 2, 3]);
}

#[test]
fn biases_follow_the_configuration_in_the_order_of_rows() {
    let biased = llama().set("attention_bias", json!(true)).tensors([
        ("model.layers.0.self_attn.q_proj.bias", &[8][..]),
        ("model.layers.0.self_attn.k_proj.bias", &[4]),
        ("model.layers.0.self_attn.v_proj.bias", &[4]),
        ("model.layers.0.self_attn.o_proj.bias", &[8]),
    ]);
    let q = order(&biased, "blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias");
    assert_eq!(q, [0, 2, 1, 3, 4, 6, 5, 7]);
    assert_refused(&biased.clone().without("model.layers.0.self_attn.k_proj.bias"), &["k_proj.bias", "missing"]);
    assert_refused(&biased.set("attention_bias", json!(false)), &["self_attn.", ".bias", "expected none"]);
}

#[test]
fn an_output_matrix_may_be_missing_only_when_tied() {
    let untied = llama().without("lm_head.weight");
    assert_refused(&untied, &["lm_head.weight", "missing", "[5, 8]"]);
    let tied = open(&untied.set("tie_word_embeddings", json!(true)));
    assert!(tied.tensor("output.weight").is_none());
}

#[test]
fn head_dim_may_differ_from_hidden_size_over_heads() {
    let mut wide = llama().set("head_dim", json!(6));
    for (name, rows) in [("q", 12), ("k", 6), ("v", 6)] {
        wide = wide.without(&format!("model.layers.0.self_attn.{name}_proj.weight"));
        wide = wide.tensor(&format!("model.layers.0.self_attn.{name}_proj.weight"), &[rows, 8]);
    }
    let o = "model.layers.0.self_attn.o_proj.weight";
    let folder = open(&wide.without(o).tensor(o, &[8, 12]));
    assert_eq!(number(&folder, "llama.attention.key_length"), 6.0);
    assert_eq!(read(&folder, "blk.0.attn_output.weight").0, [12, 8]);
}

#[test]
fn f16_and_bf16_keep_their_type() {
    use nybble::quant::block::BlockType;
    for (dtype, expected) in [(safetensors::Dtype::F16, BlockType::F16), (safetensors::Dtype::BF16, BlockType::BF16)] {
        let mut folder = llama();
        let stored = folder.find("model.layers.0.self_attn.q_proj.weight");
        stored.dtype = dtype;
        stored.bytes.truncate(8 * 8 * 2);
        let opened = open(&folder);
        assert_eq!(opened.tensor("blk.0.attn_q.weight").expect("a tensor").rows.block_type(), expected);
    }
}

// --- Errors ------------------------------------------------------------------------------------------------------------

#[test]
fn an_unknown_family_is_refused_with_the_known_ones() {
    assert_refused(
        &llama().set("model_type", json!("t5")),
        &["config.json", "model_type", "t5", "gpt_neox", "qwen3_moe"],
    );
    assert_refused(&llama().unset("model_type"), &["config.json", "model_type", "missing"]);
}

#[test]
fn a_missing_tensor_is_reported_by_the_checkpoints_name() {
    for tensor in llama().tensors {
        assert_refused(&llama().without(&tensor.name), &[&format!("{:?}", tensor.name), "missing", "config.json says"]);
    }
}

#[test]
fn a_tensor_whose_shape_contradicts_the_config_is_refused() {
    for (key, value, parts) in [
        ("hidden_size", json!(16), &["model.embed_tokens.weight", "[5, 8]", "[5, 16]"][..]),
        ("intermediate_size", json!(7), &["gate_proj.weight", "[6, 8]", "[7, 8]"]),
        ("vocab_size", json!(6), &["embed_tokens", "[5, 8]", "[6, 8]"]),
        ("num_key_value_heads", json!(2), &["k_proj.weight", "[4, 8]", "[8, 8]"]),
        ("num_hidden_layers", json!(2), &["model.layers.1.input_layernorm.weight", "missing"]),
    ] {
        assert_refused(&llama().set(key, value), parts);
    }
}

#[test]
fn an_unused_tensor_is_refused() {
    let more = llama().tensor("model.layers.1.input_layernorm.weight", &[8]);
    assert_refused(&more, &["model.safetensors", "model.layers.1.input_layernorm.weight", "expected none"]);
}

#[test]
fn a_tensor_of_integers_is_refused() {
    let mut folder = llama();
    let stored = folder.find("model.layers.0.mlp.up_proj.weight");
    stored.dtype = safetensors::Dtype::I32;
    assert_refused(&folder, &["up_proj.weight", "I32", "F32, F16, BF16"]);
}

#[test]
fn unsupported_settings_are_refused_with_their_key() {
    for (key, value, parts) in [
        ("hidden_act", json!("quick_gelu"), &["hidden_act", "quick_gelu", "silu"][..]),
        ("quantization_config", json!({"bits": 4}), &["quantization_config.quant_method", "missing"]),
        ("rope_scaling", json!({"type": "mrope"}), &["rope_scaling", "mrope", "yarn"]),
        ("head_dim", json!(5), &["head_dim", "5 dimensions", "even"]),
        ("num_attention_heads", json!(3), &["num_attention_heads", "3", "divisor"]),
        ("num_attention_heads", json!(0), &["num_attention_heads", "0", "1 to"]),
        ("num_attention_heads", json!(-2), &["num_attention_heads", "-2", "1 to"]),
        ("num_attention_heads", json!(2.0), &["num_attention_heads", "2.0", "an integer"]),
        ("num_attention_heads", json!("2"), &["num_attention_heads", "\"2\"", "an integer"]),
        ("num_attention_heads", json!(true), &["num_attention_heads", "true", "an integer"]),
        ("num_attention_heads", json!([2]), &["num_attention_heads", "[2]", "an integer"]),
        ("num_hidden_layers", json!(16_777_217), &["num_hidden_layers", "16777217", "to 16777216"]),
        ("hidden_size", json!(u64::MAX), &["hidden_size", "18446744073709551615", "to 16777216"]),
        ("vocab_size", json!(1e300), &["vocab_size", "1e+300", "an integer"]),
        ("max_position_embeddings", json!(4_294_967_295u32), &["max_position_embeddings", "4294967295", "to 16777216"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads", "3", "a divisor of the 2 heads"]),
        ("rms_norm_eps", json!(1e300), &["rms_norm_eps", "1e+300", "a finite number"]),
        ("model_type", json!(["llama"]), &["model_type", "[\"llama\"]", "a string"]),
        ("tie_word_embeddings", json!("no"), &["tie_word_embeddings", "\"no\"", "true or false"]),
        ("rms_norm_eps", json!(-1.0), &["rms_norm_eps", "-1", "positive"]),
        ("rms_norm_eps", json!("a"), &["rms_norm_eps", "\"a\"", "a finite number"]),
        ("vocab_size", json!(null), &["vocab_size", "missing"]),
        ("rope_theta", json!(0), &["rope_theta", "0", "positive"]),
        ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor", "missing"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0.0}), &["rope_scaling.factor", "positive"]),
        ("rope_scaling", json!([]), &["rope_scaling", "an object"]),
    ] {
        assert_refused(&llama().set(key, value), parts);
    }
}

#[test]
fn no_value_of_any_key_panics() {
    let odd = [
        json!(null),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(16_777_216),
        json!(u64::MAX),
        json!(1e300),
        json!(0.0),
        json!(true),
        json!("x"),
        json!([]),
        json!([1e300, "x"]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 0.0}),
        json!({"rope_type": "yarn", "factor": 2.0, "truncate": false, "beta_fast": 1e-300, "rope_theta": 1}),
        json!({"rope_type": "longrope", "long_factor": [], "short_factor": []}),
        json!({"full_attention": {"rope_type": 1}}),
    ];
    for folder in [llama(), qwen3(), gemma3(), gpt2("")] {
        let keys: Vec<String> = folder.config.as_object().expect("an object").keys().cloned().collect();
        let more = ["rope_scaling", "rope_parameters", "sliding_window", "layer_types", "head_dim", "text_config"];
        let written = folder.write();
        for key in keys.iter().map(String::as_str).chain(more) {
            for value in &odd {
                let config = folder.clone().set(key, value.clone()).config;
                std::fs::write(written.path().join("config.json"), config.to_string()).expect("config.json");
                if let Ok(folder) = HfFolder::open(written.path()) {
                    folder.names().iter().for_each(|name| drop(read(&folder, name)));
                }
            }
        }
    }
}

#[test]
fn a_size_that_is_left_out_has_the_default_of_transformers() {
    for (key, parts) in [
        ("hidden_size", ["embed_tokens.weight", "4096"]),
        ("num_attention_heads", ["num_attention_heads", "found 32"]),
        ("num_hidden_layers", ["model.layers.1.", "missing"]),
        ("intermediate_size", ["gate_proj.weight", "11008"]),
        ("vocab_size", ["embed_tokens.weight", "32000"]),
    ] {
        assert_refused(&llama().unset(key), &parts);
    }
}

#[test]
fn a_configuration_that_is_not_an_object_is_refused() {
    let written = llama().write();
    let deep = format!("{{\"a\": {}1{}}}", "{\"a\":".repeat(10_000), "}".repeat(10_000));
    let numbers = ["{\"rms_norm_eps\": nan}", "{\"rms_norm_eps\": +Infinity}", "{\"rms_norm_eps\": 1e999}"];
    let others = ["", "[]", "null", "{", "{\"a\": 1, \"a\": 2}", &"[".repeat(10_000), &deep];
    for text in others.into_iter().chain(numbers) {
        std::fs::write(written.path().join("config.json"), text).expect("config.json");
        let message = HfFolder::open(written.path()).expect_err("it is refused").to_string();
        assert!(message.contains("config.json") && message.contains("a JSON object"), "{message}");
    }
    // A file that is far too large is not read.
    let large = std::fs::File::create(written.path().join("config.json")).expect("config.json");
    large.set_len(1 << 40).expect("a hole");
    let message = HfFolder::open(written.path()).expect_err("it is refused").to_string();
    assert!(message.contains("config.json") && message.contains("more than 16777216 bytes"), "{message}");
    std::fs::remove_file(written.path().join("config.json")).expect("it is removed");
    let message = HfFolder::open(written.path()).expect_err("it is refused").to_string();
    assert!(message.contains("config.json"), "{message}");
}
