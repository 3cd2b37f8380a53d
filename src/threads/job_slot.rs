//! The protocol between a leader and its workers: a slot that holds one job at a time.
//!
//! A job is a closure and a number of indices. In pseudo-code, with the three words that all threads share:
//!
//! ```text
//! leader:   job = &job; unfinished = n; unclaimed = n; wake the workers; help(); wait until unfinished == 0
//! worker:   until closed { wait until unclaimed > 0; help() }
//! help():   while unclaimed > 0 { unclaimed -= 1, atomically; run that index; done += 1 }; unfinished -= done
//! ```
//!
//! On a machine with several NUMA nodes, each has its own `unclaimed`, for its share of the indices. A thread claims those of
//! its node first, and then those that other nodes have left.
//!
//! **Why it is sound.** `job` points to the leader's stack. A thread reads it only after it has claimed an index, and
//! reports that index as finished only after its last use of the job. A claimed, unfinished index keeps `unfinished` above
//! zero, so the leader is still waiting, its stack frame is alive and the slot still holds the same job. It does not
//! matter how long a thread slept before its claim, or from which job its last look at `unclaimed` dates: a claim that
//! succeeds is a claim of the job in the slot. Each success lowers `unclaimed` by one, so no index is given out twice.
//! `unfinished` counts all indices before the first node's `unclaimed` is set, so the same holds while the others are still
//! to be set.
//!
//! **Memory orderings.** The leader's `Release` store of each `unclaimed` and the `Acquire` claims (all of them, since
//! read-modify-writes continue the store's release sequence) make `job`, and everything that the leader wrote before,
//! visible to the items. The `Release` subtractions from `unfinished` and the leader's `Acquire` load of zero make
//! everything that the items wrote visible to the leader. Only `Waker` deals with sleep.
#![allow(unsafe_code, reason = "a job is borrowed from the leader's stack and run on threads that outlive the borrow")]

use std::any::Any;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A closure, its type erased so that one slot serves all, and its number of indices.
struct Job {
    count: usize,
    closure: *const (),
    /// Must be called with `closure` while the closure lives.
    call: unsafe fn(*const (), usize),
}

impl Job {
    fn new<F: Fn(usize) + Sync>(count: usize, closure: &F) -> Self {
        /// SAFETY: `closure` must point to a living `F`.
        unsafe fn call<F: Fn(usize)>(closure: *const (), index: usize) {
            // SAFETY: the caller's promise.
            let closure = unsafe { &*closure.cast::<F>() };
            closure(index);
        }
        Job { count, closure: std::ptr::from_ref(closure).cast(), call: call::<F> }
    }
}

/// A value that all threads use, on its own cache line and clear of the neighbor that the prefetcher also loads.
#[derive(Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// The indices of one NUMA node.
struct Share {
    /// Those of the current job that no thread has claimed.
    unclaimed: OwnLine<AtomicUsize>,
    /// The threads of this node and those before it: the share ends at this part of the indices.
    threads: usize,
}

/// An index that a thread has claimed.
struct Claim {
    /// The share that it belongs to.
    share: usize,
    /// How many indices of the share were left before, at least 1.
    left: usize,
}

/// The slot into which the leader puts jobs and from which workers take them. One leader at a time, any number of workers.
pub(super) struct JobSlot {
    /// One for each NUMA node.
    shares: Box<[Share]>,
    /// Indices of the current job that are not reported as finished.
    unfinished: OwnLine<AtomicUsize>,
    /// The current job. The module documentation says when it may be read.
    job: AtomicPtr<Job>,
    /// No more jobs will come: the workers exit.
    closed: AtomicBool,
    /// The payload of the first panic in an item of the current job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    workers: Waker,
    leader: Waker,
    /// How long to spin before sleeping.
    spin_time: Duration,
}

impl JobSlot {
    /// An empty slot for nodes with these numbers of threads. Threads that wait for each other spin for `spin_time` before they
    /// sleep.
    pub(super) fn new(threads: impl Iterator<Item = usize>, spin_time: Duration) -> Self {
        let up_to = threads.scan(0, |sum, threads| {
            *sum += threads;
            Some(*sum)
        });
        JobSlot {
            shares: up_to.map(|threads| Share { unclaimed: OwnLine::default(), threads }).collect(),
            unfinished: OwnLine(AtomicUsize::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            closed: AtomicBool::new(false),
            panic: Mutex::new(None),
            workers: Waker::default(),
            leader: Waker::default(),
            spin_time,
        }
    }

    /// The number of nodes.
    pub(super) fn nodes(&self) -> usize {
        self.shares.len()
    }

    /// Makes the workers exit.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.workers.wake();
    }

    /// What a worker thread of this node runs: takes part in all jobs until the slot is closed. Never panics.
    pub(super) fn work(&self, node: usize) {
        let is_left = |share: &Share| share.unclaimed.0.load(Ordering::Relaxed) > 0;
        while !self.closed.load(Ordering::Acquire) {
            self.help(node);
            self.workers
                .wait(self.spin_time, || self.shares.iter().any(is_left) || self.closed.load(Ordering::Relaxed));
        }
    }

    /// Runs `item` once for each of `0..count`, on this thread, which is on `node`, and on the workers that come in time, and
    /// returns when all have run. If an item panics, the panic then resumes here.
    ///
    /// # Safety
    ///
    /// Two threads must not call it at once, and no `item` may call it.
    pub(super) unsafe fn lead<F: Fn(usize) + Sync>(&self, node: usize, count: usize, item: &F) {
        if count == 0 {
            return; // No thread would report the end.
        }
        // Nothing between here and the end of the wait may unwind, since `job` is on this stack frame.
        let job = Job::new(count, item);
        self.job.store(std::ptr::from_ref(&job).cast_mut(), Ordering::Relaxed);
        self.unfinished.0.store(count, Ordering::Relaxed);
        let mut first = 0;
        for share in 0..self.shares.len() {
            let end = self.end(share, count);
            self.shares[share].unclaimed.0.store(end - first, Ordering::Release);
            first = end;
        }
        self.workers.wake();
        self.help(node);
        let finished = || self.unfinished.0.load(Ordering::Acquire) == 0;
        while !finished() {
            self.leader.wait(self.spin_time, finished);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// The end of a share of `count` indices: in proportion to the threads, so that the same part of any range always belongs to
    /// the same node.
    fn end(&self, share: usize, count: usize) -> usize {
        let (all, threads) = (self.shares.last().map_or(1, |last| last.threads), self.shares[share].threads);
        count / all * threads + count % all * threads / all
    }

    /// Claims one index of the current job, of this share if any is left.
    fn claim(&self, share: usize) -> Option<Claim> {
        let one = |left: usize| left.checked_sub(1);
        (share..self.shares.len()).chain(0..share).find_map(|share| {
            let unclaimed = &self.shares[share].unclaimed.0;
            let left = unclaimed.fetch_update(Ordering::Acquire, Ordering::Relaxed, one).ok()?;
            Some(Claim { share, left })
        })
    }

    /// Runs items of the current job until none is unclaimed, those of this share first.
    fn help(&self, share: usize) {
        let Some(mut claim) = self.claim(share) else { return };
        let mut done = 0;
        {
            // SAFETY: this thread has claimed an index and not yet reported it, so `lead` waits and keeps its job alive
            // and unchanged until the report below, which is after the last use of `job`. `job` is a local variable on
            // purpose: as a function's argument it would have to be alive until that function returns.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            loop {
                let index = self.end(claim.share, job.count) - claim.left;
                // SAFETY: `job.call` belongs to `job.closure`, which `lead` borrows for as long as it waits.
                let run = || unsafe { (job.call)(job.closure, index) };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                    self.keep(panic);
                }
                done += 1;
                match self.claim(claim.share) {
                    Some(next) => claim = next,
                    None => break,
                }
            }
        }
        if self.unfinished.0.fetch_sub(done, Ordering::Release) == done {
            self.leader.wake();
        }
    }

    /// Keeps the first panic for the leader.
    fn keep(&self, panic: Box<dyn Any + Send>) {
        let mut slot = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        match *slot {
            None => *slot = Some(panic),
            // Leaked: dropping it may run a caller's code that panics again, and then no thread would report the end.
            Some(_) => std::mem::forget(panic),
        }
    }
}

/// Puts threads to sleep until a condition holds. `wake` costs next to nothing while no thread sleeps.
#[derive(Default)]
struct Waker {
    /// A thread may have gone to sleep since the last `wake`.
    asleep: OwnLine<AtomicBool>,
    lock: Mutex<()>,
    woken: Condvar,
}

impl Waker {
    /// Waits until `due()`, spinning for `spin_time` and then sleeping. May return early: callers check again.
    fn wait(&self, spin_time: Duration, due: impl Fn() -> bool) {
        if due() {
            return;
        }
        if !spin_time.is_zero() {
            let start = Instant::now();
            while start.elapsed() < spin_time {
                for _ in 0..16 {
                    spin_loop();
                    if due() {
                        return;
                    }
                }
            }
        }
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.0.store(true, Ordering::Relaxed);
        // With the fence in `wake`: either this thread sees below what has become due, or `wake` sees that it sleeps.
        fence(Ordering::SeqCst);
        if !due() {
            drop(self.woken.wait(guard));
        }
    }

    /// Wakes all sleeping threads. To be called after making something due.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.0.load(Ordering::Relaxed) {
            // A thread that set the flag holds the lock until it sleeps, so after taking the lock once none is missed.
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.asleep.0.store(false, Ordering::Relaxed);
            drop(guard);
            self.woken.notify_all();
        }
    }
}
