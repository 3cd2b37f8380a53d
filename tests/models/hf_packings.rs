//! Checkpoints that are in 4 bits already: every number is read exactly, for every packing.

use crate::hf_folder::{Checkpoint as Folder, Stored, assert_refused, open, read};
use crate::packed_folder::{
    Dice, LINEAR, Matrix, PLAIN, Recipe, Scales, assert_same, compressed_config, gptq, gptq_config, pair,
};
use half::f16;
use nybble::format::Checkpoint as _;
use nybble::format::gguf::{Gguf, Metadata};
use nybble::model::convert::convert;
use nybble::model::requantize::Quantized;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize};
use nybble::quant::block::BlockType;
use safetensors::Dtype;
use serde_json::{Value, json};

#[test]
fn gptq_with_one_zero_point_for_all_is_q4_0() {
    let (packed, plain) = gptq(Recipe { symmetric: true, ..PLAIN });
    assert_same(&packed, &plain, BlockType::Q4_0);
}

#[test]
fn gptq_version_1_stores_zero_points_minus_one() {
    let (packed, plain) = gptq(PLAIN);
    assert_same(&packed, &plain, BlockType::Q5_0);
}

#[test]
fn gptq_version_2_stores_zero_points_as_they_are() {
    let mut config = gptq_config(32);
    config["checkpoint_format"] = json!("gptq_v2");
    let (packed, plain) = pair(PLAIN, config, |matrix, name| matrix.gptq(name, false));
    assert_same(&packed, &plain, BlockType::Q5_0);
}

#[test]
fn zero_points_with_exact_f16_products_become_q4_1() {
    let (packed, plain) = gptq(Recipe { scales: Scales::Round, ..PLAIN });
    assert_same(&packed, &plain, BlockType::Q4_1);
}

#[test]
fn groups_may_be_as_large_as_a_row() {
    for symmetric in [true, false] {
        let recipe = Recipe { group: usize::MAX, symmetric, ..PLAIN };
        let (packed, plain) = pair(recipe, gptq_config(-1), |matrix, name| matrix.gptq(name, true));
        assert_same(&packed, &plain, if symmetric { BlockType::Q4_0 } else { BlockType::Q5_0 });
    }
    // A group larger than a row means the same. The last group of 96 columns may be partial.
    for group in [64, 128] {
        let (packed, plain) = gptq(Recipe { group, symmetric: true, ..PLAIN });
        assert_same(&packed, &plain, BlockType::Q4_0);
    }
}

#[test]
fn activation_order_scatters_groups_and_keeps_all_numbers() {
    for symmetric in [true, false] {
        let (packed, plain) = gptq(Recipe { scattered: true, symmetric, ..PLAIN });
        assert_same(&packed, &plain, BlockType::F32);
    }
}

#[test]
fn rules_for_single_layers_change_their_groups_or_leave_them_unpacked() {
    let recipe = Recipe { group: 64, symmetric: true, ..PLAIN };
    let (mut packed, mut plain) = gptq(recipe);
    let (others, plain_others) = gptq(Recipe { group: 32, ..recipe });
    for (folder, others) in [(&mut packed, others), (&mut plain, plain_others)] {
        folder.tensors.retain(|tensor| !tensor.name.contains("down_proj"));
        folder.tensors.extend(others.tensors.into_iter().filter(|tensor| tensor.name.contains("down_proj")));
    }
    packed.tensors.retain(|tensor| !tensor.name.contains("v_proj"));
    packed.tensors.push(plain.find("model.layers.0.self_attn.v_proj.weight").clone());
    let rules = json!({"+:.*down_proj": {"group_size": 32, "desc_act": false}, "-:.*v_proj": {}});
    let mut config = gptq_config(64);
    config["dynamic"] = rules;
    let packed = packed.set("quantization_config", config);
    let (packed, plain) = (open(&packed), open(&plain));
    for name in plain.names() {
        assert_eq!(read(&packed, name), read(&plain, name), "{name}");
    }
    assert!(packed.is_quantized("blk.0.ffn_down.weight") && !packed.is_quantized("blk.0.attn_v.weight"));
}

#[test]
fn a_checkpoint_without_g_idx_has_groups_in_order() {
    let (mut packed, plain) = gptq(PLAIN);
    packed.tensors.retain(|tensor| !tensor.name.ends_with(".g_idx"));
    assert_same(&packed, &plain, BlockType::Q5_0);
}

#[test]
fn groups_that_are_not_whole_blocks_become_f32() {
    let (packed, plain) = gptq(Recipe { group: 16, ..PLAIN });
    assert_same(&packed, &plain, BlockType::F32);
}

#[test]
fn scales_may_have_any_float_type() {
    let (packed, plain) = gptq(Recipe { scales: Scales::BF16, symmetric: true, ..PLAIN });
    assert_same(&packed, &plain, BlockType::Q4_0);
    let (packed, plain) = gptq(Recipe { scales: Scales::F32, symmetric: true, ..PLAIN });
    assert_same(&packed, &plain, BlockType::F32);
}

#[test]
fn awq_interleaves_rows() {
    for (symmetric, block_type) in [(true, BlockType::Q4_0), (false, BlockType::Q5_0)] {
        let config = json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "GEMM"});
        let (packed, plain) = pair(Recipe { symmetric, ..PLAIN }, config, |matrix, name| matrix.awq(name));
        assert_same(&packed, &plain, block_type);
    }
}

#[test]
fn auto_round_packs_like_gptq_or_awq() {
    let config = |format: &str| json!({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int", "packing_format": format});
    for (format, one_less) in [("auto_round:auto_gptq", true), ("auto_round:gptqmodel", false), ("auto_round", false)] {
        let (packed, plain) = pair(PLAIN, config(format), |matrix, name| matrix.gptq(name, one_less));
        assert_same(&packed, &plain, BlockType::Q5_0);
    }
    let (packed, plain) = pair(PLAIN, config("auto_round:auto_awq"), |matrix, name| matrix.awq(name));
    assert_same(&packed, &plain, BlockType::Q5_0);
}

#[test]
fn compressed_tensors_may_be_symmetric_or_not_per_group_or_row() {
    for (symmetric, block_type) in [(true, BlockType::Q4_0), (false, BlockType::Q5_0)] {
        for group in [32, 64, usize::MAX] {
            let strategy = if group == usize::MAX { "channel" } else { "group" };
            let size = if group == usize::MAX { Value::Null } else { json!(group) };
            let weights = json!({
                "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size,
            });
            let recipe = Recipe { symmetric, group, scales: Scales::BF16, ..PLAIN };
            // compressed-tensors wants whole groups.
            if group == 64 {
                continue;
            }
            let pack = |matrix: &Matrix, name: &str| matrix.compressed(name, symmetric);
            let (packed, plain) = pair(recipe, compressed_config(weights), pack);
            assert_same(&packed, &plain, block_type);
        }
    }
}

#[test]
fn compressed_tensors_may_have_activation_order() {
    let weights = json!({"num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 32, "actorder": "group"});
    let recipe = Recipe { symmetric: true, scattered: true, ..PLAIN };
    let (packed, plain) = pair(recipe, compressed_config(weights), |matrix, name| matrix.compressed(name, true));
    assert_same(&packed, &plain, BlockType::F32);
}

#[test]
fn a_bias_of_zeros_that_the_family_lacks_is_ignored() {
    let (packed, plain) = gptq(PLAIN);
    let with = |byte: u8| {
        let mut packed = packed.clone();
        let name = "model.layers.0.mlp.up_proj.bias".to_owned();
        packed.tensors.push(Stored { name, shape: vec![96], dtype: Dtype::F16, bytes: vec![byte; 192] });
        packed
    };
    assert_same(&with(0), &plain, BlockType::Q5_0);
    assert_refused(&with(1), &["up_proj.bias", "expected none"]);
}

#[test]
fn loading_and_converting_round_nothing_again() {
    for scattered in [false, true] {
        let (packed, plain) = gptq(Recipe { scattered, ..PLAIN });
        let (folder, exact) = (open(&packed), open(&plain));
        for wanted in [BlockType::Q4_0, BlockType::Q8_0] {
            let quantized = Quantized::new(&folder, wanted).expect("a type that can be encoded");
            let file = tempfile::tempdir().expect("a folder");
            let path = file.path().join("model.gguf");
            if !scattered {
                convert(&folder, &Metadata::new(), &path, wanted, None).expect("a file");
            }
            for name in exact.names().into_iter().filter(|name| folder.is_quantized(name)) {
                let expected = read(&exact, name).1;
                assert_eq!(decoded(&quantized, name), expected, "{name}");
                if !scattered {
                    assert_eq!(decoded(&Gguf::open(&path).expect("a model"), name), expected, "{name}");
                }
            }
        }
    }
}

fn decoded(checkpoint: &dyn nybble::format::Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.tensor(name).expect("a tensor");
    let (mut scratch, mut all) = (Vec::new(), Vec::new());
    for row in 0..tensor.dims[1] {
        let mut values = vec![0.0; tensor.dims[0]];
        tensor.rows.block_type().decode(tensor.rows.row(row, &mut scratch), &mut values).expect("a row");
        all.extend(values);
    }
    all
}

#[test]
fn a_packed_checkpoint_keeps_its_layers_in_four_bits() {
    let (packed, _) = gptq(Recipe { symmetric: true, ..PLAIN });
    let folder = packed.write();
    let load = |quantize| {
        let options = LoadOptions::default().with_threads(1).with_quantize(quantize);
        Model::load(folder.path(), &options).expect("a model")
    };
    let linear: usize = LINEAR.iter().map(|(_, rows, columns)| rows * columns).sum();
    // 18 bytes per 32 weights, and 34 per 32 weights of embedding and output, whose 5 rows are padded to 16. A cache line
    // holds the scales of two groups; in each of the 4 panels whose rows have 3 groups, half a line is padding.
    assert_eq!(load(Quantize::Auto).weight_bytes(), linear / 32 * 18 + 4 * 32 + 2 * 16 * 64 / 32 * 34);
    assert!(load(Quantize::Stored).weight_bytes() > load(Quantize::Auto).weight_bytes());
}

/// Logits after a few tokens.
fn logits(folder: &Folder, quantize: Quantize) -> (Vec<f32>, usize) {
    let folder = folder.write();
    let options = LoadOptions::default().with_threads(1).with_quantize(quantize);
    let model = Model::load(folder.path(), &options).expect("a model");
    let (mut session, mut logits) = (model.session(), Vec::new());
    let input = Input::new(&mut session, &[1, 4, 2, 0, 3], Logits::All);
    model.forward(&mut [input], &mut logits, &|| false).expect("logits");
    (logits, model.weight_bytes())
}

#[test]
fn activation_order_is_undone_and_layers_stay_in_four_bits() {
    let recipe = Recipe { symmetric: true, ..PLAIN };
    // Embeddings that count up would outweigh everything else.
    let small = |mut folder: Folder| {
        for name in ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] {
            let stored = folder.find(name);
            let mut dice = Dice(9);
            let values = (0..stored.bytes.len() / 4).map(|_| dice.next(2000) as f32 / 1000.0 - 1.0);
            stored.bytes = values.flat_map(f32::to_le_bytes).collect();
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            let stored = folder.find(&format!("model.layers.0.{name}.weight"));
            stored.bytes = (0..64).flat_map(|_| 1f32.to_le_bytes()).collect();
        }
        folder
    };
    let (packed, plain) = gptq(Recipe { scattered: true, ..recipe });
    let (in_order, _) = gptq(recipe);
    let ((found, bytes), (expected, _)) =
        (logits(&small(packed), Quantize::Auto), logits(&small(plain), Quantize::Stored));
    assert_eq!(bytes, logits(&small(in_order), Quantize::Auto).1);
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    let (error, whole) = (distance(&found, &expected), distance(&expected, &vec![0.0; expected.len()]));
    assert!(error < 0.03 * whole, "{error} of {whole}");
}

#[test]
fn unsupported_packings_are_refused_with_their_key() {
    let refused = |config: Value, parts: &[&str]| {
        let (packed, _) = pair(PLAIN, config, |matrix, name| matrix.gptq(name, true));
        assert_refused(&packed, parts);
    };
    let with = |mut config: Value, key: &str, value: Value| {
        config[key] = value;
        config
    };
    let gptq = || gptq_config(32);
    let awq = || json!({"quant_method": "awq", "bits": 4, "group_size": 32});
    let round = || json!({"quant_method": "auto-round", "bits": 4, "group_size": 32});
    refused(json!([]), &["quantization_config", "an object"]);
    refused(json!({"bits": 4}), &["quantization_config.quant_method", "missing"]);
    refused(json!({"quant_method": "bitsandbytes"}), &["quant_method", "\"bitsandbytes\"", "gptq, awq"]);
    refused(with(gptq(), "bits", json!(3)), &["quantization_config.bits", "3 bits", "supported: 4"]);
    refused(with(gptq(), "bits", json!("four")), &["quantization_config.bits", "four"]);
    for bits in [2, 8, 32, 1 << 24] {
        refused(
            with(gptq(), "bits", json!(bits)),
            &["quantization_config.bits", &format!("{bits} bits"), "supported: 4"],
        );
    }
    for bits in [json!(0), json!(-4), json!(4.0), json!([4])] {
        refused(with(awq(), "bits", bits), &["quantization_config.bits", "an integer from 1"]);
    }
    for size in [json!(0), json!(-2), json!(1.5), json!("128"), json!(u64::MAX), json!([32])] {
        refused(with(gptq(), "group_size", size), &["quantization_config.group_size", "or -1 for whole rows"]);
    }
    refused(json!({"quant_method": "gptq", "bits": 4}), &["quantization_config.group_size", "missing"]);
    refused(with(gptq(), "checkpoint_format", json!("marlin")), &["checkpoint_format", "\"marlin\"", "gptq_v2"]);
    refused(with(gptq(), "is_marlin_format", json!(true)), &["is_marlin_format", "Marlin"]);
    refused(with(gptq(), "dynamic", json!({"+:.*down.*": {"bits": 8}})), &["dynamic", "8 bits for \"+:.*down.*\""]);
    refused(with(gptq(), "dynamic", json!({"a": {"format": "marlin"}})), &["dynamic", "format for \"a\""]);
    refused(with(gptq(), "dynamic", json!([1])), &["dynamic", "an object of rules"]);
    refused(with(awq(), "version", json!("gemv")), &["version", "\"gemv\"", "gemm"]);
    refused(with(awq(), "zero_point", json!(false)), &["zero_point"]);
    refused(with(round(), "packing_format", json!("auto_round:mx")), &["packing_format", "auto_round:mx"]);
    refused(with(round(), "data_type", json!("mx_fp")), &["data_type", "mx_fp"]);
    refused(with(round(), "act_bits", json!(8)), &["act_bits", "8 bits"]);
    let weights = || json!({"num_bits": 4, "strategy": "group", "group_size": 32});
    let compressed = || compressed_config(weights());
    refused(with(compressed(), "format", json!("float-quantized")), &["format", "float-quantized", "pack-quantized"]);
    refused(with(compressed(), "config_groups", json!({})), &["config_groups", "0 groups"]);
    let two = json!({"a": {"weights": weights()}, "b": {"weights": weights()}});
    refused(with(compressed(), "config_groups", two), &["config_groups", "2 groups"]);
    refused(compressed_config(with(weights(), "num_bits", json!(8))), &["config_groups.group_0.weights.num_bits", "8"]);
    refused(compressed_config(with(weights(), "type", json!("float"))), &["weights.type", "float"]);
    refused(compressed_config(with(weights(), "strategy", json!("block"))), &["weights.strategy", "block"]);
    refused(compressed_config(with(weights(), "group_size", json!(-1))), &["weights.group_size", "-1"]);
    let activations = json!({"group_0": {"weights": weights(), "input_activations": {"num_bits": 8}}});
    refused(with(compressed(), "config_groups", activations), &["input_activations", "activations"]);
}

#[test]
fn tensors_that_do_not_match_are_refused_by_name() {
    const NAME: &str = "model.layers.0.mlp.down_proj";
    let part = |end: &str| format!("{NAME}.{end}");
    let (gptq, _) = gptq(PLAIN);
    let spoilt = |end: &str, spoil: &dyn Fn(&mut Stored)| {
        let mut folder = gptq.clone();
        spoil(folder.find(&part(end)));
        folder
    };
    for end in ["qzeros", "scales"] {
        assert_refused(&gptq.clone().without(&part(end)), &[&part(end), "missing"]);
    }
    assert_refused(&gptq.clone().without(&part("qweight")), &["down_proj.weight", "missing"]);
    for end in ["qweight", "qzeros", "scales"] {
        let folder = spoilt(end, &|tensor| tensor.shape.reverse());
        assert_refused(&folder, &[&part(end), "shape", "as config.json says"]);
        let folder = spoilt(end, &|tensor| {
            tensor.dtype = Dtype::I8;
            *tensor.shape.last_mut().unwrap() *= tensor.bytes.len() / tensor.shape.iter().product::<usize>();
        });
        assert_refused(&folder, &[&part(end), "the type I8"]);
    }
    for group in [-1i32, 3, i32::MAX] {
        let folder = spoilt("g_idx", &|tensor| tensor.bytes[8..12].copy_from_slice(&group.to_le_bytes()));
        assert_refused(&folder, &[&part("g_idx"), &group.to_string(), "a group from 0 to 2"]);
    }
    let cut = |end: &str, rows: usize| {
        spoilt(end, &|tensor| {
            let row = tensor.bytes.len() / tensor.shape[0];
            tensor.shape[0] = rows;
            tensor.bytes.resize(rows * row, 0);
        })
    };
    for (end, rows) in [("qweight", 11), ("qweight", 13), ("qzeros", 2), ("qzeros", 4), ("scales", 0), ("scales", 4)] {
        assert_refused(&cut(end, rows), &[&part(end), &format!("shape [{rows}, "), "as config.json says"]);
    }
    for rows in [0, 95, 97] {
        assert_refused(&cut("g_idx", rows), &[&part("g_idx"), &format!("shape [{rows}]"), "[96], as config.json says"]);
    }
    let folder = spoilt("g_idx", &|tensor| tensor.dtype = Dtype::F32);
    assert_refused(&folder, &[&part("g_idx"), "the type F32", "I32"]);
    for scale in [f16::NAN, f16::INFINITY] {
        let folder = spoilt("scales", &|tensor| tensor.bytes[2..4].copy_from_slice(&scale.to_le_bytes()));
        assert_refused(&folder, &[&part("scales"), "row 1", "finite"]);
    }
    let both = gptq.clone().tensor(&format!("{NAME}.weight"), &[64, 96]);
    assert_refused(&both, &[NAME, "a tensor", "none"]);
    // Groups of another size than the file's.
    for size in [16, 31, 64, i64::MAX, -1] {
        assert_refused(&gptq.clone().set("quantization_config", gptq_config(size)), &["qzeros", "shape"]);
    }

    let weights = json!({"num_bits": 4, "symmetric": false, "strategy": "group", "group_size": 32});
    let (compressed, _) = pair(PLAIN, compressed_config(weights), |matrix, name| matrix.compressed(name, false));
    for end in ["weight_scale", "weight_shape", "weight_zero_point"] {
        assert_refused(&compressed.clone().without(&part(end)), &[&part(end), "missing"]);
    }
    for size in [-64i64, 65, i64::MAX] {
        let mut folder = compressed.clone();
        folder.find(&part("weight_shape")).bytes[..8].copy_from_slice(&size.to_le_bytes());
        assert_refused(&folder, &[&part("weight_shape"), &size.to_string(), "[64, 96]"]);
    }
}

#[test]
fn activation_order_requires_the_tensor_of_groups() {
    let without_order = |folder: &Folder| {
        let mut folder = folder.clone();
        folder.tensors.retain(|tensor| !tensor.name.ends_with("g_idx"));
        folder
    };
    for scattered in [true, false] {
        let mut config = gptq_config(32);
        config["desc_act"] = json!(true);
        let (packed, plain) = pair(Recipe { scattered, ..PLAIN }, config, |matrix, name| matrix.gptq(name, true));
        assert_same(&packed, &plain, if scattered { BlockType::F32 } else { BlockType::Q5_0 });
        assert_refused(&without_order(&packed), &["q_proj.g_idx", "missing", "whose other parts exist"]);
    }
    for (order, needed) in
        [(json!("group"), true), (json!("dynamic"), true), (json!(true), true), (json!("static"), false)]
    {
        let weights =
            json!({"num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 32, "actorder": order});
        let recipe = Recipe { symmetric: true, scattered: needed, ..PLAIN };
        let (packed, plain) = pair(recipe, compressed_config(weights), |matrix, name| matrix.compressed(name, true));
        if needed {
            assert_refused(&without_order(&packed), &["q_proj.weight_g_idx", "missing", "whose other parts exist"]);
        } else {
            assert_same(&packed, &plain, BlockType::Q4_0);
        }
    }
    // Where all columns share a scale, their order does not matter.
    let mut config = gptq_config(-1);
    config["desc_act"] = json!(true);
    let recipe = Recipe { group: usize::MAX, symmetric: true, ..PLAIN };
    let (packed, plain) = pair(recipe, config, |matrix, name| matrix.gptq(name, true));
    assert_same(&without_order(&packed), &plain, BlockType::Q4_0);
}

#[test]
fn a_packed_family_with_transposed_weights_is_refused() {
    let mut folder =
        crate::hf_folder::gpt2("").without("h.0.attn.c_proj.weight").set("quantization_config", gptq_config(32));
    let matrix = Matrix::new(PLAIN, 8, 32, &mut Dice(1));
    folder.tensors.extend(matrix.gptq("h.0.attn.c_proj", true));
    assert_refused(&folder, &["h.0.attn.c_proj", "packed matrix of a gpt2"]);
}
