//! Many sequences over one model: they join and leave between steps, and each step computes rows of all of them.
//!
//! A step takes, in this order: the token that is due of every text, guesses of what follows it, and then rows of prompts,
//! as many as [`Pace`] allows, half of them for the oldest and the rest shared by the others. None of this changes what is
//! written: a row's result has the same bits in any company, so every text is the one of a lone run.
//!
//! Pages of the cache are shared through [`Prefixes`]. When they take more memory than allowed, those that no sequence uses
//! are given up; when that is not enough, the youngest sequence waits and is computed again later; when there is no other
//! left, it fails.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::constraint;
use super::pace::Pace;
use super::prefix::{Key, Prefixes, ROOT};
use super::sampler::Sampled;
use super::sequence::Sequence;
use super::speculation::{self, Acceptance, Speculation};
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::{Input, Logits, Model, Session};

mod drafts;

type Interrupted<'a> = &'a (dyn Fn() -> bool + Sync);

/// How a scheduler divides its steps and its memory.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Sequences in a step at most. At least 1; others wait.
    pub max_batch: usize,
    /// Bytes of keys and values at most, those kept for other prompts to reuse included.
    pub cache_bytes: usize,
    /// Whether prompts reuse keys and values of what earlier ones began with.
    pub prefix_cache: bool,
    /// Rows of prompts in a step at most, at least 1; otherwise so many that running texts wait for at most four times their
    /// usual step.
    pub prefill_chunk: Option<usize>,
    /// Whether tokens are guessed ahead.
    pub speculation: Speculation,
}

impl Default for SchedulerOptions {
    fn default() -> SchedulerOptions {
        SchedulerOptions {
            max_batch: 16,
            cache_bytes: usize::MAX,
            prefix_cache: true,
            prefill_chunk: None,
            speculation: Speculation::Off,
        }
    }
}

/// What became of a sequence in a step: its next token, or why there is none. After an error it has left.
#[derive(Debug)]
pub struct Event {
    /// The number that [`Scheduler::submit`] gave.
    pub id: u64,
    /// Tokens of its prompt that were not computed, since their keys and values were there.
    pub reused: usize,
    /// The token. With guesses that were right there are several events of one sequence in a step, in order.
    pub result: Result<Sampled>,
}

/// Counts since the scheduler was made, and its present state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that wait for a place or for memory.
    pub waiting: usize,
    /// Pages kept for reuse, those in use included.
    pub cached_pages: usize,
    /// Bytes of all keys and values now.
    pub cache_bytes: usize,
    /// Steps computed.
    pub steps: usize,
    /// Tokens of prompts that were computed. One that had to wait for memory is computed again.
    pub prompt_tokens: usize,
    /// Tokens of prompts that were not, since their keys and values were there.
    pub reused_tokens: usize,
    /// Tokens guessed.
    pub drafted_tokens: usize,
    /// Guesses that were right.
    pub accepted_tokens: usize,
}

/// A sequence on its way.
#[derive(Debug)]
struct Entry {
    id: u64,
    sequence: Sequence,
    /// All tokens: seen, pending and sampled. The first so many are its prompt, of which so many were not computed.
    tokens: Vec<u32>,
    prompt: usize,
    reused: usize,
    /// Tokens that are still to be sampled.
    left: usize,
    /// Blocks of its beginning that are in the cache, and the number of the last one.
    blocks: usize,
    block: u64,
    acceptance: Acceptance,
    /// Keys and values of the draft model.
    draft: Option<Session>,
    /// What this step feeds: so many of the pending tokens, of which so many at the end are guesses.
    rows: usize,
    guesses: usize,
}

impl Entry {
    /// Whether all of its prompt is computed, so that each step gives a token.
    fn is_writing(&self) -> bool {
        self.sequence.pending.len() - self.guesses == 1
    }

    /// Which logits this step gives.
    fn logits(&self) -> Logits {
        match () {
            () if self.rows < self.sequence.pending.len() => Logits::None,
            () if self.guesses > 0 => Logits::All,
            () => Logits::Last,
        }
    }

    /// The block that it computes next, where its tokens fill one.
    fn next_block(&self) -> Option<Key> {
        let tokens = self.tokens.get(self.blocks * PAGE..)?.first_chunk()?;
        Some(Key { parent: self.block, tokens: *tokens })
    }

    /// Gives up all keys and values, to be computed again.
    fn reset(&mut self) {
        self.sequence.session.truncate(0);
        self.sequence.pending.clone_from(&self.tokens);
        self.draft = None;
        (self.blocks, self.block, self.reused, self.rows, self.guesses) = (0, ROOT, 0, 0, 0);
    }

    /// Takes pages of texts that begin as this one does. Returns the tokens that need not be computed.
    fn reuse(&mut self, prefixes: &Prefixes) -> usize {
        let mut reused = 0;
        // The last token is always computed: its logits are needed.
        while self.sequence.session.len() == self.blocks * PAGE && self.sequence.pending.len() > 1 {
            let pending = &self.sequence.pending;
            let most = pending.len() - 1;
            let whole = self.next_block().and_then(|key| prefixes.find(&key));
            let (page, tokens, number) = match whole {
                Some((number, page)) => (page, most.min(PAGE), Some(number)),
                None => match prefixes.find_beginning(self.block, &pending[..most]) {
                    Some((page, tokens)) => (page, tokens, None),
                    None => break,
                },
            };
            if self.sequence.session.attach_page(&page, tokens).is_err() {
                break;
            }
            self.sequence.pending.drain(..tokens);
            reused += tokens;
            if let (PAGE, Some(number)) = (tokens, number) {
                (self.blocks, self.block) = (self.blocks + 1, number);
            }
        }
        self.reused += reused;
        reused
    }

    /// Gives the pages that it has filled to others that begin alike.
    fn share(&mut self, prefixes: &mut Prefixes) {
        while let (Some(key), Some(page)) = (self.next_block(), self.sequence.session.page(self.blocks)) {
            let (number, page) = prefixes.insert(key, page);
            self.sequence.session.replace_page(self.blocks, &page);
            (self.blocks, self.block) = (self.blocks + 1, number);
        }
    }

    fn event(&self, result: Result<Sampled>) -> Event {
        Event { id: self.id, reused: self.reused.min(self.prompt), result }
    }

    /// Samples after each row of `logits` as long as the guesses are right. Returns how many of them were.
    fn sample(&mut self, logits: &mut [f32], vocabulary: usize, events: &mut Vec<Event>) -> Result<usize> {
        let known = self.tokens.len();
        let seen = self.sequence.session.len();
        let guesses = self.sequence.pending.split_off(self.sequence.pending.len() - self.guesses);
        self.sequence.pending.clear();
        for (i, row) in logits.chunks_mut(vocabulary).enumerate() {
            let sampled = self.sequence.take(row)?;
            let token = sampled.token;
            events.push(self.event(Ok(sampled)));
            self.tokens.push(token);
            self.left -= 1;
            if self.left == 0 || guesses.get(i) != Some(&token) {
                break;
            }
        }
        let right = self.tokens.len() - known - 1;
        self.sequence.session.truncate(seen - (guesses.len() - right));
        self.sequence.pending.extend(self.tokens.last());
        Ok(right)
    }
}

/// Keeps sequences and computes them together, step by step.
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
    draft: Option<Arc<Model>>,
    options: SchedulerOptions,
    /// Oldest first.
    running: Vec<Entry>,
    waiting: VecDeque<Entry>,
    prefixes: Prefixes,
    pace: Pace,
    logits: Vec<f32>,
    last: u64,
    counts: Stats,
}

impl Scheduler {
    /// A scheduler without sequences. Guesses come from the model `draft`, otherwise from the texts themselves.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range, or a draft model whose vocabulary has another size.
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
        Ok(Scheduler {
            model,
            draft,
            pace: Pace::new(options.prefill_chunk),
            options,
            running: Vec::new(),
            waiting: VecDeque::new(),
            prefixes: Prefixes::default(),
            logits: Vec::new(),
            last: 0,
            counts: Stats::default(),
        })
    }

    /// Takes a sequence that has not been stepped yet, to sample at most `limit` tokens; it leaves by itself after that, or when
    /// the context is full. Returns its number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `limit` of 0, a sequence that was stepped, or one of another model.
    pub fn submit(&mut self, sequence: Sequence, limit: usize) -> Result<u64> {
        if limit == 0 {
            return Err(Error::argument("limit", 0, "at least 1"));
        }
        if !sequence.session.is_empty() {
            return Err(Error::argument("sequence", "one that was stepped", "one that was not"));
        }
        if !sequence.session.is_of(&self.model) {
            return Err(Error::argument("sequence", "one of another model", "one of this model"));
        }
        self.last += 1;
        let tokens = sequence.pending.clone();
        // The last token needs no place of its own: it is sampled, but never fed.
        let left = limit.min(self.model.context() - tokens.len() + 1);
        self.waiting.push_back(Entry {
            id: self.last,
            prompt: tokens.len(),
            reused: 0,
            sequence,
            tokens,
            left,
            blocks: 0,
            block: ROOT,
            acceptance: Acceptance::default(),
            draft: None,
            rows: 0,
            guesses: 0,
        });
        Ok(self.last)
    }

    /// Ends a sequence, so that its place is free for the next step. False when it has left already.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(at) = self.running.iter().position(|entry| entry.id == id) {
            let entry = self.running.remove(at);
            self.prefixes.touch(entry.block);
            return true;
        }
        let waiting = self.waiting.len();
        self.waiting.retain(|entry| entry.id != id);
        self.waiting.len() < waiting
    }

    /// Whether there is nothing to compute.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What has been done so far.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            cached_pages: self.prefixes.len(),
            cache_bytes: self.bytes(self.prefixes.len()),
            ..self.counts
        }
    }

    /// Computes one step and returns the tokens sampled. Does nothing when there are no sequences.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `interrupted` says yes, which is asked between layers. The scheduler then is as it was
    /// before, and so are all sequences. What goes wrong with one sequence is in its event, and the others go on.
    pub fn step(&mut self, interrupted: Interrupted<'_>) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.admit();
        loop {
            self.plan();
            self.guess(interrupted)?;
            if !self.make_room(&mut events) {
                continue;
            }
            if self.running.is_empty() {
                return Ok(events);
            }
            match self.forward(interrupted) {
                Ok(()) => break,
                // Less than was allowed: what is kept for others goes first, then the youngest waits.
                Err(error @ Error::OutOfMemory { .. }) => {
                    self.forget_guesses();
                    if self.prefixes.evict(usize::MAX) == 0 {
                        self.displace(&mut events, |_| error);
                    }
                }
                Err(error) => {
                    self.forget_guesses();
                    return Err(error);
                }
            }
        }
        self.collect(&mut events);
        Ok(events)
    }

    /// Bytes of keys and values, with `shared` pages that the cache holds.
    fn bytes(&self, shared: usize) -> usize {
        let page = self.model.cache_bytes_per_page();
        let own = |entry: &Entry| {
            let draft = entry.draft.as_ref().map_or(0, Session::bytes);
            entry.sequence.session.bytes() - entry.blocks * page + draft
        };
        self.running.iter().map(own).fold(shared.saturating_mul(page), usize::saturating_add)
    }

    /// Lets waiting sequences in, first come, first served, while there are places and memory for their prompts.
    fn admit(&mut self) {
        while self.running.len() < self.options.max_batch
            && let Some(mut entry) = self.waiting.pop_front()
        {
            let reused = if self.options.prefix_cache { entry.reuse(&self.prefixes) } else { 0 };
            self.running.push(entry);
            let to_come = |entry: &Entry| entry.sequence.session.bytes_for(entry.sequence.pending.len());
            let to_come = self.running.iter().map(to_come).fold(0, usize::saturating_add);
            let needed = self.bytes(self.prefixes.in_use()).saturating_add(to_come);
            if needed > self.options.cache_bytes
                && self.running.len() > 1
                && let Some(mut entry) = self.running.pop()
            {
                entry.reset();
                self.waiting.push_front(entry);
                break;
            }
            self.counts.reused_tokens += reused;
        }
    }

    /// Decides how many rows of each sequence the step takes.
    fn plan(&mut self) {
        let texts = self.running.iter().filter(|entry| entry.is_writing()).count();
        let mut budget = self.pace.rows(texts);
        let mut computing = HashSet::new();
        let mut prompts = Vec::new();
        for (i, entry) in self.running.iter_mut().enumerate() {
            if self.options.prefix_cache && !entry.is_writing() {
                self.counts.reused_tokens += entry.reuse(&self.prefixes);
            }
            // Whoever has one token left by now writes in this step: its guesses stand behind that one.
            entry.rows = usize::from(entry.is_writing());
            if entry.rows == 0 {
                // What another one computes in this step is there to be shared after it.
                let block = entry.next_block().filter(|_| self.options.prefix_cache);
                if block.is_none_or(|block| computing.insert(block)) {
                    prompts.push(i);
                }
            }
        }
        // The oldest prompt has half, so that one after the other is done; the others share the rest, so that a short one does
        // not wait for a long one; and what some leave of theirs goes to the oldest.
        let half = budget.div_ceil(2);
        let share = (budget - half) / prompts.len().saturating_sub(1).max(1);
        let shares = std::iter::once(half).chain(std::iter::repeat(share)).take(prompts.len());
        for (i, share) in prompts.iter().zip(shares).chain(prompts.iter().zip(std::iter::repeat(usize::MAX))) {
            let entry = &mut self.running[*i];
            let more = (entry.sequence.pending.len() - entry.rows).min(share).min(budget);
            entry.rows += more;
            budget -= more;
        }
    }

    /// Sees to it that the step stays within the memory. False when a sequence had to leave for that, which asks for a new plan.
    fn make_room(&mut self, events: &mut Vec<Event>) -> bool {
        let needed = self.running.iter().map(|entry| entry.sequence.session.bytes_for(entry.rows));
        let needed = needed.fold(0, usize::saturating_add);
        let excess = |scheduler: &Scheduler| {
            let bytes = scheduler.bytes(scheduler.prefixes.len());
            bytes.saturating_add(needed).saturating_sub(scheduler.options.cache_bytes)
        };
        let pages = excess(self).div_ceil(self.model.cache_bytes_per_page().max(1));
        if pages > 0 {
            self.prefixes.evict(pages);
        }
        if excess(self) == 0 {
            return true;
        }
        self.displace(events, |entry| {
            let session = &entry.sequence.session;
            let bytes = session.bytes() + session.bytes_for(entry.rows);
            let what = "the key/value cache of one sequence, within the memory allowed,";
            Error::OutOfMemory { what, bytes, left: None }
        });
        false
    }

    /// Lets the youngest sequence wait for the memory that the others take, or, when there are no others, fail with that error.
    fn displace(&mut self, events: &mut Vec<Event>, error: impl FnOnce(&Entry) -> Error) {
        self.forget_guesses();
        let Some(mut entry) = self.running.pop() else { return };
        if self.running.is_empty() {
            let error = error(&entry);
            events.push(entry.event(Err(error)));
        } else {
            entry.reset();
            self.waiting.push_front(entry);
        }
    }

    fn forward(&mut self, interrupted: Interrupted<'_>) -> Result<()> {
        let started = Instant::now();
        self.logits.clear();
        let mut inputs = Vec::with_capacity(self.running.len());
        let mut held = Vec::new();
        let (mut texts, mut prompt_rows, mut prompt_tokens) = (0, 0, 0);
        for entry in &mut self.running {
            if entry.is_writing() {
                texts += 1;
            } else {
                prompt_rows += entry.rows;
            }
            prompt_tokens += entry.rows.min(entry.prompt.saturating_sub(entry.sequence.session.len()));
            if entry.rows > 0 {
                let logits = entry.logits();
                let Sequence { session, pending, held: own, .. } = &mut entry.sequence;
                if logits != Logits::None {
                    held.extend(own);
                }
                inputs.push(Input { session, tokens: &pending[..entry.rows], logits });
            }
        }
        constraint::beside(held, || self.model.forward(&mut inputs, &mut self.logits, interrupted))?;
        self.pace.observe(texts, prompt_rows, started.elapsed().as_secs_f64());
        self.counts.steps += 1;
        self.counts.prompt_tokens += prompt_tokens;
        Ok(())
    }

    /// Samples for all sequences whose tokens have been seen, and lets those go that are at their end.
    fn collect(&mut self, events: &mut Vec<Event>) {
        let vocabulary = self.model.vocabulary();
        let mut logits = &mut self.logits[..];
        for entry in &mut self.running {
            let rows = match entry.logits() {
                _ if entry.rows == 0 => continue,
                Logits::None => {
                    entry.sequence.pending.drain(..entry.rows);
                    0
                }
                Logits::Last => 1,
                Logits::All | Logits::Hidden => entry.rows,
            };
            if rows > 0 {
                let own = logits.split_off_mut(..rows * vocabulary).unwrap_or_default();
                let guesses = entry.guesses;
                match entry.sample(own, vocabulary, events) {
                    Ok(right) if guesses > 0 => {
                        self.counts.drafted_tokens += guesses;
                        self.counts.accepted_tokens += right;
                        entry.acceptance.observe(guesses, right);
                        if let Some(draft) = &mut entry.draft {
                            draft.truncate(entry.tokens.len() - 1);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        entry.left = 0;
                        events.push(entry.event(Err(error)));
                    }
                }
                entry.guesses = 0;
            }
            if self.options.prefix_cache {
                entry.share(&mut self.prefixes);
            }
        }
        let prefixes = &mut self.prefixes;
        self.running.retain(|entry| {
            if entry.left == 0 {
                prefixes.touch(entry.block);
            }
            entry.left > 0
        });
    }
}
