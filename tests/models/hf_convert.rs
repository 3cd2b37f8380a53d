//! Conversion of a Hugging Face folder to a GGUF file: tensors in the wanted types, the tokenizer under GGUF's keys; and
//! checkpoints that are quantized while they are read.

use std::path::{Path, PathBuf};

use crate::hf_folder::{Checkpoint as Folder, llama};
use nybble::Error;
use nybble::format::Checkpoint as _;
use nybble::format::gguf::{Gguf, Metadata, StringArray, Value};
use nybble::model::convert::{convert, convert_path};
use nybble::model::hf::HfFolder;
use nybble::model::requantize::Quantized;
use nybble::model::{LoadOptions, Model, Quantize};
use nybble::quant::block::BlockType;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

/// A byte-level tokenizer of five tokens, the last one special.
fn tokenizer() -> Json {
    json!({
        "added_tokens": [{"id": 4, "content": "<|end|>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u{120}ab": 3}, "merges": ["a b", ["\u{120}", "ab"]]},
    })
}

/// A tokenizer of pieces, like that of Llama 2.
fn pieces() -> Json {
    json!({
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 4, "content": "<s>", "special": true},
            {"id": 5, "content": "a\u{2581}b", "special": false},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]},
        "model": {
            "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<0x0A>": 1, "ab": 2, "abab": 3},
            "merges": ["a b", "ab ab"],
        },
    })
}

/// Writes the files of a folder.
fn written(folder: &Folder, files: &[(&str, &Json)]) -> TempDir {
    let written = folder.write();
    for (name, content) in files {
        std::fs::write(written.path().join(name), content.to_string()).expect("a file");
    }
    written
}

/// Converts the folder and opens the result.
fn converted(folder: &TempDir, wanted: BlockType) -> Result<Gguf, Error> {
    let out = out(folder);
    // A file of the folder is never replaced.
    let _ = std::fs::remove_file(&out);
    convert_path(folder.path(), &out, wanted, None)?;
    Gguf::open(out)
}

fn out(folder: &TempDir) -> PathBuf {
    folder.path().join("out.gguf")
}

fn refusal(folder: &TempDir, wanted: BlockType) -> String {
    let message = converted(folder, wanted).expect_err("it is refused").to_string();
    assert!(!out(folder).exists(), "no file is left");
    message
}

/// A Llama whose matrices have rows of 64 and 32 values, which fill blocks.
fn wide() -> Folder {
    let mut folder =
        llama().set("hidden_size", json!(64)).set("head_dim", json!(16)).set("intermediate_size", json!(40));
    let shapes: Vec<(String, Vec<usize>)> = folder
        .tensors
        .iter()
        .map(|tensor| {
            let dims = tensor.shape.iter().enumerate().map(|(i, dim)| match (dim, tensor.name.as_str()) {
                (6, _) => 40,
                (8, name) if (name.contains("q_proj") && i == 0) || (name.contains("o_proj") && i == 1) => 32,
                (8, _) => 64,
                (4, _) => 16,
                (dim, _) => *dim,
            });
            (tensor.name.clone(), dims.collect())
        })
        .collect();
    for (name, shape) in shapes {
        folder = folder.without(&name).tensor(&name, &shape);
    }
    folder
}

fn bytes(checkpoint: &dyn nybble::format::Checkpoint, name: &str) -> (BlockType, Vec<u8>) {
    let tensor = checkpoint.tensor(name).expect("a tensor");
    let mut scratch = Vec::new();
    let rows = 0..tensor.dims[1..].iter().product();
    let bytes = rows.flat_map(|row| tensor.rows.row(row, &mut scratch).to_vec()).collect();
    (tensor.rows.block_type(), bytes)
}

// --- Tensors ------------------------------------------------------------------------------------------------------------

#[test]
fn an_f32_file_has_every_tensor_and_key_of_the_folder() {
    let folder = written(&wide(), &[("tokenizer.json", &tokenizer())]);
    let file = converted(&folder, BlockType::F32).expect("a file");
    let source = HfFolder::open(folder.path()).expect("a folder");
    assert_eq!(file.names(), source.names());
    for name in source.names() {
        let dims = |checkpoint: &dyn nybble::format::Checkpoint| checkpoint.tensor(name).expect("a tensor").dims;
        assert_eq!(dims(&file), dims(&source), "{name}");
        assert_eq!(bytes(&file, name), bytes(&source, name), "{name}");
    }
    for (key, value) in source.metadata().iter() {
        assert_eq!(file.get(key), Some(value), "{key}");
    }
    assert_eq!(file.get_u32("general.file_type").expect("a number"), Some(0));
}

#[test]
fn four_bits_exempt_embedding_output_norms_and_odd_rows() {
    let folder = written(&wide(), &[("tokenizer.json", &tokenizer())]);
    let file = converted(&folder, BlockType::Q4_0).expect("a file");
    for (name, expected) in [
        ("token_embd.weight", BlockType::Q8_0),
        ("output.weight", BlockType::Q8_0),
        ("output_norm.weight", BlockType::F32),
        ("blk.0.attn_norm.weight", BlockType::F32),
        ("blk.0.attn_q.weight", BlockType::Q4_0),
        ("blk.0.attn_output.weight", BlockType::Q4_0),
        ("blk.0.ffn_up.weight", BlockType::Q4_0),
        // Rows of 40.
        ("blk.0.ffn_down.weight", BlockType::F16),
    ] {
        assert_eq!(file.tensor(name).expect("a tensor").block_type(), expected, "{name}");
    }
    assert_eq!(file.get_u32("general.file_type").expect("a number"), Some(2));
    assert_eq!(file.get_u32("general.quantization_version").expect("a number"), Some(2));
}

#[test]
fn a_converted_gguf_file_keeps_its_tokenizer() {
    let folder = written(&wide(), &[("tokenizer.json", &tokenizer())]);
    let first = converted(&folder, BlockType::F32).expect("a file");
    let again = folder.path().join("again.gguf");
    convert_path(&out(&folder), &again, BlockType::Q8_0, None).expect("a second file");
    let second = Gguf::open(again).expect("it opens");
    assert_eq!(second.get("tokenizer.ggml.tokens"), first.get("tokenizer.ggml.tokens"));
    let direct = converted(&folder, BlockType::Q8_0).expect("a file");
    for name in direct.names() {
        assert_eq!(bytes(&second, name), bytes(&direct, name), "{name}");
    }
}

#[test]
fn a_number_that_does_not_fit_is_refused_with_its_tensor() {
    for (wanted, value) in [(BlockType::F16, 70000.0f32), (BlockType::Q4_0, f32::NAN), (BlockType::Q8_0, f32::INFINITY)]
    {
        let mut folder = wide();
        let stored = folder.find("model.layers.0.mlp.up_proj.weight");
        stored.bytes[400..404].copy_from_slice(&value.to_le_bytes());
        let written = written(&folder, &[("tokenizer.json", &tokenizer())]);
        let message = refusal(&written, wanted);
        assert!(message.contains("blk.0.ffn_up.weight"), "{message}");
    }
}

#[test]
fn a_type_that_cannot_be_encoded_is_refused() {
    let folder = written(&wide(), &[("tokenizer.json", &tokenizer())]);
    let message = refusal(&folder, BlockType::Q4_K);
    assert!(message.contains("Q4_K") && message.contains("F32, F16, Q4_0, Q4_1, Q8_0, BF16"), "{message}");
}

#[test]
fn progress_counts_the_tensors() {
    let folder = wide().write();
    let seen = std::sync::Mutex::new(Vec::new());
    let source = HfFolder::open(folder.path()).expect("a folder");
    let progress = |done: usize, all: usize| {
        seen.lock().expect("a list").push((done, all));
        Ok(())
    };
    convert(&source, &Metadata::new(), &out(&folder), BlockType::F32, Some(&progress)).expect("a file");
    assert_eq!(seen.into_inner().expect("a list"), (0..=12).map(|done| (done, 12)).collect::<Vec<_>>());
}

// --- Quantized while it is read -----------------------------------------------------------------------------------------

#[test]
fn a_quantized_checkpoint_equals_its_converted_file() {
    let folder = written(&wide(), &[("tokenizer.json", &tokenizer())]);
    for wanted in [BlockType::Q4_0, BlockType::Q8_0] {
        let file = converted(&folder, wanted).expect("a file");
        let source = HfFolder::open(folder.path()).expect("a folder");
        let quantized = Quantized::new(&source, wanted).expect("a type that can be encoded");
        for name in quantized.names() {
            // Rows of 40 are padded instead.
            if name != "blk.0.ffn_down.weight" {
                assert_eq!(bytes(&quantized, name), bytes(&file, name), "{name}");
            }
        }
        quantized.finish().expect("no row that could not be encoded");
        let again = Quantized::new(&file, BlockType::Q4_0).expect("a type that can be encoded");
        assert_eq!(bytes(&again, "blk.0.ffn_up.weight").0, wanted, "blocks stay as they are");
    }
}

#[test]
fn rows_that_do_not_fill_blocks_are_padded_with_zeros() {
    let folder = wide().write();
    let source = HfFolder::open(folder.path()).expect("a folder");
    let quantized = Quantized::new(&source, BlockType::Q8_0).expect("a type that can be encoded");
    let tensor = quantized.tensor("blk.0.ffn_down.weight").expect("a tensor");
    assert_eq!(tensor.dims, [40, 64]);
    let (mut scratch, mut row, mut values) = (Vec::new(), vec![0.0; 64], vec![0.0; 40]);
    tensor.rows.block_type().decode(tensor.rows.row(3, &mut scratch), &mut row).expect("two blocks");
    let original = source.tensor("blk.0.ffn_down.weight").expect("a tensor");
    BlockType::F32.decode(original.rows.row(3, &mut scratch), &mut values).expect("a row");
    assert_eq!(row[40..], [0.0; 24]);
    for (found, expected) in row.iter().zip(values) {
        assert!((found - expected).abs() <= expected.abs() / 200.0, "{found} for {expected}");
    }
}

#[test]
fn a_row_that_cannot_be_quantized_is_an_error_at_the_end() {
    let mut folder = wide();
    folder.find("model.layers.0.mlp.up_proj.weight").bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let written = folder.write();
    let source = HfFolder::open(written.path()).expect("a folder");
    let quantized = Quantized::new(&source, BlockType::Q4_0).expect("a type that can be encoded");
    let (_, found) = bytes(&quantized, "blk.0.ffn_up.weight");
    assert_eq!(found[..36], [0; 36], "the row is zeros meanwhile");
    let message = quantized.finish().expect_err("a fault").to_string();
    assert!(message.contains("blk.0.ffn_up.weight") && message.contains("NaN"), "{message}");
}

#[test]
fn a_weight_that_is_nan_or_infinite_is_refused_however_it_is_loaded() {
    let tensors = [
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ];
    for quantize in [Quantize::Stored, Quantize::Int4, Quantize::Int8] {
        for ((name, own), value) in tensors.iter().flat_map(|names| [f32::NAN, f32::INFINITY].map(|v| (*names, v))) {
            let mut folder = wide();
            folder.find(name).bytes[..4].copy_from_slice(&value.to_le_bytes());
            let options = LoadOptions::default().with_threads(1).with_quantize(quantize);
            let error = Model::load(folder.write().path(), &options).expect_err("a fault").to_string();
            assert!(error.contains(own) && error.contains("expected finite"), "{quantize:?}: {error}");
        }
    }
}

#[test]
fn mapped_and_unmapped_folders_load_the_same() {
    let folder = wide().write();
    let load = |mmap| {
        let options = LoadOptions::default().with_threads(1).with_mmap(mmap);
        *Model::load(folder.path(), &options).expect("a model").fingerprint()
    };
    assert_eq!(load(true), load(false));
}

// --- The tokenizer ------------------------------------------------------------------------------------------------------

fn keys(folder: &TempDir) -> Metadata {
    HfFolder::open(folder.path()).expect("a folder").tokenizer().expect("a tokenizer")
}

fn strings(list: &[&str]) -> Value {
    Value::from(list.iter().collect::<StringArray>())
}

#[test]
fn a_byte_level_tokenizer_is_written_completely() {
    let config = json!({
        "bos_token": null, "eos_token": {"content": "<|end|>"}, "add_eos_token": true,
        "chat_template": [{"name": "default", "template": "x"}, {"name": "tool use", "template": "y"}],
    });
    let folder = llama().set("vocab_size", json!(6)).set("bos_token_id", json!(1));
    let folder = resized(folder, 6);
    let files = [
        ("tokenizer.json", &tokenizer()),
        ("tokenizer_config.json", &config),
        ("generation_config.json", &json!({"eos_token_id": [4, 3]})),
    ];
    let keys = keys(&written(&folder, &files));
    for (key, expected) in [
        ("model", Value::from("gpt2")),
        ("pre", Value::from("gpt-2")),
        ("tokens", strings(&["a", "b", "ab", "\u{120}ab", "<|end|>", "[PAD5]"])),
        ("token_type", Value::from(vec![1, 1, 1, 1, 3, 5])),
        ("merges", strings(&["a b", "\u{120} ab"])),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(4)),
        ("eot_token_id", Value::U32(3)),
        ("add_bos_token", Value::Bool(false)),
        ("add_eos_token", Value::Bool(true)),
    ] {
        assert_eq!(keys.get(&format!("tokenizer.ggml.{key}")), Some(&expected), "{key}");
    }
    assert_eq!(keys.get("tokenizer.chat_template"), Some(&Value::from("x")));
    assert_eq!(keys.get("tokenizer.chat_template.tool_use"), Some(&Value::from("y")));
    assert_eq!(keys.get("tokenizer.chat_templates"), Some(&strings(&["tool_use"])));
}

/// A Llama whose embedding and output have this many rows.
fn resized(mut folder: Folder, rows: usize) -> Folder {
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        folder = folder.without(name).tensor(name, &[rows, 8]);
    }
    folder.set("vocab_size", json!(rows))
}

#[test]
fn a_tokenizer_of_pieces_has_scores_from_its_merges() {
    let config = json!({"bos_token": "<s>", "unk_token": "<unk>"});
    let folder = resized(llama(), 6);
    let keys = keys(&written(&folder, &[("tokenizer.json", &pieces()), ("tokenizer_config.json", &config)]));
    for (key, expected) in [
        ("model", Value::from("llama")),
        ("tokens", strings(&["<unk>", "<0x0A>", "ab", "abab", "<s>", "a b"])),
        ("token_type", Value::from(vec![2, 6, 1, 1, 3, 4])),
        ("scores", Value::from(vec![0.0f32, -1e6, -0.0, -1.0, 0.0, 0.0])),
        ("bos_token_id", Value::U32(4)),
        ("unknown_token_id", Value::U32(0)),
        ("add_bos_token", Value::Bool(true)),
        ("add_eos_token", Value::Bool(false)),
        ("add_space_prefix", Value::Bool(true)),
    ] {
        assert_eq!(keys.get(&format!("tokenizer.ggml.{key}")), Some(&expected), "{key}");
    }
    assert!(!keys.contains("tokenizer.ggml.merges"));
}

#[test]
fn a_template_in_its_own_file_takes_precedence() {
    let config = json!({"chat_template": "old"});
    let folder = written(&llama(), &[("tokenizer.json", &tokenizer()), ("tokenizer_config.json", &config)]);
    std::fs::write(folder.path().join("chat_template.jinja"), "new").expect("a file");
    assert_eq!(keys(&folder).get("tokenizer.chat_template"), Some(&Value::from("new")));
}

fn tokenizer_refusal(tokenizer: &Json) -> String {
    let folder = written(&llama(), &[("tokenizer.json", tokenizer)]);
    refusal(&folder, BlockType::F32)
}

#[test]
fn a_tokenizer_that_is_missing_damaged_or_unknown_is_refused() {
    let message = refusal(&llama().write(), BlockType::F32);
    assert!(message.contains("tokenizer.json") && message.contains("missing"), "{message}");
    let change = |pointer: &str, value: Json| {
        let mut tokenizer = tokenizer();
        *tokenizer.pointer_mut(pointer).expect("a value") = value;
        tokenizer_refusal(&tokenizer)
    };
    for (pointer, value, parts) in [
        ("/model/type", json!("WordLevel"), ["model.type", "WordLevel"]),
        ("/model/vocab/ab", json!(5), ["model.vocab", "below 5"]),
        ("/model/vocab/ab", json!(0), ["model.vocab", "the id 0 a second time"]),
        ("/model/vocab", json!([]), ["model.vocab", "no object"]),
        ("/model/merges", json!(["a b c"]), ["model.merges", "a b c"]),
        ("/model/merges", json!({}), ["model.merges", "no list"]),
        ("/added_tokens/0/id", json!(-1), ["added_tokens", "below 5"]),
        ("/added_tokens/0/content", json!(1), ["added_tokens", "content"]),
        ("/pre_tokenizer/type", json!("Whitespace"), ["pre_tokenizer", "Whitespace"]),
    ] {
        let message = change(pointer, value);
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} are not in {message:?}");
    }
}

#[test]
fn a_phi3_without_its_special_tokens_is_renamed() {
    let parent = tempfile::tempdir().expect("a folder");
    let name = |called: &str| {
        let path = parent.path().join(called);
        std::fs::create_dir(&path).expect("a folder");
        write_all(&path);
        let folder = HfFolder::open(&path).expect("a folder");
        let keys = folder.tokenizer().expect("a tokenizer");
        keys.get("general.name").or(folder.metadata().get("general.name")).cloned()
    };
    assert_eq!(name("my-phi-3"), Some(Value::from("model")));
    assert_eq!(name("my-llama"), Some(Value::from("my-llama")));
}

fn write_all(path: &Path) {
    llama().write_to(path);
    std::fs::write(path.join("tokenizer.json"), tokenizer().to_string()).expect("a file");
}
