//! Measures the upper limits of this machine, with which the speed of a model is compared.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::operations::Kernel;
use crate::system::aligned_buf::AlignedBuf;
use crate::system::memory;
use crate::threads::ThreadPool;

/// The upper limits of a thread pool on this machine.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes read from memory, in units of 10^9 per second.
    pub bandwidth_gb_s: f64,
    /// INT8 operations, in units of 10^9 per second. A multiplication and an addition are two.
    pub int8_gops: f64,
}

/// Bytes of the buffer that is read, if memory allows: more than the caches of large servers hold.
const BUFFER_BYTES: u64 = 1 << 30;
/// Numbers that a thread reads at a time: 1 MiB.
const CHUNK: usize = (1 << 20) / size_of::<u64>();
/// Rounds per measurement, at most. The best counts, because other work can only slow a round down.
const ROUNDS: usize = 5;
/// No further round starts after this time, apart from the first two.
const TIME_LIMIT: Duration = Duration::from_millis(300);
/// The least time of one piece of arithmetic.
const PIECE: Duration = Duration::from_millis(1);

/// Measures the limits of all threads of `pool` together, in about a second.
///
/// - Bandwidth: the threads sum a buffer of 1 GiB (or a quarter of the available memory, if that is less) with
///   [`Kernel::read_sum`], in pieces of 1 MiB from start to end. Decoding reads all weights once per token, so bandwidth
///   divided by the bytes of the weights bounds its speed. Models that fit into the caches may be faster.
/// - Arithmetic: the threads run [`Kernel::peak_int8`], integer dot products that never leave the registers. It bounds
///   prompts and batches. The number is the limit of `kernel`'s instruction set; other kernels have other limits.
///
/// Both are the best of several rounds. Other work on the machine makes them smaller.
pub fn limits(pool: &ThreadPool, kernel: &Kernel) -> Limits {
    let bytes = buffer_bytes(memory::available().map(|bytes| bytes as u64));
    Limits { bandwidth_gb_s: bandwidth(pool, kernel, bytes), int8_gops: int8_gops(pool, kernel) }
}

/// Bytes of the buffer if `available` bytes of memory are.
fn buffer_bytes(available: Option<u64>) -> u64 {
    // A machine whose memory is unknown may have little.
    available.map_or(BUFFER_BYTES / 4, |available| available / 4).min(BUFFER_BYTES)
}

/// 10^9 bytes per second that the pool reads out of a buffer of `bytes`.
fn bandwidth(pool: &ThreadPool, kernel: &Kernel, bytes: u64) -> f64 {
    let mut length = (bytes as usize / size_of::<u64>()).max(CHUNK);
    // On huge pages, as weights.
    let mut buffer = loop {
        match AlignedBuf::<u64>::on_huge_pages(length) {
            Some(buffer) => break buffer,
            None if length > CHUNK => length /= 2,
            None => break AlignedBuf::zeroed(length),
        }
    };
    let seconds = pool.run(|scope| {
        // Pages that were never written all map to the same page of zeros, which is in the cache. So each page is written, by
        // one of the threads: on a NUMA machine that spreads the buffer over the nodes.
        scope.for_each_chunk(&mut buffer, CHUNK, |i, chunk| chunk.fill(i as u64));
        best_seconds(|| {
            scope.for_each(buffer.len().div_ceil(CHUNK), |i| {
                let start = i * CHUNK;
                black_box(kernel.read_sum(&buffer[start..buffer.len().min(start + CHUNK)]));
            });
        })
    });
    (length * size_of::<u64>()) as f64 / seconds * 1e-9
}

/// 10^9 INT8 operations per second of all threads.
fn int8_gops(pool: &ThreadPool, kernel: &Kernel) -> f64 {
    let mut rounds = 1 << 10;
    while rounds < 1 << 30 && seconds_of(|| _ = black_box(kernel.peak_int8(rounds))) < PIECE.as_secs_f64() {
        rounds *= 2;
    }
    // Several pieces per thread, so that a thread that starts late does not make the others wait for long.
    let pieces = pool.threads() * 16;
    let operations = kernel.peak_int8(1).0 as f64 * rounds as f64 * pieces as f64;
    let seconds =
        pool.run(|scope| best_seconds(|| scope.for_each(pieces, |_| _ = black_box(kernel.peak_int8(rounds)))));
    operations / seconds * 1e-9
}

/// Seconds of the fastest of several runs.
fn best_seconds(mut run: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    for round in 0..ROUNDS {
        if round >= 2 && begin.elapsed() > TIME_LIMIT {
            break;
        }
        best = best.min(seconds_of(&mut run));
    }
    best
}

/// Seconds that `run` takes, never zero.
fn seconds_of(run: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    run();
    begin.elapsed().as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::available;

    #[test]
    fn limits_are_positive_for_every_kernel_and_pool() {
        for threads in [1, 2] {
            let pool = ThreadPool::new(threads).unwrap();
            for kernel in available() {
                for bytes in [0, 1, 3 << 20, (5 << 20) + 1000] {
                    let bandwidth = bandwidth(&pool, kernel, bytes);
                    assert!(bandwidth.is_finite() && bandwidth > 0.0, "{}: {bandwidth}", kernel.name());
                }
                let gops = int8_gops(&pool, kernel);
                assert!(gops.is_finite() && gops > 0.0, "{}: {gops}", kernel.name());
            }
        }
    }

    #[test]
    fn the_buffer_takes_at_most_a_quarter_of_available_memory() {
        assert_eq!(buffer_bytes(Some(1 << 40)), BUFFER_BYTES);
        assert_eq!(buffer_bytes(Some(1 << 30)), 1 << 28);
        assert_eq!(buffer_bytes(Some(0)), 0);
        assert!(buffer_bytes(None) <= BUFFER_BYTES / 4);
    }
}
