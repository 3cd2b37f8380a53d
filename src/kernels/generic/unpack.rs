//! Codes as bytes: the step in which layouts differ. Everything after it is the same for all of them.

use super::product::{INT2, INT3, INT5, INT6, INT8, TABLE4};
use crate::quant::packed::CacheLine;

/// An instruction set that unpacks codes in registers of bytes. A register holds a part of a cache line.
///
/// What [`Vector`](super::vector::Vector) says of values of the type and of inlining holds here, too.
pub(in crate::kernels) trait ByteVector: Copy {
    type Bytes: Copy;

    fn load_bytes(self, line: &CacheLine, part: usize) -> Self::Bytes;
    /// Shifts every byte by `by` bits, to the left if it is positive. What bytes or pairs of bytes shift in is unspecified. `by` is a constant
    /// where this is inlined.
    fn shift(self, x: Self::Bytes, by: i32) -> Self::Bytes;
    /// The bits of every byte that are set in `mask`.
    fn mask(self, x: Self::Bytes, mask: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// The bytes of a table of 16 at these indices. Every 16 bytes of a register have their own copy of the table.
    fn look_up(self, table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes;
}

/// Implements [`ByteVector`] for the type that proves an instruction set: an expression of intrinsics for each method, under the contract of
/// [`vector!`](super::vector::vector).
macro_rules! byte_vector {
    ($set:ident of $bytes:ident: $($method:ident($($x:ident: $type:ty),*) = $body:expr;)*) => {
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the expressions are intrinsics, under the contract above")]
        impl $crate::kernels::generic::unpack::ByteVector for $set {
            type Bytes = $bytes;

            $(
                #[inline(always)]
                fn $method(self, $($x: $type),*) -> $bytes {
                    // SAFETY: `self` exists, so the CPU has every feature that the intrinsics need.
                    unsafe { $body }
                }
            )*
        }
    };
}
pub(in crate::kernels) use byte_vector;

/// Part `part` of columns `4 j .. 4 j + 4` of a block, whose codes are in `lines`: four columns of each row.
///
/// Codes are as they are stored: 8-bit codes 128 too high, indices replaced by values of `table`. `j` is a constant where this is inlined.
#[inline(always)]
pub(in crate::kernels) fn codes<S: ByteVector, const CODE: u8>(
    set: S,
    lines: &[CacheLine],
    j: usize,
    part: usize,
    table: S::Bytes,
) -> S::Bytes {
    let two = || plane::<S, 2>(set, lines, [j, part], 0);
    let four = || plane::<S, 4>(set, lines, [j, part], 0);
    match CODE {
        INT8 => set.load_bytes(&lines[j], part),
        INT2 => two(),
        INT3 => set.or(two(), plane::<S, 1>(set, &lines[2..], [j, part], 2)),
        INT5 => set.or(four(), plane::<S, 1>(set, &lines[4..], [j, part], 4)),
        INT6 => set.or(four(), plane::<S, 2>(set, &lines[4..], [j, part], 4)),
        TABLE4 => set.look_up(table, four()),
        _ => four(),
    }
}

/// What the columns take from a plane of `BITS` bits, as bits `to ..` of the bytes.
#[inline(always)]
fn plane<S: ByteVector, const BITS: usize>(set: S, lines: &[CacheLine], [j, part]: [usize; 2], to: usize) -> S::Bytes {
    let in_line = 8 / BITS;
    let from = BITS * (j % in_line);
    let line = set.load_bytes(&lines[j / in_line], part);
    set.mask(set.shift(line, to as i32 - from as i32), ((1 << BITS) - 1) << to)
}
