//! Values, matrices and comparisons for the kernel tests.

use half::f16;
use nybble::kernels::{self, Activation, Activations, Kernel};
use nybble::quant::packed::{BLOCK, Code, Layout, PANEL, Packed};
use nybble::threads::Columns;

/// The values of IQ4_NL's table: uneven, both signs, -127 among them.
pub(crate) const UNEVEN: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// A table with the ends of the range.
pub(crate) const ENDS: [i8; 16] = [-128, 127, -128, 127, 0, -1, 1, -127, -128, -128, 127, 127, 64, -64, 2, -2];

/// Every activation.
pub(crate) const ACTIVATIONS: [Activation; 8] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Relu2,
    Activation::Sigmoid,
    Activation::Softplus,
    Activation::Exp,
];

/// The scalar kernel, which defines the results.
pub(crate) fn scalar() -> &'static Kernel {
    kernels::by_name("scalar").unwrap()
}

/// All integer layouts.
pub(crate) fn integer_layouts() -> Vec<Layout> {
    let tables = [Code::Table4(UNEVEN), Code::Table4(ENDS)];
    let codes = [Code::Int2, Code::Int3, Code::Int4, Code::Int5, Code::Int6, Code::Int8].into_iter().chain(tables);
    let groups = [16, 32, 64, 128, 256].into_iter().flat_map(|group| [(group, false), (group, true)]);
    let all = codes.flat_map(|code| groups.clone().map(move |(group, min)| Layout { code, group, min }));
    all.filter(Layout::is_known).collect()
}

/// The largest code that is not signed.
pub(crate) fn top(code: Code) -> i8 {
    let bits = Layout { code, group: 32, min: false }.lines_per_block();
    ((1 << bits) - 1) as i8
}

/// All layouts.
pub(crate) fn layouts() -> Vec<Layout> {
    let mut layouts = integer_layouts();
    layouts.extend([Code::F32, Code::F16, Code::BF16].map(Layout::float));
    layouts
}

/// Random numbers, the same in every run: splitmix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0..n
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// -1..1
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Mostly ordinary values of varying magnitude, and zeros of both signs.
    pub(crate) fn value(&mut self) -> f32 {
        match self.below(16) {
            0 => 0.0,
            1 => -0.0,
            2 => self.unit() * 1e-6,
            3 => self.unit() * 1e3,
            _ => self.unit() * 4.0,
        }
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// As `values`, and the ends of the range of F32, infinities and NaN.
    pub(crate) fn wild_values(&mut self, n: usize) -> Vec<f32> {
        let ends = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-42, -1e-45, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        (0..n).map(|_| if self.below(12) == 0 { ends[self.below(ends.len())] } else { self.value() }).collect()
    }

    pub(crate) fn half(&mut self) -> f16 {
        f16::from_f32(match self.below(16) {
            0 => 0.0,
            1 => 3e-7 * self.unit(), // below the normal numbers of F16
            _ => 0.05 * self.unit(),
        })
    }

    pub(crate) fn halves(&mut self, n: usize) -> Vec<f16> {
        (0..n).map(|_| self.half()).collect()
    }

    pub(crate) fn code(&mut self, code: Code) -> i8 {
        match code {
            Code::Int8 => self.next() as i8,
            code if layout_is_integer(code) => self.next() as i8 & top(code),
            _ => (self.next() & 15) as i8,
        }
    }
}

fn layout_is_integer(code: Code) -> bool {
    Layout::float(code).is_integer()
}

/// A matrix of random codes, scales and minimums.
pub(crate) fn random_matrix(rng: &mut Rng, rows: usize, columns: usize, layout: Layout, gain: f32) -> Packed {
    let scales = rng.halves(4096);
    matrix(
        rows,
        columns,
        layout,
        gain,
        |_, _| rng.code(layout.code),
        |row, group| {
            let at = row * 31 + group * 2;
            (scales[at % scales.len()].to_f32(), scales[(at + 1) % scales.len()].to_f32())
        },
    )
}

/// A matrix with the codes of `code(row, column)` and the scales and minimums of `scale(row, group)`. Float weights are
/// scale times code.
pub(crate) fn matrix(
    rows: usize,
    columns: usize,
    layout: Layout,
    gain: f32,
    mut code: impl FnMut(usize, usize) -> i8,
    scale: impl Fn(usize, usize) -> (f32, f32),
) -> Packed {
    let mut w = Packed::zeroed(rows, columns, layout, gain);
    let (blocks, groups) = (w.blocks(), w.groups());
    for (p, mut panel) in w.panels_mut().into_iter().enumerate() {
        for lane in 0..PANEL.min(rows - p * PANEL) {
            let row = p * PANEL + lane;
            for group in 0..groups {
                let (scale, min) = scale(row, group);
                panel.scales[group][lane] = f16::from_f32(scale);
                if layout.min {
                    panel.mins[group][lane] = f16::from_f32(min);
                }
            }
            for block in 0..blocks {
                let mut codes = [0; BLOCK];
                for (i, out) in codes.iter_mut().enumerate().take(columns - block * BLOCK) {
                    *out = code(row, block * BLOCK + i);
                }
                if layout.is_integer() {
                    panel.set_codes(layout.code, lane, block, &codes);
                } else {
                    for (i, code) in codes.iter().enumerate().take(columns - block * BLOCK) {
                        let value = f32::from(*code) * scale(row, block).0;
                        panel.set_float(layout.code, lane, block * BLOCK + i, value);
                    }
                }
            }
        }
    }
    w
}

/// Rows of activations, the input of a product.
pub(crate) struct Input {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) x: Vec<f32>,
}

impl Input {
    pub(crate) fn random(rng: &mut Rng, rows: usize, columns: usize) -> Self {
        Input { rows, columns, x: rng.values(rows * columns) }
    }

    pub(crate) fn quantized(&self, kernel: &Kernel) -> Activations {
        let mut activations = Activations::default();
        activations.quantize(kernel, &self.x, self.columns);
        activations
    }

    /// Some of the rows.
    pub(crate) fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let x = self.x[rows.start * self.columns..rows.end * self.columns].to_vec();
        Input { rows: rows.len(), columns: self.columns, x }
    }

    /// The product with the whole matrix `(rows, w.rows())`.
    pub(crate) fn times(&self, kernel: &Kernel, w: &Packed) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.rows * w.rows()];
        self.times_panels(kernel, w, 0..w.panels(), &mut Columns::whole(&mut out, self.rows, w.rows()));
        out
    }

    pub(crate) fn times_panels(
        &self,
        kernel: &Kernel,
        w: &Packed,
        panels: std::ops::Range<usize>,
        out: &mut Columns<'_>,
    ) {
        if w.layout().is_integer() {
            kernel.product(w, panels, &self.quantized(kernel), out);
        } else {
            kernel.product_float(w, panels, &self.x, self.columns, out);
        }
    }
}

/// Panics unless the numbers are bit-identical. NaNs are equal to each other: their payloads depend on the order of
/// operands, which no instruction set guarantees.
#[track_caller]
pub(crate) fn assert_same(found: &[f32], expected: &[f32], what: impl std::fmt::Display) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
        assert!(
            same,
            "{what}: at {i} of {}: {f:e} ({:#x}), expected {e:e} ({:#x})",
            found.len(),
            f.to_bits(),
            e.to_bits()
        );
    }
}

/// Panics unless the numbers are within `tolerance` of each other.
#[track_caller]
pub(crate) fn assert_close(found: f32, expected: f64, tolerance: f64, what: impl std::fmt::Display) {
    let error = (f64::from(found) - expected).abs();
    assert!(error <= tolerance, "{what}: {found:e}, expected {expected:e}: off by {error:e}, allowed {tolerance:e}");
}
