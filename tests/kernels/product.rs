//! Matrix products: bit-identical on every kernel, in every batch and for every range of panels, and correct.

use nybble::kernels::available;
use nybble::quant::packed::{BLOCK, Code, Layout, PANEL, Packed};
use nybble::threads::Columns;

use crate::support::*;

/// Numbers of rows below, at and above each tile size.
const BATCHES: [usize; 22] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 33, 64, 97];
const COLUMNS: [usize; 9] = [1, 15, 31, 32, 33, 64, 96, 100, 576];
const ROWS: [usize; 9] = [1, 7, 8, 15, 16, 17, 31, 33, 100];

#[test]
fn batches_of_any_size_match_the_scalar_kernel() {
    let mut rng = Rng(1);
    for layout in layouts() {
        for columns in COLUMNS {
            let w = random_matrix(&mut rng, 40, columns, layout, 1.0);
            let input = Input::random(&mut rng, BATCHES[BATCHES.len() - 1], columns);
            let expected = input.times(scalar(), &w);
            for kernel in available() {
                for batch in BATCHES {
                    let found = input.part(0..batch).times(kernel, &w);
                    let what = format!("{}, {layout:?}, {columns} columns, {batch} rows", kernel.name());
                    assert_same(&found, &expected[..batch * w.rows()], what);
                }
            }
        }
    }
}

#[test]
fn a_row_alone_gives_the_same_bits_as_in_a_batch() {
    let mut rng = Rng(2);
    for layout in layouts() {
        let w = random_matrix(&mut rng, 33, 100, layout, 1.0);
        let input = Input::random(&mut rng, 31, 100);
        for kernel in available() {
            let together = input.times(kernel, &w);
            for row in 0..input.rows {
                let alone = input.part(row..row + 1).times(kernel, &w);
                assert_same(&alone, &together[row * 33..][..33], format!("{}, {layout:?}, row {row}", kernel.name()));
            }
        }
    }
}

#[test]
fn matrices_of_any_height_and_output_scale_match_the_scalar_kernel() {
    let mut rng = Rng(3);
    for layout in layouts() {
        for rows in ROWS {
            for gain in [1.0, 0.125, 4096.0] {
                let w = random_matrix(&mut rng, rows, 70, layout, gain);
                let input = Input::random(&mut rng, 19, 70);
                for batch in [1, 2, 19] {
                    let input = input.part(0..batch);
                    let expected = input.times(scalar(), &w);
                    for kernel in available() {
                        let what = format!("{}, {layout:?}, {rows} x 70, {batch} rows", kernel.name());
                        assert_same(&input.times(kernel, &w), &expected, what);
                    }
                }
            }
        }
    }
}

#[test]
fn a_range_of_panels_writes_only_its_columns() {
    let mut rng = Rng(4);
    let rows = 100; // 7 panels, the last with 4 rows
    for layout in layouts() {
        let w = random_matrix(&mut rng, rows, 64, layout, 1.0);
        let input = Input::random(&mut rng, 5, 64);
        let whole = input.times(scalar(), &w);
        for kernel in available() {
            for panels in [0..7, 0..1, 1..3, 2..6, 6..7, 5..7, 3..3, 7..7] {
                let what = format!("{}, {layout:?}, panels {panels:?}", kernel.name());
                let range = panels.start * PANEL..(panels.end * PANEL).min(rows);
                let guard = f32::from_bits(0x7fc0_1234);
                let mut out = vec![guard; input.rows * (rows + 40)];
                let mut all = Columns::whole(&mut out, input.rows, rows + 40);
                // The range is part of a wider matrix, as for products that share an output.
                let shifted = range.start.min(rows) + 20..range.end.max(range.start.min(rows)) + 20;
                input.times_panels(kernel, &w, panels.clone(), &mut all.narrow(shifted.clone()));
                for row in 0..input.rows {
                    let line = &out[row * (rows + 40)..][..rows + 40];
                    assert_same(
                        &line[shifted.clone()],
                        &whole[row * rows..][..rows][shifted.start - 20..shifted.end - 20],
                        &what,
                    );
                    for (i, x) in line.iter().enumerate().filter(|(i, _)| !shifted.contains(i)) {
                        assert_eq!(x.to_bits(), guard.to_bits(), "{what}: row {row}, column {i} was written");
                    }
                }
            }
        }
    }
}

/// The value of a code, and the codes at the ends of the range.
fn ends(layout: Layout) -> (fn(Layout, i8) -> i64, Vec<i8>) {
    fn value(layout: Layout, code: i8) -> i64 {
        match layout.code {
            Code::Table4(table) => i64::from(table[code as usize]),
            other if !layout.min => i64::from(code) - i64::from(other.zero().unwrap_or(0)),
            _ => i64::from(code),
        }
    }
    let codes = match layout.code {
        Code::Int8 => vec![-128, -127, 127, 0],
        code => vec![0, 1, top(code), code.zero().unwrap_or(8) as i8],
    };
    (value, codes)
}

#[test]
fn integer_products_are_exact_up_to_the_ends_of_their_range() {
    let columns = 192;
    for layout in integer_layouts() {
        let (value, ends) = ends(layout);
        // Rows: each end alone, and both ends alternating by column, pair, quad and half block.
        let code = |row: usize, column: usize| match row {
            0..4 => ends[row],
            4..10 => ends[(column >> (row - 4)) % 2],
            10..16 => ends[1 + (column >> (row - 10)) % 2],
            _ => ends[(row * 7 + column * 5) % 4],
        };
        let w = matrix(20, columns, layout, 1.0, code, |_, _| (1.0, 0.0));
        // Integers are their own codes, with a scale of 1, if every block contains 127.
        let x = |row: usize, column: usize| -> i64 {
            let sign = |bit: usize| if bit.is_multiple_of(2) { 127 } else { -127 };
            match row {
                _ if column.is_multiple_of(BLOCK) => 127,
                0 => 127,
                1 => -127,
                2..8 => sign(column >> (row - 2)),
                _ => (row * 53 + column * 37) as i64 % 255 - 127,
            }
        };
        let input =
            Input { rows: 19, columns, x: (0..19 * columns).map(|i| x(i / columns, i % columns) as f32).collect() };
        let expected: Vec<f32> = (0..19 * 20)
            .map(|i| {
                let dot = |k| value(layout, code(i % 20, k)) * x(i / 20, k);
                let sum: i64 = (0..columns).map(dot).sum();
                assert!(sum.abs() < 1 << 24, "F32 holds it");
                sum as f32
            })
            .collect();
        for kernel in available() {
            let found = input.times(kernel, &w);
            // Zero may have either sign.
            let found: Vec<f32> = found.iter().map(|x| x + 0.0).collect();
            assert_same(&found, &expected, format!("{}, {layout:?}", kernel.name()));
        }
    }
}

#[test]
fn products_agree_with_decoded_weights_times_dequantized_activations() {
    let mut rng = Rng(5);
    for layout in layouts() {
        for columns in [33, 576] {
            let gain = 0.5;
            let w = random_matrix(&mut rng, 21, columns, layout, gain);
            let input = Input::random(&mut rng, 7, columns);
            let x =
                if layout.is_integer() { dequantized(&input) } else { input.x.iter().map(|x| f64::from(*x)).collect() };
            let mut decoded = vec![0.0; columns];
            for kernel in available() {
                let found = input.times(kernel, &w);
                for row in 0..w.rows() {
                    w.decode_row(row, &mut decoded);
                    for r in 0..input.rows {
                        let x = &x[r * columns..][..columns];
                        let expected: f64 = decoded.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
                        // The largest weight before scale * code and the minimum cancel, times its activation.
                        let largest = f64::from(gain) * 0.05 * 129.0;
                        let sum: f64 = x.iter().map(|x| x.abs()).sum();
                        let what = format!("{}, {layout:?}, {columns} columns", kernel.name());
                        assert_close(found[r * w.rows() + row], expected, 1e-6 * largest * sum, what);
                    }
                }
            }
        }
    }
}

/// The activations `(rows, columns)` as integer products use them. Each row is quantized alone, as a tile of one row.
fn dequantized(input: &Input) -> Vec<f64> {
    let mut out = vec![];
    for row in 0..input.rows {
        let activations = input.part(row..row + 1).quantized(scalar());
        let tile = activations.tile::<1>(0);
        let value = |k: usize| f64::from(tile.code(0, k)) * f64::from(tile.scales[k / BLOCK][0]);
        out.extend((0..input.columns).map(value));
    }
    out
}

#[test]
fn floats_at_the_ends_of_their_range_match_the_scalar_kernel() {
    let mut rng = Rng(6);
    for layout in layouts() {
        let scales = [65504.0, -65504.0, 6e-8, -6e-8, f32::INFINITY, f32::NAN, 0.0, 1.0];
        let codes = [0i8, 1, 7, 15];
        let w = matrix(
            40,
            96,
            layout,
            1.0,
            |row, column| codes[(row + column * 3) % 4],
            |row, group| (scales[(row + group) % 8], scales[(row * 3 + group) % 8]),
        );
        for batch in [1, 4, 19] {
            let input = Input { rows: batch, columns: 96, x: rng.wild_values(batch * 96) };
            let expected = input.times(scalar(), &w);
            for kernel in available() {
                assert_same(
                    &input.times(kernel, &w),
                    &expected,
                    format!("{}, {layout:?}, {batch} rows", kernel.name()),
                );
            }
        }
    }
}

#[test]
fn nan_and_infinity_reach_all_outputs_of_their_row_only() {
    let mut rng = Rng(7);
    for layout in layouts() {
        let w = matrix(20, 64, layout, 1.0, |_, column| 1 + (column % 7) as i8, |_, _| (0.5, 0.25));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut input = Input::random(&mut rng, 6, 64);
            let good = input.times(scalar(), &w);
            input.x[2 * 64 + 37] = bad;
            for kernel in available() {
                let found = input.times(kernel, &w);
                let what = format!("{}, {layout:?}, {bad}", kernel.name());
                assert!(found[2 * 20..3 * 20].iter().all(|x| !x.is_finite()), "{what}: lost");
                assert_same(&found[..2 * 20], &good[..2 * 20], &what);
                assert_same(&found[3 * 20..], &good[3 * 20..], &what);
            }
        }
    }
}

#[test]
fn zero_activations_give_zero() {
    for layout in layouts() {
        let w = random_matrix(&mut Rng(8), 20, 70, layout, 1.0);
        for batch in [1, 3, 16] {
            let input = Input { rows: batch, columns: 70, x: vec![0.0; batch * 70] };
            for kernel in available() {
                let found = input.times(kernel, &w);
                assert!(found.iter().all(|x| *x == 0.0), "{}, {layout:?}", kernel.name());
            }
        }
    }
}

#[test]
fn a_product_of_no_rows_writes_nothing() {
    for layout in layouts() {
        let w = random_matrix(&mut Rng(9), 20, 32, layout, 1.0);
        let input = Input { rows: 0, columns: 32, x: vec![] };
        for kernel in available() {
            assert_eq!(input.times(kernel, &w), [0.0; 0]);
        }
    }
}

#[test]
fn batches_larger_than_the_caches_match_the_scalar_kernel() {
    let mut rng = Rng(10);
    // Kernels cut rows and columns into pieces that fit a cache. Here are several of both, the last ones shorter.
    let sizes = integer_layouts().into_iter().map(|layout| (layout, 1350, 19));
    for (layout, columns, rows) in sizes.chain([(Layout { code: Code::Int4, group: 32, min: false }, 36_000, 40)]) {
        let w: Packed = random_matrix(&mut rng, 37, columns, layout, 2.0);
        let input = Input::random(&mut rng, rows, columns);
        let expected = input.times(scalar(), &w);
        for kernel in available() {
            assert_same(&input.times(kernel, &w), &expected, format!("{}, {layout:?}", kernel.name()));
        }
    }
}

#[test]
fn scales_shared_by_runs_of_blocks_are_stored_once() {
    // 39 blocks: the last run is shorter.
    let (rows, columns) = (37, 39 * BLOCK);
    for (run, min, merged) in [(4, false, 128), (4, true, 128), (8, false, 128), (2, true, 64), (1, false, 32)] {
        let layout = Layout { code: Code::Int4, group: 32, min };
        let number =
            |row: usize, group: usize| (1.0 + (row * 7 + group / run) as f32, (row + 3 * (group / run)) as f32);
        let code = |row: usize, column: usize| ((row * 3 + column * 5) % 16) as i8;
        let plain = matrix(rows, columns, layout, 2.0, code, number);
        let mut w = plain.clone();
        w.merge_groups();
        assert_eq!(w.layout(), Layout { group: merged, ..layout });
        assert_eq!(w.bytes() < plain.bytes(), merged > 32);
        assert_eq!(w.bytes(), Packed::bytes_needed(rows, columns, w.layout()));
        let (mut found, mut expected) = (vec![f32::NAN; columns], vec![f32::NAN; columns]);
        for row in 0..rows {
            w.decode_row(row, &mut found);
            plain.decode_row(row, &mut expected);
            assert_same(&found, &expected, format!("runs of {run}, row {row}"));
        }
    }
}

#[test]
fn one_differing_scale_keeps_all_scales() {
    for (row, group) in [(0, 1), (36, 38), (17, 20)] {
        for which in [0, 1] {
            let layout = Layout { code: Code::Int4, group: 32, min: true };
            let number = |r: usize, g: usize| {
                let other = if (r, g) == (row, group) { 2.0 } else { 1.0 };
                if which == 0 { (other, 1.0) } else { (1.0, other) }
            };
            let mut w = matrix(37, 39 * BLOCK, layout, 1.0, |_, _| 3, number);
            w.merge_groups();
            assert_eq!(w.layout().group, if group == 38 { 64 } else { 32 }, "row {row}, group {group}");
        }
    }
}
