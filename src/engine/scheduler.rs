//! Continuous batching: sequences join and leave between steps, and each step computes rows of all of them.
//!
//! A step computes, in this order: the pending token of every sequence that decodes, draft tokens after it, and then
//! prompt tokens up to the [`PrefillBudget`], half of them for the oldest prompt and the rest shared by the others.
//! None of this changes the output: a row is bit-identical in any batch, so every completion is bit-identical to running it alone.
//!
//! Sequences share KV cache pages through [`Prefixes`]. When the pages exceed the memory limit, pages that no sequence uses
//! are evicted. If that is not enough, the youngest sequence is preempted and computed again later. The last one fails.

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::disk_cache::DiskCache;
use super::prefill_budget::PrefillBudget;
use super::prefix::Prefixes;
use super::sequence::Sequence;
use super::speculation::{MAX_DRAFT, Speculation};
use crate::error::{Error, Result};
use crate::model::{Logits, Model};

mod drafts;
mod entry;
mod flights;
mod restore;
mod steps;

use drafts::Drafter;
pub use entry::Event;
use entry::{Entry, Interrupted};
use flights::Flight;
use restore::{Bounds, GRACE, Restores};

/// Limits and features of a scheduler.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SchedulerOptions {
    /// Largest number of sequences in a step, at least 1. Others wait.
    pub max_batch: usize,
    /// Limit of the KV cache in bytes, the prefix cache included.
    pub cache_bytes: usize,
    /// Whether prompts reuse keys and values of earlier sequences with the same prefix.
    pub prefix_cache: bool,
    /// Largest number of prompt tokens in a step, at least 1. `None` chooses it from measurements, so that a step takes less
    /// than four times as long as one without prompt tokens.
    pub prefill_chunk: Option<usize>,
    /// Whether to use draft tokens, and where they come from.
    pub speculation: Speculation,
    /// Largest number of draft tokens of a sequence in a step, 1 to 8; with [`Speculation::Mtp`], their number. `None` chooses
    /// it by how many were accepted.
    pub draft_tokens: Option<usize>,
    /// A folder that keeps the prefix cache after the end of the process. Needs `prefix_cache`.
    pub cache_dir: Option<PathBuf>,
    /// Limit of the files in `cache_dir` in bytes. The least recently used ones are removed.
    pub cache_dir_bytes: u64,
}

/// The default of [`SchedulerOptions::cache_dir_bytes`].
const CACHE_DIR_BYTES: u64 = 10_000_000_000;

impl Default for SchedulerOptions {
    fn default() -> SchedulerOptions {
        SchedulerOptions {
            max_batch: 16,
            cache_bytes: usize::MAX,
            prefix_cache: true,
            prefill_chunk: None,
            speculation: Speculation::Off,
            draft_tokens: None,
            cache_dir: None,
            cache_dir_bytes: CACHE_DIR_BYTES,
        }
    }
}

setters!(SchedulerOptions {
    with_max_batch(max_batch: usize),
    with_cache_bytes(cache_bytes: usize),
    with_prefix_cache(prefix_cache: bool),
    with_prefill_chunk(prefill_chunk: impl Into<Option<usize>>),
    with_speculation(speculation: Speculation),
    with_draft_tokens(draft_tokens: impl Into<Option<usize>>),
    with_cache_dir(cache_dir: impl Into<Option<PathBuf>>),
    with_cache_dir_bytes(cache_dir_bytes: u64),
});

/// Counts since the scheduler was created, and its current state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that wait for a slot or for memory.
    pub waiting: usize,
    /// Pages in the prefix cache, those in use included.
    pub cached_pages: usize,
    /// Bytes of all keys and values now.
    pub cache_bytes: usize,
    /// Steps computed.
    pub steps: usize,
    /// Prompt tokens computed. Those of a preempted sequence are computed and counted again.
    pub prompt_tokens: usize,
    /// Prompt tokens that were not computed, because their keys and values were in the prefix cache.
    pub reused_tokens: usize,
    /// Draft tokens computed.
    pub drafted_tokens: usize,
    /// Draft tokens accepted.
    pub accepted_tokens: usize,
    /// Sequences with keys and values from [`SchedulerOptions::cache_dir`].
    pub disk_cache_hits: usize,
    /// Tokens whose keys and values were read from there.
    pub restored_tokens: usize,
    /// Files there that could not be read or written, or were read too slowly.
    pub disk_cache_errors: usize,
    /// Bytes of the files there.
    pub disk_cache_bytes: u64,
}

/// Computes many sequences together, step by step.
///
/// ```no_run
/// # use std::sync::Arc;
/// use nybble::engine::{Scheduler, SchedulerOptions, Sequence, sampler::SamplingOptions};
/// use nybble::model::{LoadOptions, Model};
///
/// let model = Arc::new(Model::load("model.gguf", &LoadOptions::default())?);
/// let mut scheduler = Scheduler::new(model.clone(), None, SchedulerOptions::default())?;
/// for prompt in [[1, 2, 3], [1, 2, 4]] {
///     scheduler.submit(Sequence::new(&model, &prompt, SamplingOptions::default())?, 64)?;
/// }
/// while !scheduler.is_idle() {
///     for event in scheduler.step(&|| false)? {
///         println!("{}: {}", event.id, event.result?.token);
///     }
/// }
/// # Ok::<(), nybble::Error>(())
/// ```
#[derive(Debug)]
pub struct Scheduler {
    model: Arc<Model>,
    options: SchedulerOptions,
    drafter: Drafter,
    /// Oldest first.
    running: Vec<Entry>,
    waiting: VecDeque<Entry>,
    /// What waiting sequences get from disk. Dropped before the prefix cache, whose reader waits until pages are received.
    restores: Restores,
    disk_patience: Duration,
    prefixes: Prefixes,
    prefill: PrefillBudget,
    /// Steps that are begun, oldest first: one, or one for each stage of a pipeline.
    flights: VecDeque<Flight>,
    /// Steps begun.
    begun: u64,
    /// How often the stages of a pipeline had lost their sessions.
    epoch: u64,
    logits: Vec<f32>,
    last: u64,
    counts: Stats,
}

impl Scheduler {
    /// A scheduler without sequences. Draft tokens come from the model `draft`; if it is `None`, from the model's own head for
    /// multi-token prediction or from the sequences themselves, as [`SchedulerOptions::speculation`] says.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range, a draft model whose vocabulary has another size, or
    /// [`Speculation::Mtp`] with a draft model or for a model without a head; those of [`Model::load`] where the head is loaded.
    pub fn new(model: Arc<Model>, draft: Option<Arc<Model>>, options: SchedulerOptions) -> Result<Scheduler> {
        if options.max_batch == 0 {
            return Err(Error::argument("max_batch", 0, "at least 1"));
        }
        if options.prefill_chunk == Some(0) {
            return Err(Error::argument("prefill_chunk", 0, "at least 1"));
        }
        if let Some(draft) = &draft
            && draft.vocabulary() != model.vocabulary()
        {
            let expected = format!("{}, as the model has", model.vocabulary());
            return Err(Error::argument("draft", format_args!("{} tokens", draft.vocabulary()), expected));
        }
        if let Some(count) = options.draft_tokens.filter(|count| !(1..=MAX_DRAFT).contains(count)) {
            return Err(Error::argument("draft_tokens", count, format_args!("1 to {MAX_DRAFT}")));
        }
        if options.cache_dir.is_some() && !options.prefix_cache {
            return Err(Error::argument("cache_dir", "a folder, but no prefix_cache", "prefix_cache or no folder"));
        }
        if options.cache_dir.is_some() && model.is_pipeline() {
            return Err(Error::argument(
                "cache_dir",
                "a folder for a pipeline",
                "no folder: its stages keep the pages",
            ));
        }
        let epoch = model.epoch();
        let drafter = Drafter::new(&model, draft, options.speculation, options.draft_tokens)?;
        let prefixes = Prefixes::open(&model, options.cache_dir.as_deref(), options.cache_dir_bytes)?;
        Ok(Scheduler {
            model,
            drafter,
            prefill: PrefillBudget::new(options.prefill_chunk),
            options,
            running: Vec::new(),
            waiting: VecDeque::new(),
            prefixes,
            restores: Restores::default(),
            disk_patience: GRACE,
            flights: VecDeque::new(),
            begun: 0,
            epoch,
            logits: Vec::new(),
            last: 0,
            counts: Stats::default(),
        })
    }

    /// Takes a sequence, new or partly computed, to sample at most `limit` tokens. It leaves after that, after a token that ends
    /// it, or when the context is full. Its last event hands it back, with its session. Returns its id.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `limit` of 0, or a sequence that has ended, has no pending tokens or is of another model.
    pub fn submit(&mut self, mut sequence: Sequence, limit: usize) -> Result<u64> {
        if limit == 0 {
            return Err(Error::argument("limit", 0, "at least 1"));
        }
        if !sequence.session.is_of(&self.model) {
            return Err(Error::argument("sequence", "a sequence of another model", "a sequence of this model"));
        }
        sequence.check_continues()?;
        if sequence.pending.is_empty() {
            return Err(Error::argument("sequence", "no pending tokens", "at least one"));
        }
        if sequence.searches() {
            sequence.session.drop_head(); // Beams have no draft tokens.
        } else {
            self.drafter.prepare(&mut sequence.session)?;
        }
        if sequence.session.is_lost() {
            sequence.restart();
        }
        self.prefixes.add_root(&sequence.session);
        self.last += 1;
        // The last token needs no position of its own: it is sampled but never computed.
        let remaining = limit.min(self.model.context() - sequence.tokens.len() + 1);
        self.waiting.push_back(Entry::new(self.last, sequence, remaining));
        Ok(self.last)
    }

    /// Removes a sequence and returns it; its slot is free for the next step. `None` when it has left already.
    pub fn cancel(&mut self, id: u64) -> Option<Sequence> {
        if let Some(at) = self.running.iter().position(|entry| entry.id == id) {
            let mut entry = self.running.remove(at);
            self.prefixes.touch(entry.block);
            if entry.flight.is_some() {
                entry.reset(); // Nobody will see the results of its step.
            }
            self.note_activity();
            return Some(entry.into_sequence());
        }
        let at = self.waiting.iter().position(|entry| entry.id == id)?;
        self.restores.cancel(id);
        self.waiting.remove(at).map(Entry::into_sequence)
    }

    /// A sequence that has not left.
    pub fn sequence(&self, id: u64) -> Option<&Sequence> {
        let mut entries = self.running.iter().chain(&self.waiting);
        entries.find(|entry| entry.id == id).map(|entry| &entry.sequence)
    }

    /// Whether there is nothing to compute.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Counts and current state.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            cached_pages: self.prefixes.len(),
            cache_bytes: self.bytes(self.prefixes.bytes()),
            disk_cache_bytes: self.prefixes.disk().map_or(0, DiskCache::bytes),
            disk_cache_hits: self.restores.hits,
            restored_tokens: self.restores.tokens,
            disk_cache_errors: self.prefixes.disk().map_or(0, DiskCache::errors),
            ..self.counts
        }
    }

    /// What has failed since the last call without an effect on any sequence, such as writing to
    /// [`cache_dir`](SchedulerOptions::cache_dir). Each kind of failure is reported once.
    pub fn take_reports(&mut self) -> Vec<String> {
        self.prefixes.take_reports()
    }

    /// Writes the prefix cache to [`cache_dir`](SchedulerOptions::cache_dir) as far as it is not there, for at most `limit`. Pages
    /// that several sequences have used, and those of long prompts, are written earlier.
    pub fn save_prefixes(&mut self, limit: Duration) {
        self.prefixes.save_all(limit);
    }

    /// Waits until the pages that are being written to [`cache_dir`](SchedulerOptions::cache_dir) are there, for at most `limit`.
    #[doc(hidden)]
    pub fn flush_disk_cache(&self, limit: Duration) {
        if let Some(disk) = self.prefixes.disk() {
            disk.flush(limit);
        }
    }

    /// Sets how much longer than computing them reading pages from [`cache_dir`](SchedulerOptions::cache_dir) may take.
    #[doc(hidden)]
    pub fn set_disk_patience(&mut self, patience: Duration) {
        self.disk_patience = patience;
    }

    /// Lets the reader of [`cache_dir`](SchedulerOptions::cache_dir) wait, as a disk that does not answer does, or continue.
    #[doc(hidden)]
    pub fn hold_disk_reader(&self, is_held: bool) {
        self.prefixes.disk().into_iter().for_each(|disk| disk.hold_reader(is_held));
    }

    /// Computes one step and returns the tokens sampled. Does nothing when there are no sequences, and little while the only ones
    /// wait for pages from [`cache_dir`](SchedulerOptions::cache_dir).
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `interrupted`, which is called between layers, returns true. The scheduler and all
    /// sequences are then as they were before. An error of one sequence is in its event, and the others continue.
    pub fn step(&mut self, interrupted: Interrupted<'_>) -> Result<Vec<Event>> {
        let events = self.compute(interrupted);
        self.note_activity();
        events
    }

    /// Tells the prefix cache whether sequences wait for the CPU, which writing would slow down.
    fn note_activity(&self) {
        if let Some(disk) = self.prefixes.disk() {
            disk.set_busy(!self.is_idle());
        }
    }

    /// Computes one step. In a pipeline, as many are begun as there are stages, and the oldest one ends.
    fn compute(&mut self, interrupted: Interrupted<'_>) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.keep_up();
        self.admit(interrupted)?;
        loop {
            let launched = self.launch_all(&mut events, interrupted);
            match launched.and_then(|()| self.land(&mut events, interrupted)) {
                Ok(true) => return Ok(events),
                Ok(false) => {}
                Err(error @ Error::StageLost(_)) => self.recover(error)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Bytes of keys and values, with `shared` bytes in the prefix cache.
    fn bytes(&self, shared: usize) -> usize {
        self.running.iter().map(Entry::bytes).fold(shared, usize::saturating_add)
    }

    /// Admits waiting sequences while there are slots, and memory for their prompts: in order of arrival, except that those without
    /// pages on disk do not wait for those of others.
    fn admit(&mut self, interrupted: Interrupted<'_>) -> Result<()> {
        while self.running.len() < self.options.max_batch
            && let Some(at) = self.ready(interrupted)?
            && let Some(mut entry) = self.waiting.remove(at)
        {
            let reused = if self.options.prefix_cache { entry.reuse(&self.prefixes) } else { 0 };
            self.running.push(entry);
            let pending = |entry: &Entry| entry.sequence.session.kept_bytes_for(entry.sequence.pending.len());
            let pending = self.running.iter().map(pending).fold(0, usize::saturating_add);
            let needed = self.bytes(self.prefixes.bytes_in_use()).saturating_add(pending);
            if needed > self.options.cache_bytes
                && self.running.len() > 1
                && let Some(mut entry) = self.running.pop()
            {
                entry.reset();
                self.waiting.insert(at, entry);
                break;
            }
            self.counts.reused_tokens += reused;
        }
        Ok(())
    }

    /// The position of the first waiting sequence that has what it can reuse from disk. `None` if all must wait for that.
    fn ready(&mut self, interrupted: Interrupted<'_>) -> Result<Option<usize>> {
        if self.waiting.is_empty() || self.options.cache_dir.is_none() {
            return Ok((!self.waiting.is_empty()).then_some(0));
        }
        let space = self.options.cache_bytes.saturating_sub(self.bytes(0));
        let bounds = Bounds::new(space, self.prefill.row_seconds(), &self.model, self.disk_patience);
        let alone = self.running.is_empty().then_some(interrupted);
        self.restores.ready(&mut self.waiting, &mut self.prefixes, &bounds, alone)
    }

    /// Decides how many tokens of each sequence the step computes.
    fn plan(&mut self) {
        let chosen = self.running.iter().filter(|entry| entry.is_chosen);
        let mut budget = self.prefill.rows(chosen.map(Entry::decoding_rows).sum());
        let in_flight = self.running.iter().filter(|entry| entry.flight.is_some());
        let mut computing: HashSet<_> = in_flight.filter_map(Entry::awaited_block).collect();
        let mut prompts = Vec::new();
        for (i, entry) in self.running.iter_mut().enumerate().filter(|(_, entry)| entry.is_chosen) {
            if self.options.prefix_cache && !entry.is_decoding() {
                self.counts.reused_tokens += entry.reuse(&self.prefixes);
            }
            // A sequence with one pending token by now decodes in this step: its draft tokens follow that token.
            entry.rows = entry.decoding_rows();
            if entry.rows == 0 {
                // A block that another sequence computes in this step can be shared after it.
                let block = entry.awaited_block().filter(|_| self.options.prefix_cache);
                if block.is_none_or(|block| computing.insert(block)) {
                    prompts.push(i);
                }
            }
        }
        // The oldest prompt gets half, so that prompts finish one after the other. The others share the rest, so that a short
        // one does not wait for a long one. What they leave unused goes to the oldest.
        let half = budget.div_ceil(2);
        let share = (budget - half) / prompts.len().saturating_sub(1).max(1);
        let shares = std::iter::once(half).chain(std::iter::repeat(share)).take(prompts.len());
        for (i, share) in prompts.iter().zip(shares).chain(prompts.iter().zip(std::iter::repeat(usize::MAX))) {
            let entry = &mut self.running[*i];
            let left = entry.sequence.pending.len() - entry.rows;
            let most = if self.options.prefix_cache { entry.rows_to_snapshot(entry.rows + left) } else { usize::MAX };
            let more = left.min(share).min(budget).min(most - entry.rows);
            entry.rows += more;
            budget -= more;
        }
    }

    /// Evicts, shortens and preempts until the step fits into the memory limit. Returns false after a preemption: then the step
    /// needs a new plan.
    fn free_memory(&mut self, events: &mut Vec<Event>) -> bool {
        if self.excess() > 0 {
            self.prefixes.evict(self.excess());
        }
        if self.excess() > 0 && self.forget_snapshots() {
            self.prefixes.evict(self.excess());
        }
        while self.excess() > 0
            && let [entry] = &mut self.running[..]
            && entry.shorten_step()
        {}
        if self.excess() == 0 {
            return true;
        }
        self.preempt(events, |entry| {
            let bytes = entry.sequence.session.bytes().max(entry.bytes()) + entry.bytes_for_step();
            let what = "the KV cache of one sequence, within the memory limit,";
            Error::OutOfMemory { what, bytes, left: None }
        });
        false
    }

    /// Bytes by which the step exceeds the memory limit.
    fn excess(&self) -> usize {
        let chosen = self.running.iter().filter(|entry| entry.is_chosen);
        let needed = chosen.map(Entry::bytes_for_step).fold(0, usize::saturating_add);
        let bytes = self.bytes(self.prefixes.bytes()).saturating_add(needed);
        bytes.saturating_sub(self.options.cache_bytes)
    }

    /// Forgets recurrent states that sequences keep for truncation, and, for the only sequence, those of the prefix cache. Returns
    /// whether there were any.
    fn forget_snapshots(&mut self) -> bool {
        let own: usize = self.running.iter_mut().map(Entry::forget_snapshots).sum();
        let shared = self.running.len() == 1 && self.prefixes.forget_states();
        own > 0 || shared
    }

    /// Returns the youngest sequence to the queue, to be computed again. Fails it with `error` when it is the only one.
    fn preempt(&mut self, events: &mut Vec<Event>, error: impl FnOnce(&Entry) -> Error) {
        self.forget_drafts();
        let Some(mut entry) = self.running.pop() else { return };
        if self.running.is_empty() {
            let error = error(&entry);
            if entry.flight.is_some() {
                entry.reset();
            }
            events.push(entry.failed(error));
        } else {
            entry.reset();
            self.waiting.push_front(entry);
        }
    }

    /// Discards all draft tokens: the step does not take place.
    fn forget_drafts(&mut self) {
        self.running.iter_mut().filter(|entry| entry.is_chosen).for_each(Entry::forget_drafts);
    }

    /// Samples for all sequences of step `flight` whose pending tokens are computed, and removes those that have ended.
    fn collect(&mut self, flight: u64, events: &mut Vec<Event>) {
        let vocabulary = self.model.vocabulary();
        let mut logits = &mut self.logits[..];
        let mut failed = Vec::new();
        for entry in self.running.iter_mut().filter(|entry| entry.flight == Some(flight)) {
            entry.flight = None;
            let rows = match entry.logits() {
                Logits::None => {
                    entry.sequence.pending.drain(..entry.rows);
                    if let Err(error) = entry.sequence.session.check_cache() {
                        entry.remaining = 0;
                        failed.push((entry.id, error));
                        continue;
                    }
                    0
                }
                Logits::Last => 1,
                Logits::All | Logits::Hidden => entry.rows,
            };
            if rows > 0 {
                let own = logits.split_off_mut(..rows * vocabulary).unwrap_or_default();
                let known = entry.sequence.tokens.len();
                let sampled = match entry.search {
                    Some(_) if self.options.prefix_cache && !entry.is_searching() => {
                        // Before the beams share its pages, so that they share those of the cache.
                        entry.share(&mut self.prefixes);
                        entry.extend_beams(own, events).map(|()| 0)
                    }
                    Some(_) => entry.extend_beams(own, events).map(|()| 0),
                    None => entry.sample(own, vocabulary, events),
                };
                match sampled {
                    Ok(accepted) => {
                        self.counts.drafted_tokens += entry.drafted;
                        self.counts.accepted_tokens += accepted;
                        entry.observe(accepted, known);
                        entry.truncate_draft_session();
                    }
                    Err(error) => {
                        entry.remaining = 0;
                        failed.push((entry.id, error));
                    }
                }
                entry.drafted = 0;
            }
            if self.options.prefix_cache {
                entry.share(&mut self.prefixes);
                entry.sequence.session.free_unseen();
            }
        }
        for entry in self.running.extract_if(.., |entry| entry.remaining == 0) {
            self.prefixes.touch(entry.block);
            if let Some(at) = failed.iter().position(|(id, _)| *id == entry.id) {
                events.push(entry.failed(failed.swap_remove(at).1));
            } else if let Some(last) = events.iter_mut().rfind(|event| event.id == entry.id) {
                last.sequence = Some(entry.sequence);
            }
        }
    }
}
