//! A value that each forked process makes anew.

use std::sync::OnceLock;

/// A value of one process. A process forked from it gets a new one.
///
/// A fork copies a lock as it is, but only one thread: nothing releases what the others held.
#[derive(Debug)]
pub(crate) struct PerProcess<T> {
    pid: u32,
    value: T,
    /// The value of the processes forked from this one. Never set in the process `pid` itself.
    after_fork: OnceLock<Box<PerProcess<T>>>,
}

impl<T: Default> PerProcess<T> {
    /// The value of this process.
    pub(crate) fn get(&self) -> &T {
        self.of_process(std::process::id())
    }

    fn of_process(&self, pid: u32) -> &T {
        let mut found = self;
        while found.pid != pid {
            found = found.after_fork.get_or_init(|| Box::new(PerProcess::new(pid)));
        }
        &found.value
    }

    fn new(pid: u32) -> Self {
        PerProcess { pid, value: T::default(), after_fork: OnceLock::new() }
    }
}

impl<T: Default> Default for PerProcess<T> {
    fn default() -> Self {
        PerProcess::new(std::process::id())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_lock_that_another_process_holds_is_free_here() {
        let lock = PerProcess::<Mutex<u32>>::default();
        let held = lock.get().lock();
        assert!(lock.get().try_lock().is_err());
        let child = lock.of_process(std::process::id() + 1);
        *child.try_lock().expect("a lock of its own") = 7;
        assert_eq!(*lock.of_process(std::process::id() + 1).try_lock().expect("the same"), 7);
        drop(held);
        assert!(lock.get().try_lock().is_ok_and(|value| *value == 0));
    }
}
