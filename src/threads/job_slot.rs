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
//! **Why it is sound.** `job` points to the leader's stack. A thread reads it only after it has claimed an index, and
//! reports that index as finished only after its last use of the job. A claimed, unfinished index keeps `unfinished` above
//! zero, so the leader is still waiting, its stack frame is alive and the slot still holds the same job. It does not
//! matter how long a thread slept before its claim, or from which job its last look at `unclaimed` dates: a claim that
//! succeeds is a claim of the job in the slot. Each success lowers `unclaimed` by one, so no index is given out twice.
//!
//! **Memory orderings.** The leader's `Release` store of `unclaimed` and the `Acquire` claims (all of them, since
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

/// The slot into which the leader puts jobs and from which workers take them. One leader at a time, any number of workers.
pub(super) struct JobSlot {
    /// Indices of the current job that no thread has claimed.
    unclaimed: OwnLine<AtomicUsize>,
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
    /// An empty slot. Threads that wait for each other spin for `spin_time` before they sleep.
    pub(super) fn new(spin_time: Duration) -> Self {
        JobSlot {
            unclaimed: OwnLine(AtomicUsize::new(0)),
            unfinished: OwnLine(AtomicUsize::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            closed: AtomicBool::new(false),
            panic: Mutex::new(None),
            workers: Waker::default(),
            leader: Waker::default(),
            spin_time,
        }
    }

    /// Makes the workers exit.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.workers.wake();
    }

    /// What a worker thread runs: takes part in all jobs until the slot is closed. Never panics.
    pub(super) fn work(&self) {
        while !self.closed.load(Ordering::Acquire) {
            self.help();
            self.workers.wait(self.spin_time, || {
                self.unclaimed.0.load(Ordering::Relaxed) > 0 || self.closed.load(Ordering::Relaxed)
            });
        }
    }

    /// Runs `item` once for each of `0..count`, on this thread and on the workers that come in time, and returns when
    /// all have run. If an item panics, the panic then resumes here.
    ///
    /// # Safety
    ///
    /// Two threads must not call it at once, and no `item` may call it.
    pub(super) unsafe fn lead<F: Fn(usize) + Sync>(&self, count: usize, item: &F) {
        if count == 0 {
            return; // No thread would report the end.
        }
        // Nothing between here and the end of the wait may unwind, since `job` is on this stack frame.
        let job = Job::new(count, item);
        self.job.store(std::ptr::from_ref(&job).cast_mut(), Ordering::Relaxed);
        self.unfinished.0.store(count, Ordering::Relaxed);
        self.unclaimed.0.store(count, Ordering::Release);
        self.workers.wake();
        self.help();
        let finished = || self.unfinished.0.load(Ordering::Acquire) == 0;
        while !finished() {
            self.leader.wait(self.spin_time, finished);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Claims one index of the current job and returns how many were left before, so at least 1.
    fn claim(&self) -> Option<usize> {
        self.unclaimed.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, |left| left.checked_sub(1)).ok()
    }

    /// Runs items of the current job until none is unclaimed.
    fn help(&self) {
        let Some(mut left) = self.claim() else { return };
        let mut done = 0;
        {
            // SAFETY: this thread has claimed an index and not yet reported it, so `lead` waits and keeps its job alive
            // and unchanged until the report below, which is after the last use of `job`. `job` is a local variable on
            // purpose: as a function's argument it would have to be alive until that function returns.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            loop {
                let index = job.count - left;
                // SAFETY: `job.call` belongs to `job.closure`, which `lead` borrows for as long as it waits.
                let run = || unsafe { (job.call)(job.closure, index) };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                    self.keep(panic);
                }
                done += 1;
                match self.claim() {
                    Some(next) => left = next,
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
