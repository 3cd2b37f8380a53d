//! Steps of recurrences whose state is a matrix in panels `(n, 16)`: a lane is a column, and nothing is summed across
//! lanes.

use super::math::exp;
use crate::kernels::kv::{SelectiveStep, StateUpdate, WkvStep};
use crate::quant::packed::PANEL;

#[inline(always)]
pub(in crate::kernels) fn advance_state(
    state: &mut [f32],
    update: Option<StateUpdate<'_>>,
    reads: [&[f32]; 2],
    sums: [&mut [f32; PANEL]; 2],
) {
    let [first, second] = reads;
    match (update, first.is_empty(), second.is_empty()) {
        (Some(update), true, true) => sweep::<true, false, false>(state, update, reads, sums),
        (Some(update), true, false) => sweep::<true, false, true>(state, update, reads, sums),
        (Some(update), false, _) => sweep::<true, true, true>(state, update, reads, sums),
        (None, true, true) => {}
        (None, true, false) => sweep::<false, false, true>(state, StateUpdate::NONE, reads, sums),
        (None, false, _) => sweep::<false, true, true>(state, StateUpdate::NONE, reads, sums),
    }
}

/// One pass over a panel. What is not updated or read has empty vectors.
#[inline(always)]
fn sweep<const UPDATE: bool, const FIRST: bool, const SECOND: bool>(
    state: &mut [f32],
    update: StateUpdate<'_>,
    [first, second]: [&[f32]; 2],
    [first_sum, second_sum]: [&mut [f32; PANEL]; 2],
) {
    let rows = state.as_chunks_mut::<PANEL>().0;
    let n = rows.len();
    // Of one length, so that the loop needs no checks.
    let [gate, key] = [update.gate, update.key].map(|x| if UPDATE { &x[..n] } else { &x[..0] });
    let (first, second) = (if FIRST { &first[..n] } else { &[] }, if SECOND { &second[..n] } else { &[] });
    let delta = *update.delta;
    let (mut a, mut b) = ([0.0f32; PANEL], [0.0f32; PANEL]);
    for (i, row) in rows.iter_mut().enumerate() {
        let mut s = *row;
        if UPDATE {
            let (gate, key) = (gate[i], key[i]);
            for (s, delta) in s.iter_mut().zip(&delta) {
                *s = key.mul_add(*delta, gate * *s);
            }
            *row = s;
        }
        if FIRST {
            let read = first[i];
            for (a, s) in a.iter_mut().zip(&s) {
                *a = s.mul_add(read, *a);
            }
        }
        if SECOND {
            let read = second[i];
            for (b, s) in b.iter_mut().zip(&s) {
                *b = s.mul_add(read, *b);
            }
        }
    }
    (*first_sum, *second_sum) = (a, b);
}

#[inline(always)]
pub(in crate::kernels) fn selective_step(state: &mut [f32], step: SelectiveStep<'_>, out: &mut [f32; PANEL]) {
    let SelectiveStep { rates, time, delta, key, read } = step;
    let rows = state.as_chunks_mut::<PANEL>().0;
    let (rates, key) = (&rates.as_chunks::<PANEL>().0[..rows.len()], &key[..rows.len()]);
    let mut sum = [0.0f32; PANEL];
    for (i, row) in rows.iter_mut().enumerate() {
        let (mut s, rates, key) = (*row, &rates[i], key[i]);
        for (lane, s) in s.iter_mut().enumerate() {
            *s = key.mul_add(delta[lane], exp(time[lane] * rates[lane]) * *s);
        }
        *row = s;
        if let Some(read) = read.get(i) {
            for (sum, s) in sum.iter_mut().zip(&s) {
                *sum = s.mul_add(*read, *sum);
            }
        }
    }
    *out = sum;
}

#[inline(always)]
pub(in crate::kernels) fn add_product(out: &mut [f32], x: &[f32], y: &[f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x.mul_add(*y, *out);
    }
}

#[inline(always)]
pub(in crate::kernels) fn wkv_step(state: &mut [f32], step: WkvStep<'_>, out: &mut [f32; PANEL]) {
    let WkvStep { decay, first, key, value } = step;
    let [values, weights, exponents] = state.as_chunks_mut::<PANEL>().0 else { return };
    for lane in 0..PANEL {
        let (sum, weight) = (values[lane], weights[lane]);
        let before = if weight == 0.0 { f32::MIN } else { exponents[lane] };
        let own = key[lane] + first[lane];
        let most = if before > own { before } else { own };
        let (old, new) = (exp(before - most), exp(own - most));
        out[lane] = new.mul_add(value[lane], old * sum) / old.mul_add(weight, new);
        let decayed = before + decay[lane];
        let most = if decayed > key[lane] { decayed } else { key[lane] };
        let (old, new) = (exp(decayed - most), exp(key[lane] - most));
        values[lane] = new.mul_add(value[lane], old * sum);
        weights[lane] = old.mul_add(weight, new);
        exponents[lane] = most;
    }
}
