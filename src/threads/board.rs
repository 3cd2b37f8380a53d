//! The protocol between one leader and its workers: a notice board with room for one job.
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
//! says that the index is finished only when it has let go of the job. A claimed index that is not finished keeps
//! `unfinished` above zero, so the leader still waits, so its stack frame is alive and no other job has taken the
//! place. It does not matter how long a thread slept before its claim or from which job its last look at `unclaimed`
//! stems: a claim that succeeds is one of the job that hangs there now. Each success lowers `unclaimed` by one, so no
//! index is given twice.
//!
//! **Memory orderings.** The leader's `Release` store of `unclaimed` and the `Acquire` claims (all of them, since
//! read-modify-writes continue the store's release sequence) make `job`, and all that the leader wrote before, visible
//! to the items. The `Release` subtractions from `unfinished` and the leader's `Acquire` load of zero make everything
//! that the items wrote visible to the leader. Sleeping is `Bell`'s concern alone.
#![allow(unsafe_code, reason = "a job is borrowed from the leader's stack and run on threads that outlive the borrow")]

use std::any::Any;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a claim leads to: the closure (its type erased, so that one board serves all) and its number of indices.
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

/// On a cache line of its own (and clear of the neighbour that the prefetcher takes along), as all threads use it.
#[derive(Default)]
#[repr(align(128))]
struct OwnLine<T>(T);

/// Where the leader hangs jobs and the workers find them. One leader at a time, any number of workers.
pub(super) struct Board {
    /// Indices of the present job that nobody has claimed.
    unclaimed: OwnLine<AtomicUsize>,
    /// Indices of the present job that are not known to be finished.
    unfinished: OwnLine<AtomicUsize>,
    /// The present job; see the module's text for when it may be looked at.
    job: AtomicPtr<Job>,
    /// No more jobs will come: workers go home.
    closed: AtomicBool,
    /// What the first panicking item of the present job panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    workers: Bell,
    leader: Bell,
    /// How long to spin before sleeping.
    patience: Duration,
}

impl Board {
    /// A board without jobs. `patience`: how long its threads spin for each other before they sleep.
    pub(super) fn new(patience: Duration) -> Self {
        Board {
            unclaimed: OwnLine(AtomicUsize::new(0)),
            unfinished: OwnLine(AtomicUsize::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            closed: AtomicBool::new(false),
            panic: Mutex::new(None),
            workers: Bell::default(),
            leader: Bell::default(),
            patience,
        }
    }

    /// Sends the workers home for good.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.workers.ring();
    }

    /// A worker's life: takes part in all jobs until the board is closed. Never panics.
    pub(super) fn work(&self) {
        while !self.closed.load(Ordering::Acquire) {
            self.help();
            self.workers.wait(self.patience, || {
                self.unclaimed.0.load(Ordering::Relaxed) > 0 || self.closed.load(Ordering::Relaxed)
            });
        }
    }

    /// Runs `item` once for each of `0..count`, on this thread and on the workers that come in time, and returns when
    /// all have run. A panic in `item` goes on here, after that.
    ///
    /// # Safety
    ///
    /// Not to be called by two threads at once, nor from within an `item`.
    pub(super) unsafe fn lead<F: Fn(usize) + Sync>(&self, count: usize, item: &F) {
        if count == 0 {
            return; // Nobody would report the end.
        }
        // Nothing between here and the end of the wait may unwind, since `job` is on this stack frame.
        let job = Job::new(count, item);
        self.job.store(std::ptr::from_ref(&job).cast_mut(), Ordering::Relaxed);
        self.unfinished.0.store(count, Ordering::Relaxed);
        self.unclaimed.0.store(count, Ordering::Release);
        self.workers.ring();
        self.help();
        let finished = || self.unfinished.0.load(Ordering::Acquire) == 0;
        while !finished() {
            self.leader.wait(self.patience, finished);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Takes one index of the present job: how many were left before, so at least 1.
    fn claim(&self) -> Option<usize> {
        self.unclaimed.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, |left| left.checked_sub(1)).ok()
    }

    /// Runs items of the present job for as long as there are unclaimed ones.
    fn help(&self) {
        let Some(mut left) = self.claim() else { return };
        let mut done = 0;
        {
            // SAFETY: this thread has claimed an index and not yet reported it, so `lead` waits and keeps its job alive
            // and unchanged until the report below, which is after the last use of `job`. That is a local variable on
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
            self.leader.ring();
        }
    }

    /// Keeps the first panic for the leader.
    fn keep(&self, panic: Box<dyn Any + Send>) {
        let mut slot = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        match *slot {
            None => *slot = Some(panic),
            // Leaked, because dropping it may run a caller's code that panics again, and then nobody would report.
            Some(_) => std::mem::forget(panic),
        }
    }
}

/// Where threads sleep until something is due, made so that `ring` is next to free when nobody sleeps.
#[derive(Default)]
struct Bell {
    /// Somebody may have gone to sleep since the last ring.
    asleep: OwnLine<AtomicBool>,
    lock: Mutex<()>,
    rung: Condvar,
}

impl Bell {
    /// Waits until `due()`, spinning for `patience` and then sleeping. May return early: ask again.
    fn wait(&self, patience: Duration, due: impl Fn() -> bool) {
        if due() {
            return;
        }
        if !patience.is_zero() {
            let start = Instant::now();
            while start.elapsed() < patience {
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
        // With the fence in `ring`: either we see below what has become due, or `ring` sees that we sleep.
        fence(Ordering::SeqCst);
        if !due() {
            drop(self.rung.wait(guard));
        }
    }

    /// Wakes all that sleep. To be called after making something due.
    fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.0.load(Ordering::Relaxed) {
            // Whoever raised the flag holds the lock until it really sleeps: after holding it once we miss nobody.
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.asleep.0.store(false, Ordering::Relaxed);
            drop(guard);
            self.rung.notify_all();
        }
    }
}
