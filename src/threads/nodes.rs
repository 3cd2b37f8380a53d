//! NUMA nodes: groups of CPUs, each with its own memory.
//!
//! A core reads the memory of another node more slowly, and the links between nodes limit all cores together. The system takes
//! each page from the node of the thread that first writes to it. So the threads of a pool are spread over the nodes and stay
//! there, and each node computes the same part of every range of items: its threads pack a part of a matrix, and multiply it.

use std::collections::BTreeSet;
use std::ffi::OsStr;

use super::count::available_cpus;
use crate::{Error, Result};

#[cfg(any(target_os = "linux", test))]
mod linux;

/// The environment variable that turns the placement on nodes off, or divides the CPUs into made-up nodes.
const VARIABLE: &str = "NYBBLE_NUMA";
/// The largest number of made-up nodes.
const MOST: usize = 64;

/// The CPUs of each node that the process may use. At least one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Nodes {
    /// Empty if they are not known, which takes a system of one node.
    cpus: Vec<BTreeSet<usize>>,
}

impl Nodes {
    /// Those of this machine, or what the variable `NYBBLE_NUMA` says: a single one if it is `off`, and for a number, as many
    /// made-up ones with about the same number of CPUs each.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the variable is something else than `off`, `on`, a number from 1 to 64, or empty.
    pub(super) fn of_system() -> Result<Nodes> {
        let cpus = cpus_of_nodes();
        Ok(Nodes::new(match choice(std::env::var_os(VARIABLE).as_deref())? {
            Choice::System => cpus,
            Choice::One => vec![],
            Choice::MadeUp(count) => {
                let mut all: Vec<usize> = cpus.into_iter().flatten().collect();
                if all.is_empty() {
                    all.extend(0..available_cpus());
                }
                all.chunks(all.len().div_ceil(count)).map(|cpus| cpus.iter().copied().collect()).collect()
            }
        }))
    }

    /// Nodes with these CPUs. Those without any do not count.
    pub(super) fn new(mut cpus: Vec<BTreeSet<usize>>) -> Nodes {
        cpus.retain(|cpus| !cpus.is_empty());
        Nodes { cpus }
    }

    /// The node of each of `threads` threads, in ascending order: in proportion to the CPUs.
    pub(super) fn of_threads(&self, threads: usize) -> Vec<usize> {
        let all: usize = self.cpus.iter().map(BTreeSet::len).sum();
        let ends: Vec<usize> = self
            .cpus
            .iter()
            .scan(0, |sum, cpus| {
                *sum += cpus.len();
                Some(*sum)
            })
            .collect();
        (0..threads).map(|thread| ends.iter().take_while(|end| **end <= thread * all / threads).count()).collect()
    }

    /// Keeps the calling thread on the CPUs of a node, if there are several. Where the system refuses, the thread runs anywhere.
    pub(super) fn pin(&self, node: usize) {
        #[cfg(target_os = "linux")]
        if self.cpus.len() > 1 {
            crate::system::affinity::keep_on(&self.cpus[node]);
        }
        let _ = node;
    }

    /// The node that the calling thread is on now.
    pub(super) fn current(&self) -> usize {
        #[cfg(target_os = "linux")]
        if self.cpus.len() > 1 {
            let cpu = crate::system::affinity::current_cpu();
            return self.cpus.iter().position(|cpus| cpu.is_some_and(|cpu| cpus.contains(&cpu))).unwrap_or(0);
        }
        0
    }
}

/// What the variable asks for.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    System,
    One,
    MadeUp(usize),
}

fn choice(variable: Option<&OsStr>) -> Result<Choice> {
    let Some(text) = variable else { return Ok(Choice::System) };
    match text.to_str().map(str::trim) {
        Some("" | "on") => Ok(Choice::System),
        Some("off") => Ok(Choice::One),
        number => match number.and_then(|number| number.parse().ok()) {
            Some(count) if (1..=MOST).contains(&count) => Ok(Choice::MadeUp(count)),
            _ => Err(Error::argument(VARIABLE, text.display(), format_args!("on, off or a number from 1 to {MOST}"))),
        },
    }
}

/// The CPUs of each node that the process may use. Empty if the system does not say.
fn cpus_of_nodes() -> Vec<BTreeSet<usize>> {
    #[cfg(target_os = "linux")]
    return linux::cpus_of_nodes(std::path::Path::new("/"));
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(cpus: &[&[usize]]) -> Nodes {
        Nodes::new(cpus.iter().map(|cpus| cpus.iter().copied().collect()).collect())
    }

    #[test]
    fn threads_are_spread_over_nodes_in_proportion_to_their_cpus() {
        assert_eq!(nodes(&[&[0, 1], &[2, 3]]).of_threads(4), [0, 0, 1, 1]);
        assert_eq!(nodes(&[&[0, 1], &[2, 3]]).of_threads(2), [0, 1]);
        assert_eq!(nodes(&[&[0, 1], &[2, 3]]).of_threads(1), [0]);
        assert_eq!(nodes(&[&[0], &[], &[2, 3, 7]]).of_threads(4), [0, 1, 1, 1]);
        assert_eq!(nodes(&[&[0, 1], &[2, 3]]).of_threads(7), [0, 0, 0, 0, 1, 1, 1]);
        assert_eq!(nodes(&[]).of_threads(3), [0, 0, 0]);
    }

    #[test]
    fn the_variable_is_on_off_a_number_or_an_error() {
        let of = |text: &str| choice(Some(OsStr::new(text)));
        assert_eq!(choice(None).unwrap(), Choice::System);
        for text in ["", "on", " on\n"] {
            assert_eq!(of(text).unwrap(), Choice::System, "{text:?}");
        }
        assert_eq!(of("off").unwrap(), Choice::One);
        assert_eq!([of("1").unwrap(), of("64").unwrap()], [Choice::MadeUp(1), Choice::MadeUp(64)]);
        for bad in ["0", "65", "-1", "yes", "1.5"] {
            let message = of(bad).unwrap_err().to_string();
            assert_eq!(message, format!("NYBBLE_NUMA: found {bad}, expected on, off or a number from 1 to 64"));
        }
    }

    #[test]
    fn a_thread_stays_on_its_node() {
        let all: Vec<_> = cpus_of_nodes().into_iter().flatten().collect();
        let Some((last, others)) = all.split_last().filter(|(_, others)| !others.is_empty()) else { return };
        let nodes = nodes(&[others, &[*last]]);
        for node in [1, 0, 1] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    nodes.pin(node);
                    assert!((0..100).all(|_| nodes.current() == node));
                });
            });
        }
    }
}
