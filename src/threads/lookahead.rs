//! What the next stages will read, so that threads that wait can prefetch it.
//!
//! A token takes the same matrices in the same order as the token before it. So a pool remembers what each stage of a run has read, and
//! expects the same of the next run, once two runs in a row have read the same there. Experts are rarely expected, as others are chosen
//! for each token.

/// Memory that a thread reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Span {
    /// The address of the first byte.
    pub(crate) address: usize,
    pub(crate) bytes: usize,
}

/// What the stages of a run read, in order.
#[derive(Debug, Default)]
pub(super) struct Lookahead {
    stages: Vec<Stage>,
    /// Stages of this run so far.
    done: usize,
}

/// What a stage reads.
#[derive(Debug)]
struct Stage {
    /// The number of items.
    count: usize,
    /// What the first item reads.
    first: Span,
    /// What each thread reads.
    threads: Vec<Span>,
    /// Whether two runs in a row have read it.
    is_expected: bool,
}

impl Lookahead {
    /// Stages of a run that are remembered.
    const MOST: usize = 4096;

    /// Begins a run.
    pub(super) fn begin(&mut self) {
        self.done = 0;
    }

    /// Takes note of what the next stage reads: `count` items, the first of them `first`, and each thread what `threads` says.
    /// Returns what each thread is expected to read in the stage after it, or nothing. After the last stage, that is the first one of the
    /// next run.
    pub(super) fn note(&mut self, count: usize, first: Span, threads: impl Iterator<Item = Span>) -> &[Span] {
        if self.done == Self::MOST {
            return &[];
        }
        match self.stages.get_mut(self.done) {
            Some(stage) if (stage.count, stage.first) == (count, first) => stage.is_expected = true,
            Some(stage) => {
                // In place: a step allocates nothing.
                (stage.count, stage.first, stage.is_expected) = (count, first, false);
                stage.threads.clear();
                stage.threads.extend(threads);
            }
            None => self.stages.push(Stage { count, first, threads: threads.collect(), is_expected: false }),
        }
        self.done += 1;
        let following = self.stages.get(self.done).or(self.stages.first());
        following.filter(|stage| stage.is_expected).map_or(&[], |stage| &stage.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(lookahead: &mut Lookahead, address: usize) -> Option<usize> {
        let span = Span { address, bytes: 64 };
        lookahead.note(2, span, [span].into_iter()).first().map(|span| span.address)
    }

    #[test]
    fn a_run_is_expected_to_read_what_two_runs_before_it_have_read() {
        let mut lookahead = Lookahead::default();
        let mut run = |addresses: &[usize]| {
            lookahead.begin();
            addresses.iter().map(|address| note(&mut lookahead, *address)).collect::<Vec<_>>()
        };
        assert_eq!(run(&[1, 2, 3]), [None; 3]);
        assert_eq!(run(&[1, 2, 3]), [None, None, Some(1)]);
        assert_eq!(run(&[1, 2, 3]), [Some(2), Some(3), Some(1)]);
        // What differs from run to run, such as experts, is not expected.
        assert_eq!(run(&[1, 7, 3]), [Some(2), Some(3), Some(1)]);
        assert_eq!(run(&[1, 8, 3]), [None, Some(3), Some(1)]);
        assert_eq!(run(&[1, 9, 3]), [None, Some(3), Some(1)]);
        // Another run, which has fewer stages, is learned.
        run(&[4, 5]);
        run(&[4, 5]);
        assert_eq!(run(&[4, 5]), [Some(5), Some(3)]);
    }

    #[test]
    fn what_is_remembered_has_a_limit() {
        let mut lookahead = Lookahead::default();
        for _ in 0..3 {
            lookahead.begin();
            (0..2 * Lookahead::MOST).for_each(|address| {
                note(&mut lookahead, address);
            });
        }
        assert_eq!(lookahead.stages.len(), Lookahead::MOST);
        lookahead.begin();
        let expected = (0..2 * Lookahead::MOST).filter(|address| note(&mut lookahead, *address).is_some()).count();
        assert_eq!(expected, Lookahead::MOST);
    }
}
