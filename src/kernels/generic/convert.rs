//! Conversions between F32 and the types in which the cache stores keys and values.

use half::f16;

use super::vector::{Number, Vector};
use crate::kernels::kv::KvSlice;
use crate::quant::packed::PANEL;

#[inline(always)]
pub(in crate::kernels) fn widen<V: Vector>(v: V, numbers: KvSlice<'_>, out: &mut [f32]) {
    match numbers {
        KvSlice::F32(x) => out.copy_from_slice(&x[..out.len()]),
        KvSlice::F16(x) => widen_all(v, x, out),
    }
}

#[inline(always)]
fn widen_all<V: Vector, T: Number + Into<f32>>(v: V, x: &[T], out: &mut [f32]) {
    let (x, x_tail) = x[..out.len()].as_chunks::<PANEL>();
    let (out, out_tail) = out.as_chunks_mut::<PANEL>();
    for (x, out) in x.iter().zip(out) {
        for part in 0..V::PARTS {
            v.store(T::load(v, x, part), out, part);
        }
    }
    for (x, out) in x_tail.iter().zip(out_tail) {
        *out = (*x).into();
    }
}

#[inline(always)]
pub(in crate::kernels) fn to_f16<V: Vector>(v: V, x: &[f32], out: &mut [f16]) {
    let (x, x_tail) = x.as_chunks::<PANEL>();
    let (out, out_tail) = out.as_chunks_mut::<PANEL>();
    for (x, out) in x.iter().zip(out) {
        for part in 0..V::PARTS {
            v.store_f16(v.load(x, part), out, part);
        }
    }
    for (x, out) in x_tail.iter().zip(out_tail) {
        *out = f16::from_f32(*x);
    }
}
