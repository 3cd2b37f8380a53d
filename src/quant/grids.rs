//! The codebooks of the IQ types, which ggml's authors found by optimization (MIT license).
//!
//! An entry holds the indices of 8 values in 2 bits each, or of 4 values in 4 bits each, the first in the lowest bits.

/// Indices of the absolute values of IQ2.
pub(super) const IQ2_XXS: [u16; 256] = table(include_bytes!("grids/iq2_xxs.txt"));

/// Indices of the absolute values of IQ2.
pub(super) const IQ2_XS: [u16; 512] = table(include_bytes!("grids/iq2_xs.txt"));

/// Indices of the absolute values of IQ2.
pub(super) const IQ2_S: [u16; 1024] = table(include_bytes!("grids/iq2_s.txt"));

/// Indices of the absolute values of IQ3_XXS.
pub(super) const IQ3_XXS: [u16; 256] = table(include_bytes!("grids/iq3_xxs.txt"));

/// Indices of the odd numbers from 1.
pub(super) const IQ3_S: [u16; 512] = table(include_bytes!("grids/iq3_s.txt"));

/// The values, increased by 1.
pub(super) const IQ1: [u16; 2048] = table(include_bytes!("grids/iq1.txt"));

/// Reads `N` numbers of 4 hexadecimal digits each.
const fn table<const N: usize>(text: &[u8]) -> [u16; N] {
    let mut numbers = [0; N];
    let (mut at, mut digits) = (0, 0);
    while at < text.len() {
        let digit = match text[at] {
            digit @ b'0'..=b'9' => digit - b'0',
            digit @ b'a'..=b'f' => digit - b'a' + 10,
            _ => 16,
        };
        if digit < 16 {
            numbers[digits / 4] = numbers[digits / 4] << 4 | digit as u16;
            digits += 1;
        }
        at += 1;
    }
    assert!(digits == 4 * N);
    numbers
}
