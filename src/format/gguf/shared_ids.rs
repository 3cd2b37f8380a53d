//! Type ids with two meanings, which the sizes of tensors tell apart.
//!
//! - 42 is Q2_0. PrismML's files from before ggml had it have 128 weights per scale instead of 64, which is PQ2_0 by a newer name.
//! - 142 is PQ2_0, and in files of older versions of ik_llama.cpp IQ2_TN, which takes fewer bytes.
//! - 36 is I2_S of bitnet.cpp. ggml has withdrawn another type with this id, which takes more than twice as many bytes.

use crate::quant::block::BlockType;

/// The bytes after the codes of an I2_S tensor: its scale as F32, and padding.
pub(super) const I2_S_TAIL: usize = 32;

/// Weights and bytes of a block of the withdrawn type with the id of I2_S.
const IQ4_NL_4_4: [usize; 2] = [32, 18];

/// The bytes of `elements` weights in a file. `None` when they do not fill whole blocks or the result overflows.
pub(super) fn bytes_in_file(block_type: BlockType, elements: usize) -> Option<usize> {
    match block_type {
        BlockType::I2_S if elements.is_multiple_of(block_type.block_len()) => (elements / 4).checked_add(I2_S_TAIL),
        _ => block_type.bytes_for(elements),
    }
}

/// Whether tensors of Q2_0 are PQ2_0. Each is given as its number of weights and the bytes from its start to that of the next tensor.
pub(super) fn is_pq2_0(tensors: impl Iterator<Item = (usize, usize)>) -> bool {
    // Q2_0 takes more bytes. Both may fit the padding of small tensors, so one that has too few bytes decides.
    let fits =
        |block_type: BlockType, elements, bytes| block_type.bytes_for(elements).is_some_and(|size| size <= bytes);
    let mut is_found = false;
    for (elements, bytes) in tensors {
        if !fits(BlockType::PQ2_0, elements, bytes) {
            return false;
        }
        is_found |= !fits(BlockType::Q2_0, elements, bytes);
    }
    is_found
}

/// Whether a tensor with the id of PQ2_0 is of ik_llama.cpp's type: 2 bits per weight, and a scale per row.
pub(super) fn is_iq2_tn(elements: usize, bytes: usize) -> bool {
    BlockType::PQ2_0.bytes_for(elements).is_none_or(|size| bytes < size) && elements / 4 < bytes
}

/// Whether a tensor with the id of I2_S is of the withdrawn type.
pub(super) fn is_withdrawn(elements: usize, bytes: usize) -> bool {
    elements > 0
        && (elements / IQ4_NL_4_4[0])
            .checked_mul(IQ4_NL_4_4[1])
            .is_some_and(|size| size.max(I2_S_TAIL + elements / 4 + 1) <= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_tell_the_two_meanings_of_q2_0_apart() {
        // Blocks of 64 weights take 18 bytes, of 128 weights 34; tensors are padded to 32.
        let [small, large] = [128, 128 * 128];
        let ggml = |n: usize| (n, (n / 64 * 18).next_multiple_of(32));
        let prism = |n: usize| (n, (n / 128 * 34).next_multiple_of(32));
        assert!(!is_pq2_0([ggml(small), ggml(large)].into_iter()));
        assert!(is_pq2_0([prism(small), prism(large)].into_iter()));
        assert_eq!(ggml(small), prism(small));
        assert!(!is_pq2_0([ggml(small)].into_iter()));
        assert!(!is_pq2_0(std::iter::empty()));
        // Neither, as in a file that was cut.
        assert!(!is_pq2_0([prism(large), (large, 100)].into_iter()));
        assert!(!is_pq2_0([(usize::MAX, 100), (large + 64, 1 << 20)].into_iter()));
    }

    #[test]
    fn sizes_tell_pq2_0_from_the_other_type() {
        let (rows, columns) = (16, 1024);
        let size = BlockType::PQ2_0.bytes_for(rows * columns).unwrap();
        assert!(!is_iq2_tn(rows * columns, size));
        assert!(is_iq2_tn(rows * columns, rows * (4 + columns / 4)));
        // A file that was cut is neither.
        assert!(!is_iq2_tn(rows * columns, 100));
        assert!(!is_iq2_tn(usize::MAX, 100));
    }

    #[test]
    fn sizes_tell_i2_s_from_the_withdrawn_type() {
        for elements in [128, 1 << 12, 1 << 24] {
            let i2_s = bytes_in_file(BlockType::I2_S, elements).unwrap();
            assert_eq!(i2_s, elements / 4 + 32);
            assert!(!is_withdrawn(elements, i2_s.next_multiple_of(32)));
            assert!(is_withdrawn(elements, (elements / 32 * 18).next_multiple_of(32)));
        }
        assert!(!is_withdrawn(usize::MAX, 100));
        assert_eq!(bytes_in_file(BlockType::I2_S, 100), None);
    }
}
