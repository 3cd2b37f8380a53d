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
//! Each thread has its own `unclaimed`, for its share of the indices. A thread claims those of its share first, and then those that
//! other threads have left, of its NUMA node first. So a thread mostly reads the same part of a matrix for every token, and while it
//! waits, it can prefetch what it will read next.
//!
//! **Why it is sound.** `job` points to the leader's stack. A thread reads it only after it has claimed an index, and
//! reports that index as finished only after its last use of the job. A claimed, unfinished index keeps `unfinished` above
//! zero, so the leader is still waiting, its stack frame is alive and the slot still holds the same job. It does not
//! matter how long a thread slept before its claim, or from which job its last look at `unclaimed` dates: a claim that
//! succeeds is a claim of the job in the slot. Each success lowers `unclaimed` by one, so no index is given out twice.
//! `unfinished` counts all indices before the first `unclaimed` is set, so the same holds while the others are still
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
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::lookahead::Span;

/// How long a thread yields to others before it sleeps. A thread that sleeps takes so long to wake, in virtual machines most of all, that
/// a few of them cost a stage more than its work. Others that are ready run at once while it yields.
const YIELD_TIME: Duration = Duration::from_millis(1);
/// Bytes of a cache line.
const LINE: usize = 64;
/// Lines that a thread prefetches between two looks at what it waits for.
const LINES: usize = 4;

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

/// What belongs to one thread.
#[derive(Default)]
struct Share {
    /// Indices of the current job that no thread has claimed.
    unclaimed: AtomicUsize,
    /// What the thread is expected to read in the next stage and has not prefetched.
    next: AtomicUsize,
    next_bytes: AtomicUsize,
    /// The NUMA node of the thread.
    node: usize,
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
    /// One for each thread, by node. The leader's is the first.
    shares: Box<[OwnLine<Share>]>,
    /// How a line is prefetched. Only the kernels know the instruction.
    prefetch_line: OnceLock<fn(usize)>,
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
    /// An empty slot for threads on these nodes, in ascending order. Threads that wait for each other spin for `spin_time` before they
    /// yield and sleep. If it is zero, they sleep at once.
    pub(super) fn new(nodes: impl IntoIterator<Item = usize>, spin_time: Duration) -> Self {
        JobSlot {
            shares: nodes.into_iter().map(|node| OwnLine(Share { node, ..Share::default() })).collect(),
            prefetch_line: OnceLock::new(),
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
        self.shares.last().map_or(1, |last| last.0.node + 1)
    }

    /// Sets what each thread prefetches while it waits, nothing if `spans` is empty: line by line with `prefetch_line`, which is given an
    /// address.
    pub(super) fn set_next(&self, spans: &[Span], prefetch_line: fn(usize)) {
        self.prefetch_line.get_or_init(|| prefetch_line);
        for (share, span) in self.shares.iter().zip(spans.iter().copied().chain(std::iter::repeat(Span::default()))) {
            share.0.next.store(span.address, Ordering::Relaxed);
            share.0.next_bytes.store(span.bytes, Ordering::Relaxed);
        }
    }

    /// Prefetches some of what the thread with this share is expected to read next. Returns whether it did.
    pub(super) fn prefetch(&self, share: usize) -> bool {
        // If the leader sets others meanwhile, lines that nobody needs may be prefetched.
        let Share { next, next_bytes, .. } = &self.shares[share].0;
        let (address, left) = (next.load(Ordering::Relaxed), next_bytes.load(Ordering::Relaxed));
        let (Some(prefetch_line), true) = (self.prefetch_line.get(), left > 0) else { return false };
        (0..LINES).for_each(|line| prefetch_line(address.wrapping_add(line * LINE)));
        next.store(address.wrapping_add(LINES * LINE), Ordering::Relaxed);
        next_bytes.store(left.saturating_sub(LINES * LINE), Ordering::Relaxed);
        true
    }

    /// What each thread reads in a stage of `count` items that read what `of` says.
    pub(super) fn spans(&self, count: usize, of: impl Fn(usize) -> Span) -> impl Iterator<Item = Span> {
        (0..self.shares.len()).map(move |share| {
            let first = share.checked_sub(1).map_or(0, |before| self.end(before, count));
            if first < self.end(share, count) { of(first) } else { Span::default() }
        })
    }

    /// Makes the workers exit.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.workers.wake();
    }

    /// What the worker thread with this share runs: takes part in all jobs until the slot is closed. Never panics.
    pub(super) fn work(&self, share: usize) {
        let is_left = |share: &OwnLine<Share>| share.0.unclaimed.load(Ordering::Relaxed) > 0;
        // Most often the thread's own share has the first index that it finds.
        let due =
            || is_left(&self.shares[share]) || self.shares.iter().any(is_left) || self.closed.load(Ordering::Relaxed);
        while !self.closed.load(Ordering::Acquire) {
            self.help(share);
            self.workers.wait(self.spin_time, || self.prefetch(share), due);
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
            self.shares[share].0.unclaimed.store(end - first, Ordering::Release);
            first = end;
        }
        self.workers.wake();
        self.help(self.shares.iter().position(|share| share.0.node == node).unwrap_or(0));
        let finished = || self.unfinished.0.load(Ordering::Acquire) == 0;
        while !finished() {
            self.leader.wait(self.spin_time, || self.prefetch(0), finished);
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// The end of a share of `count` indices. They are equal, so that the same part of any range always belongs to the same thread.
    fn end(&self, share: usize, count: usize) -> usize {
        let threads = self.shares.len();
        count / threads * (share + 1) + count % threads * (share + 1) / threads
    }

    /// Claims one index of the current job: of this share if any is left, then of those of its node, then of any.
    fn claim(&self, share: usize) -> Option<Claim> {
        let one = |left: usize| left.checked_sub(1);
        let node = self.shares[share].0.node;
        let others = || (share + 1..self.shares.len()).chain(0..share);
        let near = others().filter(|other| self.shares[*other].0.node == node);
        let far = others().filter(|other| self.shares[*other].0.node != node);
        std::iter::once(share).chain(near).chain(far).find_map(|share| {
            let left = self.shares[share].0.unclaimed.fetch_update(Ordering::Acquire, Ordering::Relaxed, one).ok()?;
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
                match self.claim(share) {
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
    /// Waits until `due()`: does `idly` while that says that it has more to do, spins for `spin_time`, yields, and then sleeps. If
    /// `spin_time` is zero, it sleeps at once. May return early: callers check again.
    fn wait(&self, spin_time: Duration, idly: impl Fn() -> bool, due: impl Fn() -> bool) {
        if due() {
            return;
        }
        if !spin_time.is_zero() {
            while idly() {
                if due() {
                    return;
                }
            }
            let start = Instant::now();
            loop {
                for _ in 0..16 {
                    spin_loop();
                    if due() {
                        return;
                    }
                }
                match start.elapsed() {
                    waited if waited < spin_time => {}
                    waited if waited < spin_time + YIELD_TIME => std::thread::yield_now(),
                    _ => break,
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
