//! Sparse 4-bit codes: the same bits as the dense matrix from which they were made, on every kernel.

use nybble::kernels::available;
use nybble::quant::packed::{BLOCK, Code, Layout, Packed};
use nybble::threads::{Columns, ThreadPool};

use crate::support::*;

/// A matrix in which about `percent` of the codes are zero, besides those that are zero by chance.
fn with_zeros(rng: &mut Rng, [rows, columns]: [usize; 2], group: usize, percent: usize) -> Packed {
    let layout = Layout { code: Code::Int4, group, min: false };
    let scales = rng.halves(4096);
    let code = |_, _| if rng.below(100) < percent { 8 } else { rng.code(Code::Int4) };
    matrix(rows, columns, layout, 2.0, code, |row, group| (scales[(row * 31 + group) % scales.len()].to_f32(), 0.0))
}

fn sparse(w: &Packed) -> Option<Packed> {
    ThreadPool::new(2).unwrap().run(|scope| w.try_sparse(scope)).unwrap()
}

#[test]
fn products_of_sparse_matrices_match_those_of_dense_ones() {
    let mut rng = Rng(31);
    for (columns, group) in [(1, 32), (31, 32), (100, 64), (16 * BLOCK, 32), (17 * BLOCK, 128), (1350, 32), (1350, 64)]
    {
        for (rows, percent) in [(1, 100), (16, 60), (40, 50), (37, 90)] {
            let w = with_zeros(&mut rng, [rows, columns], group, percent);
            let Some(sparse) = sparse(&w) else {
                assert!(columns < 100 || rows == 1, "{rows} x {columns} is not sparse");
                continue;
            };
            assert_eq!(sparse.layout(), Layout { code: Code::SparseInt4, ..w.layout() });
            let input = Input::random(&mut rng, 97, columns);
            for kernel in available() {
                for batch in [1, 2, 3, 4, 5, 8, 9, 19, 33, 97] {
                    let input = input.part(0..batch);
                    let expected = input.times(kernel, &w);
                    let what = format!("{}, {rows} x {columns}, group {group}, {batch} rows", kernel.name());
                    assert_same(&input.times(kernel, &sparse), &expected, what);
                }
            }
        }
    }
}

#[test]
fn ranges_of_sparse_panels_match_the_whole_product() {
    let mut rng = Rng(32);
    let w = with_zeros(&mut rng, [75, 640], 32, 50);
    let sparse = sparse(&w).unwrap();
    for rows in [1, 7, 40] {
        let input = Input::random(&mut rng, rows, 640);
        for kernel in available() {
            let whole = input.times(kernel, &w);
            for panels in [0..1, 1..3, 2..5, 4..5] {
                let width = 75.min(panels.end * 16) - panels.start * 16;
                let mut out = vec![f32::NAN; rows * width];
                input.times_panels(kernel, &sparse, panels.clone(), &mut Columns::whole(&mut out, rows, width));
                let expected: Vec<f32> =
                    whole.chunks(75).flat_map(|row| row[panels.start * 16..][..width].to_vec()).collect();
                assert_same(&out, &expected, format!("{}, {rows} rows, {panels:?}", kernel.name()));
            }
        }
    }
}

#[test]
fn rows_of_sparse_matrices_decode_to_the_same_weights() {
    let mut rng = Rng(33);
    for (columns, group) in [(100, 32), (640, 128), (1350, 64)] {
        let w = with_zeros(&mut rng, [35, columns], group, 55);
        let sparse = sparse(&w).unwrap();
        let (mut found, mut expected) = (vec![f32::NAN; columns], vec![f32::NAN; columns]);
        for row in 0..35 {
            sparse.decode_row(row, &mut found);
            w.decode_row(row, &mut expected);
            assert_same(&found, &expected, format!("row {row} of {columns} columns"));
        }
    }
}

#[test]
fn matrices_stay_dense_where_masks_save_little() {
    let mut rng = Rng(34);
    let shape = [64, 1024];
    assert!(sparse(&with_zeros(&mut rng, shape, 32, 25)).is_none());
    let w = with_zeros(&mut rng, shape, 32, 50);
    let sparse_bytes = sparse(&w).unwrap().bytes();
    // 1.03 bits for the mask and the ends of words, 4 for each of 15 / 32 codes, and half a bit for scales.
    let bits = 8.0 * sparse_bytes as f64 / (64.0 * 1024.0);
    assert!((3.3..3.5).contains(&bits), "{bits} bits per weight");
    for (code, min) in [(Code::Int8, false), (Code::Int4, true), (Code::Int2, false), (Code::F16, false)] {
        assert!(sparse(&Packed::zeroed(64, 1024, Layout { code, group: 32, min }, 1.0)).is_none(), "{code:?}");
    }
}
