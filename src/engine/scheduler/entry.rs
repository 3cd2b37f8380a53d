//! A sequence in a scheduler: its progress, its blocks in the prefix cache and its draft tokens.

use super::super::beams::BeamSearch;
use super::super::prefix::{Key, Prefixes, root};
use super::super::sampler::Sampled;
use super::super::sequence::Sequence;
use super::super::speculation::Acceptance;
use crate::error::{Error, Result};
use crate::kernels::PAGE;
use crate::model::{Logits, Session};

/// Whether the caller asks a step to end early.
pub(super) type Interrupted<'a> = &'a (dyn Fn() -> bool + Sync);

/// The outcome of a step for one sequence: its next token or an error.
#[derive(Debug)]
#[non_exhaustive]
pub struct Event {
    /// The id that [`Scheduler::submit`](super::Scheduler::submit) returned.
    pub id: u64,
    /// Prompt tokens that were not computed, because their keys and values were in a cache.
    pub reused: usize,
    /// The token. A step in which draft tokens were accepted has several events for a sequence, in order.
    pub result: Result<Sampled>,
    /// The sequence, with the last event before it leaves the scheduler: after an error, when it has ended, and when it has
    /// reached its limit. [`Sequence::has_ended`] distinguishes the last two; [`Sequence::into_session`] keeps its session.
    pub sequence: Option<Sequence>,
}

/// A sequence in a scheduler.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) sequence: Sequence,
    /// Length of the prompt in tokens.
    pub(super) prompt: usize,
    /// Prompt tokens that were not computed.
    reused: usize,
    /// Tokens still to be sampled.
    pub(super) remaining: usize,
    /// The beam search that continues it after its prompt, if it does not sample.
    pub(super) search: Option<BeamSearch>,
    /// Whether pages on disk spare it computing, where that was looked up while it waited behind others.
    pub(super) is_on_disk: Option<bool>,
    /// Number of blocks at its beginning that are in the prefix cache, and the id of the last one.
    pub(super) blocks: usize,
    pub(super) block: u64,
    /// The same up to where the cache can restore the recurrent states; without any, the same.
    restorable: (usize, u64),
    /// Where pages in the cache end that it cannot attach, because there are no recurrent states: it computes them again, and
    /// keeps the states for others.
    branch: usize,
    pub(super) acceptance: Acceptance,
    /// That of the drafts of the model's own head.
    pub(super) head_acceptance: Acceptance,
    /// Draft tokens that were not used, because the head's drafts promised more.
    pub(super) unused: Vec<u32>,
    /// The draft model's KV cache.
    pub(super) draft_session: Option<Session>,
    /// The same before the first draft token, for draft models with recurrent states.
    pub(super) draft_before: Option<Session>,
    /// Pending tokens that this step computes.
    pub(super) rows: usize,
    /// Draft tokens at the end of the pending tokens.
    pub(super) drafted: usize,
    /// Whether they come from the model's own head.
    pub(super) by_head: bool,
    /// Whether the step that is being planned may compute it.
    pub(super) is_chosen: bool,
    /// The number of the step that computes it.
    pub(super) flight: Option<u64>,
    /// The number of the latest step that has computed it.
    pub(super) latest: u64,
}

impl Entry {
    /// An entry that samples up to `remaining` tokens.
    pub(super) fn new(id: u64, sequence: Sequence, remaining: usize) -> Entry {
        let root = root(&sequence.session);
        let search = BeamSearch::new(sequence.options(), &sequence.ends, remaining);
        Entry {
            id,
            prompt: sequence.tokens.len(),
            reused: sequence.session.len(),
            is_on_disk: None,
            sequence,
            remaining,
            search,
            blocks: 0,
            block: root,
            restorable: (0, root),
            branch: 0,
            acceptance: Acceptance::default(),
            head_acceptance: Acceptance::default(),
            unused: Vec::new(),
            draft_session: None,
            draft_before: None,
            rows: 0,
            drafted: 0,
            by_head: false,
            is_chosen: false,
            flight: None,
            latest: 0,
        }
    }

    /// Whether its prompt is computed, so that each step samples a token.
    pub(super) fn is_decoding(&self) -> bool {
        self.is_searching() || self.sequence.pending.len() - self.drafted == 1
    }

    /// Rows that a step computes without prompt and draft tokens.
    pub(super) fn decoding_rows(&self) -> usize {
        match &self.search {
            Some(search) if self.is_searching() => search.beams().len(),
            _ => usize::from(self.is_decoding()),
        }
    }

    /// Whether its beam search is under way, so that each step computes a row of each beam and none of the sequence.
    pub(super) fn is_searching(&self) -> bool {
        self.search.as_ref().is_some_and(|search| !search.beams().is_empty())
    }

    /// Bytes that the next step adds.
    pub(super) fn bytes_for_step(&self) -> usize {
        match &self.search {
            Some(search) if self.is_searching() => {
                search.beams().iter().map(|beam| beam.session.bytes_for(1)).fold(0, usize::saturating_add)
            }
            _ => self.sequence.session.bytes_for(self.rows),
        }
    }

    /// Bytes of its keys and values, without the pages in the prefix cache.
    pub(super) fn bytes(&self) -> usize {
        let session = &self.sequence.session;
        let own = match &self.search {
            Some(search) if self.is_searching() => {
                let beams = search.beams().iter().map(|beam| &beam.session);
                Session::bytes_together(beams.chain([session]), self.blocks)
            }
            _ => session.bytes_from(self.blocks),
        };
        own.saturating_add(self.draft_session.as_ref().map_or(0, Session::bytes))
    }

    /// Rows of logits that its step returns.
    pub(super) fn logit_rows(&self) -> usize {
        match self.logits() {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All | Logits::Hidden => self.rows,
        }
    }

    /// Records for its sessions the positions whose keys or values the stages of a pipeline do not hold.
    pub(super) fn note_overflows(&mut self, overflows: &[Option<usize>]) {
        let is_searching = self.is_searching();
        let Entry { sequence, search, .. } = self;
        let beams = search.iter_mut().flat_map(BeamSearch::beams_mut).filter(|_| is_searching);
        let own = std::iter::once(&mut sequence.session).filter(|_| !is_searching);
        for (session, overflow) in own.chain(beams.map(|beam| &mut beam.session)).zip(overflows) {
            overflow.iter().for_each(|position| session.overflowed_at(*position));
        }
    }

    /// The logits that this step needs.
    pub(super) fn logits(&self) -> Logits {
        match () {
            () if self.is_searching() => Logits::All,
            () if self.rows < self.sequence.pending.len() => Logits::None,
            () if self.drafted > 0 => Logits::All,
            () => Logits::Last,
        }
    }

    /// The key of the block that it computes next, if its tokens fill one.
    fn next_block(&self) -> Option<Key> {
        self.block_at(self.blocks, self.block)
    }

    /// The key of the first block that others cannot attach before it is computed further: the next one, or the first after
    /// the last snapshot of recurrent states.
    pub(super) fn awaited_block(&self) -> Option<Key> {
        self.block_at(self.restorable.0, self.restorable.1)
    }

    /// At most `rows` rows of its prompt, so that the step ends where recurrent states are kept.
    pub(super) fn rows_to_snapshot(&self, rows: usize) -> usize {
        let session = &self.sequence.session;
        let Some(regular) = session.next_snapshot() else { return rows };
        let stops = [regular, self.branch, self.last_snapshot()];
        let stops = stops.into_iter().filter_map(|stop| stop.checked_sub(session.len()));
        stops.filter(|left| *left > 0).fold(rows, usize::min)
    }

    /// Whether the step ends where others may continue.
    pub(super) fn ends_at_snapshot(&self) -> bool {
        [self.branch, self.last_snapshot()].contains(&(self.sequence.session.len() + self.rows))
    }

    /// The end of the last page of its prompt that others can share.
    fn last_snapshot(&self) -> usize {
        self.prompt.saturating_sub(1) / PAGE * PAGE
    }

    /// The key of block `index` after the block `parent`, if its tokens fill one.
    fn block_at(&self, index: usize, parent: u64) -> Option<Key> {
        let tokens = self.sequence.tokens.get(index * PAGE..)?.first_chunk()?;
        Some(Key { parent, tokens: *tokens })
    }

    /// Frees its KV cache. All of its tokens are computed again.
    pub(super) fn reset(&mut self) {
        self.sequence.restart();
        (self.draft_session, self.draft_before) = (None, None);
        self.search.iter_mut().for_each(BeamSearch::reset);
        let root = root(&self.sequence.session);
        (self.blocks, self.block, self.reused, self.rows, self.drafted) = (0, root, 0, 0, 0);
        (self.restorable, self.branch) = ((0, root), 0);
        (self.is_chosen, self.flight) = (false, None);
        self.unused.clear();
    }

    /// Attaches pages of the prefix cache that match its next tokens. Returns the number of tokens that they hold.
    pub(super) fn reuse(&mut self, prefixes: &Prefixes) -> usize {
        if self.sequence.session.len() != self.blocks * PAGE {
            return 0;
        }
        let pending = &self.sequence.pending;
        // The last token is always computed: its logits are needed.
        let most = pending.len().saturating_sub(1);
        let has_head = self.sequence.session.has_head();
        let (mut pages, mut numbers, mut tokens, mut parent) = (Vec::new(), Vec::new(), 0, self.block);
        while tokens < most && tokens.is_multiple_of(PAGE) {
            let whole = self.block_at(self.blocks + numbers.len(), parent).and_then(|key| prefixes.find(&key));
            let (page, count) = match whole {
                Some((number, page)) => {
                    parent = number;
                    (page, (most - tokens).min(PAGE))
                }
                None => match prefixes.find_beginning(parent, &pending[tokens..most]) {
                    // The last of the common tokens is computed again where a head reads the state after it.
                    Some((page, count)) => (page, count - usize::from(has_head)),
                    None => break,
                },
            };
            pages.push(page);
            numbers.push(parent);
            tokens += count;
        }
        let last = if tokens.is_multiple_of(PAGE) { PAGE } else { tokens % PAGE };
        let count = self.sequence.session.attachable(&pages, last);
        let whole = tokens / PAGE;
        if count < whole {
            self.branch = self.sequence.session.len() + whole * PAGE;
        }
        let mut reused = 0;
        for (page, number) in pages.iter().zip(numbers).take(count) {
            let held = (tokens - reused).min(PAGE);
            let next = self.sequence.pending.get(reused + held).copied().filter(|_| held < PAGE);
            if self.sequence.session.attach(page, held, next).is_err() {
                break;
            }
            reused += held;
            if held == PAGE {
                (self.blocks, self.block) = (self.blocks + 1, number);
            }
        }
        if reused > 0 {
            self.restorable = (self.blocks, self.block);
        }
        self.sequence.session.free_unseen();
        self.sequence.pending.drain(..reused);
        self.reused += reused;
        reused
    }

    /// Adds the pages that it has filled to the prefix cache.
    pub(super) fn share(&mut self, prefixes: &mut Prefixes) {
        while let (Some(key), Some(page)) = (self.next_block(), self.sequence.session.page(self.blocks)) {
            let (number, page) = prefixes.insert(key, page);
            self.sequence.session.replace_page(self.blocks, &page);
            // The cache keeps it, as long as there is memory.
            self.sequence.session.forget_snapshot(self.blocks);
            (self.blocks, self.block) = (self.blocks + 1, number);
            if page.has_state() {
                self.restorable = (self.blocks, self.block);
            }
        }
    }

    /// Discards its draft tokens: the step does not take place.
    pub(super) fn forget_drafts(&mut self) {
        let known = self.sequence.pending.len() - self.drafted;
        self.sequence.pending.truncate(known);
        (self.drafted, self.rows) = (0, 0);
        self.unused.clear();
        self.truncate_draft_session();
    }

    /// Forgets recurrent states that it does not need to continue, and returns how many there were.
    pub(super) fn forget_snapshots(&mut self) -> usize {
        let beams = self.search.iter_mut().flat_map(BeamSearch::beams_mut).map(|beam| &mut beam.session);
        let sessions = beams.chain([&mut self.sequence.session]);
        sessions.map(Session::forget_snapshots).sum()
    }

    /// Halves its step, or computes it without draft tokens. Returns false if it is a single row or that of a beam search.
    pub(super) fn shorten_step(&mut self) -> bool {
        if self.is_searching() {
            return false;
        }
        if self.drafted > 0 {
            self.forget_drafts();
            self.rows = self.decoding_rows();
            return true;
        }
        let is_divisible = self.rows > 1;
        self.rows -= self.rows / 2;
        is_divisible
    }

    /// Appends draft tokens to the pending tokens.
    pub(super) fn add_drafts(&mut self, drafts: &[u32]) {
        self.sequence.pending.extend_from_slice(drafts);
        self.drafted += drafts.len();
        self.rows += drafts.len();
    }

    /// Records how many of this step's draft tokens were accepted, and how many of those that were not used were right, by the
    /// tokens from number `known` on.
    pub(super) fn observe(&mut self, accepted: usize, known: usize) {
        let drafted = self.drafted;
        let acceptance = if self.by_head { &mut self.head_acceptance } else { &mut self.acceptance };
        if drafted > 0 {
            acceptance.observe(drafted, accepted);
        }
        let sampled = self.sequence.tokens.get(known..).unwrap_or_default();
        let pairs = self.unused.iter().zip(sampled);
        let (count, right) = (pairs.len(), pairs.take_while(|(draft, token)| draft == token).count());
        if count > 0 {
            self.acceptance.observe(count, right);
        }
        self.unused.clear();
    }

    /// Removes what the draft model has computed beyond the tokens known.
    pub(super) fn truncate_draft_session(&mut self) {
        if let Some(session) = &mut self.draft_session {
            let (known, before) = (self.sequence.tokens.len() - 1, self.draft_before.take());
            let expected = known.min(session.len());
            if session.truncate(known) < expected
                && let Some(mut before) = before
                && before.truncate(known) > session.len()
            {
                *session = before;
            }
        }
    }

    /// An event of this sequence.
    pub(super) fn event(&self, result: Result<Sampled>) -> Event {
        Event { id: self.id, reused: self.reused.min(self.prompt), result, sequence: None }
    }

    /// The sequence as it is, which can be continued.
    pub(super) fn into_sequence(mut self) -> Sequence {
        self.sequence.restore_pending();
        self.sequence
    }

    /// The event with which the sequence leaves because of an error.
    pub(super) fn failed(self, error: Error) -> Event {
        let event = self.event(Err(error));
        Event { sequence: Some(self.into_sequence()), ..event }
    }

    /// Extends the beams by the rows of `logits`. At the end of the search, its best continuation becomes that of the sequence.
    pub(super) fn extend_beams(&mut self, logits: &mut [f32], events: &mut Vec<Event>) -> Result<()> {
        let is_searching = self.is_searching();
        let Some(search) = &mut self.search else { return Ok(()) };
        let sampler = self.sequence.sampler.unconstrained_mut();
        let has_ended = if is_searching {
            search.advance(logits, sampler)?
        } else {
            self.sequence.session.check_cache()?;
            self.sequence.pending.clear();
            search.start(self.sequence.session.fork(), logits, sampler)?
        };
        if has_ended && let Some(search) = self.search.take() {
            let (score, best) = search.into_best().ok_or(Error::BadLogits)?;
            self.sequence.restore_pending();
            for (token, logprob) in best {
                self.sequence.tokens.push(token);
                self.sequence.pending.push(token);
                self.sequence.has_ended = self.sequence.ends.contains(&token);
                let sampled = Sampled { token, logprob: Some(logprob), top: Vec::new(), beam_score: Some(score) };
                events.push(self.event(Ok(sampled)));
            }
            self.remaining = 0;
        }
        Ok(())
    }

    /// Samples after each row of `logits` for as long as the draft tokens are right. Returns how many were.
    pub(super) fn sample(&mut self, logits: &mut [f32], vocabulary: usize, events: &mut Vec<Event>) -> Result<usize> {
        let sequence = &mut self.sequence;
        let known = sequence.tokens.len();
        let draft = sequence.pending.split_off(sequence.pending.len() - self.drafted);
        sequence.pending.clear();
        for (i, row) in logits.chunks_mut(vocabulary).enumerate() {
            match self.sequence.sample(row) {
                Ok(sampled) => {
                    let token = sampled.token;
                    events.push(self.event(Ok(sampled)));
                    self.remaining = if self.sequence.has_ended() { 0 } else { self.remaining - 1 };
                    if self.remaining == 0 || draft.get(i) != Some(&token) {
                        break;
                    }
                }
                Err(error) => {
                    // Every token so far was a draft token, and is computed.
                    self.sequence.session.truncate(self.sequence.tokens.len());
                    return Err(error);
                }
            }
        }
        let sequence = &mut self.sequence;
        // The last token was sampled only, the draft tokens before it were computed.
        sequence.session.truncate(sequence.tokens.len() - 1);
        sequence.pending.extend(sequence.tokens.last());
        Ok(sequence.tokens.len() - known - 1)
    }
}
