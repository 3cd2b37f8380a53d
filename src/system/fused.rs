//! A fused multiply-add where that of the C library rounds twice.
//!
//! `f32::mul_add` calls `fmaf` outside of functions for CPUs with such an instruction. That of MinGW's C library rounds the product to a
//! double and the sum again, so more than a third of its results differ in their last bit. Every result must be bit-identical
//! to those of other machines. The linker prefers this function to the library's.
#![cfg_attr(all(windows, target_env = "gnu"), allow(unsafe_code, reason = "the name of the C library's function"))]

/// `x * y + z`, rounded once.
#[cfg(all(windows, target_env = "gnu"))]
// SAFETY: the signature and the result are those of the C library's function.
#[unsafe(no_mangle)]
extern "C" fn fmaf(x: f32, y: f32, z: f32) -> f32 {
    libm::fmaf(x, y, z)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    /// `x * y + z`, rounded once, from integers. The operands are `a * 2^-12`, `b * 2^-12` and `c * 2^-24`, so the sum is an
    /// integer multiple of `2^-24`, and the conversion to a float is the only rounding.
    fn exact(a: i64, b: i64, c: i64) -> f32 {
        (a * b + c) as f32 / 2f32.powi(24)
    }

    #[test]
    fn a_multiply_add_rounds_once_on_every_platform() {
        let mut state = 7u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as i64) - (1 << 23)
        };
        let mut twice = 0;
        for _ in 0..100_000 {
            let (a, b, c) = (draw(), draw(), draw());
            let [x, y] = [a, b].map(|factor| black_box(factor as f32 / 4096.0));
            let z = black_box(c as f32 / 2f32.powi(24));
            assert_eq!(x.mul_add(y, z).to_bits(), exact(a, b, c).to_bits(), "{x:e} * {y:e} + {z:e}");
            twice += usize::from((x * y + z).to_bits() != exact(a, b, c).to_bits());
        }
        assert!(twice > 10_000, "only {twice} results would differ if they were rounded twice");
    }

    #[test]
    fn an_addend_too_small_for_a_double_decides_a_tie() {
        // The square is halfway between two floats. A double cannot hold it together with the addend, which decides.
        let x = black_box(1.0 + 2f32.powi(-12));
        let below = 1.0 + 2f32.powi(-11);
        for (addend, expected) in [(-2f32.powi(-60), below), (2f32.powi(-60), below.next_up())] {
            assert_eq!(x.mul_add(x, black_box(addend)), expected, "{addend:e}");
        }
    }
}
