//! The operations of a kernel: their list, and [`Kernel`], a table with a function for each of them.
//!
//! The list is read by macros, so that nothing else repeats it: [`operations!`] calls a macro with the signatures of all
//! operations, in three groups by where their code comes from. Those of the last group are listed in
//! `generic/elementwise.rs`, next to their code.

#![allow(unsafe_code, reason = "tables of functions that only some CPUs can run")]

use std::fmt;

use self::types::*;

/// The types in the signatures, which the macros bring into scope where they repeat a signature.
pub(super) mod types {
    pub(in crate::kernels) use std::ops::Range;

    pub(in crate::kernels) use half::f16;

    pub(in crate::kernels) use crate::kernels::activations::{Activations, RowMut};
    pub(in crate::kernels) use crate::kernels::generic::math::Activation;
    pub(in crate::kernels) use crate::kernels::kv::{
        Int8ScoreInputs, Int8WeightedValues, Int8Weights, KvSlice, PAGE, ScoreInputs, SelectiveStep, Softmax,
        SoftmaxMut, StateUpdate, WeightedValues, WkvStep,
    };
    pub(in crate::kernels) use crate::quant::packed::{CacheLine, PANEL, Packed};
    pub(in crate::kernels) use crate::threads::Columns;
}

/// Calls the macro `$then` with `$argument` and the signatures of all operations.
macro_rules! operations {
    ($then:ident $argument:tt) => {
        $crate::kernels::generic::elementwise::elementwise_operations! { $then $argument
            // Operations that each instruction set implements by hand.
            {
                /// `out = x * panels(w)^T`: an integer layout with quantized activations `(rows, columns)`.
                ///
                /// `out` has `x.rows()` rows and the columns of these panels, `16 * panels.start ..` up to at most
                /// `w.rows()`. Over the blocks of a row (or their halves, for groups of 16) in order:
                /// `acc = fma(integer dot, weight scale * activation scale, acc)`, then, with minimums,
                /// `acc = fma(min, activation scale * sum of codes, acc)`. Where a group has several blocks, over its blocks
                /// `part = fma(integer dot, activation scale, part)`, then `acc = fma(part, weight scale, acc)`, then the
                /// minimums. Groups of 256 columns are summed as two of 128.
                fn product(w: &Packed, panels: Range<usize>, x: &Activations, out: &mut Columns<'_>);

                /// Runs `rounds` rounds of independent integer dot products in registers and returns the number of
                /// operations (a multiply and an add are two) and a checksum: measures the peak INT8 rate.
                fn peak_int8(rounds: usize) -> (u64, i32);
            }
            // Operations in `generic/` over a `Vector` of the instruction set. The scalar kernel has its own, which define
            // the result.
            {
                /// `out = x * panels(w)^T`: a float layout with F32 activations, row `r` at `x[r * stride ..]`.
                ///
                /// Over the columns in order: `acc = fma(w, x, acc)`.
                fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>) = float;

                /// Dot products of queries with a page of keys into `scores[i * stride ..][.. PAGE]`. Over the numbers of a
                /// key in order: `score = fma(key, query, score)`; then `score *= scale`.
                fn scores(inputs: ScoreInputs<'_>, scores: &mut [f32], stride: usize) = attention;

                /// Adds to `out (n, width)` the values of the positions `ranges[i]`, weighted by `weights[i * stride ..]`, in
                /// order with fused multiply-add.
                fn weighted_sum(inputs: WeightedValues<'_>, out: &mut [f32]) = attention;

                /// Packs the codes of a page of keys `(PAGE / 16, head_dim, 16)` for [`Kernel::scores_int8`] of the same kernel
                /// into `(head_dim / 4, PAGE / 16)`, rounded up.
                fn pack_keys(keys: &[i8], head_dim: usize, out: &mut [CacheLine]) = attention_int8;

                /// Packs the codes of a page of values `(PAGE, width)` for [`Kernel::weighted_sum_int8`] of the same kernel into
                /// `(width / 16, PAGE / 4 + 1)`.
                fn pack_values(values: &[i8], width: usize, out: &mut [CacheLine]) = attention_int8;

                /// As [`Kernel::scores`], of quantized queries and keys. Over the groups in order, with the dot product of the
                /// codes as an integer: the first `dot * query scale * key scale`, then
                /// `score = fma(dot * query scale, key scale, score)`.
                fn scores_int8(inputs: Int8ScoreInputs<'_>, scores: &mut [f32], stride: usize) = attention_int8;

                /// Quantizes weights times the scales of the values into `codes (groups, n, PAGE)` for
                /// [`Kernel::weighted_sum_int8`] of the same kernel and `factors (groups, n)`, each `max(product) / 255`. Codes of
                /// positions that a query has not seen are those of 0. If a product is not finite, the factor is NaN.
                fn quantize_weights(inputs: Int8Weights<'_>, codes: &mut [u8], factors: &mut [f32]) = attention_int8;

                /// As [`Kernel::weighted_sum`], of quantized weights and values: `out = fma(dot, scale, out)`, with the dot product
                /// of the codes as an integer.
                fn weighted_sum_int8(inputs: Int8WeightedValues<'_>, out: &mut [f32]) = attention_int8;

                /// Converts numbers to single precision.
                fn widen(numbers: KvSlice<'_>, out: &mut [f32]) = convert;

                /// Converts to half precision, rounding to nearest even.
                fn to_f16(x: &[f32], out: &mut [f16]) = convert;
            }
        }
    };
}
pub(super) use operations;

/// Defines [`Table`] and [`Kernel`]'s methods.
macro_rules! declare {
    ({} $({ $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $(= $file:ident)?;)* })*) => {
        /// The functions of a kernel. Each may be called only on a CPU that has the kernel's instruction set.
        #[derive(Clone, Copy)]
        pub(super) struct Table {
            pub(super) name: &'static str,
            $($(pub(super) $name: unsafe fn($($type),*) $(-> $result)?,)*)*
        }

        impl Kernel {
            $($(
                $(#[$doc])*
                #[doc(hidden)]
                #[inline]
                pub fn $name(&self, $($arg: $type),*) $(-> $result)? {
                    // SAFETY: `self` exists, so `Kernel::new`'s caller has promised that this CPU can run the function.
                    unsafe { (self.0.$name)($($arg),*) }
                }
            )*)*
        }
    };
}
operations! { declare {} }

/// Everything that a forward pass computes, for one instruction set.
///
/// [`available`](fn@super::available) returns only kernels that this CPU can run. All of them return the same bits as the
/// scalar one.
pub struct Kernel(Table);

impl Kernel {
    /// A kernel with the functions of `table`.
    ///
    /// # Safety
    ///
    /// References to the kernel may be given out only on CPUs that have the instruction set of all functions in `table`.
    pub(super) const unsafe fn new(table: Table) -> Self {
        Kernel(table)
    }

    /// The functions.
    pub(super) fn table(&self) -> Table {
        self.0
    }

    /// The name by which users choose the kernel.
    pub fn name(&self) -> &'static str {
        self.0.name
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernel").field(&self.name()).finish()
    }
}

/// The [`Table`] of an instruction set whose `product` and `peak_int8` are in scope at the call:
/// `compile! { { "name", "feature,feature", VectorType } ... }`, called through [`operations!`].
macro_rules! compile {
    (
        { $table:literal, $features:literal, $vector:ident }
        { $($(#[$own_doc:meta])* fn $own:ident($($own_arg:ident: $own_type:ty),* $(,)?) $(-> $own_result:ty)?;)* }
        { $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $file:ident;)* }
        { $($(#[$e_doc:meta])* fn $e_name:ident($($e_arg:ident: $e_type:ty),* $(,)?) $(-> $e_result:ty)?;)* }
    ) => {{
        use $crate::kernels::operations::types::*;
        $(
            #[target_feature(enable = $features)]
            fn $name($($arg: $type),*) $(-> $result)? {
                // SAFETY: the function runs only on CPUs with its features, and they are all that the vector needs.
                let vector = unsafe { $vector::new() };
                $crate::kernels::generic::$file::$name(vector, $($arg),*)
            }
        )*
        $(
            #[target_feature(enable = $features)]
            fn $e_name($($e_arg: $e_type),*) $(-> $e_result)? {
                $crate::kernels::generic::elementwise::$e_name($($e_arg),*)
            }
        )*
        Table { name: $table, $($own,)* $($name,)* $($e_name),* }
    }};
}
pub(super) use compile;

/// The [`Table`] of the scalar kernel: functions in scope at the call, and the elementwise ones as they are.
macro_rules! plain {
    (
        { $table:literal }
        { $($(#[$own_doc:meta])* fn $own:ident($($own_args:tt)*) $(-> $own_result:ty)?;)* }
        { $($(#[$doc:meta])* fn $name:ident($($args:tt)*) $(-> $result:ty)? = $file:ident;)* }
        { $($(#[$e_doc:meta])* fn $e_name:ident($($e_args:tt)*) $(-> $e_result:ty)?;)* }
    ) => {
        Table {
            name: $table,
            $($own,)*
            $($name,)*
            $($e_name: $crate::kernels::generic::elementwise::$e_name),*
        }
    };
}
pub(super) use plain;
