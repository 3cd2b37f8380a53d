//! The pool: one leader, its workers, and the stages they run through together.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::board::Board;
use super::columns::{Base, Columns};
use super::count::{available_cpus, check};
use crate::{Error, Result};

/// How long a thread spins for the others before it sleeps. A wake-up costs the system about as much, so spinning
/// longer can at best halve the cost and spinning shorter can at worst double it.
const PATIENCE: Duration = Duration::from_micros(40);

thread_local! {
    /// Whether this thread is inside some pool's `run`, as a leader or as a worker.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed number of threads that run through many short parallel stages together: one fork-join for all of them.
///
/// Shared freely between threads: a second [`run`](ThreadPool::run) waits until the first is done. Between runs the workers
/// sleep. In a process made by `fork`, where only the forking thread lives on, a pool starts new workers.
#[derive(Debug)]
pub struct ThreadPool {
    threads: usize,
    crew: Crew,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller's own among them, so one less is started.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when `threads` is not in 1 to [`MAX_THREADS`](super::MAX_THREADS) or the system does
    /// not start that many.
    pub fn new(threads: usize) -> Result<Self> {
        check("threads", threads)?;
        let crew = Crew::new(threads, std::process::id())?;
        Ok(ThreadPool { threads, crew })
    }

    /// How many threads, the leader included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `lead` on this thread. The stages that it hands to its [`Scope`] are run by all threads of the pool.
    ///
    /// A panic in a stage or in `lead` itself goes on in the caller, and the pool remains usable. A run from within a
    /// run, of this pool or another, works but has no workers: all threads are busy with the outer one.
    pub fn run<R>(&self, lead: impl FnOnce(&Scope<'_>) -> R) -> R {
        self.run_as(std::process::id(), lead)
    }

    /// `run` in the process `pid`, which tests choose.
    fn run_as<R>(&self, pid: u32, lead: impl FnOnce(&Scope<'_>) -> R) -> R {
        let Some(_inside) = Inside::enter() else { return lead(&Scope::alone()) };
        let crew = self.crew.of_process(pid, self.threads);
        if crew.workers.is_empty() {
            return lead(&Scope::alone());
        }
        // One leader at a time; one that panicked left nothing behind that the next would mind.
        let _turn = crew.turn.lock().unwrap_or_else(PoisonError::into_inner);
        lead(&Scope { board: Some(&crew.board), leader_only: PhantomData })
    }
}

// A panic leaves nothing half-done behind: the next run finds no job and its turn free.
impl UnwindSafe for ThreadPool {}
impl RefUnwindSafe for ThreadPool {}

/// Marks this thread as inside a run for as long as it lives.
struct Inside;

impl Inside {
    /// `None` when the thread is inside already.
    fn enter() -> Option<Self> {
        (!INSIDE.replace(true)).then(|| Inside)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

/// The workers of one process. They stay at the board from run to run, asleep between them, so that a run allocates
/// nothing and starts nothing.
struct Crew {
    pid: u32,
    /// Held by the leader. A fork may copy it locked, with the thread that would unlock it left behind.
    turn: Mutex<()>,
    /// `threads - 1` workers.
    workers: Vec<JoinHandle<()>>,
    board: Arc<Board>,
    /// The crew of a process forked from this one. Never set in the process `pid` itself.
    after_fork: OnceLock<Box<Crew>>,
}

impl Crew {
    fn new(threads: usize, pid: u32) -> Result<Self> {
        let mut crew = Crew::alone(threads, pid);
        for i in 1..threads {
            let board = Arc::clone(&crew.board);
            let work = move || {
                let _inside = Inside::enter();
                board.work();
            };
            let worker = Builder::new()
                .name(format!("nybble-{i}"))
                .spawn(work)
                .map_err(|e| Error::argument("threads", threads, format!("as many as the system starts ({e})")))?;
            crew.workers.push(worker);
        }
        Ok(crew)
    }

    fn alone(threads: usize, pid: u32) -> Self {
        // With more threads than CPUs, whoever spins keeps those that it waits for from running.
        let patience = if threads <= available_cpus() { PATIENCE } else { Duration::ZERO };
        Crew {
            pid,
            turn: Mutex::new(()),
            workers: Vec::new(),
            board: Arc::new(Board::new(patience)),
            after_fork: OnceLock::new(),
        }
    }

    /// The crew that lives in the process `pid`: this one, or one that is made now since this process was forked.
    fn of_process(&self, pid: u32, threads: usize) -> &Crew {
        let mut crew = self;
        while crew.pid != pid {
            // A forked process that cannot start threads still computes, on one.
            let make = || Box::new(Crew::new(threads, pid).unwrap_or_else(|_| Crew::alone(threads, pid)));
            crew = crew.after_fork.get_or_init(make);
        }
        crew
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let workers = std::mem::take(&mut self.workers);
        if self.pid != std::process::id() {
            // The threads stayed in the other process: there is no one to send home.
            std::mem::forget(workers);
            return;
        }
        self.board.close();
        for worker in workers {
            // A worker catches all panics of its items and has none of its own.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crew").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// What the leader of a [`ThreadPool::run`] hands its stages to.
///
/// A stage returns when all its items have run; what they wrote is visible then. Items are claimed one by one, so a
/// thread that is slow or late does fewer of them and delays nobody. Which thread runs an item is left open: results
/// must not depend on it. When an item panics, the panic goes on in the leader after the stage, and it is not defined
/// which of the other items have run.
pub struct Scope<'a> {
    /// `None` for a leader without workers.
    board: Option<&'a Board>,
    /// Not `Sync`, so that no item can capture the scope and start a stage within a stage.
    leader_only: PhantomData<Cell<()>>,
}

impl Scope<'_> {
    fn alone() -> Self {
        Scope { board: None, leader_only: PhantomData }
    }

    /// Runs `item(i)` exactly once for each `i` of `0..count`.
    pub fn for_each<F: Fn(usize) + Sync>(&self, count: usize, item: F) {
        match self.board {
            #[allow(unsafe_code, reason = "the borrow checker cannot see that there is one leader")]
            // SAFETY: `run` makes one scope at a time for a board, and lends it to the leader's thread alone: a scope
            // is not `Sync`, so neither another thread nor an item can hold a reference to it.
            Some(board) if count > 1 => unsafe { board.lead(count, &item) },
            _ => (0..count).for_each(item),
        }
    }

    /// Cuts `buffer` into chunks of `length` elements (the last may be shorter) and runs `item(i, chunk)` for each.
    ///
    /// # Panics
    ///
    /// When `length` is 0.
    pub fn for_each_chunk<T: Send, F: Fn(usize, &mut [T]) + Sync>(&self, buffer: &mut [T], length: usize, item: F) {
        assert_ne!(length, 0, "the length of a chunk");
        let end = buffer.len();
        let base = Base::new(buffer);
        self.for_each(end.div_ceil(length), |i| {
            let start = i * length;
            #[allow(unsafe_code, reason = "the borrow checker cannot see that chunks are disjoint")]
            // SAFETY: start < end since i < ceil(end / length). Chunks of different items are disjoint, and `for_each`
            // runs each item once.
            let chunk = unsafe { base.slice_mut(start..end.min(start.saturating_add(length))) };
            item(i, chunk);
        });
    }

    /// As [`for_each_chunk`](Self::for_each_chunk) with room for the items: `item(i, chunk, room)` gets `size` elements of
    /// `rooms` of its own, of unspecified values. `rooms` grows to what is needed and is to be kept, so that no item has to
    /// allocate.
    ///
    /// # Panics
    ///
    /// When `length` is 0.
    pub fn for_each_chunk_with<T, R, F>(
        &self,
        buffer: &mut [T],
        length: usize,
        rooms: &mut Vec<R>,
        size: usize,
        item: F,
    ) where
        T: Send,
        R: Send + Clone + Default,
        F: Fn(usize, &mut [T], &mut [R]) + Sync,
    {
        let needed = buffer.len().div_ceil(length.max(1)) * size;
        if rooms.len() < needed {
            rooms.resize(needed, R::default());
        }
        let base = Base::new(rooms);
        self.for_each_chunk(buffer, length, |i, chunk| {
            #[allow(unsafe_code, reason = "the borrow checker cannot see that rooms are disjoint")]
            // SAFETY: there is a room for each chunk, rooms of different items are disjoint, and each item runs once.
            let room = unsafe { base.slice_mut(i * size..(i + 1) * size) };
            item(i, chunk, room);
        });
    }

    /// Cuts the columns of `matrix` into ranges of `step` (the last may be narrower) and runs `item(range, columns)`
    /// for each, the range counted as in the whole matrix.
    ///
    /// # Panics
    ///
    /// When `step` is 0.
    pub fn for_each_columns<F>(&self, matrix: &mut Columns<'_>, step: usize, item: F)
    where
        F: Fn(Range<usize>, &mut Columns<'_>) + Sync,
    {
        assert_ne!(step, 0, "the step of the columns");
        let all = matrix.range();
        let matrix: &Columns<'_> = matrix;
        self.for_each(all.len().div_ceil(step), |i| {
            let start = all.start + i * step;
            let range = start..all.end.min(start.saturating_add(step));
            #[allow(unsafe_code, reason = "the borrow checker cannot see that column ranges are disjoint")]
            // SAFETY: ranges of different items are disjoint, and `for_each` runs each item once. `matrix` is borrowed
            // mutably by the caller, so that nobody else looks at it meanwhile.
            let mut part = unsafe { matrix.part(range.clone()) };
            item(range, &mut part);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    /// The threads that two items run on which wait for each other.
    fn pair(scope: &Scope<'_>) -> HashSet<thread::ThreadId> {
        let (seen, both) = (Mutex::new(HashSet::new()), Barrier::new(2));
        scope.for_each(2, |_| {
            both.wait();
            seen.lock().unwrap().insert(thread::current().id());
        });
        seen.into_inner().unwrap()
    }

    #[test]
    fn a_forked_process_gets_workers_of_its_own_even_while_its_parent_computes() {
        let pool = ThreadPool::new(2).unwrap();
        let parent = std::process::id();
        let (child, grandchild) = (parent.wrapping_add(1), parent.wrapping_add(2));
        let of_parent = pool.run_as(parent, pair);
        let _held_for_ever = pool.crew.turn.lock().unwrap(); // As in a copy made in the middle of a run.
        let of_child = pool.run_as(child, pair);
        assert_eq!(pool.run_as(child, pair), of_child);
        let of_grandchild = pool.run_as(grandchild, pair);
        let here = HashSet::from([thread::current().id()]);
        assert_eq!(&of_parent & &of_child, here);
        assert_eq!(&of_child & &of_grandchild, here);
    }

    #[test]
    fn a_team_that_is_dropped_leaves_no_worker_behind() {
        for _ in 0..100 {
            let pool = ThreadPool::new(3).unwrap();
            let board = Arc::downgrade(&pool.crew.board);
            pool.run(|scope| scope.for_each(2, |_| ()));
            drop(pool);
            assert!(board.upgrade().is_none(), "a worker still holds the board");
        }
    }

    #[test]
    fn one_thread_has_no_workers() {
        let pool = ThreadPool::new(1).unwrap();
        assert!(pool.crew.workers.is_empty());
        assert!(pool.run(|scope| scope.board.is_none()));
    }
}
