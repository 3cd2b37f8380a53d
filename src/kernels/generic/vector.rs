//! The registers of floats that generic code requires of an instruction set.

use std::ops::IndexMut;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::quant::packed::{CacheLine, PANEL};

/// An instruction set that computes with registers of F32. One or several of them make a panel of [`PANEL`] values.
///
/// A value of the type proves that the CPU has the instructions, so its methods are safe to call. The methods and all code
/// generic over them are `#[inline(always)]`: only inside a `#[target_feature]` function of the set does the compiler turn
/// them into the set's instructions.
pub(in crate::kernels) trait Vector: Copy {
    /// A register of `PANEL / PARTS` F32.
    type Register: Copy;
    /// The registers of a panel: `[Register; PARTS]`.
    type Panel: Copy + IndexMut<usize, Output = Self::Register>;
    /// A register of as many I32, or of four times as many bytes.
    type Integers: Copy;
    /// The registers of a panel of I32: `[Integers; PARTS]`.
    type IntegerPanel: Copy + IndexMut<usize, Output = Self::Integers>;

    /// Registers per panel.
    const PARTS: usize;
    /// How many panels fit into all registers. Tile sizes depend on it.
    const CAPACITY: usize;
    /// Whether the first bytes of dot products are unsigned.
    const UNSIGNED: bool;

    /// A panel of zeros.
    fn zeros(self) -> Self::Panel;
    /// A register that holds `x` in every lane.
    fn splat(self, x: f32) -> Self::Register;
    fn load(self, x: &[f32; PANEL], part: usize) -> Self::Register;
    fn load_f16(self, x: &[f16; PANEL], part: usize) -> Self::Register;
    fn load_bf16(self, x: &[bf16; PANEL], part: usize) -> Self::Register;
    fn store(self, x: Self::Register, out: &mut [f32; PANEL], part: usize);
    /// Rounds to nearest even.
    fn store_f16(self, x: Self::Register, out: &mut [f16; PANEL], part: usize);
    fn mul(self, a: Self::Register, b: Self::Register) -> Self::Register;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Register, b: Self::Register, c: Self::Register) -> Self::Register;

    /// A panel that holds `x` in every lane.
    fn integers(self, x: i32) -> Self::IntegerPanel;
    /// A register that holds `x` in every lane.
    fn splat_bytes(self, x: [i8; 4]) -> Self::Integers;
    fn load_bytes(self, x: &CacheLine, part: usize) -> Self::Integers;
    fn to_floats(self, x: Self::Integers) -> Self::Register;
    /// Adds to each lane of `sums` the products of its four bytes of `a`, which may be [`UNSIGNED`](Vector::UNSIGNED), with those of
    /// `b`, which are signed and at least -127.
    fn add_dots(self, sums: Self::Integers, a: Self::Integers, b: Self::Integers) -> Self::Integers;

    /// Prefetches the cache line in which `x` begins, if the set has an instruction for it.
    #[inline(always)]
    fn prefetch<T>(self, _: &T) {}

    /// Stores the first `out.len()` values of a panel: the last panel of a matrix may have fewer rows.
    #[inline(always)]
    fn store_panel(self, x: Self::Panel, out: &mut [f32]) {
        let mut lanes = [0.0; PANEL];
        let whole = out.first_chunk_mut();
        let cut = whole.is_none();
        let target = whole.unwrap_or(&mut lanes);
        for part in 0..Self::PARTS {
            self.store(x[part], target, part);
        }
        if cut {
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }

    /// Stores part `part` of a panel, as far as `out`, which begins with the panel, holds it.
    #[inline(always)]
    fn store_part(self, x: Self::Register, part: usize, out: &mut [f32]) {
        if let Some(out) = out.first_chunk_mut() {
            return self.store(x, out, part);
        }
        let mut lanes = [0.0; PANEL];
        self.store(x, &mut lanes, part);
        let [first, end] = [part, part + 1].map(|part| (part * (PANEL / Self::PARTS)).min(out.len()));
        out[first..end].copy_from_slice(&lanes[first..end]);
    }
}

/// Implements [`Vector`] for the type that proves an instruction set: an expression of intrinsics for each method.
///
/// In the expressions, panels are references to the lanes of one register. They are unsafe code: they may use what the
/// existence of the type allows, and touch no memory except for what these references are to.
macro_rules! vector {
    (
        $set:ident: $registers:literal registers $register:ident of $lanes:ident;
        splat($x:ident) = $splat:expr;
        $(load $load:ident($from:ident: $loaded:ident) = $load_body:expr;)*
        $(store $store:ident($stored:ident, $to:ident: $target:ident) = $store_body:expr;)*
        $(compute $compute:ident($($operand:ident),*) = $compute_body:expr;)*
        integers $integers:ident, unsigned: $unsigned:literal;
        splat_integers($integer:ident) = $splat_integers:expr;
        load_bytes($bytes:ident) = $load_bytes:expr;
        to_floats($converted:ident) = $to_floats:expr;
        add_dots($sums:ident, $a:ident, $b:ident) = $add_dots:expr;
        $(also { $($other:item)* })?
    ) => {
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the expressions are intrinsics, under the contract above")]
        impl Vector for $set {
            type Register = $register;
            type Panel = [$register; PANEL / $lanes];
            type Integers = $integers;
            type IntegerPanel = [$integers; PANEL / $lanes];

            const PARTS: usize = PANEL / $lanes;
            const CAPACITY: usize = $registers / Self::PARTS;
            const UNSIGNED: bool = $unsigned;

            #[inline(always)]
            fn zeros(self) -> Self::Panel {
                [self.splat(0.0); Self::PARTS]
            }

            #[inline(always)]
            fn splat(self, $x: f32) -> $register {
                // SAFETY: `self` exists, so the CPU has every feature that the intrinsics need.
                unsafe { $splat }
            }

            $(
                #[inline(always)]
                fn $load(self, panel: &[$loaded; PANEL], part: usize) -> $register {
                    let $from = &panel.as_chunks::<$lanes>().0[part];
                    // SAFETY: as in `splat`. The reference is to the numbers of a register, and loads need no alignment.
                    unsafe { $load_body }
                }
            )*

            $(
                #[inline(always)]
                fn $store(self, $stored: $register, panel: &mut [$target; PANEL], part: usize) {
                    let $to = &mut panel.as_chunks_mut::<$lanes>().0[part];
                    // SAFETY: as in `splat`. The reference is to the numbers of a register, and stores need no alignment.
                    unsafe { $store_body }
                }
            )*

            $(
                #[inline(always)]
                fn $compute(self, $($operand: $register),*) -> $register {
                    // SAFETY: as in `splat`.
                    unsafe { $compute_body }
                }
            )*

            #[inline(always)]
            fn integers(self, $integer: i32) -> Self::IntegerPanel {
                // SAFETY: as in `splat`.
                [unsafe { $splat_integers }; Self::PARTS]
            }

            #[inline(always)]
            fn splat_bytes(self, bytes: [i8; 4]) -> $integers {
                self.integers(bytemuck::cast(bytes))[0]
            }

            #[inline(always)]
            fn load_bytes(self, line: &CacheLine, part: usize) -> $integers {
                let $bytes = &line.0.as_chunks::<{ 4 * $lanes }>().0[part];
                // SAFETY: as in `splat`. The reference is to the bytes of a register, and loads need no alignment.
                unsafe { $load_bytes }
            }

            #[inline(always)]
            fn to_floats(self, $converted: $integers) -> $register {
                // SAFETY: as in `splat`.
                unsafe { $to_floats }
            }

            #[inline(always)]
            fn add_dots(self, $sums: $integers, $a: $integers, $b: $integers) -> $integers {
                // SAFETY: as in `splat`.
                unsafe { $add_dots }
            }

            $($($other)*)?
        }
    };
}
pub(in crate::kernels) use vector;

/// A type of number that a [`Vector`] loads as F32.
pub(super) trait Number: Pod {
    /// Loads part `part` of a panel.
    fn load<V: Vector>(v: V, x: &[Self; PANEL], part: usize) -> V::Register;
}

macro_rules! numbers {
    ($($type:ty: $load:ident),*) => {
        $(
            impl Number for $type {
                #[inline(always)]
                fn load<V: Vector>(v: V, x: &[Self; PANEL], part: usize) -> V::Register {
                    v.$load(x, part)
                }
            }
        )*
    };
}
numbers!(f32: load, f16: load_f16, bf16: load_bf16);

/// `N` rows of `length` values, `stride` apart.
#[inline(always)]
pub(super) fn rows<const N: usize, T>(x: &[T], stride: usize, length: usize) -> [&[T]; N] {
    std::array::from_fn(|i| &x[i * stride..][..length])
}

/// Adds `x(p) * factor(q)` to `sums[q][p]`: the inner step of every tile.
///
/// `x` and `factor` are called where their value is used: an array of values would keep more registers occupied.
#[inline(always)]
pub(super) fn add_products<'a, V: Vector, T: Number, const Q: usize, const P: usize>(
    v: V,
    x: impl Fn(usize) -> &'a [T; PANEL],
    factor: impl Fn(usize) -> f32,
    sums: &mut [[V::Panel; P]; Q],
) {
    // Either the panels or the factors stay in registers next to the sums: the fewer of them.
    if Q < P * V::PARTS {
        for p in 0..P {
            for part in 0..V::PARTS {
                let x = T::load(v, x(p), part);
                for q in 0..Q {
                    sums[q][p][part] = v.mul_add(x, v.splat(factor(q)), sums[q][p][part]);
                }
            }
        }
    } else {
        let mut loaded = [v.zeros(); P];
        for p in 0..P {
            for part in 0..V::PARTS {
                loaded[p][part] = T::load(v, x(p), part);
            }
        }
        for q in 0..Q {
            let factor = v.splat(factor(q));
            for p in 0..P {
                for part in 0..V::PARTS {
                    sums[q][p][part] = v.mul_add(loaded[p][part], factor, sums[q][p][part]);
                }
            }
        }
    }
}
