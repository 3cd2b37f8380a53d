//! The thread pool: runs every item once, gives the results of a serial loop, survives panics and leaves no thread behind.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use nybble::Error;
use nybble::threads::{Columns, MAX_THREADS, ThreadPool};

/// Numbers of items: none, one, fewer than threads, equal, off by one, many.
const COUNTS: [usize; 12] = [0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 1000, 4097];

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(threads).unwrap()
}

/// The message of a panic.
fn message(result: std::thread::Result<()>) -> String {
    let panic = result.expect_err("a panic was expected");
    panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap()
}

#[test]
fn every_index_is_run_exactly_once() {
    for threads in 1..=8 {
        pool(threads).run(|scope| {
            for count in COUNTS {
                let runs: Vec<AtomicU8> = (0..count).map(|_| AtomicU8::new(0)).collect();
                scope.for_each(count, |i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "{threads} threads, {count} items");
            }
        });
    }
}

#[test]
fn a_stage_sees_the_writes_of_earlier_stages() {
    let serial = |mut values: Vec<u64>| {
        for round in 0..50 {
            let sum = values.iter().fold(0_u64, |sum, value| sum.wrapping_mul(3).wrapping_add(*value));
            values.iter_mut().enumerate().for_each(|(i, value)| *value = value.wrapping_mul(sum) ^ (round + i as u64));
        }
        values
    };
    let start: Vec<u64> = (0..500).collect();
    let expected = serial(start.clone());
    for threads in [1, 2, 3, 8] {
        let mut values = start.clone();
        pool(threads).run(|scope| {
            for round in 0..50 {
                let sum = values.iter().fold(0_u64, |sum, value| sum.wrapping_mul(3).wrapping_add(*value));
                scope.for_each_chunk(&mut values, 7, |chunk, part| {
                    for (i, value) in part.iter_mut().enumerate() {
                        *value = value.wrapping_mul(sum) ^ (round + (chunk * 7 + i) as u64);
                    }
                });
            }
        });
        assert_eq!(values, expected, "{threads} threads");
    }
}

#[test]
fn chunks_cover_the_buffer_without_overlap() {
    for threads in [1, 2, 5] {
        pool(threads).run(|scope| {
            for size in COUNTS {
                for length in [1, 2, 16, 1000, usize::MAX] {
                    let mut buffer = vec![(usize::MAX, 0); size];
                    scope.for_each_chunk(&mut buffer, length, |i, chunk| {
                        assert!(chunk.len() <= length);
                        for (owner, runs) in chunk {
                            *owner = i;
                            *runs += 1;
                        }
                    });
                    let expected: Vec<_> = (0..size).map(|at| (at / length, 1)).collect();
                    assert_eq!(buffer, expected, "{threads} threads, {size} elements in chunks of {length}");
                }
            }
        });
    }
}

#[test]
fn column_ranges_cover_exactly_their_view() {
    for threads in [1, 2, 5] {
        pool(threads).run(|scope| {
            for (rows, stride, view) in [(0, 9, 0..9), (1, 1, 0..1), (3, 40, 0..40), (4, 33, 3..30), (2, 5, 2..2)] {
                for step in [1, 4, 16, usize::MAX] {
                    let mut matrix = vec![0.0; rows * stride];
                    let mut whole = Columns::whole(&mut matrix, rows, stride);
                    scope.for_each_columns(&mut whole.narrow(view.clone()), step, |range, columns| {
                        assert_eq!((columns.rows(), columns.range()), (rows, range.clone()));
                        for row in 0..columns.rows() {
                            let part = columns.row_mut(row);
                            assert_eq!(part.len(), range.len());
                            for (column, value) in range.clone().zip(part) {
                                *value += (row * 100 + column + 1) as f32;
                            }
                        }
                    });
                    for (at, value) in matrix.into_iter().enumerate() {
                        let (row, column) = (at / stride, at % stride);
                        let expected = if view.contains(&column) { (row * 100 + column + 1) as f32 } else { 0.0 };
                        assert_eq!(value, expected, "{threads} threads, row {row}, column {column}");
                    }
                }
            }
        });
    }
}

#[test]
fn columns_narrow_only_to_ranges_inside_them() {
    let mut matrix = [0.0; 30];
    let mut columns = Columns::whole(&mut matrix, 3, 10);
    let mut part = columns.narrow(2..8);
    part.narrow(3..5).row_mut(2).fill(1.0);
    assert_eq!(part.row_mut(2), [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
    for bad in [0..3, 7..9, 1..9, usize::MAX..usize::MAX] {
        assert!(catch_unwind(AssertUnwindSafe(|| part.narrow(bad).rows())).is_err());
    }
    assert!(catch_unwind(AssertUnwindSafe(|| part.row_mut(3).len())).is_err());
    let mut other = [0.0; 30];
    for (rows, stride) in [(3, 11), (3, 9), (usize::MAX, 2)] {
        assert!(catch_unwind(AssertUnwindSafe(|| Columns::whole(&mut other, rows, stride).rows())).is_err());
    }
}

#[test]
fn tens_of_thousands_of_tiny_stages_complete() {
    for (threads, stages) in [(2, 50_000), (8, 5_000)] {
        let total = AtomicUsize::new(0);
        let mut expected = 0;
        pool(threads).run(|scope| {
            for stage in 0..stages {
                let count = stage % 11;
                expected += count * (count + 1) / 2;
                scope.for_each(count, |i| {
                    total.fetch_add(i + 1, Ordering::Relaxed);
                });
                assert_eq!(total.load(Ordering::Relaxed), expected, "stage {stage} of {threads} threads");
            }
        });
    }
}

#[test]
fn many_short_runs_complete() {
    let pool = pool(3);
    for run in 0..2_000 {
        let total = AtomicUsize::new(0);
        pool.run(|scope| {
            scope.for_each(run % 5, |i| {
                total.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(total.into_inner(), (0..run % 5).sum::<usize>());
    }
}

#[test]
fn all_threads_of_a_pool_can_run_one_stage() {
    for threads in [2, 3, 8] {
        let all = Barrier::new(threads);
        pool(threads).run(|scope| {
            for _ in 0..20 {
                scope.for_each(threads, |_| {
                    all.wait(); // Passes only if every item has its own thread.
                });
            }
        });
    }
}

#[test]
fn sleeping_workers_and_leaders_wake_up() {
    let (pool, both) = (pool(2), Barrier::new(2));
    let nap = || std::thread::sleep(std::time::Duration::from_millis(3)); // Far longer than the spin time.
    pool.run(|scope| {
        let leader = std::thread::current().id();
        for leader_naps in [true, false].repeat(10) {
            if leader_naps {
                nap();
            }
            scope.for_each(2, |_| {
                both.wait();
                if !leader_naps && std::thread::current().id() != leader {
                    nap();
                }
            });
        }
    });
}

#[test]
fn a_panic_in_an_item_reaches_the_caller_and_the_pool_survives() {
    for threads in [1, 2, 8] {
        let pool = pool(threads);
        for bad in [0, 1, 50, 99] {
            let stage = || {
                pool.run(|scope| scope.for_each(100, |i| assert_ne!(i, bad, "item {i} fails")));
            };
            assert!(message(catch_unwind(stage)).contains(&format!("item {bad} fails")), "{threads} threads");
        }
        let everyone = || pool.run(|scope| scope.for_each(100, |i| panic!("item {i} fails")));
        assert!(message(catch_unwind(everyone)).contains(" fails"));

        let total = AtomicUsize::new(0);
        pool.run(|scope| {
            // A leader may catch it and continue in the same run.
            let stage = || scope.for_each(10, |_| panic!("caught"));
            assert_eq!(message(catch_unwind(AssertUnwindSafe(stage))), "caught");
            scope.for_each(100, |i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
        });
        assert_eq!(total.into_inner(), 4950);
    }
}

#[test]
fn a_panic_on_a_worker_thread_reaches_the_leader() {
    let (pool, both) = (pool(2), Barrier::new(2));
    let result = catch_unwind(|| {
        pool.run(|scope| {
            let leader = std::thread::current().id();
            scope.for_each(2, |_| {
                both.wait();
                assert_eq!(std::thread::current().id(), leader, "on a worker");
            });
        });
    });
    assert!(message(result).contains("on a worker"));
}

#[test]
fn a_panic_of_the_leader_releases_the_workers() {
    for threads in [1, 2, 8] {
        let pool = pool(threads);
        for _ in 0..20 {
            let lead = || {
                pool.run(|scope| {
                    scope.for_each(10, |_| ());
                    panic!("the leader fails");
                })
            };
            assert_eq!(message(catch_unwind(lead)), "the leader fails");
        }
        assert_eq!(pool.run(|_| "well"), "well");
    }
}

#[test]
fn several_threads_take_turns_with_a_pool() {
    let pool = pool(3);
    let leaders = AtomicUsize::new(0);
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| {
                for round in 0..200 {
                    let mut values = vec![0; 100];
                    pool.run(|scope| {
                        assert_eq!(leaders.fetch_add(1, Ordering::SeqCst), 0, "two leaders at once");
                        for _ in 0..5 {
                            scope.for_each_chunk(&mut values, 9, |_, chunk| chunk.iter_mut().for_each(|v| *v += round));
                        }
                        leaders.fetch_sub(1, Ordering::SeqCst);
                    });
                    assert_eq!(values, vec![5 * round; 100]);
                }
            });
        }
    });
}

#[test]
fn a_run_inside_a_run_works_from_leader_and_items() {
    let (outer, other) = (pool(3), pool(2));
    let total = AtomicUsize::new(0);
    let add = |i| {
        total.fetch_add(i, Ordering::Relaxed);
    };
    outer.run(|scope| {
        outer.run(|inner| inner.for_each(10, add)); // 45
        other.run(|inner| inner.for_each(10, add)); // 45
        scope.for_each(10, |_| outer.run(|inner| inner.for_each(10, add))); // 450
        scope.for_each(10, |_| other.run(|inner| inner.for_each(10, add))); // 450
    });
    assert_eq!(total.into_inner(), 990);
}

#[test]
fn a_pool_of_zero_or_too_many_threads_is_rejected() {
    for bad in [0, MAX_THREADS + 1, usize::MAX] {
        assert!(matches!(ThreadPool::new(bad), Err(Error::InvalidArgument { name: "threads", .. })));
    }
}
