//! Random shapes and values on every kernel.

use half::f16;
use nybble::kernels::{INT8_GROUP, KvSlice, PAGE, ScoreInputs, Softmax, SoftmaxMut, WeightedValues, available};
use nybble::quant::packed::PANEL;
use nybble::threads::Columns;
use proptest::prelude::*;

use crate::attention_int8::Int8Case;
use crate::support::*;

/// Any F32, including subnormals, infinities and NaN with any payload.
fn any_float() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits)
}

/// Numbers of ordinary magnitude.
fn ordinary() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -8.0f32..8.0, 1 => Just(0.0), 1 => -1e-3f32..1e-3, 1 => -1e4f32..1e4]
}

fn floats(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![proptest::collection::vec(ordinary(), length.clone()), proptest::collection::vec(any_float(), length)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_bit_identical_on_every_kernel(
        layout in 0..layouts().len(),
        (rows, columns, batch) in (1usize..70, 1usize..200, 1usize..40),
        (first, last) in (0usize..6, 0usize..6),
        gain in prop_oneof![Just(1.0f32), Just(0.0625), Just(1024.0)],
        seed in any::<u64>(),
        wild in any::<bool>(),
    ) {
        let (layout, mut rng) = (layouts()[layout], Rng(seed));
        let w = random_matrix(&mut rng, rows, columns, layout, gain);
        let x = if wild { rng.wild_values(batch * columns) } else { rng.values(batch * columns) };
        let input = Input { rows: batch, columns, x };
        let panels = first.min(w.panels() - 1)..(last + 1).clamp(first.min(w.panels() - 1), w.panels());
        let range = panels.start * PANEL..(panels.end * PANEL).clamp(panels.start * PANEL, rows);
        let product = |kernel| {
            let mut out = vec![f32::NAN; batch * rows];
            let mut all = Columns::whole(&mut out, batch, rows);
            input.times_panels(kernel, &w, panels.clone(), &mut all.narrow(range.clone()));
            out
        };
        let expected = product(scalar());
        for kernel in available() {
            assert_same(&product(kernel), &expected, format!("{}, {layout:?}", kernel.name()));
        }
    }

    #[test]
    fn elementwise_operations_are_bit_identical_on_every_kernel(
        x in floats(0..200),
        (a, b) in (ordinary(), ordinary()),
        seed in any::<u64>(),
    ) {
        let mut rng = Rng(seed);
        let (weight, other) = (rng.wild_values(x.len()), rng.values(x.len()));
        let all = |kernel: &nybble::kernels::Kernel| {
            let mut outs = vec![];
            for activation in ACTIVATIONS {
                let (mut activated, mut gated) = (x.clone(), x.clone());
                kernel.activate(activation, &mut activated);
                kernel.gate(activation, &mut gated, &weight);
                outs.extend([activated, gated]);
            }
            let (mut clamped, mut curved) = (x.clone(), x.clone());
            kernel.clamped_gate(&mut clamped, &weight, 1.702, a.abs());
            kernel.xielu(&mut curved, [0.8, 0.7, 0.5, -1e-6]);
            outs.extend([clamped, curved]);
            let (mut rms, mut layer) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            kernel.rms_norm(&x, &weight, a.abs(), &mut rms);
            kernel.layer_norm(&x, &weight, &other, a.abs(), &mut layer);
            let (mut scores, mut capped, mut multiplied, mut added) = (x.clone(), x.clone(), x.clone(), x.clone());
            let (max, sum) = kernel.exp_segment(&mut scores);
            kernel.soft_cap(&mut capped, a);
            kernel.multiply(&mut multiplied, &weight);
            let mut sloped = x.clone();
            kernel.add_slope(&mut sloped, a, b);
            let mut codes = vec![0; x.len()];
            let mut int8 = vec![kernel.to_int8(&x, &mut codes)];
            if int8[0].is_finite() {
                int8.extend(codes.into_iter().map(f32::from));
            }
            kernel.add_scaled(&mut added, &weight, b);
            let mut halves = vec![f16::NAN; x.len()];
            kernel.to_f16(&x, &mut halves);
            let halves = halves.iter().map(|x| x.to_f32()).collect();
            let (mut turned, n) = (x.clone(), x.len() / 2);
            kernel.rope(&mut turned, &weight[..n], &other[..n]);
            outs.extend([rms, layer, scores, vec![max, sum], capped, multiplied, added, halves, turned, sloped, int8]);
            outs
        };
        let expected = all(scalar());
        for kernel in available() {
            for (i, (found, expected)) in all(kernel).iter().zip(&expected).enumerate() {
                assert_same(found, expected, format!("{}, operation {i}", kernel.name()));
            }
        }
    }

    #[test]
    fn attention_is_bit_identical_on_every_kernel(
        (n, head_dim, columns) in (1usize..20, 1usize..140, 1usize..9),
        pad in 0usize..20,
        seed in any::<u64>(),
        wild in any::<bool>(),
    ) {
        let (mut rng, width, stride) = (Rng(seed), columns * PANEL, PAGE + pad);
        let mut values = |n| if wild { rng.wild_values(n) } else { rng.values(n) };
        let (queries, weights, before) = (values(n * head_dim), values(n * stride), values(n * width));
        let more = [values(n), values(n), values(n * width)];
        let key_scales: Vec<f32> = values(head_dim.div_ceil(INT8_GROUP) * PAGE);
        let value_scales: Vec<f32> = values(width.div_ceil(INT8_GROUP) * PAGE);
        let positive: Vec<f32> = weights.iter().map(|x| x.abs()).collect();
        let (keys, page) = (rng.halves(PAGE * head_dim), rng.halves(PAGE * width));
        let codes: Vec<i8> = (0..PAGE * head_dim.max(width)).map(|_| rng.next() as i8).collect();
        let range = |_| {
            let end = rng.below(PAGE + 1);
            rng.below(end + 1)..end
        };
        let ranges: Vec<_> = (0..n).map(range).collect();
        let int8 = Int8Case {
            head_dim,
            queries: &queries,
            keys: &codes[..PAGE * head_dim],
            key_scales: &key_scales,
            weights: &positive,
            stride,
            seen: &ranges,
            values: &codes[..PAGE * width],
            value_scales: &value_scales,
        };
        let all = |kernel: &nybble::kernels::Kernel| {
            let (mut scores, mut out) = (vec![7.0; n * stride], before.clone());
            let keys = KvSlice::F16(&keys);
            kernel.scores(ScoreInputs { queries: &queries, head_dim, keys, scale: 0.3 }, &mut scores, stride);
            let (weights, ranges, values) = (&weights, &ranges, KvSlice::F16(&page));
            kernel.weighted_sum(WeightedValues { weights, stride, ranges, values, width }, &mut out);
            let mut outs = vec![scores, out];
            let (mut scores, mut out) = (vec![7.0; n * stride], before.clone());
            int8.compute(kernel, &mut scores, &mut out);
            outs.extend([scores, out.clone()]);
            let (mut max, mut sum) = (weights[..n].to_vec(), queries[..n].to_vec());
            let so_far = SoftmaxMut { max: &mut max, sum: &mut sum, values: &mut out };
            let [more_max, more_sum, more_values] = &more;
            kernel.join(so_far, Softmax { max: more_max, sum: more_sum, values: more_values });
            outs.extend([out, max, sum]);
            outs
        };
        let expected = all(scalar());
        for kernel in available() {
            for (i, (found, expected)) in all(kernel).iter().zip(&expected).enumerate() {
                assert_same(found, expected, format!("{}, result {i}", kernel.name()));
            }
        }
    }
}
