//! For instruction sets that add a product to those of another one and compute everything else as that one does.

/// All trait methods but `name`, `product` and `peak_int8`, done by the kernel in the field `$rest`.
macro_rules! delegated_methods {
    ($rest:ident) => {
        crate::kernels::delegate::delegated_methods! { @each $rest
            fn quantize(x: &[f32], out: RowMut<'_>);
            fn product_float(w: &Packed, panels: Range<usize>, x: &[f32], stride: usize, out: &mut Columns<'_>);
            fn scores(
                queries: &[f32], head_dim: usize, keys: KvSlice<'_>, scales: &[f32; PAGE], scores: &mut [f32], stride: usize
            );
            fn weighted_sum(
                weights: &[f32], stride: usize, ranges: &[Range<usize>], values: KvSlice<'_>, width: usize, out: &mut [f32]
            );
            fn widen(numbers: KvSlice<'_>, out: &mut [f32]);
            fn exp_segment(scores: &mut [f32]) -> (f32, f32);
            fn join(so_far: SoftmaxMut<'_>, more: Softmax<'_>);
            fn multiply(x: &mut [f32], y: &[f32]);
            fn add_slope(scores: &mut [f32], slope: f32, distance: f32);
            fn to_int8(x: &[f32], codes: &mut [i8]) -> f32;
            fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
            fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]);
            fn add_scaled(x: &mut [f32], y: &[f32], scale: f32);
            fn activate(activation: Activation, x: &mut [f32]);
            fn gate(activation: Activation, gate: &mut [f32], up: &[f32]);
            fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]);
            fn soft_cap(x: &mut [f32], cap: f32);
            fn to_f16(x: &[f32], out: &mut [f16]);
            fn read_sum(data: &[u64]) -> u64;
        }
    };
    (@each $rest:ident $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(
            fn $name(&self, $($arg: $type),*) $(-> $result)? {
                self.$rest.$name($($arg),*)
            }
        )*
    };
}
pub(super) use delegated_methods;
