//! The block types of GGUF files: their ids and sizes, and conversion between blocks and F32.
//!
//! A row of a tensor is a sequence of blocks. A block is a fixed number of bytes with one or more scales and the codes of its
//! values. [`BlockType`] lists every type that a file may name. The types that nybble supports
//! ([`BlockType::is_supported`]) are decoded to F32 with the bits of ggml's C code, and some of them are encoded.
//!
//! Scales come from the file and may be infinite or NaN. Decoding is plain IEEE arithmetic, so the values of such a block are
//! infinite or NaN too.
//!
//! To support another type, implement `decoder::Block` for it and add its line in `BlockType::decoder`.

use half::{bf16, f16};

use super::codebooks::{self, Vectors};
use super::decoder::Decoder;
use super::encode::{self, Encoder};
use super::few_bits::{self, OneScale};
use super::layout::Layout;
use super::{blocks32, blocks256};
use crate::error::{Error, Result};

/// The decoder of a type: those of floats, and one for each type of blocks.
macro_rules! decoders {
    ($type:expr, { $($name:ident => $block:ty,)+ }) => {
        Some(match $type {
            F32 => const { &Decoder::float::<f32>() },
            F16 => const { &Decoder::float::<f16>() },
            BF16 => const { &Decoder::float::<bf16>() },
            $($name => const { &Decoder::of::<$block>() },)+
            _ => return None,
        })
    };
}

/// How the values of a tensor are stored.
///
/// Names and discriminants are the names (`Q4_0`, `IQ2_XXS`...) and type ids of ggml, of bitnet.cpp for `I2_S`, and of PrismML for
/// `PQ2_0`. A block of `I2_S` is 128 codes and the scale, which a file has once, after the codes of the whole tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names that users know from file names")]
#[allow(missing_docs, reason = "the names describe the types; `sizes` has the numbers")]
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
    I2_S = 36,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
    PQ2_0 = 142,
}

use BlockType::*;

/// Every type, in the order of the ids.
const ALL: [BlockType; 37] = [
    F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S,
    IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, I8, I16, I32, I64, F64, IQ1_M, BF16, TQ1_0, TQ2_0, I2_S, MXFP4, NVFP4, Q1_0, Q2_0,
    PQ2_0,
];

impl BlockType {
    /// Every type, in the order of the ids.
    pub fn all() -> impl Iterator<Item = BlockType> {
        ALL.into_iter()
    }

    /// The type with the id `id`: ggml's types, bitnet.cpp's [`I2_S`] and PrismML's [`PQ2_0`].
    /// `None` for ids that are not assigned or that ggml has withdrawn.
    pub fn from_id(id: u32) -> Option<BlockType> {
        ALL.into_iter().find(|known| known.id() == id)
    }

    /// The type with this [`BlockType::name`], ignoring case.
    pub fn from_name(name: &str) -> Option<BlockType> {
        ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(name))
    }

    /// The id of the type in files.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name, for example `Q4_0`.
    pub fn name(self) -> &'static str {
        self.sizes().0
    }

    /// Values in a block: 1, 32, 64, 128 or 256.
    pub fn block_len(self) -> usize {
        self.sizes().1
    }

    /// Bytes of a block.
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
            I2_S => ("I2_S", 128, 36),
            PQ2_0 => ("PQ2_0", 128, 34),
        }
    }

    /// Bytes of `values` values. `None` when they do not fill whole blocks or the result overflows.
    pub fn bytes_for(self, values: usize) -> Option<usize> {
        let (_, len, bytes) = self.sizes();
        if !values.is_multiple_of(len) {
            return None;
        }
        (values / len).checked_mul(bytes)
    }

    /// The decoder of the type. `None` where nybble does not support it.
    pub(super) fn decoder(self) -> Option<&'static Decoder> {
        decoders!(self, {
            Q4_0 => blocks32::Q4_0,
            Q4_1 => blocks32::Q4_1,
            Q5_0 => blocks32::Q5_0,
            Q5_1 => blocks32::Q5_1,
            Q8_0 => blocks32::Q8_0,
            IQ4_NL => blocks32::Iq4Nl,
            MXFP4 => blocks32::Mxfp4,
            Q2_K => blocks256::Q2K,
            Q3_K => blocks256::Q3K,
            Q4_K => blocks256::Q4K,
            Q5_K => blocks256::Q5K,
            Q6_K => blocks256::Q6K,
            IQ4_XS => blocks256::Iq4Xs,
            IQ1_S => Vectors<codebooks::Iq1S>,
            IQ1_M => Vectors<codebooks::Iq1M>,
            IQ2_XXS => Vectors<codebooks::Iq2Xxs>,
            IQ2_XS => Vectors<codebooks::Iq2Xs>,
            IQ2_S => Vectors<codebooks::Iq2S>,
            IQ3_XXS => Vectors<codebooks::Iq3Xxs>,
            IQ3_S => Vectors<codebooks::Iq3S>,
            TQ1_0 => OneScale<few_bits::Tq1>,
            TQ2_0 => OneScale<few_bits::Tq2>,
            Q1_0 => OneScale<few_bits::Q1>,
            Q2_0 => OneScale<few_bits::Q2<16, 2>>,
            PQ2_0 => OneScale<few_bits::Q2<32, 4>>,
            I2_S => few_bits::I2S,
            NVFP4 => few_bits::Nvfp4,
        })
    }

    /// The layout of packed matrices of the type, or a larger one. `None` where nybble does not support the type.
    pub(crate) fn packed_layout(self) -> Option<Layout> {
        self.decoder().map(|decoder| decoder.merged)
    }

    /// The encoder of a quantized type. `None` where nybble does not encode it.
    fn encoder(self) -> Option<Encoder> {
        Some(match self {
            Q4_0 => encode::q4_0,
            Q4_1 => encode::q4_1,
            Q8_0 => encode::q8_0,
            _ => return None,
        })
    }

    /// Whether [`BlockType::decode`] supports the type.
    pub fn is_supported(self) -> bool {
        self.decoder().is_some()
    }

    /// Whether [`BlockType::encode`] supports the type.
    pub fn can_encode(self) -> bool {
        matches!(self, F32 | F16 | BF16) || self.encoder().is_some()
    }

    /// The names of the types for which `which` is true, for error messages.
    pub(crate) fn names(which: impl Fn(BlockType) -> bool) -> String {
        ALL.into_iter().filter(|known| which(*known)).map(BlockType::name).collect::<Vec<_>>().join(", ")
    }

    /// Decodes blocks.
    ///
    /// `bytes` holds whole blocks, `out` has one element per value. On an error `out` is unchanged.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the lengths do not match or the type is not supported.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        let Some(decoder) = self.decoder() else {
            let known = BlockType::names(BlockType::is_supported);
            return Err(Error::argument("block type", self.name(), format_args!("one of {known}")));
        };
        let expected = self.bytes_for(out.len()).ok_or_else(|| {
            let blocks = format!("a multiple of {}, the block of {}", self.block_len(), self.name());
            Error::argument("values", out.len(), blocks)
        })?;
        if bytes.len() != expected {
            let wanted = format!("{expected} for {} values of {}", out.len(), self.name());
            return Err(Error::argument("bytes", bytes.len(), wanted));
        }
        (decoder.decode)(bytes, out);
        Ok(())
    }

    /// Encodes values and appends the blocks to `out`, with the rounding of ggml's reference code.
    ///
    /// F32 keeps every bit. F16 and BF16 round to nearest, ties to even, and keep infinities and NaN.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the values do not fill whole blocks, when the type cannot be encoded, and, for
    /// quantized types, when a value is not finite or too large for the block's F16 scale. `out` is then unchanged.
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
                let Some(encode) = self.encoder() else { return Ok(()) };
                for (index, block) in values.as_chunks().0.iter().enumerate() {
                    if !encode(block, out) {
                        out.truncate(start);
                        return Err(cannot_encode(self, index, block));
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

/// The error for block number `index`, which holds a value that is not finite or too large.
fn cannot_encode(block_type: BlockType, index: usize, block: &[f32; 32]) -> Error {
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
    fn the_list_of_types_is_complete_and_in_order() {
        assert!(ALL.is_sorted_by_key(|known| known.id()));
        // Q2_0 is the last type of ggml. A type that is missing from the list would leave a gap in the assigned ids.
        let given = (0..=Q2_0.id()).filter(|id| !matches!(id, 4 | 5 | 31..=33 | 37 | 38)).chain([PQ2_0.id()]);
        assert!(given.eq(ALL.into_iter().map(BlockType::id)));
        for known in ALL {
            assert_eq!(format!("{known:?}"), known.name());
        }
    }
    #[test]
    fn the_sizes_of_decoders_match_the_table() {
        for known in ALL {
            if let Some(decoder) = known.decoder() {
                assert_eq!(decoder.size, [known.block_len(), known.block_bytes()], "{known}");
            }
        }
    }
}
