//! Steps of recurrences: bit-identical on every kernel, and correct.

use nybble::kernels::{Kernel, SelectiveStep, StateUpdate, available};
use nybble::quant::packed::PANEL;

use crate::support::*;

/// Rows of a panel, below, at and above what a register or an unrolled loop takes.
const ROWS: [usize; 9] = [0, 1, 2, 7, 8, 15, 16, 33, 128];

/// Panels and vectors for steps of `rows` rows.
struct Operands {
    state: Vec<f32>,
    /// `(rows)`
    vectors: [Vec<f32>; 4],
    /// `(16)`
    columns: [[f32; PANEL]; 2],
    /// `(rows, 16)`
    rates: Vec<f32>,
}

impl Operands {
    fn new(rng: &mut Rng, rows: usize, wild: bool) -> Operands {
        let mut values = |n| if wild { rng.wild_values(n) } else { rng.values(n) };
        Operands {
            state: values(rows * PANEL),
            vectors: [(); 4].map(|()| values(rows)),
            columns: [(); 2].map(|()| values(PANEL).try_into().unwrap()),
            rates: values(rows * PANEL),
        }
    }

    /// The state and the sums after a step with these parts.
    fn advance(&self, kernel: &Kernel, updates: bool, reads: [bool; 2]) -> Vec<f32> {
        let (mut state, mut sums) = (self.state.clone(), [[f32::NAN; PANEL]; 2]);
        let [gate, key, first, second] = &self.vectors;
        let update = StateUpdate { gate, key, delta: &self.columns[0] };
        let read = |is_read: bool, vector: &Vec<f32>| if is_read { vector.clone() } else { Vec::new() };
        let [a, b] = &mut sums;
        let (first, second) = (read(reads[0], first), read(reads[1], second));
        kernel.advance_state(&mut state, updates.then_some(update), [&first, &second], [a, b]);
        let read_sums = if reads[1] && !second.is_empty() { sums.as_flattened() } else { &[] };
        let read_sums = if reads[0] { read_sums } else { &read_sums[read_sums.len() / 2..] };
        [&state, read_sums].concat()
    }

    fn select(&self, kernel: &Kernel, reads: bool) -> Vec<f32> {
        let (mut state, mut out) = (self.state.clone(), [f32::NAN; PANEL]);
        let ([key, read, ..], [time, delta]) = (&self.vectors, &self.columns);
        let read = if reads { &read[..] } else { &[] };
        let step = SelectiveStep { rates: &self.rates, time, delta, key, read };
        kernel.selective_step(&mut state, step, &mut out);
        [&state[..], &out].concat()
    }
}

#[test]
fn steps_match_the_scalar_kernel() {
    let mut rng = Rng(77);
    for rows in ROWS {
        for wild in [false, true] {
            let operands = Operands::new(&mut rng, rows, wild);
            for kernel in available() {
                let what = |part: &str| format!("{part}, {}, {rows} rows", kernel.name());
                for (updates, reads) in [
                    (true, [false, false]),
                    (true, [false, true]),
                    (true, [true, true]),
                    (false, [false, true]),
                    (false, [true, true]),
                    (false, [false, false]),
                ] {
                    let expected = operands.advance(scalar(), updates, reads);
                    assert_same(&operands.advance(kernel, updates, reads), &expected, what("advance_state"));
                }
                for reads in [false, true] {
                    assert_same(
                        &operands.select(kernel, reads),
                        &operands.select(scalar(), reads),
                        what("selective_step"),
                    );
                }
            }
        }
    }
}

#[test]
fn a_step_in_one_pass_is_an_update_and_then_a_read() {
    let operands = Operands::new(&mut Rng(5), 40, false);
    for kernel in available() {
        let once = operands.advance(kernel, true, [true, true]);
        let state = operands.advance(kernel, true, [false, false]);
        let updated = Operands { state, vectors: operands.vectors.clone(), rates: Vec::new(), ..operands };
        assert_same(&updated.advance(kernel, false, [true, true]), &once, kernel.name().to_owned());
    }
}

#[test]
fn steps_compute_what_their_formulas_say() {
    let mut operands = Operands::new(&mut Rng(6), 24, false);
    // Decays: exponentials of negative numbers.
    operands.rates.iter_mut().for_each(|rate| *rate = -rate.abs());
    operands.columns[0].iter_mut().for_each(|time| *time = time.abs());
    let Operands { state, vectors: [gate, key, first, second], columns: [time, delta], rates } = &operands;
    // `size` is the sum of the magnitudes of all summands.
    let close = |found: f32, exact: f64, size: f64| (f64::from(found) - exact).abs() <= 1e-5 * (1.0 + size);
    let double = |x: f32| f64::from(x);
    for kernel in available() {
        let found = operands.advance(kernel, true, [true, true]);
        let selected = operands.select(kernel, true);
        for lane in 0..PANEL {
            let (mut sums, mut sizes) = ([0.0; 3], [0.0; 3]);
            for row in 0..24 {
                let before = double(state[row * PANEL + lane]);
                let after = double(gate[row]) * before + double(key[row]) * double(time[lane]);
                let size = (double(gate[row]) * before).abs() + (double(key[row]) * double(time[lane])).abs();
                assert!(close(found[row * PANEL + lane], after, size));
                for (i, read) in [first, second].into_iter().enumerate() {
                    sums[i] += after * double(read[row]);
                    sizes[i] += size * double(read[row]).abs();
                }
                // The first two vectors are key and read here, the columns step and input.
                let decay = (double(time[lane]) * double(rates[row * PANEL + lane])).exp();
                let after = decay * before + double(gate[row]) * double(delta[lane]);
                let size = (decay * before).abs() + (double(gate[row]) * double(delta[lane])).abs();
                assert!(close(selected[row * PANEL + lane], after, size));
                sums[2] += after * double(key[row]);
                sizes[2] += size * double(key[row]).abs();
            }
            let at = 24 * PANEL + lane;
            for (i, found) in [found[at], found[at + PANEL], selected[at]].into_iter().enumerate() {
                assert!(close(found, sums[i], sizes[i]), "{found}, {}", sums[i]);
            }
        }
    }
}
