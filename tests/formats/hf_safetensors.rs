//! safetensors folders: valid ones open, and each kind of damage has its error.

use std::fs;
use std::path::Path;

use crate::hf_folder::{Stored, file, llama};
use nybble::format::safetensors::SafeTensors;
use nybble::quant::block::BlockType;
use serde_json::{Value, json};

/// The error message of opening `folder`.
fn refusal(folder: &Path) -> String {
    SafeTensors::open(folder).expect_err("a folder that cannot be opened").to_string()
}

/// A file with this header and `data` bytes of data.
fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// The error message for a folder whose only file is `bytes`.
fn refusal_of(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("model.safetensors"), bytes).expect("a file");
    refusal(folder.path())
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// A folder of two files with their index after `change`.
fn sharded(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let tensors = llama().tensors;
    let (first, second): (Vec<Stored>, Vec<Stored>) = tensors.into_iter().partition(|t| t.name.contains("self_attn"));
    let folder = tempfile::tempdir().expect("a folder");
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": {}});
    for (name, tensors) in [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)] {
        fs::write(folder.path().join(name), file(&tensors)).expect("a file");
        for tensor in tensors {
            index["weight_map"][tensor.name] = json!(name);
        }
    }
    change(&mut index);
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).expect("an index");
    folder
}

#[test]
fn a_single_file_yields_every_tensor_with_its_bytes() {
    let checkpoint = llama();
    let folder = checkpoint.write();
    let files = SafeTensors::open(folder.path()).expect("it opens");
    assert_eq!(files.tensors().len(), checkpoint.tensors.len());
    for stored in &checkpoint.tensors {
        let tensor = files.tensor(&stored.name).expect("a tensor");
        assert_eq!(tensor.shape(), stored.shape);
        assert_eq!(tensor.block_type(), Some(BlockType::F32));
        assert_eq!(files.data(tensor), stored.bytes);
        files.release(tensor);
        assert_eq!(files.data(tensor), stored.bytes, "given back pages can still be read");
    }
}

#[test]
fn an_index_yields_the_tensors_of_all_its_files() {
    let folder = sharded(|_| {});
    let files = SafeTensors::open(folder.path()).expect("it opens");
    for stored in llama().tensors {
        let tensor = files.tensor(&stored.name).expect("a tensor");
        assert_eq!(files.data(tensor), stored.bytes);
        let number = if stored.name.contains("self_attn") { "00001" } else { "00002" };
        assert!(files.path(tensor).to_string_lossy().contains(&format!("model-{number}-of-")));
    }
}

#[test]
fn a_missing_shard_is_reported_with_one_of_its_tensors() {
    let folder = sharded(|_| {});
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).expect("it is removed");
    assert_says(&refusal(folder.path()), &["model-00002-of-00002.safetensors", "missing", "model.embed_tokens.weight"]);
}

#[test]
fn a_truncated_shard_is_refused_with_the_truncated_tensor() {
    let folder = sharded(|_| {});
    let path = folder.path().join("model-00001-of-00002.safetensors");
    let bytes = fs::read(&path).expect("a file");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("a shorter file");
    assert_says(&refusal(folder.path()), &["model-00001-of-00002", "self_attn", "truncated"]);
}

#[test]
fn every_truncation_is_an_error() {
    let whole = file(&llama().tensors);
    for length in (0..whole.len()).step_by(7) {
        refusal_of(&whole[..length]);
    }
}

#[test]
fn changing_any_byte_of_a_header_never_panics() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let whole = file(&llama().tensors[..2]);
    for at in 0..whole.len().min(200) {
        for byte in [0, b'"', b'{', b'9', b',', 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            fs::write(&path, bytes).expect("a file");
            if let Ok(files) = SafeTensors::open(folder.path()) {
                files.tensors().iter().for_each(|tensor| assert!(files.data(tensor).len() <= whole.len()));
            }
        }
    }
}

#[test]
fn an_index_that_names_the_wrong_file_is_refused() {
    let folder = sharded(|index| index["weight_map"]["lm_head.weight"] = json!("model-00001-of-00002.safetensors"));
    assert_says(&refusal(folder.path()), &["model-00001-of-00002", "lm_head.weight", "model-00002-of-00002"]);
}

#[test]
fn an_index_with_a_tensor_that_no_file_holds_is_refused() {
    let folder = sharded(|index| index["weight_map"]["nowhere"] = json!("model-00001-of-00002.safetensors"));
    assert_says(&refusal(folder.path()), &["model-00001-of-00002", "nowhere", "no such tensor"]);
}

#[test]
fn an_index_cannot_name_files_outside_its_folder() {
    for outside in ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors", "..", "", "x.bin"] {
        let folder = sharded(|index| index["weight_map"]["lm_head.weight"] = json!(outside));
        assert_says(&refusal(folder.path()), &["index.json", "lm_head.weight", "in the same folder"]);
    }
}

#[test]
fn an_index_without_a_weight_map_is_refused() {
    let folder = sharded(|index| index["weight_map"] = json!([]));
    assert_says(&refusal(folder.path()), &["index.json", "weight_map"]);
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let folder = sharded(|_| {});
    let path = folder.path().join("model-00002-of-00002.safetensors");
    fs::write(path, file(&llama().tensors)).expect("a file");
    assert_says(&refusal(folder.path()), &["another file", "each tensor once"]);
}

#[test]
fn a_duplicate_tensor_in_a_header_is_refused() {
    let entry = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert_says(&refusal_of(&raw(&format!("{{{entry},{entry}}}"), 4)), &["\"a\" a second time"]);
}

#[test]
fn a_huge_header_is_refused_before_it_is_read() {
    let mut bytes = raw("{}", 0);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_says(&refusal_of(&bytes), &["18446744073709551615", "at most 100000000"]);
    bytes[..8].copy_from_slice(&1000u64.to_le_bytes());
    assert_says(&refusal_of(&bytes), &["a header of 1000 bytes", "truncated"]);
}

#[test]
fn a_header_that_contradicts_the_data_is_refused_with_the_tensor() {
    let header = |entry: &str| format!("{{\"a\":{entry}}}");
    for (entry, data, parts) in [
        (r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4, &["\"a\"", "4 bytes", "8 for the shape [2]"][..]),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8, &["\"a\"", "data at 4", "data at 0"]),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4, &["\"a\"", "from 4 to 0"]),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 8, &["8 bytes of data", "4, the end of the last"]),
        (r#"{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}"#, 4, &["\"a\"", "counted"]),
        (r#"{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}"#, 4, &["\"a\"", "counted"]),
        (r#"{"dtype":"F32","shape":[0],"data_offsets":[0,4]}"#, 4, &["\"a\"", "4 bytes", "0 for the shape [0]"]),
        (r#"{"dtype":"F64","shape":[1],"data_offsets":[0,4]}"#, 4, &["\"a\"", "4 bytes", "8 for the shape [1] of F64"]),
        (
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#,
            4,
            &["\"a\"", "4 bytes of data", "up to 8", "truncated"],
        ),
        (
            r#"{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551615]}"#,
            4,
            &["truncated"],
        ),
        (r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"dtype":"F32","shape":[36893488147419103232],"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and"]),
        (r#"{"dtype":"F32","shape":1,"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"dtype":4,"shape":[1],"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"shape":[1],"data_offsets":[0,4]}"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
        (r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#, 4, &["\"a\"", "1 offsets"]),
        (r#"[]"#, 4, &["\"a\"", "dtype, shape and data_offsets"]),
    ] {
        assert_says(&refusal_of(&raw(&header(entry), data)), parts);
    }
}

#[test]
fn a_header_that_is_not_an_object_of_tensors_is_refused() {
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for header in ["", "[]", "null", "{", "{\"a\"}", "{\"a\":NaN}", "{} x", &"[".repeat(100_000), &deep] {
        assert_says(&refusal_of(&raw(header, 0)), &["model.safetensors", "at byte 8", "a header of JSON, an object"]);
    }
    let mut bytes = raw("{\"?\":1}", 0);
    bytes[10] = 0xff;
    assert_says(&refusal_of(&bytes), &["at byte 8", "a header of JSON, an object of tensors"]);
}

#[test]
fn tensors_that_overlap_are_refused_in_any_order_of_the_header() {
    let entry = |name: &str, from: usize, to: usize| {
        format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{from},{to}]}}", to - from)
    };
    for (one, other) in [((0, 4), (0, 4)), ((0, 4), (2, 8)), ((0, 8), (2, 4)), ((0, 3), (4, 8))] {
        for (first, second) in [(one, other), (other, one)] {
            let header = format!("{{{},{}}}", entry("a", first.0, first.1), entry("b", second.0, second.1));
            let message = refusal_of(&raw(&header, 8));
            assert_says(&message, &["model.safetensors", "tensor", "without gaps or overlaps"]);
        }
    }
}

#[test]
fn metadata_in_a_header_are_ignored() {
    for metadata in ["{}", "[]", "1", "null", "{\"format\":[1,{}]}"] {
        let header =
            format!("{{\"__metadata__\":{metadata},\"a\":{{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}}}");
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("model.safetensors"), raw(&header, 1)).expect("a file");
        assert_eq!(SafeTensors::open(folder.path()).expect("it opens").tensors().len(), 1);
    }
}

#[test]
fn a_tensor_of_unknown_type_opens_and_is_refused_as_a_weight() {
    let mut folder = llama();
    let name = "model.layers.0.mlp.up_proj.weight";
    folder.find(name).dtype = safetensors::Dtype::U32;
    let written = folder.write();
    let path = written.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("a file");
    let at = bytes.windows(5).position(|window| window == b"\"U32\"").expect("the type");
    fs::write(&path, [&bytes[..at], b"\"Q77\"", &bytes[at + 5..]].concat()).expect("a file");
    let files = SafeTensors::open(written.path()).expect("it opens");
    assert_eq!(files.tensor(name).expect("a tensor").block_type(), None);
    let message = nybble::model::hf::HfFolder::open(written.path()).expect_err("it is refused").to_string();
    assert_says(&message, &[name, "Q77", "F32, F16, BF16"]);
}

#[test]
fn an_index_that_is_not_an_object_of_names_is_refused() {
    let folder = sharded(|_| {});
    let path = folder.path().join("model.safetensors.index.json");
    for text in ["", "[]", "{", "NaN", "{\"weight_map\": {}, \"weight_map\": {}}", &"[".repeat(100_000)] {
        fs::write(&path, text).expect("an index");
        assert_says(&refusal(folder.path()), &["model.safetensors.index.json", "a JSON object"]);
    }
    for wrong in [json!(null), json!(1), json!([]), json!({}), json!(["model-00001-of-00002.safetensors"])] {
        let folder = sharded(|index| index["weight_map"]["lm_head.weight"] = wrong);
        assert_says(&refusal(folder.path()), &["index.json", "lm_head.weight", "in the same folder"]);
    }
    let folder = sharded(|index| index["weight_map"] = json!({}));
    fs::copy(llama().write().path().join("config.json"), folder.path().join("config.json")).expect("a configuration");
    let message = nybble::model::hf::HfFolder::open(folder.path()).expect_err("it is refused").to_string();
    assert_says(&message, &["is missing", "as config.json says"]);
}

#[cfg(unix)]
#[test]
fn a_folder_or_a_pipe_instead_of_a_file_is_refused_without_waiting() {
    for name in ["model.safetensors.index.json", "model-00002-of-00002.safetensors"] {
        for make in ["mkdir", "mkfifo"] {
            let folder = sharded(|_| {});
            let path = folder.path().join(name);
            fs::remove_file(&path).expect("it is removed");
            assert!(std::process::Command::new(make).arg(&path).status().expect("it runs").success());
            assert_says(&refusal(folder.path()), &[name, if make == "mkdir" { "directory" } else { "regular file" }]);
        }
    }
}

#[test]
fn a_folder_of_pickled_files_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("pytorch_model.bin"), b"PK").expect("a file");
    assert_says(&refusal(folder.path()), &["pytorch_model.bin", "pickled", "any program", "safetensors"]);
}

#[test]
fn an_empty_folder_and_shards_without_an_index_say_what_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_says(&refusal(folder.path()), &["model.safetensors", "missing"]);
    fs::write(folder.path().join("model-00001-of-00002.safetensors"), file(&[])).expect("a file");
    assert_says(&refusal(folder.path()), &["model.safetensors.index.json", "missing"]);
    assert_says(&refusal(&folder.path().join("nowhere")), &["nowhere"]);
}
