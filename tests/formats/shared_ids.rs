//! Type ids with two meanings are told apart by the sizes of tensors.

use crate::gguf_builder::{Builder, Saved, assert_refused};
use nybble::Place;
use nybble::format::gguf::{NewTensor, Writer};
use nybble::quant::block::BlockType;

const Q2_0: u32 = 42;
const PQ2_0: u32 = 142;
const I2_S: u32 = 36;

/// Blocks of a scale of 0.5 and codes that are all `code`.
fn blocks(count: usize, code_bytes: usize, code: u8) -> Vec<u8> {
    let block = [&0x3800u16.to_le_bytes()[..], &vec![0b0101_0101 * code; code_bytes]].concat();
    block.repeat(count)
}

/// A file with two tensors of 128 x 64 values of a type and these bytes each.
fn two_tensors(type_id: u32, bytes: &[u8]) -> Builder {
    let padded = [bytes, &vec![0; bytes.len().next_multiple_of(32) - bytes.len()]].concat();
    let second = padded.len() as u64;
    Builder::new()
        .tensor("first", &[128, 64], type_id, 0)
        .tensor("second", &[128, 64], type_id, second)
        .data([padded, bytes.to_vec()].concat())
}

#[test]
fn q2_0_is_read_with_64_and_with_128_weights_per_scale() {
    for (type_id, block_type, bytes) in [
        (Q2_0, BlockType::Q2_0, blocks(128, 16, 3)),
        (Q2_0, BlockType::PQ2_0, blocks(64, 32, 3)),
        (PQ2_0, BlockType::PQ2_0, blocks(64, 32, 3)),
    ] {
        let file = Saved::new(&two_tensors(type_id, &bytes).bytes()).open().unwrap();
        for tensor in file.tensors() {
            assert_eq!((tensor.block_type(), tensor.nbytes()), (block_type, bytes.len()));
            assert_eq!(file.decode(tensor).unwrap(), [1.0; 128 * 64]);
        }
    }
}

#[test]
fn a_q2_0_tensor_that_is_too_short_for_both_sizes_is_refused() {
    let file = Builder::new().tensor("t", &[128, 64], Q2_0, 0).data(vec![0; 64 * 34 - 1]);
    let found = format!("{} bytes at offset 0 of the data, which start at byte {}", 128 * 18, file.data_start());
    let length = file.bytes().len();
    assert_refused(&file, Place::Tensor("t".to_owned()), &found, &format!("data inside the file of {length} bytes"));
    // Rows that do not fill blocks of 128.
    let file = Builder::new().tensor("t", &[64, 128], Q2_0, 0).data(vec![0; 64 * 34]);
    let expected = "a first dimension that is a multiple of 128, the block of PQ2_0";
    assert_refused(&file, Place::Tensor("t".to_owned()), "dimensions [64, 128]", expected);
}

#[test]
fn a_type_of_ik_llama_cpp_with_the_id_of_pq2_0_is_refused_by_name() {
    // 2 bits per weight, and an F32 per row.
    let file = Builder::new().tensor("t", &[1024, 16], PQ2_0, 0).data(vec![0; 16 * (256 + 4)]);
    let error = Saved::new(&file.bytes()).open().unwrap_err().to_string();
    assert!(error.contains("the type IQ2_TN, which only ik_llama.cpp reads"), "{error}");
}

/// The bytes of an I2_S tensor of `rows` of 256 values. Value `i` of row `r` has code `(r + i) % 3`.
fn ternary(rows: usize, scale: f32) -> Vec<u8> {
    let mut bytes = vec![];
    for row in 0..rows {
        for block in 0..2 {
            let code = |i: usize| ((row + 128 * block + i) % 3) as u8;
            bytes.extend((0..32).map(|i| code(i) << 6 | code(32 + i) << 4 | code(64 + i) << 2 | code(96 + i)));
        }
    }
    bytes.extend(scale.to_le_bytes());
    bytes.extend([0; 28]);
    bytes
}

#[test]
fn an_i2_s_tensor_has_one_scale_after_its_codes() {
    let scale = 1.0 / 3.0;
    let file = Builder::new().tensor("t", &[256, 5], I2_S, 0).data(ternary(5, scale));
    let file = Saved::new(&file.bytes()).open().unwrap();
    let tensor = &file.tensors()[0];
    assert_eq!((tensor.block_type(), tensor.nbytes()), (BlockType::I2_S, 5 * 64 + 32));
    let values = file.decode(tensor).unwrap();
    for (i, value) in values.iter().enumerate() {
        let (row, column) = (i / 256, i % 256);
        assert_eq!(*value, scale * (((row + column) % 3) as f32 - 1.0), "row {row}, column {column}");
    }
}

#[test]
fn an_i2_s_tensor_without_its_scale_is_refused() {
    let file = Builder::new().tensor("t", &[256, 5], I2_S, 0).data(&ternary(5, 1.0)[..5 * 64 + 31]);
    let found = format!("{} bytes at offset 0 of the data, which start at byte {}", 5 * 64 + 32, file.data_start());
    let length = file.bytes().len();
    assert_refused(&file, Place::Tensor("t".to_owned()), &found, &format!("data inside the file of {length} bytes"));
}

#[test]
fn i2_s_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = NewTensor::new("t", BlockType::I2_S, [256, 5]);
    let error = Writer::create(folder.path().join("t.gguf"), &Default::default(), [tensor]).unwrap_err().to_string();
    assert!(error.contains("\"t\" of I2_S, which has its scale after the last row"), "{error}");
}
