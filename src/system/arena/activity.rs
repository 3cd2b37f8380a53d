//! Whether the process computes, so that work in the background can wait until it does not.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Nothing computes if nothing has for so long. Between two tokens there is less.
const PAUSE: Duration = Duration::from_millis(20);

/// Computations that have begun.
static BEGUN: AtomicUsize = AtomicUsize::new(0);
/// Computations that have ended.
static ENDED: AtomicUsize = AtomicUsize::new(0);

/// A computation. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Computing(());

impl Computing {
    pub(crate) fn begin() -> Computing {
        BEGUN.fetch_add(1, Ordering::Relaxed);
        Computing(())
    }
}

impl Drop for Computing {
    fn drop(&mut self) {
        ENDED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Watches the computations.
#[derive(Debug)]
pub(super) struct Watch {
    /// Those that had begun at the last look.
    begun: usize,
    /// When the current pause began, at the latest.
    since: Instant,
}

impl Watch {
    pub(super) fn new() -> Watch {
        Watch { begun: BEGUN.load(Ordering::Relaxed), since: Instant::now() }
    }

    /// Whether nothing has been computed for a while, as far as the looks tell.
    pub(super) fn is_idle(&mut self) -> bool {
        let (ended, begun) = (ENDED.load(Ordering::Relaxed), BEGUN.load(Ordering::Relaxed));
        if ended != begun || begun != self.begun {
            *self = Watch { begun, since: Instant::now() };
            return false;
        }
        self.since.elapsed() >= PAUSE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_idle_while_something_computes() {
        let mut watch = Watch::new();
        let computing = Computing::begin();
        std::thread::sleep(PAUSE + PAUSE / 2);
        assert!(!watch.is_idle());
        drop(computing);
    }
}
