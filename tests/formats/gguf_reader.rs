//! Valid models are read completely, from one file or several.

use std::path::{Path, PathBuf};

use crate::gguf_builder::{Builder, Saved, array, assert_refused, open_both_ways, string};
use nybble::format::gguf::{Array, Gguf, StringArray, Value};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};

#[test]
fn the_smallest_file_opens() {
    let bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let saved = Saved::new(bytes);
    let file = saved.open().unwrap();
    assert_eq!((file.version(), file.metadata().len(), file.tensors().len()), (3, 0, 0));
    assert_eq!(file.path(), saved.path());
}

#[test]
fn a_vocabulary_without_tensors_opens_without_padding() {
    let tokens = array(8, 2, [string("a"), string("b")].concat());
    let file = Builder::new().entry("general.architecture", 8, string("llama")).entry("tokens", 9, tokens);
    assert_ne!(file.bytes().len() % 32, 0);
    let opened = Saved::new(&file.bytes()).open().unwrap();
    assert_eq!(opened.get_strings("tokens").unwrap().unwrap().get(1), Some(b"b".as_slice()));
}

#[test]
fn versions_2_and_3_read_alike() {
    for version in [2, 3] {
        let mut file =
            Builder::new().entry("k", 4, 7u32.to_le_bytes()).tensor("t", &[1], 0, 0).data(5f32.to_le_bytes());
        file.version = version;
        let opened = Saved::new(&file.bytes()).open().unwrap();
        assert_eq!((opened.version(), opened.get_u32("k").unwrap()), (version, Some(7)));
        assert_eq!(opened.decode(opened.tensor("t").unwrap()).unwrap(), [5.0]);
    }
}

#[test]
fn every_value_type_is_read_in_the_order_of_the_file() {
    let scalars: [(&str, u32, Vec<u8>, Value); 13] = [
        ("u8", 0, vec![200], Value::U8(200)),
        ("i8", 1, vec![200], Value::I8(-56)),
        ("u16", 2, 60_000u16.to_le_bytes().into(), Value::U16(60_000)),
        ("i16", 3, (-2i16).to_le_bytes().into(), Value::I16(-2)),
        ("u32", 4, u32::MAX.to_le_bytes().into(), Value::U32(u32::MAX)),
        ("i32", 5, i32::MIN.to_le_bytes().into(), Value::I32(i32::MIN)),
        ("f32", 6, 0.1f32.to_le_bytes().into(), Value::F32(0.1)),
        ("true", 7, vec![1], Value::Bool(true)),
        ("false", 7, vec![0], Value::Bool(false)),
        ("string", 8, string("w\u{f6}rd"), Value::from("w\u{f6}rd")),
        ("u64", 10, u64::MAX.to_le_bytes().into(), Value::U64(u64::MAX)),
        ("i64", 11, i64::MIN.to_le_bytes().into(), Value::I64(i64::MIN)),
        ("f64", 12, 0.1f64.to_le_bytes().into(), Value::F64(0.1)),
    ];
    let arrays: [(&str, u32, u64, Vec<u8>, Value); 13] = [
        ("u8s", 0, 2, vec![1, 2], vec![1u8, 2].into()),
        ("i8s", 1, 1, vec![255], vec![-1i8].into()),
        ("u16s", 2, 1, vec![1, 2], vec![513u16].into()),
        ("i16s", 3, 1, vec![255, 255], vec![-1i16].into()),
        ("u32s", 4, 2, vec![1, 0, 0, 0, 2, 0, 0, 0], vec![1u32, 2].into()),
        ("i32s", 5, 1, vec![255; 4], vec![-1i32].into()),
        ("f32s", 6, 1, 0.5f32.to_le_bytes().into(), vec![0.5f32].into()),
        ("bools", 7, 2, vec![0, 1], vec![false, true].into()),
        ("strings", 8, 2, [string("x"), string("")].concat(), ["x", ""].iter().collect::<StringArray>().into()),
        ("u64s", 10, 1, vec![255; 8], vec![u64::MAX].into()),
        ("i64s", 11, 1, vec![255; 8], vec![-1i64].into()),
        ("f64s", 12, 1, 0.5f64.to_le_bytes().into(), vec![0.5f64].into()),
        ("none", 4, 0, vec![], Vec::<u32>::new().into()),
    ];
    let mut file = Builder::new();
    let mut expected = Vec::new();
    for (key, type_id, bytes, value) in scalars {
        file = file.entry(key, type_id, bytes);
        expected.push((key, value));
    }
    for (key, type_id, count, bytes, value) in arrays {
        file = file.entry(key, 9, array(type_id, count, bytes));
        expected.push((key, value));
    }
    let opened = Saved::new(&file.bytes()).open().unwrap();
    let found: Vec<(&str, Value)> = opened.metadata().iter().map(|(key, value)| (key, value.clone())).collect();
    assert_eq!(found, expected);
}

/// A file with values of many types under short keys.
fn values() -> Saved {
    let file = Builder::new()
        .entry("u8", 0, [5])
        .entry("i32", 5, 5i32.to_le_bytes())
        .entry("negative", 5, (-1i32).to_le_bytes())
        .entry("u64", 10, (1u64 << 40).to_le_bytes())
        .entry("f32", 6, 0.5f32.to_le_bytes())
        .entry("f64", 12, 0.5f64.to_le_bytes())
        .entry("bool", 7, [1])
        .entry("text", 8, string("words"))
        .entry("i32s", 9, array(5, 2, [3i32.to_le_bytes(), 4i32.to_le_bytes()].concat()))
        .entry("negatives", 9, array(5, 1, (-4i32).to_le_bytes()))
        .entry("f32s", 9, array(6, 1, 0.5f32.to_le_bytes()))
        .entry("bools", 9, array(7, 2, [1, 0]));
    Saved::new(&file.bytes())
}

#[test]
fn integers_of_any_type_are_accepted_where_they_fit() {
    let file = values().open().unwrap();
    assert_eq!(file.get_u32("u8").unwrap(), Some(5));
    assert_eq!(file.get_u32("i32").unwrap(), Some(5));
    assert_eq!(file.get_u64("u64").unwrap(), Some(1 << 40));
    assert_eq!(file.get_f32("f32").unwrap(), Some(0.5));
    assert_eq!(file.get_f32("f64").unwrap(), Some(0.5));
    assert_eq!(file.get_bool("bool").unwrap(), Some(true));
    assert_eq!(file.get_str("text").unwrap(), Some("words"));
    assert_eq!(file.get_array_u32("i32s").unwrap(), Some(vec![3, 4]));
    assert_eq!(file.get_array_i32("negatives").unwrap(), Some(vec![-4]));
    assert_eq!(file.get_array_f32("f32s").unwrap(), Some(vec![0.5]));
    assert_eq!(file.get_array_bool("bools").unwrap(), Some([true, false].as_slice()));
}

#[test]
fn a_missing_key_is_not_an_error() {
    let file = values().open().unwrap();
    assert!(file.get("absent").is_none());
    assert_eq!(file.get_u32("absent").unwrap(), None);
    assert_eq!(file.get_str("absent").unwrap(), None);
    assert_eq!(file.get_strings("absent").unwrap(), None);
    assert_eq!(file.per_layer_u32("absent", 3).unwrap(), None);
}

#[test]
fn a_value_of_wrong_type_or_out_of_range_is_an_error_with_the_key() {
    let saved = values();
    let file = saved.open().unwrap();
    let check = |error: Error, key: &str, found: &str, expected: &str| {
        let place = Place::Key(key.to_owned());
        assert_eq!(error.to_string(), Error::malformed(saved.path(), place, found, expected).to_string());
    };
    let (u32s, u64s) = ("an integer from 0 to 2^32 - 1", "an integer from 0 to 2^64 - 1");
    check(file.get_u32("u64").unwrap_err(), "u64", "u64 1099511627776", u32s);
    check(file.get_u32("negative").unwrap_err(), "negative", "i32 -1", u32s);
    check(file.get_u64("negative").unwrap_err(), "negative", "i32 -1", u64s);
    check(file.get_u32("f32").unwrap_err(), "f32", "f32 0.5", u32s);
    check(file.get_u32("bool").unwrap_err(), "bool", "bool true", u32s);
    check(file.get_f32("u8").unwrap_err(), "u8", "u8 5", "a float");
    check(file.get_bool("u8").unwrap_err(), "u8", "u8 5", "a boolean");
    check(file.get_str("i32s").unwrap_err(), "i32s", "array of 2 i32", "a string of valid UTF-8");
    check(file.get_strings("text").unwrap_err(), "text", "string \"words\"", "an array of strings");
    let u32_array = "an array of integers from 0 to 2^32 - 1";
    check(file.get_array_u32("negatives").unwrap_err(), "negatives", "array of 1 i32", u32_array);
    check(file.get_array_f32("i32s").unwrap_err(), "i32s", "array of 2 i32", "an array of floats");
    check(file.get_array_bool("i32s").unwrap_err(), "i32s", "array of 2 i32", "an array of booleans");
}

#[test]
fn values_per_layer_are_one_value_or_an_array_of_that_length() {
    let file = values().open().unwrap();
    assert_eq!(file.per_layer_u32("u8", 3).unwrap(), Some(vec![5, 5, 5]));
    assert_eq!(file.per_layer_u32("i32s", 2).unwrap(), Some(vec![3, 4]));
    assert_eq!(file.per_layer_bool("bool", 2).unwrap(), Some(vec![true, true]));
    assert_eq!(file.per_layer_bool("bools", 2).unwrap(), Some(vec![true, false]));
    for (error, found, expected) in [
        (
            file.per_layer_u32("i32s", 3).map(drop),
            "array of 2 i32",
            "an integer from 0 to 2^32 - 1, or an array of 3 of them",
        ),
        (
            file.per_layer_u32("negatives", 1).map(drop),
            "array of 1 i32",
            "an integer from 0 to 2^32 - 1, or an array of 1 of them",
        ),
        (file.per_layer_bool("bools", 1).map(drop), "array of 2 bool", "a boolean, or an array of 1 of them"),
        (file.per_layer_bool("u8", 1).map(drop), "u8 5", "a boolean, or an array of 1 of them"),
    ] {
        let text = error.unwrap_err().to_string();
        assert!(text.ends_with(&format!("found {found}, expected {expected}")), "{text}");
    }
}

#[test]
fn strings_of_an_array_are_bytes_and_may_be_empty_or_invalid_utf8() {
    let strings = [string("a"), string(""), string([0xff, 0xfe]), string("")].concat();
    let file = Saved::new(&Builder::new().entry("k", 9, array(8, 4, strings)).bytes()).open().unwrap();
    let found = file.get_strings("k").unwrap().unwrap();
    assert_eq!(found.iter().collect::<Vec<_>>(), [b"a".as_slice(), b"", &[0xff, 0xfe], b""]);
    assert_eq!(
        (0..5).map(|i| found.get(i).map(<[u8]>::len)).collect::<Vec<_>>(),
        [Some(1), Some(0), Some(2), Some(0), None]
    );
    assert_eq!((found.len(), found.is_empty()), (4, false));
    assert!(matches!(file.get("k"), Some(Value::Array(Array::String(_)))));
}

#[test]
fn tensors_have_their_shape_and_place() {
    let block = [&0x3c00u16.to_le_bytes(), [0x98; 16].as_slice()].concat();
    let data = [block.repeat(12), vec![0; 40], 2f32.to_le_bytes().repeat(3)].concat();
    let file = Builder::new().tensor("m", &[64, 3, 2], 2, 0).tensor("v", &[3], 0, 256).data(data);
    let start = file.data_start() as u64;
    let opened = Saved::new(&file.bytes()).open().unwrap();
    let m = opened.tensor("m").unwrap();
    assert_eq!((m.name(), m.block_type(), m.dims()), ("m", BlockType::Q4_0, [64, 3, 2].as_slice()));
    assert_eq!((m.columns(), m.rows(), m.elements(), m.nbytes()), (64, 6, 384, 216));
    assert_eq!((m.offset(), m.shard()), (start, 0));
    assert_eq!(opened.data(m), block.repeat(12));
    // Codes 8 and 9 with a scale of 1.
    let row: Vec<f32> = (0..32).map(|i| if i < 16 { 0.0 } else { 1.0 }).collect();
    assert_eq!(opened.decode(m).unwrap(), row.repeat(12));
    let v = opened.tensor("v").unwrap();
    assert_eq!((v.columns(), v.rows(), v.elements(), v.offset()), (3, 1, 3, start + 256));
    assert_eq!(opened.decode(v).unwrap(), [2.0; 3]);
    assert_eq!(opened.tensors().iter().map(|t| t.name()).collect::<Vec<_>>(), ["m", "v"]);
    assert!(opened.tensor("w").is_none());
}

#[test]
fn gaps_between_tensors_and_after_the_last_are_accepted() {
    let file = Builder::new().tensor("a", &[1], 0, 32).tensor("b", &[1], 0, 128).data([0; 1000]);
    assert_eq!(Saved::new(&file.bytes()).open().unwrap().tensors().len(), 2);
}

#[test]
fn the_alignment_sets_where_data_start() {
    for alignment in [1u32, 8, 64, 65_536] {
        let mut file = Builder::new()
            .entry("general.alignment", 4, alignment.to_le_bytes())
            .tensor("t", &[1], 0, 0)
            .data(3f32.to_le_bytes());
        file.alignment = alignment as usize;
        let opened = Saved::new(&file.bytes()).open().unwrap();
        let tensor = opened.tensor("t").unwrap();
        assert!(tensor.offset().is_multiple_of(alignment.into()));
        assert_eq!(opened.decode(tensor).unwrap(), [3.0]);
    }
}

#[test]
fn a_tensor_of_unsupported_type_is_listed_and_refused_by_name() {
    let saved = Saved::new(&Builder::new().tensor("t", &[256], 15, 0).data([0; 292]).bytes());
    let file = saved.open().unwrap();
    let tensor = file.tensor("t").unwrap();
    assert_eq!((tensor.block_type().name(), tensor.nbytes(), file.data(tensor).len()), ("Q8_K", 292, 292));
    match file.decode(tensor) {
        Err(Error::Unsupported { path, place, what, supported }) => {
            assert_eq!((path, place), (saved.path(), Place::Tensor("t".into())));
            assert_eq!(what, "block type Q8_K");
            assert!(supported.starts_with("supported: F32, F16, Q4_0"), "{supported}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tensor_reads_the_same_after_its_release() {
    let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    let file = Builder::new().tensor("t", &[25_000], 0, 0).data(&data);
    let saved = Saved::new(&file.bytes());
    for opened in [Gguf::open(saved.path()).unwrap(), Gguf::open_unmapped(saved.path()).unwrap()] {
        let tensor = opened.tensor("t").unwrap();
        assert_eq!(opened.data(tensor), data);
        opened.release(tensor);
        assert_eq!(opened.data(tensor), data);
    }
}

#[test]
fn an_unmapped_file_may_change_after_it_was_opened() {
    let saved = Saved::new(&Builder::new().tensor("t", &[4], 0, 0).data([7; 16]).bytes());
    let opened = Gguf::open_unmapped(saved.path()).unwrap();
    saved.write(b"something else");
    assert_eq!(opened.data(opened.tensor("t").unwrap()), [7; 16]);
}

#[test]
fn the_tensor_of_another_model_never_reads_outside_the_file() {
    let large = Saved::new(&Builder::new().tensor("t", &[1000], 0, 0).data([0; 4000]).bytes()).open().unwrap();
    let small = Saved::new(&Builder::new().tensor("t", &[1], 0, 0).data([0; 4]).bytes()).open().unwrap();
    let foreign = large.tensor("t").unwrap();
    assert!(small.data(foreign).is_empty());
    assert!(small.decode(foreign).is_err());
    small.release(foreign);
}

#[test]
fn an_open_file_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Gguf>();
}

// Several files

/// A folder of shards.
struct Shards {
    folder: tempfile::TempDir,
}

impl Shards {
    /// `count` valid files, each with a tensor whose value is the number of the file.
    fn new(count: u16) -> Self {
        let shards = Shards { folder: tempfile::tempdir().unwrap() };
        for number in 0..count {
            shards.write(number + 1, count, Self::shard(number, count, &format!("t{number}")));
        }
        shards
    }

    fn shard(number: u16, count: u16, tensor: &str) -> Builder {
        let mut file = Builder::new()
            .entry("split.no", 2, number.to_le_bytes())
            .entry("split.count", 2, count.to_le_bytes())
            .entry("split.tensors.count", 5, i32::from(count).to_le_bytes());
        if number == 0 {
            file = file.entry("general.architecture", 8, string("llama"));
        }
        file.tensor(tensor, &[1], 0, 0).data(f32::from(number).to_le_bytes())
    }

    fn path(&self, number: u16, count: u16) -> PathBuf {
        self.folder.path().join(format!("my-model-{number:05}-of-{count:05}.gguf"))
    }

    fn write(&self, number: u16, count: u16, file: Builder) {
        std::fs::write(self.path(number, count), file.bytes()).unwrap();
    }

    /// The path, place, found and expected of the error of opening the first of three files.
    fn fault(&self) -> (PathBuf, Place, String, String) {
        match open_both_ways(&self.path(1, 3)) {
            Err(Error::Malformed { path, place, found, expected }) => (path, place, found, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_split_model_opens_by_the_path_of_any_of_its_files() {
    let shards = Shards::new(3);
    for number in 1..=3 {
        let model = open_both_ways(&shards.path(number, 3)).unwrap();
        assert_eq!(model.path(), shards.path(1, 3));
        assert_eq!(model.paths().collect::<Vec<_>>(), [1, 2, 3].map(|number| shards.path(number, 3)));
        assert_eq!(model.get_str("general.architecture").unwrap(), Some("llama"));
        for (index, tensor) in model.tensors().iter().enumerate() {
            assert_eq!((tensor.name(), tensor.shard()), (format!("t{index}").as_str(), index));
            assert_eq!(model.decode(tensor).unwrap(), [index as f32]);
            model.release(tensor);
        }
        assert_eq!(model.tensors().len(), 3);
    }
}

#[cfg(unix)]
#[test]
fn links_into_a_cache_are_resolved_in_the_folder_of_the_links() {
    let shards = Shards::new(2);
    let links = tempfile::tempdir().unwrap();
    for number in [1, 2] {
        // The cache names files by their hashes.
        let blob = shards.folder.path().join(format!("hash{number}"));
        std::fs::rename(shards.path(number, 2), &blob).unwrap();
        std::os::unix::fs::symlink(&blob, links.path().join(format!("m-{number:05}-of-00002.gguf"))).unwrap();
    }
    assert_eq!(open_both_ways(&links.path().join("m-00001-of-00002.gguf")).unwrap().tensors().len(), 2);
}

#[test]
fn the_error_for_a_missing_shard_has_its_name() {
    let shards = Shards::new(3);
    std::fs::remove_file(shards.path(2, 3)).unwrap();
    match Gguf::open(shards.path(1, 3)) {
        Err(Error::Missing { path, place, expected }) => {
            assert_eq!((path, place), (shards.path(2, 3), Place::File));
            assert_eq!(expected, "number 2 of the 3 files of a model");
        }
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(shards.path(1, 3)).unwrap();
    let error = Gguf::open(shards.path(3, 3)).unwrap_err();
    assert!(matches!(error, Error::Missing { path, .. } if path == shards.path(1, 3)));
}

#[test]
fn a_model_of_65535_files_stops_at_the_first_missing_one() {
    let shards = Shards::new(0);
    shards.write(1, u16::MAX, Shards::shard(0, u16::MAX, "t"));
    let error = Gguf::open(shards.path(1, u16::MAX)).unwrap_err();
    assert!(matches!(error, Error::Missing { path, .. } if path == shards.path(2, u16::MAX)));
}

#[test]
fn a_shard_under_another_name_is_refused() {
    let shards = Shards::new(3);
    for name in [
        "model.gguf",
        "my-model-00001-of-00004.gguf",
        "my-model-00002-of-00003.gguf",
        "m-1-of-3.gguf",
        "m-+0001-of-+0003.gguf",
    ] {
        let path = shards.folder.path().join("elsewhere").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(shards.path(1, 3), &path).unwrap();
        match Gguf::open(&path) {
            Err(Error::Malformed { path: at, place, found, expected }) => {
                assert_eq!((at, place), (path, Place::Key("split.count".into())));
                assert_eq!(found, "file 1 of a model of 3 files, under this name");
                assert_eq!(expected, "a name that ends in -00001-of-00003.gguf");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn shards_of_different_models_are_refused() {
    let shards = Shards::new(3);
    shards.write(2, 3, Shards::shard(1, 2, "t1"));
    assert_eq!(shards.fault(), (shards.path(2, 3), Place::Key("split.count".into()), "2".into(), "3".into()));
    shards.write(2, 3, Shards::shard(2, 3, "t1"));
    assert_eq!(shards.fault(), (shards.path(2, 3), Place::Key("split.no".into()), "2".into(), "1".into()));
    shards.write(2, 3, Builder::new());
    assert_eq!(shards.fault(), (shards.path(2, 3), Place::Key("split.count".into()), "0".into(), "3".into()));
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let shards = Shards::new(3);
    shards.write(3, 3, Shards::shard(2, 3, "t0"));
    let found = "a tensor that an earlier file of the model also holds";
    let expected = (shards.path(3, 3), Place::Tensor("t0".into()), found.into(), "each tensor once".into());
    assert_eq!(shards.fault(), expected);
}

#[test]
fn a_wrong_total_of_tensors_is_refused() {
    let shards = Shards::new(3);
    let more = Shards::shard(1, 3, "t1").tensor("extra", &[1], 0, 32).data([0; 36]);
    shards.write(2, 3, more);
    let expected =
        (shards.path(1, 3), Place::Key("split.tensors.count".into()), "4 tensors in 3 files".into(), "3".into());
    assert_eq!(shards.fault(), expected);
}

#[test]
fn keys_of_shards_of_wrong_type_or_out_of_range_are_refused() {
    let key = |name: &str| Place::Key(name.to_owned());
    let range = "an integer from 0 to 65535";
    let file = Builder::new().entry("split.count", 8, string("../../etc"));
    assert_refused(&file, key("split.count"), "string \"../../etc\"", range);
    let file = Builder::new().entry("split.count", 4, 65_536u32.to_le_bytes());
    assert_refused(&file, key("split.count"), "u32 65536", range);
    let file = Builder::new().entry("split.no", 5, (-1i32).to_le_bytes());
    assert_refused(&file, key("split.no"), "i32 -1", range);
    let file = Builder::new().entry("split.count", 2, 2u16.to_le_bytes()).entry("split.no", 2, 2u16.to_le_bytes());
    assert_refused(&file, key("split.no"), "2", "a number below split.count, 2");
}

#[test]
fn a_model_of_one_file_may_have_any_name() {
    let file = Builder::new().entry("split.no", 2, [0; 2]).entry("split.count", 2, 1u16.to_le_bytes());
    let saved = Saved::new(&file.bytes());
    assert_eq!(saved.open().unwrap().path().file_name(), Path::new("model.gguf").file_name());
}
