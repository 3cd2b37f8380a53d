//! The thread pool: one leader, its workers, and the stages that they run together.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::columns::{Base, Columns};
use super::count::{available_cpus, check};
use super::job_slot::JobSlot;
use super::lookahead::{Lookahead, Span};
use super::nodes::Nodes;
use crate::system::arena::Computing;
use crate::{Error, Result};

/// How long a thread spins before it sleeps. Waking a thread costs about as much time, so a longer spin can at best halve
/// the cost and a shorter one at worst double it.
const SPIN_TIME: Duration = Duration::from_micros(40);

thread_local! {
    /// Whether this thread is inside the `run` of a pool, as a leader or as a worker.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed number of threads that run many short parallel stages together, with one fork-join for all of them.
///
/// Threads may share a pool: a second [`run`](ThreadPool::run) waits until the first is done. Between runs the workers
/// sleep. In a process made by `fork`, which has only the forking thread, a pool starts new workers.
#[derive(Debug)]
pub struct ThreadPool {
    threads: usize,
    nodes: Nodes,
    workers: Workers,
}

impl ThreadPool {
    /// A pool of `threads` threads. The caller's thread is one of them, so one less is started. On a machine with several NUMA
    /// nodes, they are spread over the nodes and stay there, unless the environment variable `NYBBLE_NUMA` is `off`. A number there
    /// divides the CPUs into as many made-up nodes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if `threads` is not in 1 to [`MAX_THREADS`](super::MAX_THREADS), the system cannot
    /// start them, or `NYBBLE_NUMA` is neither `on`, `off` nor a number from 1 to 64.
    pub fn new(threads: usize) -> Result<Self> {
        check("threads", threads)?;
        ThreadPool::on(Nodes::of_system()?, threads)
    }

    /// A pool whose threads are spread over these nodes.
    fn on(nodes: Nodes, threads: usize) -> Result<Self> {
        let workers = Workers::new(&nodes, threads, std::process::id())?;
        Ok(ThreadPool { threads, nodes, workers })
    }

    /// The number of threads, including the leader.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `lead` on this thread. All threads of the pool run the stages that it passes to its [`Scope`].
    ///
    /// A panic in a stage or in `lead` itself resumes in the caller, and the pool remains usable. A run inside another run,
    /// of this pool or another, works but has no workers: all threads are busy with the outer one.
    pub fn run<R>(&self, lead: impl FnOnce(&Scope<'_>) -> R) -> R {
        self.run_as(std::process::id(), lead)
    }

    /// `run` in the process `pid`, which tests choose.
    fn run_as<R>(&self, pid: u32, lead: impl FnOnce(&Scope<'_>) -> R) -> R {
        let Some(_inside) = Inside::enter() else { return lead(&Scope::alone()) };
        let _computing = Computing::begin();
        let workers = self.workers.of_process(pid, &self.nodes, self.threads);
        if workers.threads.is_empty() {
            return lead(&Scope::alone());
        }
        // One leader at a time. A leader that panicked has left no job in the slot.
        let lookahead = workers.leading.lock().unwrap_or_else(PoisonError::into_inner);
        lookahead.borrow_mut().begin();
        lead(&Scope { slot: Some((&workers.slot, self.nodes.current())), lookahead: Some(&lookahead) })
    }
}

// After a panic the slot is empty and the lock free.
impl UnwindSafe for ThreadPool {}
impl RefUnwindSafe for ThreadPool {}

/// Marks this thread as inside a run until it is dropped.
struct Inside;

impl Inside {
    /// `None` if the thread is already inside a run.
    fn enter() -> Option<Self> {
        (!INSIDE.replace(true)).then(|| Inside)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

/// The workers of one process. They wait at the job slot from run to run, asleep between them, so that a run allocates
/// nothing and starts no thread.
struct Workers {
    pid: u32,
    /// Held by the leader. A fork may copy it locked, without the thread that would unlock it.
    leading: Mutex<RefCell<Lookahead>>,
    /// One less than the threads of the pool.
    threads: Vec<JoinHandle<()>>,
    slot: Arc<JobSlot>,
    /// The workers of a process forked from this one. Never set in the process `pid` itself.
    after_fork: OnceLock<Box<Workers>>,
}

impl Workers {
    fn new(nodes: &Nodes, threads: usize, pid: u32) -> Result<Self> {
        let mut workers = Workers::none(nodes, threads, pid);
        // The first thread is the leader.
        for (i, node) in nodes.of_threads(threads).into_iter().enumerate().skip(1) {
            let (slot, nodes) = (Arc::clone(&workers.slot), nodes.clone());
            let work = move || {
                let _inside = Inside::enter();
                nodes.pin(node);
                slot.work(i);
            };
            let worker = Builder::new().name(format!("nybble-{i}")).spawn(work).map_err(|e| {
                Error::argument("threads", threads, format!("a number that the system can start ({e})"))
            })?;
            workers.threads.push(worker);
        }
        Ok(workers)
    }

    /// No workers yet, for a pool of `threads` threads.
    fn none(nodes: &Nodes, threads: usize, pid: u32) -> Self {
        // With more threads than CPUs, a spinning thread keeps those that it waits for from running.
        let spin_time = if threads <= available_cpus() { SPIN_TIME } else { Duration::ZERO };
        Workers {
            pid,
            leading: Mutex::default(),
            threads: Vec::new(),
            slot: Arc::new(JobSlot::new(nodes.of_threads(threads), spin_time)),
            after_fork: OnceLock::new(),
        }
    }

    /// The workers of the process `pid`: these, or new ones if `pid` was forked from this process.
    fn of_process(&self, pid: u32, nodes: &Nodes, threads: usize) -> &Workers {
        let mut workers = self;
        while workers.pid != pid {
            // A forked process that cannot start threads still computes, on one thread.
            let none = |_| Workers::none(nodes, threads, pid);
            let make = || Box::new(Workers::new(nodes, threads, pid).unwrap_or_else(none));
            workers = workers.after_fork.get_or_init(make);
        }
        workers
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut self.threads);
        if self.pid != std::process::id() {
            // The threads exist only in the other process.
            std::mem::forget(threads);
            return;
        }
        self.slot.close();
        for worker in threads {
            // A worker catches all panics of its items and does not panic itself.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Runs the stages of the leader of a [`ThreadPool::run`].
///
/// A stage returns when all its items have run; what they wrote is visible then. Threads claim items one by one, so a slow
/// or late thread runs fewer of them and delays no other. Which thread runs an item is unspecified: results must not depend
/// on it. If an item panics, the panic resumes in the leader after the stage, and it is unspecified which of the other
/// items have run.
pub struct Scope<'a> {
    /// The slot, and the NUMA node of the leader. `None` for a leader without workers.
    slot: Option<(&'a JobSlot, usize)>,
    /// What stages read. Not `Sync`, so that no item can capture the scope and start a stage within a stage.
    lookahead: Option<&'a RefCell<Lookahead>>,
}

impl Scope<'_> {
    fn alone() -> Self {
        Scope { slot: None, lookahead: None }
    }

    /// The number of NUMA nodes with threads of the pool. Each computes the same part of every range of items.
    pub(crate) fn nodes(&self) -> usize {
        self.slot.map_or(1, |(slot, _)| slot.nodes())
    }

    /// Tells what the next stage reads, in `count` items: item `i` begins with `of(i)`. Threads that wait then prefetch what they are
    /// expected to read in the stage after it, line by line with `prefetch_line`, which is given an address.
    pub(crate) fn reads(&self, count: usize, of: impl Fn(usize) -> Span, prefetch_line: fn(usize)) {
        if let (Some((slot, _)), Some(lookahead), true) = (self.slot, self.lookahead, count > 0) {
            slot.set_next(lookahead.borrow_mut().note(count, of(0), slot.spans(count, of)), prefetch_line);
        }
    }

    /// Runs `item(i)` exactly once for each `i` of `0..count`.
    pub fn for_each<F: Fn(usize) + Sync>(&self, count: usize, item: F) {
        match self.slot {
            #[allow(unsafe_code, reason = "the borrow checker cannot see that there is one leader")]
            // SAFETY: `run` makes one scope at a time for a slot, and lends it to the leader's thread alone: a scope
            // is not `Sync`, so neither another thread nor an item can hold a reference to it.
            Some((slot, node)) if count > 1 => unsafe { slot.lead(node, count, &item) },
            _ => (0..count).for_each(item),
        }
    }

    /// Cuts `buffer` into chunks of `length` elements (the last may be shorter) and runs `item(i, chunk)` for each.
    ///
    /// # Panics
    ///
    /// If `length` is 0.
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

    /// As [`for_each_chunk`](Self::for_each_chunk), with a workspace for each item: `item(i, chunk, workspace)` gets `size`
    /// elements of `workspaces`, of unspecified values. `workspaces` grows as needed; callers keep it, so that later calls
    /// do not allocate.
    ///
    /// # Panics
    ///
    /// If `length` is 0.
    pub fn for_each_chunk_with<T, R, F>(
        &self,
        buffer: &mut [T],
        length: usize,
        workspaces: &mut Vec<R>,
        size: usize,
        item: F,
    ) where
        T: Send,
        R: Send + Clone + Default,
        F: Fn(usize, &mut [T], &mut [R]) + Sync,
    {
        let needed = buffer.len().div_ceil(length.max(1)) * size;
        if workspaces.len() < needed {
            workspaces.resize(needed, R::default());
        }
        let base = Base::new(workspaces);
        self.for_each_chunk(buffer, length, |i, chunk| {
            #[allow(unsafe_code, reason = "the borrow checker cannot see that workspaces are disjoint")]
            // SAFETY: there is a workspace for each chunk, those of different items are disjoint, and each item runs once.
            let workspace = unsafe { base.slice_mut(i * size..(i + 1) * size) };
            item(i, chunk, workspace);
        });
    }

    /// Cuts the columns of `matrix` into ranges of `step` (the last may be narrower) and runs `item(range, columns)`
    /// for each. Ranges count columns of the whole matrix.
    ///
    /// # Panics
    ///
    /// If `step` is 0.
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
            // mutably by the caller, so nothing else accesses it meanwhile.
            let mut part = unsafe { matrix.part(range.clone()) };
            item(range, &mut part);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// Nodes with these numbers of CPUs, which need not exist.
    fn nodes(counts: &[usize]) -> Nodes {
        Nodes::new(counts.iter().map(|count| (0..*count).collect()).collect())
    }

    #[test]
    fn every_item_runs_once_on_any_number_of_nodes() {
        for counts in [&[1][..], &[1, 1], &[2, 1], &[1, 3], &[1, 1, 1, 1]] {
            for threads in 1..6 {
                let pool = ThreadPool::on(nodes(counts), threads).unwrap();
                for count in 0..40 {
                    let mut seen = vec![0; count];
                    pool.run(|scope| scope.for_each_chunk(&mut seen, 1, |_, seen| seen[0] += 1));
                    assert!(seen.iter().all(|seen| *seen == 1), "{counts:?}, {threads} threads: {seen:?}");
                }
            }
        }
    }

    #[test]
    fn a_thread_takes_items_of_its_node_first() {
        let slot = JobSlot::new([0, 1], SPIN_TIME);
        let leader = thread::current().id();
        let strays = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| slot.work(1));
            for _ in 0..100 {
                let both = Barrier::new(2);
                let item = |i: usize| {
                    both.wait();
                    strays.fetch_add(usize::from((thread::current().id() == leader) != (i == 0)), Ordering::Relaxed);
                };
                #[allow(unsafe_code, reason = "there is one leader")]
                // SAFETY: only this thread leads, and the item does not.
                unsafe {
                    slot.lead(0, 2, &item);
                }
            }
            slot.close();
        });
        // Not in the item: a panic would leave the worker waiting for ever.
        assert_eq!(strays.into_inner(), 0);
    }

    #[test]
    fn a_thread_that_waits_prefetches_its_part_of_the_next_stage() {
        static SUM: AtomicUsize = AtomicUsize::new(0);
        let prefetch_line: fn(usize) = |address| {
            SUM.fetch_add(address, Ordering::Relaxed);
        };
        let slot = JobSlot::new([0, 0, 0], SPIN_TIME);
        let span = |item: usize| Span { address: 1000 * item, bytes: 600 };
        // Items 0, 1 and 2, 3 and 4.
        let spans: Vec<Span> = slot.spans(5, span).collect();
        assert_eq!(spans.iter().map(|span| span.address).collect::<Vec<_>>(), [0, 1000, 3000]);
        slot.set_next(&spans, prefetch_line);
        for share in 0..3 {
            assert_eq!((0..10).filter(|_| slot.prefetch(share)).count(), 3, "256 bytes at a time");
        }
        // A single item belongs to one thread.
        let alone = slot.spans(1, span).collect::<Vec<_>>();
        assert_eq!(alone.iter().filter(|span| span.bytes > 0).count(), 1);
        slot.set_next(&spans, prefetch_line);
        slot.set_next(&[], prefetch_line);
        assert!((0..3).all(|share| !slot.prefetch(share)), "nothing is expected any more");
        // Every line once.
        assert_eq!(SUM.load(Ordering::Relaxed), (0..12).map(|line| 3 * 64 * line + 4000).sum::<usize>());
    }

    #[test]
    fn stages_may_read_anything_while_threads_wait() {
        let pool = ThreadPool::new(2).unwrap();
        for run in 0..100 {
            pool.run(|scope| {
                for stage in 0..3 {
                    scope.reads(
                        4,
                        |item| Span { address: usize::MAX - 100 * (item + stage + run % 5), bytes: 1 << 20 },
                        |_| (),
                    );
                    let sum = AtomicUsize::new(0);
                    scope.for_each(4, |item| {
                        sum.fetch_add(item, Ordering::Relaxed);
                    });
                    assert_eq!(sum.into_inner(), 6);
                }
            });
        }
    }

    /// The threads on which two items run that wait for each other.
    fn pair(scope: &Scope<'_>) -> HashSet<thread::ThreadId> {
        let (seen, both) = (Mutex::new(HashSet::new()), Barrier::new(2));
        scope.for_each(2, |_| {
            both.wait();
            seen.lock().unwrap().insert(thread::current().id());
        });
        seen.into_inner().unwrap()
    }

    #[test]
    fn a_forked_process_starts_its_own_workers_even_during_a_run() {
        let pool = ThreadPool::new(2).unwrap();
        let parent = std::process::id();
        let (child, grandchild) = (parent.wrapping_add(1), parent.wrapping_add(2));
        let of_parent = pool.run_as(parent, pair);
        let _held_for_ever = pool.workers.leading.lock().unwrap(); // As in a copy made in the middle of a run.
        let of_child = pool.run_as(child, pair);
        assert_eq!(pool.run_as(child, pair), of_child);
        let of_grandchild = pool.run_as(grandchild, pair);
        let here = HashSet::from([thread::current().id()]);
        assert_eq!(&of_parent & &of_child, here);
        assert_eq!(&of_child & &of_grandchild, here);
    }

    #[test]
    fn dropping_a_pool_ends_its_workers() {
        for _ in 0..100 {
            let pool = ThreadPool::new(3).unwrap();
            let slot = Arc::downgrade(&pool.workers.slot);
            pool.run(|scope| scope.for_each(2, |_| ()));
            drop(pool);
            assert!(slot.upgrade().is_none(), "a worker still holds the slot");
        }
    }

    #[test]
    fn one_thread_has_no_workers() {
        let pool = ThreadPool::new(1).unwrap();
        assert!(pool.workers.threads.is_empty());
        assert!(pool.run(|scope| scope.slot.is_none()));
    }
}
