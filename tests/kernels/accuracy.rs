//! The accuracy of exp, tanh, erf and the activation functions against values computed in F64.

use nybble::kernels::{Activation, Kernel, available};

use crate::support::*;

/// Evenly spaced numbers from `low` to `high`.
fn sweep(low: f64, high: f64) -> Vec<f32> {
    const N: usize = 100_000;
    (0..=N).map(|i| (low + (high - low) * i as f64 / N as f64) as f32).collect()
}

/// The distance between neighboring F32 numbers at `x`.
fn ulp(x: f64) -> f64 {
    let x = x.abs() as f32;
    f64::from(x.next_up()) - f64::from(x)
}

/// Checks that `f` of all `x` is within `tolerance(x, exact(x))` of `exact` on every kernel.
fn check(x: &[f32], f: impl Fn(&Kernel, &mut [f32]), exact: impl Fn(f64) -> f64, tolerance: impl Fn(f64, f64) -> f64) {
    for kernel in available() {
        let mut found = x.to_vec();
        f(kernel, &mut found);
        for (x, found) in x.iter().zip(&found) {
            let x = f64::from(*x);
            let expected = exact(x);
            assert_close(*found, expected, tolerance(x, expected), format!("{}: x = {x:e}", kernel.name()));
        }
    }
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    // With a largest score of 0, the result is the exponential of the others themselves.
    let exp = |kernel: &Kernel, x: &mut [f32]| {
        let (max, sum) = kernel.exp_segment(x);
        let exact: f64 = x.iter().map(|x| f64::from(*x)).sum();
        assert_eq!(max, 0.0);
        assert_close(sum, exact, 1e-5 * exact, "sum");
    };
    for x in [sweep(-87.0, 0.0), sweep(-1.0, 0.0), sweep(-1e-3, 0.0)] {
        check(&x, exp, libm::exp, |_, y| 2.0 * ulp(y));
    }
    let far = [-87.4, -88.0, -104.0, -1e3, -1e30, f32::MIN, f32::NEG_INFINITY, 0.0];
    check(&far, exp, |x| if x == 0.0 { 1.0 } else { 0.0 }, |_, _| 0.0);
}

#[test]
fn coarse_exp_is_within_five_millionths() {
    let exp = |kernel: &Kernel, x: &mut [f32]| {
        let (max, sum) = kernel.exp_segment_coarse(x);
        let exact: f64 = x.iter().map(|x| f64::from(*x)).sum();
        assert_eq!(max, 0.0);
        assert_close(sum, exact, 1e-5 * exact, "sum");
    };
    for x in [sweep(-87.0, 0.0), sweep(-1.0, 0.0), sweep(-1e-3, 0.0)] {
        check(&x, exp, libm::exp, |_, y| 5e-6 * y);
    }
    let far = [-87.4, -88.0, -104.0, -1e3, -1e30, f32::MIN, f32::NEG_INFINITY, 0.0];
    check(&far, exp, |x| if x == 0.0 { 1.0 } else { 0.0 }, |_, _| 0.0);
}

#[test]
fn tanh_is_within_two_ten_millionths() {
    let tanh = |kernel: &Kernel, x: &mut [f32]| kernel.soft_cap(x, 1.0);
    for x in [sweep(-12.0, 12.0), sweep(-0.01, 0.01)] {
        check(&x, tanh, libm::tanh, |_, _| 2e-7);
    }
    check(&[f32::MAX, f32::INFINITY, 100.0, 44.5], tanh, |_| 1.0, |_, _| 0.0);
    check(&[f32::MIN, f32::NEG_INFINITY, -100.0, -44.5], tanh, |_| -1.0, |_, _| 0.0);
    check(&sweep(-500.0, 500.0), |kernel, x| kernel.soft_cap(x, 30.0), |x| 30.0 * libm::tanh(x / 30.0), |_, _| 1e-5);
}

#[test]
fn silu_is_within_a_millionth() {
    let silu = |kernel: &Kernel, x: &mut [f32]| kernel.activate(Activation::Silu, x);
    let exact = |x: f64| x / (1.0 + libm::exp(-x));
    for x in [sweep(-80.0, 80.0), sweep(-1.0, 1.0), sweep(-1e-6, 1e-6)] {
        check(&x, silu, exact, |_, y| 1e-6 * y.abs());
    }
    // Beyond the range of F32's exp, the value is negligible.
    check(&[-88.0, -89.0, -100.0, -1e4, -1e30, f32::MIN], silu, |_| 0.0, |_, _| 1e-34);
    check(&[100.0, 1e4, 1e30, f32::MAX], silu, |x| x, |_, _| 0.0);
}

/// Checks a form of GELU against `exact`, within `tolerance` times its argument.
fn check_gelu(activation: Activation, exact: impl Fn(f64) -> f64, tolerance: f64) {
    let gelu = |kernel: &Kernel, x: &mut [f32]| kernel.activate(activation, x);
    for x in [sweep(-12.0, 12.0), sweep(-1e-3, 1e-3)] {
        check(&x, gelu, &exact, |x, _| tolerance * x.abs());
    }
    check(&[-20.0, -1e4, f32::MIN], gelu, |_| 0.0, |_, _| 0.0);
    check(&[20.0, 1e4, 1e30], gelu, |x| x, |_, _| 0.0);
}

#[test]
fn gelu_is_within_three_ten_millionths_of_its_argument() {
    let exact = |x: f64| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2));
    // erf has an absolute error below 6e-7, and half of it is multiplied by x.
    check_gelu(Activation::Gelu, exact, 3e-7);
}

#[test]
fn gelu_tanh_is_within_two_ten_millionths_of_its_argument() {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let exact = |x: f64| 0.5 * x * (1.0 + libm::tanh(root * (x + 0.044715 * x * x * x)));
    check_gelu(Activation::GeluTanh, exact, 2e-7);
}

#[test]
fn relu_replaces_negative_values_by_zero() {
    let relu = |kernel: &Kernel, x: &mut [f32]| kernel.activate(Activation::Relu, x);
    check(&[-1.0, -0.0, 0.0, 1.0, f32::MIN, f32::MAX, f32::NEG_INFINITY], relu, |x| x.max(0.0), |_, _| 0.0);
}

#[test]
fn activations_of_newer_families_are_close_to_exact() {
    let inputs: Vec<f32> = (-4000..4000).map(|i| i as f32 / 100.0).collect();
    let relative = |_: f64, exact: f64| 4e-7 * exact.abs();
    let relu2 = |kernel: &Kernel, x: &mut [f32]| kernel.activate(Activation::Relu2, x);
    check(&inputs, relu2, |x| x.max(0.0).powi(2), relative);
    let sigmoid = |kernel: &Kernel, x: &mut [f32]| kernel.activate(Activation::Sigmoid, x);
    check(&inputs, sigmoid, |x| 1.0 / (1.0 + (-x).exp()), relative);
    let softplus = |kernel: &Kernel, x: &mut [f32]| kernel.activate(Activation::Softplus, x);
    check(&inputs, softplus, |x| x.max(0.0) + (-x.abs()).exp().ln_1p(), relative);
    let xielu = |kernel: &Kernel, x: &mut [f32]| kernel.xielu(x, [0.8, 0.7, 0.5, -1e-6]);
    let exact = |x: f64| {
        if x > 0.0 {
            f64::from(0.8f32) * x * x + 0.5 * x
        } else {
            (x.min(f64::from(-1e-6f32)).exp_m1() - x) * f64::from(0.7f32) + 0.5 * x
        }
    };
    check(&inputs, xielu, exact, |x, exact| 4e-7 * (exact.abs() + x.abs()));
}
