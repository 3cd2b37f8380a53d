//! Block types decode and encode with the bits of the reference code.

use nybble::Error;
use nybble::quant::block::BlockType;
use proptest::prelude::*;

/// A block of the golden vectors: byte i is 7 i + 3, with F16 scales of 0.5 and perhaps 0.25 at the given bytes.
fn golden_block(block_type: BlockType, d_at: usize, m_at: Option<usize>) -> Vec<u8> {
    let mut block: Vec<u8> = (0..block_type.block_bytes()).map(|i| (7 * i + 3) as u8).collect();
    block[d_at..d_at + 2].copy_from_slice(&0x3800u16.to_le_bytes());
    if let Some(at) = m_at {
        block[at..at + 2].copy_from_slice(&0x3400u16.to_le_bytes());
    }
    block
}

/// The type, the offsets of its scales, single values by index, the sum of all values and of their magnitudes.
type Golden = (BlockType, usize, Option<usize>, &'static [(usize, f32)], f64, f64);

#[test]
fn golden_blocks_decode_to_the_same_bits() {
    use BlockType::*;
    let golden: [Golden; 12] = [
        (Q4_0, 0, None, &[(0, -3.5), (1, 0.0), (15, 1.0), (16, -3.5), (31, -0.5)], -37.0, 65.0),
        (Q4_1, 0, Some(2), &[(0, 7.75), (1, 3.25), (15, 4.25), (16, 0.75), (31, 4.25)], 106.0, 106.0),
        (Q5_0, 0, None, &[(0, 6.5), (1, -6.0), (15, -5.0), (16, 1.0), (31, -3.5)], -55.0, 125.0),
        (Q5_1, 0, Some(2), &[(0, 13.75), (1, 9.25), (15, 2.25), (16, 9.75), (31, 5.25)], 240.0, 240.0),
        (Q8_0, 0, None, &[(0, 8.5), (1, 12.0), (15, 61.0), (16, -63.5), (31, -11.0)], -40.0, 1152.0),
        (
            Q2_K,
            80,
            Some(82),
            &[(0, 4.5), (1, 3.0), (31, 0.0), (32, -0.25), (127, 1.25), (128, 15.75), (255, -1.5)],
            1294.0,
            1416.5,
        ),
        (
            Q3_K,
            108,
            None,
            &[(0, 28.5), (1, -19.0), (31, -20.0), (32, -0.0), (127, -28.0), (128, 3.0), (255, 29.0)],
            -1056.0,
            5198.0,
        ),
        (
            Q4_K,
            0,
            Some(2),
            &[(0, 31.75), (1, 140.25), (31, 171.25), (32, 132.5), (127, 48.0), (128, 9.25), (255, 78.5)],
            24176.0,
            24324.0,
        ),
        (
            Q5_K,
            0,
            Some(2),
            &[(0, 279.75), (1, 140.25), (31, 171.25), (32, 398.5), (127, 412.0), (128, 65.25), (255, 66.5)],
            50496.0,
            50594.5,
        ),
        (
            Q6_K,
            208,
            None,
            &[(0, 636.5), (1, 335.0), (31, -740.0), (32, -1174.5), (127, -290.0), (128, 1168.5), (255, 1050.0)],
            -15552.0,
            219349.0,
        ),
        (IQ4_NL, 0, None, &[(0, -52.0), (1, 0.5), (15, 12.5), (16, -52.0), (31, -5.0)], -484.5, 885.5),
        (
            IQ4_XS,
            0,
            None,
            &[(0, -19.0), (1, 41.5), (31, -12.5), (32, -589.0), (127, -1695.0), (128, -361.0), (255, -551.0)],
            2113.5,
            120928.5,
        ),
    ];
    for (block_type, d_at, m_at, values, sum, sum_of_abs) in golden {
        let block = golden_block(block_type, d_at, m_at);
        // Two blocks, so that a decoder that stops after the first fails.
        let bytes = [block.as_slice(), &block].concat();
        let mut out = vec![f32::NAN; 2 * block_type.block_len()];
        block_type.decode(&bytes, &mut out).unwrap();
        let (first, second) = out.split_at(block_type.block_len());
        assert_eq!(first, second, "{block_type}");
        for (index, value) in values {
            assert_eq!(first[*index].to_bits(), value.to_bits(), "{block_type}[{index}] is {}", first[*index]);
        }
        assert_eq!(first.iter().map(|v| f64::from(*v)).sum::<f64>(), sum, "{block_type}");
        assert_eq!(first.iter().map(|v| f64::from(v.abs())).sum::<f64>(), sum_of_abs, "{block_type}");
    }
}

/// FNV-1a, 64 bits.
fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn random_blocks_decode_to_the_bits_of_the_reference() {
    use BlockType::*;
    // The type, the byte with the exponent of its scale, and the hash of the values of 64 random blocks. The hashes are of
    // gguf-py 0.19 (`gguf.quants.dequantize`); those of Q1_0, Q2_0, I2_S and PQ2_0, which it lacks, of a few lines of numpy.
    let expected = [
        (IQ1_S, Some(1), 0x755f_f341_6c78_110b),
        (IQ1_M, Some(55), 0x7a63_1671_5831_dc52),
        (IQ2_XXS, Some(1), 0xf66a_44cb_48e8_aec5),
        (IQ2_XS, Some(1), 0xa70c_0bba_236b_12ed),
        (IQ2_S, Some(1), 0x71d3_d301_febc_80de),
        (IQ3_XXS, Some(1), 0x3ad3_a4ec_fb87_d205),
        (IQ3_S, Some(1), 0x4871_8d18_779d_fbf7),
        (TQ1_0, Some(53), 0xdd75_19cd_143c_ab0d),
        (TQ2_0, Some(65), 0xd2ec_c398_0c3b_1b99),
        (NVFP4, None, 0x0698_3a0f_9437_f190),
        (Q1_0, Some(1), 0x6994_f71f_ac7c_aa25),
        (Q2_0, Some(1), 0xbdbe_753f_94a0_3c0f),
        (I2_S, Some(35), 0xe758_11be_216a_c095),
        (PQ2_0, Some(1), 0xf32e_6438_ed29_b6ba),
    ];
    for (block_type, exponent_at, hash) in expected {
        let mut state = 0x1234_5678u64;
        let mut bytes: Vec<u8> = (0..64 * block_type.block_bytes())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        if let Some(at) = exponent_at {
            // Below 2, so finite.
            bytes.iter_mut().skip(at).step_by(block_type.block_bytes()).for_each(|byte| *byte &= 0xbf);
        }
        let mut values = vec![f32::NAN; 64 * block_type.block_len()];
        block_type.decode(&bytes, &mut values).unwrap();
        assert_eq!(fnv(values.iter().flat_map(|value| value.to_le_bytes())), hash, "{block_type}");
    }
}

#[test]
fn mxfp4_scales_are_exact_powers_of_two_down_to_subnormals() {
    let doubled = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];
    for e in [0u8, 1, 2, 3, 127, 128, 251] {
        // Byte j has code j in its low nibble and code 15 - j in its high one.
        let block: Vec<u8> = std::iter::once(e).chain((0..16u8).map(|j| j | (15 - j) << 4)).collect();
        let mut out = [f32::NAN; 32];
        BlockType::MXFP4.decode(&block, &mut out).unwrap();
        let scale = 2f64.powi(i32::from(e) - 128);
        for j in 0..16 {
            assert_eq!(f64::from(out[j]), scale * doubled[j], "e = {e}, value {j}");
            assert_eq!(f64::from(out[j + 16]), scale * doubled[15 - j], "e = {e}, value {}", j + 16);
        }
    }
}

#[test]
fn floats_decode_with_infinities_and_subnormals() {
    let decode = |block_type: BlockType, bytes: &[u8], count: usize| {
        let mut out = vec![0.0; count];
        block_type.decode(bytes, &mut out).unwrap();
        out
    };
    let halves: Vec<u8> = [0x3c00u16, 0x0001, 0x8000, 0x7c00, 0xfbff].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(BlockType::F16, &halves, 5), [1.0, 2f32.powi(-24), -0.0, f32::INFINITY, -65504.0]);
    let brains: Vec<u8> = [0x3f80u16, 0x0001, 0xff80].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(BlockType::BF16, &brains, 3), [1.0, f32::from_bits(0x0001_0000), f32::NEG_INFINITY]);
    let floats: Vec<u8> = [1.5f32, -0.1].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(BlockType::F32, &floats, 2), [1.5, -0.1]);
    assert!(decode(BlockType::F16, &0x7e00u16.to_le_bytes(), 1)[0].is_nan());
}

#[test]
fn a_scale_that_is_nan_or_infinite_makes_such_values() {
    let mut block = [0u8; 34];
    block[..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    block[2] = 1;
    let mut out = [0.0; 32];
    BlockType::Q8_0.decode(&block, &mut out).unwrap();
    assert_eq!(out[0], f32::INFINITY);
    assert!(out[1].is_nan());
}

#[test]
fn types_are_found_by_name_and_by_id() {
    for block_type in BlockType::all() {
        assert_eq!(BlockType::from_id(block_type.id()), Some(block_type));
        assert_eq!(BlockType::from_name(block_type.name()), Some(block_type));
        assert_eq!(BlockType::from_name(&block_type.name().to_lowercase()), Some(block_type));
        assert_eq!(block_type.to_string(), block_type.name());
    }
    assert_eq!(BlockType::from_name("Q9_9"), None);
    for id in [4, 5, 31, 32, 33, 37, 38, 43, 141, 143, u32::MAX] {
        assert_eq!(BlockType::from_id(id), None, "{id}");
    }
}

#[test]
fn sizes_match_the_format() {
    use BlockType::*;
    let sizes = [
        (F32, 0, 1, 4),
        (F16, 1, 1, 2),
        (Q4_0, 2, 32, 18),
        (Q4_1, 3, 32, 20),
        (Q5_0, 6, 32, 22),
        (Q5_1, 7, 32, 24),
        (Q8_0, 8, 32, 34),
        (Q8_1, 9, 32, 36),
        (Q2_K, 10, 256, 84),
        (Q3_K, 11, 256, 110),
        (Q4_K, 12, 256, 144),
        (Q5_K, 13, 256, 176),
        (Q6_K, 14, 256, 210),
        (Q8_K, 15, 256, 292),
        (IQ2_XXS, 16, 256, 66),
        (IQ2_XS, 17, 256, 74),
        (IQ3_XXS, 18, 256, 98),
        (IQ1_S, 19, 256, 50),
        (IQ4_NL, 20, 32, 18),
        (IQ3_S, 21, 256, 110),
        (IQ2_S, 22, 256, 82),
        (IQ4_XS, 23, 256, 136),
        (I8, 24, 1, 1),
        (I16, 25, 1, 2),
        (I32, 26, 1, 4),
        (I64, 27, 1, 8),
        (F64, 28, 1, 8),
        (IQ1_M, 29, 256, 56),
        (BF16, 30, 1, 2),
        (TQ1_0, 34, 256, 54),
        (TQ2_0, 35, 256, 66),
        (MXFP4, 39, 32, 17),
        (NVFP4, 40, 64, 36),
        (Q1_0, 41, 128, 18),
        (Q2_0, 42, 64, 18),
        (I2_S, 36, 128, 36),
        (PQ2_0, 142, 128, 34),
    ];
    assert_eq!(sizes.len(), BlockType::all().count());
    for (block_type, id, len, bytes) in sizes {
        assert_eq!(
            (block_type.id(), block_type.block_len(), block_type.block_bytes()),
            (id, len, bytes),
            "{block_type}"
        );
        assert_eq!(block_type.bytes_for(0), Some(0));
        assert_eq!(block_type.bytes_for(3 * len), Some(3 * bytes));
        assert_eq!(block_type.bytes_for(len + 1), (len == 1).then_some(2 * bytes));
    }
    // 4096 x 32000 of Q4_0: the worked example of the format's description.
    assert_eq!(Q4_0.bytes_for(4096 * 32000), Some(73_728_000));
    assert_eq!(F64.bytes_for(usize::MAX), None);
}

#[test]
fn an_unsupported_type_is_refused_by_name() {
    let supported: Vec<&str> = BlockType::all().filter(|t| t.is_supported()).map(BlockType::name).collect();
    let listed = "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL, \
                  IQ3_S, IQ2_S, IQ4_XS, IQ1_M, BF16, TQ1_0, TQ2_0, I2_S, MXFP4, NVFP4, Q1_0, Q2_0, PQ2_0";
    assert_eq!(supported.join(", "), listed);
    for block_type in BlockType::all().filter(|t| !t.is_supported()) {
        let bytes = vec![0; block_type.block_bytes()];
        let error = block_type.decode(&bytes, &mut vec![0.0; block_type.block_len()]).unwrap_err();
        assert_eq!(error.to_string(), format!("block type: found {block_type}, expected one of {listed}"));
    }
    for block_type in BlockType::all().filter(|t| !t.can_encode()) {
        let error = block_type.encode(&vec![0.0; block_type.block_len()], &mut Vec::new()).unwrap_err();
        let expected = format!("block type: found {block_type}, expected one of F32, F16, Q4_0, Q4_1, Q8_0, BF16");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn mismatched_lengths_are_refused() {
    let error = |bytes: usize, values: usize| {
        BlockType::Q4_0.decode(&vec![0; bytes], &mut vec![0.0; values]).unwrap_err().to_string()
    };
    assert_eq!(error(18, 31), "values: found 31, expected a multiple of 32, the block of Q4_0");
    assert_eq!(error(17, 32), "bytes: found 17, expected 18 for 32 values of Q4_0");
    assert_eq!(error(36, 32), "bytes: found 36, expected 18 for 32 values of Q4_0");
    let error = BlockType::Q8_0.encode(&[0.0; 33], &mut Vec::new()).unwrap_err().to_string();
    assert_eq!(error, "values: found 33, expected a multiple of 32, the block of Q8_0");
}

/// Bytes from their hexadecimal digits.
fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn encoding_yields_the_bytes_of_the_reference_implementation() {
    // Computed with the Python package `gguf` 0.19, whose numpy code is independent of this crate.
    let values: Vec<f32> = (0..64).map(|i| ((37 * i + 11) % 101 - 50) as f32 / 7.0).collect();
    let cases = [
        (BlockType::F16, 16, "92c592b4004525c4923c6e466ec1254192c625bd004425c592306e456ec3493e"),
        (BlockType::BF16, 16, "b2c092bea04085c0923fce402ec02540d2c0a5bf8040a5c0123eae406ec0c93f"),
        (BlockType::Q4_0, 64, "253bf258be1379df359bf147ac0268ce248a25bb53fd9731db852fca640ea842fc9630db"),
        (BlockType::Q4_1, 64, "773b25c7f257bd1379cf358ae146ac0268bd2479643bb7c6ad0368ce248ad0469bf257bd1379cf25"),
        (
            BlockType::Q8_0,
            64,
            "332b9dfb59b61472d02e8be947a50361be1c7ad73593f14fac0a68c62481df3d9af8\
             332b56b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc3a98f654b1",
        ),
    ];
    for (block_type, count, bytes) in cases {
        let mut out = Vec::new();
        block_type.encode(&values[..count], &mut out).unwrap();
        assert_eq!(out, hex(bytes), "{block_type}");
    }
}

#[test]
fn representable_values_survive_encoding_exactly() {
    let check = |block_type: BlockType, values: &[f32]| {
        let mut bytes = Vec::new();
        block_type.encode(values, &mut bytes).unwrap();
        let mut out = vec![f32::NAN; values.len()];
        block_type.decode(&bytes, &mut out).unwrap();
        assert_eq!(out, values, "{block_type}");
    };
    let codes: Vec<f32> = (0..32).map(|i| ((i * 5) % 16) as f32).collect();
    check(BlockType::Q4_0, &codes.iter().map(|c| (c - 8.0) * 0.5).collect::<Vec<_>>());
    // A positive extreme has a negative scale.
    check(BlockType::Q4_0, &codes.iter().map(|c| (c - 8.0) * -0.25).collect::<Vec<_>>());
    check(BlockType::Q4_1, &codes.iter().map(|c| c * 0.5 + 3.0).collect::<Vec<_>>());
    check(BlockType::Q8_0, &(0..32).map(|i| (i * 8 - 121) as f32 * 0.125).collect::<Vec<_>>());
    for block_type in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0] {
        check(block_type, &[0.0; 64]);
    }
}

#[test]
fn values_that_a_block_cannot_hold_are_refused_without_output() {
    for block_type in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; 64];
            values[40] = bad;
            let mut out = vec![7];
            let error = block_type.encode(&values, &mut out).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }));
            assert_eq!(error.to_string(), format!("values: found {bad} at index 40, expected finite values"));
            assert_eq!(out, [7]);
        }
        let mut values = [0.0; 32];
        values[3] = -3e38;
        let error = block_type.encode(&values, &mut Vec::new()).unwrap_err().to_string();
        let expected =
            format!("values: found values up to 3e38 in block 0, expected values whose {block_type} scale fits F16");
        assert_eq!(error, expected);
    }
}

#[test]
fn floats_of_16_bits_round_to_even_and_keep_infinities() {
    let encode = |block_type: BlockType, value: f32| {
        let mut out = Vec::new();
        block_type.encode(&[value], &mut out).unwrap();
        u16::from_le_bytes([out[0], out[1]])
    };
    // Halfway between two neighbors, the one with the even last bit.
    assert_eq!(encode(BlockType::F16, 1.0 + 2f32.powi(-11)), 0x3c00);
    assert_eq!(encode(BlockType::F16, 1.0 + 3.0 * 2f32.powi(-11)), 0x3c02);
    assert_eq!(encode(BlockType::BF16, f32::from_bits(0x3f80_8000)), 0x3f80);
    assert_eq!(encode(BlockType::BF16, f32::from_bits(0x3f81_8000)), 0x3f82);
    assert_eq!(encode(BlockType::F16, 1e6), 0x7c00);
    assert_eq!(encode(BlockType::BF16, f32::NEG_INFINITY), 0xff80);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn encoded_values_are_within_half_a_step(values in proptest::collection::vec(-100f32..100.0, 32), shift in -50f32..50.0) {
        let values: Vec<f32> = values.iter().map(|v| v + shift).collect();
        let (min, max) = values.iter().fold((f32::MAX, f32::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
        let largest = min.abs().max(max.abs());
        // The step, and how far from the grid a value may lie: half a step, and for Q4_0 a whole one, because the side
        // opposite to the extreme ends at 7 steps and not at 8.
        for (block_type, step, off) in [
            (BlockType::Q4_0, largest / 8.0, 1.0),
            (BlockType::Q4_1, (max - min) / 15.0, 0.5),
            (BlockType::Q8_0, largest / 127.0, 0.5),
        ] {
            let mut bytes = Vec::new();
            block_type.encode(&values, &mut bytes).unwrap();
            let mut out = [0.0; 32];
            block_type.decode(&bytes, &mut out).unwrap();
            // Scale and minimum are rounded to 11 bits.
            let rounding = 2.0 * largest / 1024.0;
            for (value, back) in values.iter().zip(out) {
                prop_assert!((value - back).abs() <= step * off + rounding, "{} {} {}", block_type, value, back);
            }
        }
    }
}
