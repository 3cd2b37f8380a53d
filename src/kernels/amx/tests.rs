//! Tests the product around the tiles on any CPU with AVX-512, with plain Rust in place of the tiles, and the tiles
//! themselves on CPUs that have them.

use std::io::Write;

use super::product::{Dots, Sums, WCodes, XCodes};
use super::*;
use crate::kernels::activations::MAX_TILE_ROWS;
use crate::kernels::scalar;
use crate::quant::packed::{CacheLine, Code, Layout, PANEL};

/// `TDPBSUD` as Intel's manual defines it.
#[derive(Debug)]
struct Plain<const PARTS: usize>;

impl<const PARTS: usize> Dots for Plain<PARTS> {
    const PARTS: usize = PARTS;

    fn dots(&self, x: &XCodes, w: &WCodes, part: usize, out: &mut Sums) {
        let columns = BLOCK / PARTS;
        for (m, out) in out.iter_mut().enumerate() {
            for (n, out) in bytemuck::cast_mut::<CacheLine, [i32; PANEL]>(out).iter_mut().enumerate() {
                *out = 0;
                for k in part * columns / 4..(part + 1) * columns / 4 {
                    for i in 0..4 {
                        *out += i32::from(x[m][4 * k + i]) * i32::from(w[k].0[4 * n + i]);
                    }
                }
            }
        }
    }
}

/// splitmix64
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// -1..1
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn layouts() -> Vec<Layout> {
    let uneven = Code::Table4([-128, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 127]);
    let codes = [Code::Int2, Code::Int3, Code::Int4, Code::Int5, Code::Int6, uneven, Code::Int8];
    let groups = [16, 32, 64, 128, 256].into_iter().flat_map(|group| [(group, false), (group, true)]);
    let all = codes.into_iter().flat_map(|code| groups.clone().map(move |(group, min)| Layout { code, group, min }));
    all.filter(Layout::is_known).collect()
}

fn matrix(rng: &mut Rng, rows: usize, columns: usize, layout: Layout) -> Packed {
    let mut w = Packed::zeroed(rows, columns, layout, 0.5);
    let blocks = w.blocks();
    for mut panel in w.panels_mut() {
        for lane in 0..PANEL {
            let numbers = panel.scales.iter_mut().chain(panel.mins.iter_mut());
            numbers.for_each(|numbers| numbers[lane] = f16::from_f32(0.05 * rng.unit()));
            for block in 0..blocks {
                panel.set_codes(layout.code, lane, block, &std::array::from_fn(|_| rng.next() as i8));
            }
        }
    }
    w
}

/// Bits of the product of `rows` rows with all panels.
fn bits(w: &Packed, x: &Activations, product: impl Fn(Range<usize>, &Activations, &mut Columns<'_>)) -> Vec<u32> {
    let mut out = vec![f32::NAN; x.rows() * w.rows()];
    product(0..w.panels(), x, &mut Columns::whole(&mut out, x.rows(), w.rows()));
    out.into_iter().map(f32::to_bits).collect()
}

/// Compares products of every layout with the scalar kernel's.
fn matches_the_scalar_product(product: impl Fn(&Packed, Range<usize>, &Activations, &mut Columns<'_>)) {
    let mut rng = Rng(1);
    for layout in layouts() {
        for (rows, columns) in [(40, 100), (16, 1), (33, 32 * 33)] {
            let w = matrix(&mut rng, rows, columns, layout);
            for count in [1, 2, 3, 8, 9, 13, 32, 35] {
                let values: Vec<f32> = (0..count * columns).map(|_| 4.0 * rng.unit()).collect();
                let mut x = Activations::default();
                x.quantize(scalar::kernel(), &values, columns);
                let expected = bits(&w, &x, |panels, x, out| scalar::kernel().product(&w, panels, x, out));
                let found = bits(&w, &x, |panels, x, out| product(&w, panels, x, out));
                assert!(found == expected, "{layout:?}, {rows} x {columns}, {count} rows");
            }
        }
    }
}

/// Prints on the terminal that something was not tested, even if the test passes.
fn report_untested(what: &str) {
    let _ = writeln!(std::io::stderr(), "NOT TESTED: {what}");
}

#[test]
fn everything_but_the_tiles_matches_the_scalar_product() {
    if !avx512::is_available() {
        return report_untested("the product around AMX's tiles, as this CPU has no AVX-512");
    }
    // SAFETY: the CPU has AVX-512, as was just checked.
    let avx512 = unsafe { Avx512::new() };
    matches_the_scalar_product(|w, panels, x, out| {
        if w.layout().group < BLOCK {
            with_dots(avx512, &Plain::<2>, w, panels, x, out);
        } else {
            with_dots(avx512, &Plain::<1>, w, panels, x, out);
        }
    });
}

#[test]
fn tiles_match_the_scalar_product() {
    let Some(kernel) = kernel() else {
        return report_untested("the kernel amx, as this CPU or its system has no AMX");
    };
    matches_the_scalar_product(|w, panels, x, out| kernel.product(w, panels, x, out));
    let mut rng = Rng(2);
    let x: XCodes = std::array::from_fn(|_| std::array::from_fn(|_| (rng.next() as i8).max(-127)));
    let w: WCodes = std::array::from_fn(|_| CacheLine(std::array::from_fn(|_| rng.next() as u8)));
    let (mut found, mut expected) = ([CacheLine([1; 64]); MAX_TILE_ROWS], [CacheLine([2; 64]); MAX_TILE_ROWS]);
    for part in 0..2 {
        // SAFETY: there is a kernel, so the CPU has AMX. These are the only tiles of this thread, dropped at the end of the
        // statement.
        unsafe { Tiles::<2>::new(Amx::new()) }.dots(&x, &w, part, &mut found);
        Plain::<2>.dots(&x, &w, part, &mut expected);
        assert_eq!(found, expected, "half {part}");
    }
    assert_eq!(kernel.peak_int8(2).0, 2 * kernel.peak_int8(1).0);
    // Six tiles of 16 x 16 sums of 64 products of -5 and 3, in every round.
    assert_eq!([0, 1, 2].map(|rounds| kernel.peak_int8(rounds).1), [0, 1, 2].map(|rounds| rounds * 6 * 256 * 64 * -15));
}
