//! Elementwise operations and norms: bit-identical on every kernel, and correct.

use half::f16;
use nybble::kernels::{Kernel, available};

use crate::support::*;

const LENGTHS: [usize; 13] = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000];

/// Runs an operation on three buffers of each length and compares its result with the scalar kernel's.
fn same_on_every_kernel(name: &str, operation: impl Fn(&Kernel, [Vec<f32>; 3]) -> Vec<f32>) {
    let mut rng = Rng(30);
    for n in LENGTHS {
        for wild in [false, true] {
            let buffers = [(); 3].map(|()| if wild { rng.wild_values(n) } else { rng.values(n) });
            let expected = operation(scalar(), buffers.clone());
            for kernel in available() {
                let what = format!("{name}, {}, {n} values", kernel.name());
                assert_same(&operation(kernel, buffers.clone()), &expected, what);
            }
        }
    }
}

#[test]
fn norms_match_the_scalar_kernel() {
    same_on_every_kernel("rms_norm", |kernel, [x, weight, mut out]| {
        out.fill(f32::NAN);
        kernel.rms_norm(&x, &weight, 1e-5, &mut out);
        out
    });
    same_on_every_kernel("layer_norm with bias", |kernel, [x, weight, bias]| {
        let mut out = vec![f32::NAN; x.len()];
        kernel.layer_norm(&x, &weight, &bias, 1e-5, &mut out);
        out
    });
    same_on_every_kernel("layer_norm", |kernel, [x, weight, mut out]| {
        out.fill(f32::NAN);
        kernel.layer_norm(&x, &weight, &[], 1e-5, &mut out);
        out
    });
}

#[test]
fn elementwise_operations_match_the_scalar_kernel() {
    same_on_every_kernel("multiply", |kernel, [mut x, y, _]| {
        kernel.multiply(&mut x, &y);
        x
    });
    same_on_every_kernel("add_slope", |kernel, [mut scores, ..]| {
        kernel.add_slope(&mut scores, 0.3, 100.0);
        scores
    });
    same_on_every_kernel("to_int8", |kernel, [x, ..]| {
        let mut codes = vec![0; x.len()];
        let scale = kernel.to_int8(&x, &mut codes);
        codes.into_iter().map(f32::from).chain([scale]).collect()
    });
    same_on_every_kernel("expand_scales", |kernel, [x, mut out, _]| {
        let scales: Vec<u16> = x.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
        kernel.expand_scales(&scales, 0.3, &mut out);
        out
    });
    for block in [1, 2, 4, 8, 16, 64, 128] {
        same_on_every_kernel("hadamard", |kernel, [mut x, ..]| {
            let whole = x.len() / block * block;
            kernel.hadamard(&mut x[..whole], block);
            x
        });
    }
    same_on_every_kernel("add_scaled", |kernel, [mut x, y, _]| {
        kernel.add_scaled(&mut x, &y, 0.7);
        x
    });
    same_on_every_kernel("soft_cap", |kernel, [mut x, ..]| {
        kernel.soft_cap(&mut x, 3.0);
        x
    });
    same_on_every_kernel("rope", |kernel, [first, second, angles]| {
        let cos: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
        let mut x = [first, second].concat();
        kernel.rope(&mut x, &cos, &sin);
        x
    });
    for limit in [0.5, 7.0] {
        same_on_every_kernel("clamped_gate", |kernel, [mut gate, up, _]| {
            kernel.clamped_gate(&mut gate, &up, 1.702, limit);
            gate
        });
    }
    same_on_every_kernel("xielu", |kernel, [mut x, ..]| {
        kernel.xielu(&mut x, [0.8, 0.7, 0.5, -1e-6]);
        x
    });
    same_on_every_kernel("dot", |kernel, [x, y, _]| vec![kernel.dot(&x, &y)]);
    same_on_every_kernel("add_product", |kernel, [mut out, x, y]| {
        kernel.add_product(&mut out, &x, &y);
        out
    });
    for activation in ACTIVATIONS {
        same_on_every_kernel(&format!("{activation:?}"), |kernel, [mut x, ..]| {
            kernel.activate(activation, &mut x);
            x
        });
        same_on_every_kernel(&format!("{activation:?} gate"), |kernel, [mut gate, up, _]| {
            kernel.gate(activation, &mut gate, &up);
            gate
        });
    }
}

#[test]
fn exponentials_of_a_segment_match_the_scalar_kernel() {
    same_on_every_kernel("exp_segment", |kernel, [mut scores, ..]| {
        let (max, sum) = kernel.exp_segment(&mut scores);
        scores.extend([max, sum]);
        scores
    });
    same_on_every_kernel("exp_segment_coarse", |kernel, [mut scores, ..]| {
        let (max, sum) = kernel.exp_segment_coarse(&mut scores);
        scores.extend([max, sum]);
        scores
    });
}

#[test]
fn half_precision_matches_the_scalar_kernel() {
    same_on_every_kernel("to_f16", |kernel, [x, ..]| {
        let mut out = vec![f16::NAN; x.len()];
        kernel.to_f16(&x, &mut out);
        out.iter().map(|x| x.to_f32()).collect()
    });
}

#[test]
fn half_precision_rounds_to_nearest_even() {
    // Every finite F16, the midpoint to the next one, and the F32 numbers around that midpoint.
    let mut cases = vec![];
    for bits in 0..f16::INFINITY.to_bits() {
        let (low, high) = (f16::from_bits(bits), f16::from_bits(bits + 1));
        let upper = if high.is_finite() { f64::from(high.to_f32()) } else { 65536.0 };
        let middle = ((f64::from(low.to_f32()) + upper) / 2.0) as f32;
        let even = if bits % 2 == 0 { low } else { high };
        cases.push((low.to_f32(), low));
        cases.push((middle, even));
        cases.push((middle.next_down(), low));
        cases.push((middle.next_up(), high));
    }
    let x: Vec<f32> = cases.iter().flat_map(|(x, _)| [*x, -*x]).collect();
    let expected: Vec<u16> = cases.iter().flat_map(|(_, y)| [y.to_bits(), y.to_bits() | 0x8000]).collect();
    for kernel in available() {
        let mut out = vec![f16::NAN; x.len()];
        kernel.to_f16(&x, &mut out);
        let found: Vec<u16> = out.iter().map(|x| x.to_bits()).collect();
        assert!(found == expected, "{}", kernel.name());
    }
}

#[test]
fn norms_agree_with_their_definitions() {
    let mut rng = Rng(31);
    for n in [1, 33, 576] {
        let (x, weight, bias) = (rng.values(n), rng.values(n), rng.values(n));
        let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let mean = exact.iter().sum::<f64>() / n as f64;
        let squares = exact.iter().map(|x| x * x).sum::<f64>() / n as f64;
        let variance = exact.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n as f64;
        for kernel in available() {
            let (mut rms, mut layer, mut plain) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            kernel.rms_norm(&x, &weight, 1e-5, &mut rms);
            kernel.layer_norm(&x, &weight, &bias, 1e-5, &mut layer);
            kernel.layer_norm(&x, &weight, &[], 1e-5, &mut plain);
            for i in 0..n {
                let (w, b) = (f64::from(weight[i]), f64::from(bias[i]));
                let expected = exact[i] / (squares + 1e-5).sqrt() * w;
                assert_close(rms[i], expected, 1e-6 * expected.abs(), "rms_norm");
                let expected = (exact[i] - mean) / (variance + 1e-5).sqrt() * w;
                let tolerance = 2e-6 * (w.abs() * n as f64).max(1.0);
                assert_close(plain[i], expected, tolerance, "layer_norm");
                assert_close(layer[i], expected + b, tolerance + 1e-7 * b.abs(), "layer_norm with bias");
            }
        }
    }
}

#[test]
fn rope_rotates_pairs_half_a_row_apart() {
    let mut rng = Rng(32);
    for n in [1, 16, 33] {
        let x = rng.values(2 * n);
        let angles: Vec<f32> = (0..n).map(|_| rng.unit() * 3.0).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        for kernel in available() {
            let mut found = x.clone();
            kernel.rope(&mut found, &cos, &sin);
            for i in 0..n {
                let (a, b) = (f64::from(x[i]), f64::from(x[i + n]));
                let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
                let tolerance = 2e-7 * (a.abs() + b.abs());
                assert_close(found[i], a * cos - b * sin, tolerance, "first");
                assert_close(found[i + n], a * sin + b * cos, tolerance, "second");
            }
        }
    }
}

#[test]
fn elementwise_arithmetic_rounds_as_defined() {
    let mut rng = Rng(33);
    let (x, y) = (rng.values(100), rng.values(100));
    for kernel in available() {
        let (mut multiplied, mut sloped, mut added) = (x.clone(), x.clone(), x.clone());
        kernel.multiply(&mut multiplied, &y);
        kernel.add_slope(&mut sloped, 0.3, 120.0);
        kernel.add_scaled(&mut added, &y, 0.7);
        for i in 0..100 {
            assert_eq!(multiplied[i], x[i] * y[i]);
            assert_eq!(sloped[i], 0.3f32.mul_add(i as f32 - 120.0, x[i]));
            assert_eq!(added[i], y[i].mul_add(0.7, x[i]));
        }
    }
}

#[test]
fn int8_codes_are_rounded_to_nearest() {
    let mut rng = Rng(35);
    for kernel in available() {
        for n in [1, 22, 64, 100] {
            let x: Vec<f32> = (0..n).map(|_| rng.unit() * 3.0).collect();
            let mut codes = vec![0; n];
            let scale = kernel.to_int8(&x, &mut codes);
            let top = x.iter().fold(0.0f32, |top, x| top.max(x.abs()));
            let least = f64::from(top) / 127.4;
            assert!(f64::from(scale) >= least * 0.999_999 && f64::from(scale) <= least * 1.07, "{scale} for {least}");
            assert_eq!(scale.to_bits() & 0xffff, 0, "{scale} is not BF16");
            for (code, x) in codes.iter().zip(&x) {
                assert_close(*x, f64::from(*code) * f64::from(scale), 0.5001 * f64::from(scale), kernel.name());
            }
        }
        let mut codes = [7; 3];
        assert_eq!((kernel.to_int8(&[0.0, -0.0, 1e-38], &mut codes), codes), (0.0, [0; 3]), "{}", kernel.name());
        assert!(kernel.to_int8(&[1.0, f32::NAN, 2.0], &mut codes).is_nan(), "{}", kernel.name());
    }
}

#[test]
fn int8_scales_lose_less_than_those_of_the_largest_numbers() {
    let mut rng = Rng(37);
    for kernel in available() {
        let (mut found, mut plain) = (0.0, 0.0);
        for _ in 0..200 {
            let mut x = rng.values(32);
            kernel.hadamard(&mut x, 32); // About a normal distribution, as in the cache.
            let mut codes = [0; 32];
            let scale = kernel.to_int8(&x, &mut codes);
            let largest = x.iter().fold(0.0f32, |top, x| top.max(x.abs())) / 127.0;
            for (x, code) in x.iter().zip(codes) {
                found += f64::from(x - f32::from(code) * scale).powi(2);
                plain += f64::from(x - (x / largest).round() * largest).powi(2);
            }
        }
        assert!(found < 0.9 * plain, "{}: {found} and {plain}", kernel.name());
    }
}

#[test]
fn the_hadamard_transform_is_a_product_with_its_matrix() {
    let mut rng = Rng(36);
    for kernel in available() {
        for block in [1, 2, 4, 8, 32, 64, 256] {
            let x = rng.values(2 * block);
            let mut transformed = x.clone();
            kernel.hadamard(&mut transformed, block);
            for (i, found) in transformed.iter().enumerate() {
                let own = &x[i / block * block..][..block];
                let sign = |j: usize| if ((i % block) & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let expected: f64 = own.iter().enumerate().map(|(j, x)| sign(j) * f64::from(*x)).sum();
                assert_close(*found, expected, 1e-5 * block as f64, format!("{}, {block}", kernel.name()));
            }
            // Twice the transform is the block times the numbers.
            kernel.hadamard(&mut transformed, block);
            for (found, x) in transformed.iter().zip(&x) {
                let expected = f64::from(*x) * block as f64;
                assert_close(*found, expected, 1e-5 * (block * block) as f64, format!("{}, {block}", kernel.name()));
            }
        }
    }
}

#[test]
fn a_segment_of_absent_scores_has_weight_zero() {
    for kernel in available() {
        for n in [1, 31, 64] {
            let mut scores = vec![f32::NEG_INFINITY; n];
            assert_eq!(kernel.exp_segment(&mut scores), (f32::NEG_INFINITY, 0.0), "{}", kernel.name());
            assert_eq!(scores, vec![0.0; n], "{}", kernel.name());
            scores.fill(f32::NEG_INFINITY);
            scores[n / 2] = 3.5;
            assert_eq!(kernel.exp_segment(&mut scores), (3.5, 1.0), "{}", kernel.name());
            assert_eq!(scores[n / 2], 1.0, "{}", kernel.name());
        }
        assert_eq!(kernel.exp_segment(&mut []), (f32::NEG_INFINITY, 0.0), "{}", kernel.name());
    }
}

#[test]
fn nan_stays_nan() {
    for kernel in available() {
        for activation in ACTIVATIONS {
            let mut x = vec![1.0, f32::NAN, 2.0];
            kernel.activate(activation, &mut x);
            assert!(x[1].is_nan() && x[0].is_finite() && x[2].is_finite(), "{activation:?}, {}", kernel.name());
        }
        let mut x = vec![1.0, f32::NAN, 2.0];
        kernel.soft_cap(&mut x, 30.0);
        assert!(x[1].is_nan() && x[0].is_finite() && x[2].is_finite(), "soft_cap, {}", kernel.name());
        let mut x = vec![1.0, f32::NAN, 2.0];
        let (_, sum) = kernel.exp_segment(&mut x);
        assert!(x[1].is_nan() && sum.is_nan(), "exp_segment, {}", kernel.name());
        let mut x = vec![1.0, f32::NAN, 2.0];
        let (_, sum) = kernel.exp_segment_coarse(&mut x);
        assert!(x[1].is_nan() && sum.is_nan(), "exp_segment_coarse, {}", kernel.name());
        let mut out = vec![0.0; 3];
        kernel.rms_norm(&[1.0, f32::NAN, 2.0], &[1.0; 3], 1e-5, &mut out);
        assert!(out.iter().all(|x| x.is_nan()), "rms_norm, {}", kernel.name());
    }
}

#[test]
fn measurements_sum_their_input_and_count_operations() {
    let mut rng = Rng(34);
    for kernel in available() {
        for n in LENGTHS {
            let data: Vec<u64> = (0..n).map(|_| rng.next()).collect();
            let expected = data.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x));
            assert_eq!(kernel.read_sum(&data), expected, "{}", kernel.name());
        }
        let (one, _) = kernel.peak_int8(1);
        assert!(one > 0 && kernel.peak_int8(0).0 == 0 && kernel.peak_int8(10).0 == 10 * one, "{}", kernel.name());
        // The loop of AMX is assembly, which no compiler removes: it needs no checksum.
        if kernel.name() != "amx" {
            let (three, four) = (kernel.peak_int8(3).1, kernel.peak_int8(4).1);
            assert_ne!(three, four, "{}: the checksum depends on the rounds", kernel.name());
        }
    }
}
