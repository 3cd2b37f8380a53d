//! Threads: how many to use, and the [`ThreadPool`] that walks through a whole forward pass together.
//!
//! Handing each of a model's few hundred matrix products to a thread pool costs 5 to 10 microseconds apiece, which
//! alone would cap a small model's speed. So a forward pass enters the pool once ([`ThreadPool::run`]). Its closure is the
//! *leader*: plain code from top to bottom on the calling thread, which hands out *stages* ([`Scope::for_each`] and its
//! kin) that the workers, already awake, join within a fraction of a microsecond.
//!
//! ```
//! use nybble::threads::ThreadPool;
//!
//! let pool = ThreadPool::new(2)?;
//! let mut squares = vec![0; 1000];
//! let sum: usize = pool.run(|scope| {
//!     scope.for_each_chunk(&mut squares, 100, |i, chunk| {
//!         for (j, square) in chunk.iter_mut().enumerate() {
//!             *square = (i * 100 + j).pow(2);
//!         }
//!     });
//!     squares.iter().sum()
//! });
//! assert_eq!(sum, 332_833_500);
//! # Ok::<(), nybble::Error>(())
//! ```

mod board;
mod columns;
mod count;
mod pool;

pub use columns::Columns;
pub use count::{MAX_THREADS, default_threads, resolve_threads};
pub use pool::{Scope, ThreadPool};
