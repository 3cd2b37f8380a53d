//! Random shapes and values: what no list of cases thought of.

use half::f16;
use nybble::kernels::{Activation, PAGE, available};
use nybble::quant::packed::PANEL;
use nybble::threads::Columns;
use proptest::prelude::*;

use crate::support::*;

/// Any F32 at all: subnormals, infinities and NaN with any payload.
fn any_float() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits)
}

/// Numbers as models have them.
fn ordinary() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -8.0f32..8.0, 1 => Just(0.0), 1 => -1e-3f32..1e-3, 1 => -1e4f32..1e4]
}

fn floats(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![proptest::collection::vec(ordinary(), length.clone()), proptest::collection::vec(any_float(), length)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_have_the_same_bits_on_every_kernel(
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
    fn elementwise_operations_have_the_same_bits_on_every_kernel(
        x in floats(0..200),
        (a, b) in (ordinary(), ordinary()),
        seed in any::<u64>(),
    ) {
        let mut rng = Rng(seed);
        let (weight, other) = (rng.wild_values(x.len()), rng.values(x.len()));
        let all = |kernel: &dyn nybble::kernels::Kernel| {
            let mut outs = vec![];
            for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                let (mut activated, mut gated) = (x.clone(), x.clone());
                kernel.activate(activation, &mut activated);
                kernel.gate(activation, &mut gated, &weight);
                outs.extend([activated, gated]);
            }
            let (mut rms, mut layer) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            kernel.rms_norm(&x, &weight, a.abs(), &mut rms);
            kernel.layer_norm(&x, &weight, &other, a.abs(), &mut layer);
            let (mut scores, mut capped, mut blended, mut added) = (x.clone(), x.clone(), x.clone(), x.clone());
            let (max, sum) = kernel.exp_segment(&mut scores);
            kernel.soft_cap(&mut capped, a);
            kernel.blend(&mut blended, a, &weight, b);
            kernel.add_scaled(&mut added, &weight, b);
            let mut halves = vec![f16::NAN; x.len()];
            kernel.to_f16(&x, &mut halves);
            let halves = halves.iter().map(|x| x.to_f32()).collect();
            let (mut turned, n) = (x.clone(), x.len() / 2);
            kernel.rope(&mut turned, &weight[..n], &other[..n]);
            outs.extend([rms, layer, scores, vec![max, sum], capped, blended, added, halves, turned]);
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
    fn attention_has_the_same_bits_on_every_kernel(
        (n, head_dim, columns) in (1usize..20, 1usize..140, 1usize..9),
        pad in 0usize..20,
        seed in any::<u64>(),
        wild in any::<bool>(),
    ) {
        let (mut rng, width, stride) = (Rng(seed), columns * PANEL, PAGE + pad);
        let mut values = |n| if wild { rng.wild_values(n) } else { rng.values(n) };
        let (queries, weights, before) = (values(n * head_dim), values(n * stride), values(n * width));
        let (keys, page) = (rng.halves(PAGE * head_dim), rng.halves(PAGE * width));
        let counts: Vec<usize> = (0..n).map(|_| rng.below(PAGE + 1)).collect();
        let both = |kernel: &dyn nybble::kernels::Kernel| {
            let (mut scores, mut out) = (vec![7.0; n * stride], before.clone());
            kernel.scores(&queries, head_dim, &keys, 0.3, &mut scores, stride);
            kernel.weighted_sum(&weights, stride, &counts, &page, width, &mut out);
            (scores, out)
        };
        let expected = both(scalar());
        for kernel in available() {
            let found = both(kernel);
            assert_same(&found.0, &expected.0, format!("{}, scores", kernel.name()));
            assert_same(&found.1, &expected.1, format!("{}, sums", kernel.name()));
        }
    }
}
