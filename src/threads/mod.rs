//! Threads: how many to use, and a [`ThreadPool`] that runs a whole forward pass.
//!
//! Submitting each of a model's few hundred matrix products to an ordinary thread pool costs 5 to 10 microseconds apiece,
//! which alone would limit a small model's speed. So a forward pass enters the pool once ([`ThreadPool::run`]). Its closure
//! is the *leader*: code that runs from top to bottom on the calling thread and starts *stages*
//! ([`Scope::for_each`] and similar). The workers are already awake and join a stage within a fraction of a microsecond.
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

mod columns;
mod count;
mod job_slot;
mod lookahead;
mod nodes;
mod per_process;
mod pool;

pub use columns::Columns;
pub use count::{MAX_THREADS, default_threads, resolve_threads};
pub(crate) use lookahead::Span;
pub(crate) use per_process::PerProcess;
pub use pool::{Scope, ThreadPool};
