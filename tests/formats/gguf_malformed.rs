//! Files that break the format are refused with the place, what was found and what was expected.

use crate::gguf_builder::{Builder, Saved, array, assert_refused, fault, string};
use nybble::{Error, Place};
use proptest::prelude::*;

const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;
const Q4_0: u32 = 2;

fn at(offset: u64) -> Place {
    Place::Offset(offset)
}

fn key(name: &str) -> Place {
    Place::Key(name.to_owned())
}

fn tensor(name: &str) -> Place {
    Place::Tensor(name.to_owned())
}

/// A valid file with every type of value, arrays, and tensors of two types.
fn rich() -> Builder {
    let strings = [string("a"), string(""), string([0xff, 0xfe])].concat();
    let mut file = Builder::new()
        .entry("general.architecture", STRING, string("llama"))
        .entry("u8", 0, [1])
        .entry("i8", 1, [0xff])
        .entry("u16", 2, 1u16.to_le_bytes())
        .entry("i16", 3, (-1i16).to_le_bytes())
        .entry("u32", U32, 1u32.to_le_bytes())
        .entry("i32", 5, (-1i32).to_le_bytes())
        .entry("f32", 6, 1f32.to_le_bytes())
        .entry("bool", BOOL, [1])
        .entry("u64", 10, 1u64.to_le_bytes())
        .entry("i64", 11, (-1i64).to_le_bytes())
        .entry("f64", 12, 1f64.to_le_bytes())
        .entry("strings", ARRAY, array(STRING, 3, strings));
    for (name, type_id, size) in [("u8s", 0, 1), ("i16s", 3, 2), ("f32s", 6, 4), ("bools", BOOL, 1), ("u64s", 10, 8)] {
        file = file.entry(name, ARRAY, array(type_id, 3, vec![1; 3 * size]));
    }
    file.tensor("matrix", &[32, 3], Q4_0, 0).tensor("vector", &[5], F32, 64).data([1; 84])
}

#[test]
fn the_file_that_these_tests_damage_is_valid() {
    let file = Saved::new(&rich().bytes()).open().unwrap();
    assert_eq!((file.metadata().len(), file.tensors().len()), (18, 2));
}

// Truncation

#[test]
fn a_file_truncated_anywhere_in_the_header_is_refused() {
    let (bytes, data_start) = (rich().bytes(), rich().data_start());
    for length in 0..data_start {
        // Either parsing reached the end, or a count or a tensor needs more bytes than the file has.
        let (place, found, expected) = fault(&bytes[..length]);
        match place {
            Place::Offset(offset) => assert!(offset <= length as u64, "{length}: {offset}"),
            Place::Tensor(_) => assert!(expected.contains(&format!("inside the file of {length} bytes")), "{expected}"),
            other => panic!("{length}: {other}"),
        }
        assert!(!found.is_empty());
    }
    assert_eq!(fault(&bytes[..2]), (at(0), "the end of the file after 2 bytes".into(), "4 bytes for the magic".into()));
    // Inside a value, the error has the key.
    let one = Builder::new().entry("key", 10, [0; 8]).bytes();
    let expected = "8 bytes for the value of key \"key\"";
    assert_eq!(fault(&one[..45]), (at(39), "the end of the file after 6 bytes".into(), expected.into()));
}

#[test]
fn a_file_truncated_anywhere_in_the_data_is_refused() {
    let (bytes, data_start) = (rich().bytes(), rich().data_start());
    for length in data_start..bytes.len() {
        // The first tensor has 54 bytes; the second starts after 64.
        let (name, nbytes, offset) = if length < data_start + 54 { ("matrix", 54, 0) } else { ("vector", 20, 64) };
        let found = format!("{nbytes} bytes at offset {offset} of the data, which start at byte {data_start}");
        let expected = format!("data inside the file of {length} bytes");
        assert_eq!(fault(&bytes[..length]), (tensor(name), found, expected));
    }
}

// Magic and version

#[test]
fn bad_magic_is_refused() {
    let mut file = rich();
    file.magic = *b"GGML";
    assert_refused(&file, at(0), "\"GGML\"", "\"GGUF\", the start of every GGUF file");
}

#[test]
fn versions_0_1_and_4_are_refused() {
    for version in [0, 1, 4, u32::MAX] {
        let mut file = rich();
        file.version = version;
        assert_refused(&file, at(4), &format!("version {version}"), "version 2 or 3");
    }
}

#[test]
fn a_big_endian_file_is_refused_as_such() {
    let mut file = rich();
    file.version = 3u32.swap_bytes();
    let found = "version 0x03000000, that of a big-endian file";
    assert_refused(&file, at(4), found, "version 2 or 3 in a little-endian file");
}

// Counts

#[test]
fn more_tensors_than_the_file_can_hold_are_refused() {
    for count in [u64::MAX, 1 << 63, 1 << 32, 100] {
        let mut file = Builder::new();
        file.tensor_count = Some(count);
        let expected = "at most 0: each takes 24 bytes and 8 are left";
        assert_refused(&file, at(8), &format!("{count} tensors"), expected);
    }
}

#[test]
fn more_keys_than_the_file_can_hold_are_refused() {
    for count in [u64::MAX, 1 << 63, 1 << 32, 3] {
        let mut file = Builder::new().entry("a", 0, [1]).entry("b", 0, [1]);
        file.entry_count = Some(count);
        assert_refused(&file, at(16), &format!("{count} keys"), "at most 2: each takes 14 bytes and 28 are left");
    }
}

// Keys

#[test]
fn an_empty_key_is_refused() {
    let file = Builder::new().entry("", 0, [1]).data([0; 32]);
    assert_refused(&file, at(24), "an empty key", "1 to 65535 bytes of printable ASCII");
}

#[test]
fn a_key_longer_than_the_file_is_refused() {
    for length in [u64::MAX, 1 << 32, 7] {
        let file = Builder::new().raw_entry([&length.to_le_bytes(), b"abcdef".as_slice()].concat());
        let expected = "at most 6: each takes 1 bytes and 6 are left";
        assert_refused(&file, at(24), &format!("{length} bytes of a string"), expected);
    }
}

#[test]
fn a_key_of_more_than_65535_bytes_is_refused() {
    let file = Builder::new().entry(vec![b'a'; 65_536], 0, [1]);
    assert_refused(&file, at(24), "a key of more than 65535 bytes", "1 to 65535 bytes of printable ASCII");
    let longest = Builder::new().entry(vec![b'a'; 65_535], 0, [1]);
    assert!(Saved::new(&longest.bytes()).open().is_ok());
}

#[test]
fn a_duplicate_key_is_refused() {
    let file = Builder::new().entry("twice", 0, [1]).entry("once", 0, [1]).entry("twice", 0, [1]);
    assert_refused(&file, key("twice"), "the key a second time", "each key once");
}

#[test]
fn a_key_that_is_not_ascii_is_refused() {
    for name in ["sch\u{f6}n".as_bytes(), b"nul\0", b"line\n", &[0xff, 0xfe]] {
        let file = Builder::new().entry(name, 0, [1]);
        let found = "a key with bytes that are not printable ASCII";
        assert_refused(&file, at(24), found, "1 to 65535 bytes of printable ASCII");
    }
}

// Values

#[test]
fn an_unknown_value_type_is_refused() {
    for type_id in [13, u32::MAX] {
        let file = Builder::new().entry("k", type_id, [0; 8]);
        assert_refused(&file, key("k"), &format!("type {type_id} at byte 33"), "a value type of 0 to 12");
        let file = Builder::new().entry("k", ARRAY, array(type_id, 0, []));
        let expected = "a value type of 0 to 8 or 10 to 12";
        assert_refused(&file, key("k"), &format!("type {type_id} at byte 37"), expected);
    }
}

#[test]
fn arrays_of_arrays_are_refused_at_any_depth() {
    for depth in [1, 10_000] {
        let file = Builder::new().entry("k", ARRAY, array(ARRAY, 1, []).repeat(depth));
        assert_refused(&file, key("k"), "an array of arrays at byte 37", "an array of scalars or strings");
    }
}

#[test]
fn an_array_longer_than_the_file_is_refused() {
    for (type_id, size) in [(0, 1), (3, 2), (6, 4), (BOOL, 1), (STRING, 8), (10, 8)] {
        // 2^61 elements of 8 bytes wrap around to 0 bytes.
        for count in [u64::MAX, 1 << 61, 1 << 62, 17] {
            let file = Builder::new().entry("k", ARRAY, array(type_id, count, [0; 16]));
            let what = if type_id == STRING { "strings" } else { "elements" };
            let expected = format!("at most {}: each takes {size} bytes and 16 are left", 16 / size);
            assert_refused(&file, at(41), &format!("{count} {what} of key \"k\""), &expected);
        }
    }
}

#[test]
fn a_boolean_of_2_is_refused() {
    let file = Builder::new().entry("k", BOOL, [2]);
    assert_refused(&file, key("k"), "the boolean 2 at byte 37", "0 or 1");
    let file = Builder::new().entry("k", ARRAY, array(BOOL, 3, [0, 1, 255]));
    assert_refused(&file, key("k"), "the boolean 255 at byte 51", "0 or 1");
}

#[test]
fn a_string_longer_than_the_file_is_refused() {
    for length in [u64::MAX, 1 << 32, 4] {
        let value = [&length.to_le_bytes(), b"abc".as_slice()].concat();
        let file = Builder::new().entry("k", STRING, &value);
        let (found, expected) =
            (format!("{length} bytes of a string of key \"k\""), "at most 3: each takes 1 bytes and 3 are left");
        assert_refused(&file, at(37), &found, expected);
        let file = Builder::new().entry("k", ARRAY, array(STRING, 1, value));
        assert_refused(&file, at(49), &found, expected);
    }
}

#[test]
fn a_string_of_more_than_a_gibibyte_is_refused() {
    // The file is sparse, and nothing reads the hole.
    let length = (1u64 << 30) + 1;
    let saved = Saved::new(&Builder::new().entry("k", STRING, length.to_le_bytes()).bytes());
    std::fs::OpenOptions::new().write(true).open(saved.path()).unwrap().set_len(length + 1000).unwrap();
    match nybble::format::gguf::Gguf::open(saved.path()) {
        Err(Error::Malformed { place, found, expected, .. }) => {
            assert_eq!(place, at(37));
            assert_eq!(found, "1073741825 bytes of a string of key \"k\"");
            assert_eq!(expected, "at most 1073741824");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_string_that_is_not_utf8_opens_and_is_refused_as_text() {
    let saved = Saved::new(&Builder::new().entry("k", STRING, string([b'a', 0xff])).bytes());
    let file = saved.open().unwrap();
    assert_eq!(file.get("k").unwrap().as_bytes(), Some([b'a', 0xff].as_slice()));
    let error = file.get_str("k").unwrap_err().to_string();
    assert!(error.ends_with("key \"k\": found string \"a\\xff\", expected a string of valid UTF-8"), "{error}");
}

// Alignment

#[test]
fn an_alignment_that_is_huge_or_not_a_power_of_two_is_refused() {
    for alignment in [0u32, 3, 13, 1 << 17, 0x8000_0000, u32::MAX] {
        let file = Builder::new().entry("general.alignment", U32, alignment.to_le_bytes());
        let (place, found) = (key("general.alignment"), format!("u32 {alignment}"));
        assert_refused(&file, place, &found, "a u32 that is a power of two from 1 to 65536");
    }
}

#[test]
fn an_alignment_of_the_wrong_type_is_refused() {
    for (type_id, value, found) in [
        (5, 32i32.to_le_bytes().to_vec(), "i32 32"),
        (10, 32u64.to_le_bytes().to_vec(), "u64 32"),
        (STRING, string("32"), "string \"32\""),
        (ARRAY, array(U32, 1, 32u32.to_le_bytes()), "array of 1 u32"),
    ] {
        let file = Builder::new().entry("general.alignment", type_id, value);
        let expected = "a u32 that is a power of two from 1 to 65536";
        assert_refused(&file, key("general.alignment"), found, expected);
    }
}

// Tensors

#[test]
fn a_tensor_name_of_64_bytes_is_refused() {
    let file = Builder::new().tensor([b'n'; 64], &[1], F32, 0).data([0; 4]);
    let expected = "the name of a tensor: at most 63 bytes of UTF-8 without NUL";
    assert_refused(&file, at(24), "a name of more than 63 bytes", expected);
    let longest = Builder::new().tensor([b'n'; 63], &[1], F32, 0).data([0; 4]);
    assert!(Saved::new(&longest.bytes()).open().is_ok());
}

#[test]
fn a_tensor_name_with_a_nul_or_without_utf8_is_refused() {
    let file = Builder::new().tensor("a\0b", &[1], F32, 0).data([0; 4]);
    let expected = "the name of a tensor: at most 63 bytes of UTF-8 without NUL";
    assert_refused(&file, at(24), "a name with a NUL byte", expected);
    let file = Builder::new().tensor([b'a', 0xff], &[1], F32, 0).data([0; 4]);
    assert_refused(&file, at(24), "the name \"a\\xff\"", "the name of a tensor in UTF-8");
}

#[test]
fn a_duplicate_tensor_is_refused() {
    let file = Builder::new().tensor("t", &[1], F32, 0).tensor("t", &[1], F32, 32).data([0; 64]);
    assert_refused(&file, tensor("t"), "the tensor a second time", "each tensor once");
}

#[test]
fn a_tensor_with_0_or_more_than_4_dimensions_is_refused() {
    for dims in [[].as_slice(), &[1; 5]] {
        let file = Builder::new().tensor("t", dims, F32, 0).data([0; 64]);
        assert_refused(&file, tensor("t"), &format!("{} dimensions", dims.len()), "1 to 4 dimensions");
    }
    let raw = [string("t").as_slice(), &u32::MAX.to_le_bytes(), &[0; 64]].concat();
    let file = Builder::new().raw_tensor(raw);
    assert_refused(&file, tensor("t"), "4294967295 dimensions", "1 to 4 dimensions");
}

#[test]
fn a_tensor_without_values_is_left_out() {
    for dims in [[0, 1], [32, 0], [0, u64::MAX]] {
        let file = Builder::new().tensor("t", &dims, Q4_0, 0).tensor("u", &[1], F32, 0).data([0; 64]);
        let opened = Saved::new(&file.bytes()).open().unwrap();
        assert_eq!(opened.tensors().iter().map(|tensor| tensor.name()).collect::<Vec<_>>(), ["u"]);
    }
}

#[test]
fn dimensions_whose_product_overflows_are_refused() {
    for (dims, type_id, name) in [
        // Negative as a signed integer.
        ([1 << 63, 1, 1], F32, "F32"),
        ([u64::MAX, 1, 1], F32, "F32"),
        // 2^62 values are fine, but their bytes wrap.
        ([1 << 62, 1, 1], F32, "F32"),
        // 2^64 - 4 bytes, which wrap when they are padded.
        ([(1 << 62) - 1, 1, 1], F32, "F32"),
        ([1 << 63, 1, 1], 8, "Q8_0"),
        // The product wraps to 0, and to 32.
        ([1 << 32, 1 << 32, 1], F32, "F32"),
        ([32, (1 << 63) + 1, 2], F32, "F32"),
    ] {
        let file = Builder::new().tensor("t", &dims, type_id, 0).data([0; 64]);
        let expected = format!("fewer than 2^63 values and bytes of {name}");
        assert_refused(&file, tensor("t"), &format!("dimensions {dims:?}"), &expected);
    }
}

#[test]
fn a_tensor_larger_than_the_file_is_refused() {
    // 2^61 - 1 values of 4 bytes: 2^63 - 4 bytes, which would wrap when padded or added to the start of the data.
    for values in [17u64, (1 << 61) - 1] {
        let file = Builder::new().tensor("t", &[values], F32, 0).data([0; 64]);
        let found = format!("{} bytes at offset 0 of the data, which start at byte 64", values * 4);
        assert_refused(&file, tensor("t"), &found, "data inside the file of 128 bytes");
    }
    // 2^62 values times 18 bytes per block wrap to less than the file, if they are not divided by the block first.
    let file = Builder::new().tensor("t", &[1 << 62], Q4_0, 0).data([0; 64]);
    let found = "2594073385365405696 bytes at offset 0 of the data, which start at byte 64";
    assert_refused(&file, tensor("t"), found, "data inside the file of 128 bytes");
}

#[test]
fn unassigned_block_types_are_refused() {
    for type_id in [43, u32::MAX] {
        let file = Builder::new().tensor("t", &[256], type_id, 0).data([0; 2048]);
        let expected = "a block type that ggml has (0 to 42 without 4, 5, 31 to 33, 37 and 38), or 142";
        assert_refused(&file, tensor("t"), &format!("block type {type_id}"), expected);
    }
}

#[test]
fn withdrawn_block_types_are_refused_by_name() {
    for (type_id, name) in
        [(4, "Q4_2"), (5, "Q4_3"), (31, "Q4_0_4_4"), (33, "Q4_0_8_8"), (36, "IQ4_NL_4_4"), (38, "IQ4_NL_8_8")]
    {
        let file = Builder::new().tensor("t", &[256], type_id, 0).data([0; 2048]);
        let error = Saved::new(&file.bytes()).open().unwrap_err().to_string();
        assert!(error.contains(&format!("the type {name}, which ggml has withdrawn")), "{error}");
    }
}

#[test]
fn types_of_other_programs_are_refused_by_name() {
    let others = [(133, "Q6_0"), (139, "IQ4_K"), (158, "IQ1_KT"), (212, "Q4_K_R4"), (399, "Q8_K_R8")];
    for (type_id, name) in others {
        let file = Builder::new().tensor("t", &[256], type_id, 0).data([0; 2048]);
        let error = Saved::new(&file.bytes()).open().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("ik_llama.cpp"), "{error}");
    }
}

#[test]
fn a_first_dimension_that_does_not_fill_blocks_is_refused() {
    for (type_id, name, block, columns) in [(Q4_0, "Q4_0", 32, 33), (12, "Q4_K", 256, 32), (14, "Q6_K", 256, 1)] {
        // The number of values alone would fill blocks.
        let dims = [columns, 256];
        let file = Builder::new().tensor("t", &dims, type_id, 0).data([0; 65536]);
        let expected = format!("a first dimension that is a multiple of {block}, the block of {name}");
        assert_refused(&file, tensor("t"), &format!("dimensions {dims:?}"), &expected);
    }
}

#[test]
fn an_offset_that_is_not_aligned_is_refused() {
    let file = Builder::new().tensor("t", &[1], F32, 4).data([0; 64]);
    assert_refused(&file, tensor("t"), "an offset of 4", "a multiple of the alignment, 32");
    let file = Builder::new()
        .entry("general.alignment", U32, 64u32.to_le_bytes())
        .tensor("a", &[1], F32, 0)
        .tensor("b", &[1], F32, 32)
        .data([0; 256]);
    assert_refused(&file, tensor("b"), "an offset of 32", "a multiple of the alignment, 64");
}

#[test]
fn an_offset_beyond_the_file_is_refused() {
    for offset in [96u64, 1 << 63, u64::MAX - 31] {
        let file = Builder::new().tensor("t", &[1], F32, offset).data([0; 64]);
        let found = format!("4 bytes at offset {offset} of the data, which start at byte 64");
        assert_refused(&file, tensor("t"), &found, "data inside the file of 128 bytes");
    }
}

#[test]
fn tensors_that_overlap_are_refused() {
    let file = Builder::new().tensor("a", &[9], F32, 0).tensor("b", &[1], F32, 32).data([0; 64]);
    let start = file.data_start();
    let found = format!("data from byte {}, before the end of the tensor before it", start + 32);
    assert_refused(&file, tensor("b"), &found, &format!("data from byte {} or later", start + 36));
}

#[test]
fn tensors_in_descending_order_are_refused() {
    let file = Builder::new().tensor("a", &[1], F32, 32).tensor("b", &[1], F32, 0).data([0; 64]);
    let start = file.data_start();
    let found = format!("data from byte {start}, before the end of the tensor before it");
    assert_refused(&file, tensor("b"), &found, &format!("data from byte {} or later", start + 36));
}

// Arbitrary damage

#[test]
fn an_empty_or_missing_file_and_a_folder_are_errors() {
    let expected = (at(0), "the end of the file after 0 bytes".to_owned(), "4 bytes for the magic".to_owned());
    assert_eq!(fault(&[]), expected);
    let saved = Saved::new(&[]);
    std::fs::remove_file(saved.path()).unwrap();
    assert!(matches!(saved.open(), Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound));
    std::fs::create_dir(saved.path()).unwrap();
    assert!(matches!(saved.open(), Err(Error::Io { path, .. }) if path == saved.path()));
}

/// A change to the bytes of a file.
#[derive(Debug, Clone)]
enum Damage {
    Byte(u8),
    Number(u64),
    Insert(Vec<u8>),
    Remove(usize),
    Cut,
}

fn damage() -> impl Strategy<Value = Damage> {
    let number = prop_oneof![
        Just(0u64),
        Just(u64::MAX),
        (0u32..64).prop_map(|bit| 1 << bit),
        (0u32..64).prop_map(|bit| (1 << bit) - 1),
        0u64..300,
    ];
    prop_oneof![
        4 => any::<u8>().prop_map(Damage::Byte),
        4 => number.prop_map(Damage::Number),
        1 => proptest::collection::vec(any::<u8>(), 1..20).prop_map(Damage::Insert),
        1 => (1usize..20).prop_map(Damage::Remove),
        1 => Just(Damage::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), damage()), 1..4)) {
        let mut bytes = rich().bytes();
        for (index, change) in changes {
            let at = index.index(bytes.len().max(1)).min(bytes.len());
            match change {
                Damage::Byte(byte) => bytes[at..].iter_mut().take(1).for_each(|b| *b = byte),
                Damage::Number(number) => {
                    bytes[at..].iter_mut().zip(number.to_le_bytes()).for_each(|(b, byte)| *b = byte);
                }
                Damage::Insert(new) => drop(bytes.splice(at..at, new)),
                Damage::Remove(count) => drop(bytes.drain(at..bytes.len().min(at + count))),
                Damage::Cut => bytes.truncate(at),
            }
        }
        match Saved::new(&bytes).open() {
            Err(error) => {
                // A damaged type may be one that ggml has withdrawn.
                let expected = matches!(error, Error::Malformed { .. } | Error::Missing { .. } | Error::Unsupported { .. });
                prop_assert!(expected, "{error}");
            }
            Ok(file) => {
                for tensor in file.tensors() {
                    prop_assert_eq!(file.data(tensor).len(), tensor.nbytes());
                    let values = file.decode(tensor);
                    let whole = values.as_ref().is_ok_and(|values| values.len() == tensor.elements());
                    prop_assert_eq!(whole, tensor.block_type().is_supported());
                    file.release(tensor);
                }
                for (key, value) in file.metadata().iter() {
                    prop_assert_eq!(file.get(key).map(|v| v.to_string()), Some(value.to_string()));
                    let _ = (file.get_u32(key), file.get_str(key), file.per_layer_u32(key, 3), file.get_array_f32(key));
                }
            }
        }
    }
}
