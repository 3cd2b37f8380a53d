//! The block types of GGUF files: their ids, their sizes, and the way between blocks and F32.
//!
//! A row of a tensor is cut into blocks of equally many values; a block is a fixed number of bytes that hold one or more
//! scales and the codes of its values. [`BlockType`] knows every type that a file may name. The ones that nybble computes
//! with ([`BlockType::is_supported`]) are decoded to F32, bit for bit as ggml's own C code does it, and some are encoded.
//!
//! Scales come from the file and may be infinite or NaN: decoding is plain IEEE arithmetic and hands them on, so the values
//! of that block are then infinite or NaN too.

use half::{bf16, f16};

use super::{blocks32, blocks256};
use crate::error::{Error, Result};

/// How the values of a tensor are stored.
///
/// The names are those of ggml (`Q4_0`, `IQ2_XXS`...), the discriminants its type ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names that users know from file names")]
#[allow(missing_docs, reason = "the name is all there is to say; `sizes` knows the rest")]
#[non_exhaustive]
#[repr(u32)]
pub enum BlockType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

use BlockType::*;

/// Every type, in the order of the ids.
const ALL: [BlockType; 35] = [
    F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S,
    IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, I8, I16, I32, I64, F64, IQ1_M, BF16, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0,
];

impl BlockType {
    /// Every type, in the order of the ids.
    pub fn all() -> impl Iterator<Item = BlockType> {
        ALL.into_iter()
    }

    /// The type with ggml's number `id`. `None` for numbers that were never given, or were given and taken back (4, 5,
    /// 31 to 33 and 36 to 38).
    pub fn from_id(id: u32) -> Option<BlockType> {
        ALL.into_iter().find(|known| known.id() == id)
    }

    /// The type called `name`, as [`BlockType::name`] spells it; capitals do not matter.
    pub fn from_name(name: &str) -> Option<BlockType> {
        ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(name))
    }

    /// ggml's number of the type.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name, as in `Q4_0`.
    pub fn name(self) -> &'static str {
        self.sizes().0
    }

    /// How many values one block holds: 1, 32, 64, 128 or 256.
    pub fn block_len(self) -> usize {
        self.sizes().1
    }

    /// How many bytes one block takes.
    pub fn block_bytes(self) -> usize {
        self.sizes().2
    }

    /// The name, the values in a block, the bytes of a block.
    const fn sizes(self) -> (&'static str, usize, usize) {
        match self {
            F32 => ("F32", 1, 4),
            F16 => ("F16", 1, 2),
            Q4_0 => ("Q4_0", 32, 18),
            Q4_1 => ("Q4_1", 32, 20),
            Q5_0 => ("Q5_0", 32, 22),
            Q5_1 => ("Q5_1", 32, 24),
            Q8_0 => ("Q8_0", 32, 34),
            Q8_1 => ("Q8_1", 32, 36),
            Q2_K => ("Q2_K", 256, 84),
            Q3_K => ("Q3_K", 256, 110),
            Q4_K => ("Q4_K", 256, 144),
            Q5_K => ("Q5_K", 256, 176),
            Q6_K => ("Q6_K", 256, 210),
            Q8_K => ("Q8_K", 256, 292),
            IQ2_XXS => ("IQ2_XXS", 256, 66),
            IQ2_XS => ("IQ2_XS", 256, 74),
            IQ3_XXS => ("IQ3_XXS", 256, 98),
            IQ1_S => ("IQ1_S", 256, 50),
            IQ4_NL => ("IQ4_NL", 32, 18),
            IQ3_S => ("IQ3_S", 256, 110),
            IQ2_S => ("IQ2_S", 256, 82),
            IQ4_XS => ("IQ4_XS", 256, 136),
            I8 => ("I8", 1, 1),
            I16 => ("I16", 1, 2),
            I32 => ("I32", 1, 4),
            I64 => ("I64", 1, 8),
            F64 => ("F64", 1, 8),
            IQ1_M => ("IQ1_M", 256, 56),
            BF16 => ("BF16", 1, 2),
            TQ1_0 => ("TQ1_0", 256, 54),
            TQ2_0 => ("TQ2_0", 256, 66),
            MXFP4 => ("MXFP4", 32, 17),
            NVFP4 => ("NVFP4", 64, 36),
            Q1_0 => ("Q1_0", 128, 18),
            Q2_0 => ("Q2_0", 64, 18),
        }
    }

    /// How many bytes `values` values take; `None` when they do not fill whole blocks or the number overflows.
    pub fn bytes_for(self, values: usize) -> Option<usize> {
        let (_, len, bytes) = self.sizes();
        if !values.is_multiple_of(len) {
            return None;
        }
        (values / len).checked_mul(bytes)
    }

    /// Whether [`BlockType::decode`] knows the type.
    pub fn is_supported(self) -> bool {
        matches!(
            self,
            F32 | F16
                | BF16
                | Q4_0
                | Q4_1
                | Q5_0
                | Q5_1
                | Q8_0
                | Q2_K
                | Q3_K
                | Q4_K
                | Q5_K
                | Q6_K
                | IQ4_NL
                | IQ4_XS
                | MXFP4
        )
    }

    /// Whether [`BlockType::encode`] knows the type.
    pub fn can_encode(self) -> bool {
        matches!(self, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q8_0)
    }

    /// The names of the types that `which` holds for, for the text of errors.
    pub(crate) fn names(which: impl Fn(BlockType) -> bool) -> String {
        ALL.into_iter().filter(|known| which(*known)).map(BlockType::name).collect::<Vec<_>>().join(", ")
    }

    /// Turns blocks into values.
    ///
    /// `bytes` holds whole blocks and `out` one place for each of their values. Every value of `out` is written, or, on an
    /// error, none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the lengths do not belong together or the type is not supported.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        if !self.is_supported() {
            let known = BlockType::names(BlockType::is_supported);
            return Err(Error::argument("block type", self.name(), format_args!("one of {known}")));
        }
        let expected = self.bytes_for(out.len()).ok_or_else(|| {
            let blocks = format_args!("a multiple of {}, the block of {}", self.block_len(), self.name()).to_string();
            Error::argument("values", out.len(), blocks)
        })?;
        if bytes.len() != expected {
            let wanted = format!("{expected} for {} values of {}", out.len(), self.name());
            return Err(Error::argument("bytes", bytes.len(), wanted));
        }
        match self {
            F32 => decode_blocks(bytes, out, |b, v| *v = [f32::from_le_bytes(*b)]),
            F16 => decode_blocks(bytes, out, |b, v| *v = [f16::from_le_bytes(*b).to_f32()]),
            BF16 => decode_blocks(bytes, out, |b, v| *v = [bf16::from_le_bytes(*b).to_f32()]),
            Q4_0 => decode_blocks(bytes, out, blocks32::decode_q4_0),
            Q4_1 => decode_blocks(bytes, out, blocks32::decode_q4_1),
            Q5_0 => decode_blocks(bytes, out, blocks32::decode_q5_0),
            Q5_1 => decode_blocks(bytes, out, blocks32::decode_q5_1),
            Q8_0 => decode_blocks(bytes, out, blocks32::decode_q8_0),
            IQ4_NL => decode_blocks(bytes, out, blocks32::decode_iq4_nl),
            MXFP4 => decode_blocks(bytes, out, blocks32::decode_mxfp4),
            Q2_K => decode_blocks(bytes, out, blocks256::decode_q2_k),
            Q3_K => decode_blocks(bytes, out, blocks256::decode_q3_k),
            Q4_K => decode_blocks(bytes, out, blocks256::decode_q4_k),
            Q5_K => decode_blocks(bytes, out, blocks256::decode_q5_k),
            Q6_K => decode_blocks(bytes, out, blocks256::decode_q6_k),
            IQ4_XS => decode_blocks(bytes, out, blocks256::decode_iq4_xs),
            // `is_supported` let none of the others through.
            _ => {}
        }
        Ok(())
    }

    /// Turns values into blocks and appends their bytes to `out`, by the same rounding as ggml's reference code.
    ///
    /// F32 keeps every bit; F16 and BF16 round to the nearest, ties to even, and keep infinities and NaN.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the values do not fill whole blocks, when the type cannot be encoded, and, for the
    /// quantized types, when a value is not finite or too large for the block's F16 scale. `out` is then as it was.
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
        if !self.can_encode() {
            let known = BlockType::names(BlockType::can_encode);
            return Err(Error::argument("block type", self.name(), format_args!("one of {known}")));
        }
        let Some(bytes) = self.bytes_for(values.len()) else {
            let blocks = format!("a multiple of {}, the block of {}", self.block_len(), self.name());
            return Err(Error::argument("values", values.len(), blocks));
        };
        let start = out.len();
        out.reserve(bytes);
        match self {
            F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
            BF16 => out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            _ => {
                for (index, block) in values.as_chunks::<32>().0.iter().enumerate() {
                    let fits = match self {
                        Q4_0 => blocks32::encode_q4_0(block, out),
                        Q4_1 => blocks32::encode_q4_1(block, out),
                        _ => blocks32::encode_q8_0(block, out),
                    };
                    if !fits {
                        out.truncate(start);
                        return Err(unfit(self, index, block));
                    }
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Applies `decode` to each block of `B` bytes and its `N` values. The caller has checked that both slices hold equally
/// many whole blocks.
fn decode_blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let (blocks, values) = (bytes.as_chunks::<B>().0, out.as_chunks_mut::<N>().0);
    for (block, values) in blocks.iter().zip(values) {
        decode(block, values);
    }
}

/// Says why block number `index` could not be encoded.
fn unfit(block_type: BlockType, index: usize, block: &[f32; 32]) -> Error {
    match block.iter().position(|v| !v.is_finite()) {
        Some(at) => {
            Error::argument("values", format_args!("{} at index {}", block[at], index * 32 + at), "finite values")
        }
        None => Error::argument(
            "values",
            format_args!("values up to {:e} in block {index}", block.iter().fold(0.0f32, |m, v| m.max(v.abs()))),
            format_args!("values whose {block_type} scale fits F16"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_all_types_is_whole_and_in_order() {
        assert!(ALL.is_sorted_by_key(|known| known.id()));
        // Q2_0 is the last variant: one that is missing from the list would leave a hole in the numbers ggml has given.
        let given = (0..=Q2_0.id()).filter(|id| !matches!(id, 4 | 5 | 31..=33 | 36..=38));
        assert!(given.eq(ALL.into_iter().map(BlockType::id)));
        for known in ALL {
            assert_eq!(format!("{known:?}"), known.name());
        }
    }
}
