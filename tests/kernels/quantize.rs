//! Activations as INT8 blocks.

use nybble::kernels::{Activations, MAX_TILE_ROWS, Tile, available};
use nybble::quant::packed::BLOCK;

use crate::support::*;

/// The data of one row of a tile.
#[derive(Debug, PartialEq)]
struct Row {
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<[f32; 3]>,
    zeros: Vec<[i32; 3]>,
}

fn row_of<const R: usize>(tile: Tile<'_, R>, row: usize) -> Row {
    let blocks = tile.scales.len();
    Row {
        codes: (0..blocks * BLOCK).map(|column| tile.code(row, column)).collect(),
        scales: tile.scales.iter().map(|block| block[row]).collect(),
        sums: (0..blocks).map(|b| [tile.sums[b][row], tile.half_sums[b][0][row], tile.half_sums[b][1][row]]).collect(),
        zeros: (0..blocks)
            .map(|b| [tile.zeros[b][row], tile.half_zeros[b][0][row], tile.half_zeros[b][1][row]])
            .collect(),
    }
}

/// The rows of all tiles.
fn rows_of(x: &Activations) -> Vec<Row> {
    let mut rows = vec![];
    while rows.len() < x.rows() {
        let first = rows.len();
        match Activations::height(x.rows() - first) {
            8 => rows.extend((0..8).map(|r| row_of(x.tile::<8>(first), r))),
            4 => rows.extend((0..4).map(|r| row_of(x.tile::<4>(first), r))),
            2 => rows.extend((0..2).map(|r| row_of(x.tile::<2>(first), r))),
            _ => rows.push(row_of(x.tile::<1>(first), 0)),
        }
    }
    // The rows that pad the last tile are zeros.
    for row in rows.split_off(x.rows()) {
        assert!(row.codes.iter().all(|code| *code == 0) && row.scales.iter().all(|scale| *scale == 0.0), "{row:?}");
    }
    rows
}

#[test]
fn every_kernel_quantizes_to_the_same_bytes() {
    let mut rng = Rng(20);
    for columns in [1, 15, 31, 32, 33, 64, 100, 576] {
        for rows in [1, 2, 5, 15, 16, 17, 33] {
            for wild in [false, true] {
                let x = if wild { rng.wild_values(rows * columns) } else { rng.values(rows * columns) };
                let input = Input { rows, columns, x };
                let mut expected = input.quantized(scalar());
                for kernel in available() {
                    let mut found = input.quantized(kernel);
                    let same = found.lines_mut() == expected.lines_mut();
                    assert!(same, "{}, {rows} x {columns}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_codes_alone_and_in_a_tile() {
    let input = Input::random(&mut Rng(21), 31, 100);
    for kernel in available() {
        for (row, together) in rows_of(&input.quantized(kernel)).into_iter().enumerate() {
            let alone = rows_of(&input.part(row..row + 1).quantized(kernel));
            assert_eq!(alone, [together], "{}, row {row}", kernel.name());
        }
    }
}

#[test]
fn codes_are_the_nearest_multiples_of_a_127th_of_the_largest_value() {
    let (rows, columns) = (19, 100);
    let input = Input::random(&mut Rng(22), rows, columns);
    for kernel in available() {
        for (r, row) in rows_of(&input.quantized(kernel)).into_iter().enumerate() {
            let mut x = input.x[r * columns..][..columns].to_vec();
            x.resize(columns.next_multiple_of(BLOCK), 0.0);
            for (b, block) in x.chunks(BLOCK).enumerate() {
                let top = block.iter().fold(0.0f32, |top, x| top.max(x.abs()));
                let (scale, codes) = (row.scales[b], &row.codes[b * BLOCK..][..BLOCK]);
                assert_eq!(scale, top / 127.0);
                for (x, code) in block.iter().zip(codes) {
                    let exact = if top == 0.0 { 0.0 } else { f64::from(*x) * 127.0 / f64::from(top) };
                    // The inverse of the scale is rounded, so a value midway between two codes may round either way.
                    assert_close(f32::from(*code), exact, 0.5 + 1e-4, format!("{x} of {top}"));
                }
                let sum = |codes: &[i8]| codes.iter().map(|code| i32::from(*code)).sum::<i32>();
                let parts = [sum(codes), sum(&codes[..16]), sum(&codes[16..])];
                assert_eq!(row.zeros[b], parts.map(|sum| -8 * sum));
                assert_eq!(row.sums[b], parts.map(|sum| scale * sum as f32));
            }
        }
    }
}

#[test]
fn a_value_midway_between_two_codes_rounds_to_even() {
    // 127 makes the scale 1 and its inverse exact.
    let mut x = vec![127.0f32];
    x.extend((-15..16).map(|i| i as f32 + 0.5));
    let input = Input { rows: 1, columns: 32, x };
    for kernel in available() {
        let row = rows_of(&input.quantized(kernel)).remove(0);
        for (x, code) in input.x.iter().zip(&row.codes) {
            assert_eq!(f32::from(*code), x.round_ties_even(), "{}: {x}", kernel.name());
        }
    }
}

#[test]
fn a_block_of_negligible_values_has_a_scale_of_zero() {
    for x in [0.0, -0.0, 1e-31, -1e-38, 1e-45] {
        let input = Input { rows: 1, columns: 64, x: [vec![x; 32], vec![1.0; 32]].concat() };
        for kernel in available() {
            let row = rows_of(&input.quantized(kernel)).remove(0);
            assert_eq!(row.scales, [0.0, 1.0 / 127.0], "{}: {x}", kernel.name());
            assert_eq!(row.codes, [[0; 32], [127; 32]].concat(), "{}: {x}", kernel.name());
        }
    }
}

#[test]
fn the_largest_values_keep_their_codes_in_range() {
    for top in [f32::MAX, f32::MIN, 1e-30, 3.3e38, 0.1, 1.0 / 3.0] {
        let x: Vec<f32> = (0..32).map(|i| if i % 2 == 0 { top } else { -top * (i as f32 / 31.0) }).collect();
        let input = Input { rows: 1, columns: 32, x };
        for kernel in available() {
            let row = rows_of(&input.quantized(kernel)).remove(0);
            assert!(row.codes.iter().all(|code| (-127..=127).contains(code)), "{}: {top}", kernel.name());
            assert_eq!(row.codes[0], if top < 0.0 { -127 } else { 127 }, "{}: {top}", kernel.name());
        }
    }
}

#[test]
fn short_rows_are_padded_with_zeros() {
    let x = [3.0f32; 33];
    for kernel in available() {
        let mut activations = Activations::default();
        activations.resize(2, 128);
        let blocks = activations.blocks();
        Activations::fill(kernel, activations.lines_mut(), blocks, 2, |row| if row == 0 { &x } else { &[] });
        let rows = rows_of(&activations);
        let expected = [vec![127; 33], vec![0; 95]].concat();
        assert_eq!(rows[0].codes, expected, "{}", kernel.name());
        assert_eq!(rows[0].scales[2..], [0.0; 2], "{}", kernel.name());
        assert_eq!(rows[1].codes, [0; 128], "{}", kernel.name());
    }
}

#[test]
fn tiles_filled_in_any_order_are_the_same() {
    let input = Input::random(&mut Rng(23), 45, 70);
    for kernel in available() {
        let expected = rows_of(&input.quantized(kernel));
        let mut found = Activations::default();
        found.resize(45, 70);
        let (blocks, chunk) = (found.blocks(), MAX_TILE_ROWS * found.row_lines());
        // In reverse, as threads might.
        for (i, lines) in found.lines_mut().chunks_mut(chunk).enumerate().rev() {
            let count = MAX_TILE_ROWS.min(45 - i * MAX_TILE_ROWS);
            Activations::fill(kernel, lines, blocks, count, |row| &input.x[(i * MAX_TILE_ROWS + row) * 70..][..70]);
        }
        assert_eq!(rows_of(&found), expected, "{}", kernel.name());
    }
}

#[test]
fn a_reused_buffer_gives_the_same_result() {
    let mut rng = Rng(24);
    let (large, small) = (Input::random(&mut rng, 20, 300), Input::random(&mut rng, 3, 40));
    let mut activations = large.quantized(scalar());
    activations.quantize(scalar(), &small.x, small.columns);
    assert_eq!((activations.rows(), activations.blocks()), (3, 2));
    assert_eq!(rows_of(&activations), rows_of(&small.quantized(scalar())));
}
