//! Written files read back the same, and a file appears only when it is complete.

use std::path::Path;

use nybble::Error;
use nybble::format::gguf::{Array, Gguf, Metadata, NewTensor, StringArray, Value, Writer};
use nybble::quant::block::BlockType;
use proptest::prelude::*;

/// The names of the files in the folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Writes the contents of an open file to another one.
fn copy(file: &Gguf, path: &Path) -> Result<(), Error> {
    let mut writer = Writer::create(path, file.metadata(), file.tensors().iter().map(NewTensor::from))?;
    for tensor in file.tensors() {
        writer.write_tensor(tensor.name(), file.data(tensor))?;
    }
    writer.finish()
}

fn two_tensors() -> [NewTensor; 2] {
    [NewTensor::new("a", BlockType::F32, [3]), NewTensor::new("b", BlockType::Q8_0, [32, 2])]
}

#[test]
fn the_bytes_follow_the_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    Writer::create(&path, &Metadata::new(), []).unwrap().finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");

    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "llama");
    let mut writer = Writer::create(&path, &metadata, [NewTensor::new("t", BlockType::F16, [2, 1])]).unwrap();
    writer.write_values("t", &[1.0, -2.0]).unwrap();
    writer.finish().unwrap();
    let expected = [
        b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".as_slice(),
        b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"\x01\0\0\0\0\0\0\0t\x02\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0",
        // 110 bytes so far, padded to 128; the data are padded too.
        &[0; 18],
        b"\x00\x3c\x00\xc0",
        &[0; 28],
    ]
    .concat();
    assert_eq!(std::fs::read(&path).unwrap(), expected);
}

#[test]
fn tensors_are_padded_only_to_the_alignment_that_the_key_sets() {
    for (key, alignment) in [(None, 32), (Some(64u32), 64), (Some(1), 1)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let mut metadata = Metadata::new();
        if let Some(key) = key {
            metadata.set("general.alignment", key);
        }
        let mut writer = Writer::create(&path, &metadata, two_tensors()).unwrap();
        writer.write_values("a", &[1.0, 2.0, 3.0]).unwrap();
        writer.write_values("b", &[0.5; 64]).unwrap();
        writer.finish().unwrap();
        let file = Gguf::open(&path).unwrap();
        let offsets: Vec<u64> = file.tensors().iter().map(|tensor| tensor.offset()).collect();
        assert_eq!(offsets[1] - offsets[0], 12u64.next_multiple_of(alignment));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), offsets[1] + 68u64.next_multiple_of(alignment));
        assert_eq!(file.decode(&file.tensors()[0]).unwrap(), [1.0, 2.0, 3.0]);
    }
}

#[test]
fn a_file_appears_only_when_it_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, "before").unwrap();
    let mut writer = Writer::create(&path, &Metadata::new(), [NewTensor::new("a", BlockType::F32, [3])]).unwrap();
    writer.write_values("a", &[1.0, 2.0, 3.0]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    assert_eq!(names(folder.path()).len(), 2);
    writer.finish().unwrap();
    assert_eq!(names(folder.path()), ["m.gguf"]);
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 1);
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, "before").unwrap();
    let mut writer = Writer::create(&path, &Metadata::new(), two_tensors()).unwrap();
    writer.write_values("a", &[1.0, 2.0, 3.0]).unwrap();
    drop(writer);
    assert_eq!(names(folder.path()), ["m.gguf"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
}

#[test]
fn finishing_without_every_tensor_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut writer = Writer::create(&path, &Metadata::new(), two_tensors()).unwrap();
    writer.write_values("a", &[1.0, 2.0, 3.0]).unwrap();
    let error = writer.finish().unwrap_err().to_string();
    assert_eq!(error, "finish: found 1 of 2 tensors written, expected all of them, \"b\" next");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_path_that_cannot_be_written_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // A folder that is not empty cannot be replaced by a file.
    std::fs::create_dir_all(path.join("inside")).unwrap();
    let error = Writer::create(&path, &Metadata::new(), []).unwrap_err().to_string();
    assert!(error.contains("m.gguf, which is a folder"), "{error}");
    assert_eq!(names(folder.path()), ["m.gguf"]);
    let nowhere = folder.path().join("no-such-folder").join("m.gguf");
    let error = Writer::create(&nowhere, &Metadata::new(), []).unwrap_err();
    assert!(matches!(error, Error::Io { path: at, .. } if at == nowhere));
}

#[test]
fn tensors_are_written_in_order_and_completely() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut writer = Writer::create(&path, &Metadata::new(), two_tensors()).unwrap();
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert_eq!(text(writer.write_tensor("b", &[0; 68])), "name: found \"b\", expected \"a\"");
    assert_eq!(text(writer.write_tensor("a", &[0; 11])), "bytes: found 11 bytes, expected 12 bytes for tensor \"a\"");
    assert_eq!(text(writer.write_values("a", &[0.0; 4])), "bytes: found 16 bytes, expected 12 bytes for tensor \"a\"");
    writer.write_tensor("a", &[0; 12]).unwrap();
    assert_eq!(text(writer.write_tensor("a", &[0; 12])), "name: found \"a\", expected \"b\"");
    let expected = "values: found 33, expected a multiple of 32, the block of Q8_0";
    assert_eq!(text(writer.write_values("b", &[0.0; 33])), expected);
    // Nothing was written, so the file can still be finished.
    writer.write_tensor("b", &[0; 68]).unwrap();
    assert_eq!(text(writer.write_tensor("c", &[])), "name: found \"c\", expected no more tensors");
    writer.finish().unwrap();
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 2);
}

#[test]
fn metadata_and_tensors_that_a_reader_would_refuse_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let refused = |metadata: &Metadata, tensors: Vec<NewTensor>| {
        let error = Writer::create(&path, metadata, tensors).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        error.to_string()
    };
    let ascii = "1 to 65535 bytes of printable ASCII";
    for (key, fault) in [
        (String::new(), "an empty key"),
        ("sch\u{f6}n".into(), "a key with bytes that are not printable ASCII"),
        ("k".repeat(65_536), "a key of more than 65535 bytes"),
    ] {
        assert_eq!(
            refused(Metadata::new().set(key, 1u32), vec![]),
            format!("metadata: found {fault}, expected {ascii}")
        );
    }
    for (value, found) in [(Value::U32(13), "u32 13"), (Value::U64(32), "u64 32"), (Value::U32(0), "u32 0")] {
        let text = refused(Metadata::new().set("general.alignment", value), vec![]);
        let expected = "a u32 that is a power of two from 1 to 65536";
        assert_eq!(text, format!("general.alignment: found {found}, expected {expected}"));
    }
    let tensor = |name: &str, dims: &[u64]| NewTensor::new(name, BlockType::Q4_0, dims);
    let text = |tensors: Vec<NewTensor>| refused(&Metadata::new(), tensors);
    let long = "n".repeat(64);
    let expected = "at most 63 bytes without NUL";
    assert_eq!(
        text(vec![tensor(&long, &[32])]),
        format!("tensors: found a name of more than 63 bytes: {long:?}, expected {expected}")
    );
    assert_eq!(
        text(vec![tensor("a\0", &[32])]),
        format!("tensors: found a name with a NUL byte: \"a\\0\", expected {expected}")
    );
    assert_eq!(
        text(vec![tensor("a", &[32]), tensor("a", &[32])]),
        "tensors: found \"a\" a second time, expected each tensor once"
    );
    for (dims, found, expected) in [
        ([].as_slice(), "0 dimensions", "1 to 4 dimensions"),
        (&[32, 1, 1, 1, 1], "5 dimensions", "1 to 4 dimensions"),
        (&[32, 0], "dimensions [32, 0]", "dimensions of 1 or more"),
        (&[33], "dimensions [33]", "a first dimension that is a multiple of 32, the block of Q4_0"),
        (&[1 << 32, 1 << 32], "dimensions [4294967296, 4294967296]", "fewer than 2^63 values and bytes of Q4_0"),
    ] {
        assert_eq!(text(vec![tensor("a", dims)]), format!("tensors: found {found} of \"a\", expected {expected}"));
    }
    let huge = |name| NewTensor::new(name, BlockType::I8, [i64::MAX as u64 - 63]);
    assert_eq!(text(vec![huge("a"), huge("b")]), "tensors: found \"b\" ends beyond 2^63, expected fewer bytes in all");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn setting_a_key_again_replaces_its_value_in_place() {
    let mut metadata = Metadata::new();
    metadata.set("a", 1u32).set("b", vec![true, false]).set("a", "text");
    let entries: Vec<(&str, &Value)> = metadata.iter().collect();
    assert_eq!(entries, [("a", &Value::from("text")), ("b", &Value::from(vec![true, false]))]);
    assert_eq!((metadata.len(), metadata.is_empty(), metadata.contains("b")), (2, false, true));
}

#[test]
fn two_writers_of_the_same_path_do_not_interfere() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let begin = |value: u32| Writer::create(&path, Metadata::new().set("k", value), []).unwrap();
    let (first, second) = (begin(1), begin(2));
    second.finish().unwrap();
    first.finish().unwrap();
    assert_eq!(Gguf::open(&path).unwrap().get_u32("k").unwrap(), Some(1));
    assert_eq!(names(folder.path()), ["m.gguf"]);
}

fn value() -> impl Strategy<Value = Value> {
    use proptest::collection::vec;
    let text = || vec(any::<u8>(), 0..40);
    let strings = vec(vec(any::<u8>(), 0..10), 0..20);
    let scalar = prop_oneof![
        any::<u8>().prop_map(Value::from),
        any::<i8>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        any::<i16>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::String),
    ];
    let array = prop_oneof![
        vec(any::<u8>(), 0..20).prop_map(Array::from),
        vec(any::<i8>(), 0..20).prop_map(Array::from),
        vec(any::<u16>(), 0..20).prop_map(Array::from),
        vec(any::<i16>(), 0..20).prop_map(Array::from),
        vec(any::<u32>(), 0..20).prop_map(Array::from),
        vec(any::<i32>(), 0..20).prop_map(Array::from),
        vec(any::<f32>(), 0..20).prop_map(Array::from),
        vec(any::<bool>(), 0..20).prop_map(Array::from),
        vec(any::<u64>(), 0..20).prop_map(Array::from),
        vec(any::<i64>(), 0..20).prop_map(Array::from),
        vec(any::<f64>(), 0..20).prop_map(Array::from),
        strings.prop_map(|strings| Array::String(strings.iter().collect::<StringArray>())),
    ];
    prop_oneof![scalar, array.prop_map(Value::Array)]
}

/// A tensor of any type that is written, supported or not, with its bytes.
fn tensor() -> impl Strategy<Value = (BlockType, Vec<u64>, Vec<u8>)> {
    let types: Vec<BlockType> = BlockType::all().filter(|block_type| *block_type != BlockType::I2_S).collect();
    (proptest::sample::select(types), 1..4u64, proptest::collection::vec(1..4u64, 0..4), any::<u8>()).prop_map(
        |(block_type, blocks, mut dims, seed)| {
            dims.insert(0, blocks * block_type.block_len() as u64);
            dims.truncate(4);
            let elements: u64 = dims.iter().product();
            let nbytes = block_type.bytes_for(elements as usize).unwrap();
            let bytes = (0..nbytes).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
            (block_type, dims, bytes)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reading_returns_what_was_written_and_writing_it_again_the_same_bytes(
        values in proptest::collection::vec(("[ -~]{1,30}", value()), 0..12),
        tensors in proptest::collection::vec(tensor(), 0..6),
        alignment in proptest::option::of((0u32..12).prop_map(|bit| 1u32 << bit)),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (path, again) = (folder.path().join("m.gguf"), folder.path().join("again.gguf"));
        let mut metadata = Metadata::new();
        for (key, value) in values {
            metadata.set(key, value);
        }
        if let Some(alignment) = alignment {
            metadata.set("general.alignment", alignment);
        }
        let new = |(index, (block_type, dims, _)): (usize, &(BlockType, Vec<u64>, Vec<u8>))| {
            NewTensor::new(format!("t{index}"), *block_type, dims.clone())
        };
        let mut writer = Writer::create(&path, &metadata, tensors.iter().enumerate().map(new)).unwrap();
        for (index, (_, _, bytes)) in tensors.iter().enumerate() {
            writer.write_tensor(&format!("t{index}"), bytes).unwrap();
        }
        writer.finish().unwrap();

        let file = Gguf::open(&path).unwrap();
        // Compared as text, because NaN is not equal to itself. The bytes of the second file prove its bits.
        let text = |metadata: &Metadata| format!("{:?}", metadata.iter().collect::<Vec<_>>());
        prop_assert_eq!(text(file.metadata()), text(&metadata));
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (tensor, (block_type, dims, bytes)) in file.tensors().iter().zip(&tensors) {
            prop_assert_eq!((tensor.block_type(), tensor.dims()), (*block_type, dims.as_slice()));
            prop_assert_eq!(file.data(tensor), bytes.as_slice());
        }
        copy(&file, &again).unwrap();
        prop_assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap());
    }
}
