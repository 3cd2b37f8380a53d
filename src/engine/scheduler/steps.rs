//! How a scheduler begins and ends steps. A pipeline computes several at the same time, each of other sequences, so that none of its
//! stages waits.

use std::time::Instant;

use super::super::beams::BeamSearch;
use super::super::constrained_sampler::compute_and_find_allowed;
use super::super::sequence::Sequence;
use super::Scheduler;
use super::entry::{Entry, Event, Interrupted};
use super::flights::{Flight, Member};
use crate::error::{Error, Result};
use crate::model::{Input, Logits};

impl Scheduler {
    /// Begins as many steps as can be computed at the same time.
    pub(super) fn launch_all(&mut self, events: &mut Vec<Event>, interrupted: Interrupted<'_>) -> Result<()> {
        while self.flights.len() < self.model.stages() && self.launch(events, interrupted)? {}
        Ok(())
    }

    /// Begins a step of sequences that no other step computes. Returns false if there is nothing to compute.
    fn launch(&mut self, events: &mut Vec<Event>, interrupted: Interrupted<'_>) -> Result<bool> {
        while self.choose() {
            self.plan();
            self.drafter.propose(&mut self.running, interrupted)?;
            if !self.free_memory(events) {
                continue;
            }
            if !self.running.iter().any(|entry| entry.is_chosen && entry.rows > 0) {
                return Ok(false);
            }
            match self.begin(interrupted) {
                Ok(()) => return Ok(true),
                // The system has less memory than the limit allows.
                Err(error @ Error::OutOfMemory { .. }) => {
                    self.forget_drafts();
                    self.make_place(events, error);
                }
                Err(error) => {
                    self.forget_drafts();
                    return Err(error);
                }
            }
        }
        Ok(false)
    }

    /// Chooses the sequences of the next step, those first that have waited longest: all that no step computes, or a share of them
    /// if more steps can be begun. Returns false if there are none.
    fn choose(&mut self) -> bool {
        let free = self.model.stages().saturating_sub(self.flights.len()).max(1);
        let mut idle: Vec<_> = self.running.iter_mut().filter(|entry| entry.flight.is_none()).collect();
        let count = idle.len().div_ceil(free);
        if count < idle.len() {
            idle.sort_by_key(|entry| entry.latest);
        }
        for (at, entry) in idle.into_iter().enumerate() {
            (entry.is_chosen, entry.rows) = (at < count, 0);
        }
        count > 0
    }

    /// Begins the step of the chosen sequences that have rows.
    fn begin(&mut self, interrupted: Interrupted<'_>) -> Result<()> {
        let started = Instant::now();
        let mut inputs = Vec::with_capacity(self.running.len());
        let (mut samplers, mut members) = (Vec::new(), Vec::new());
        let (mut decoding, mut prompt_rows, mut prompt_tokens) = (0, 0, 0);
        for entry in self.running.iter_mut().filter(|entry| entry.is_chosen && entry.rows > 0) {
            if entry.is_decoding() {
                decoding += entry.decoding_rows();
            } else {
                prompt_rows += entry.rows;
            }
            prompt_tokens += entry.rows.min(entry.prompt.saturating_sub(entry.sequence.session.len()));
            let (id, rows, before) = (entry.id, entry.logit_rows(), inputs.len());
            if entry.is_searching() {
                for beam in entry.search.iter_mut().flat_map(BeamSearch::beams_mut) {
                    let (session, token) = beam.input();
                    inputs.push(Input::new(session, token, Logits::Last));
                }
            } else {
                let logits = entry.logits();
                let keeps_state = self.options.prefix_cache && entry.ends_at_snapshot();
                let Sequence { session, pending, sampler, .. } = &mut entry.sequence;
                if self.options.prefix_cache {
                    session.keep_unseen();
                    if keeps_state {
                        session.keep_state();
                    }
                }
                if logits != Logits::None {
                    samplers.push(sampler);
                }
                inputs.push(Input::new(session, &pending[..entry.rows], logits));
            }
            members.push(Member { id, inputs: inputs.len() - before, rows });
        }
        self.logits.clear();
        let begin = || self.model.begin(&mut inputs, &mut self.logits, interrupted);
        let ticket = compute_and_find_allowed(samplers, begin)?;
        self.begun += 1;
        let number = self.begun;
        for entry in self.running.iter_mut().filter(|entry| entry.is_chosen && entry.rows > 0) {
            (entry.is_chosen, entry.flight, entry.latest) = (false, Some(number), number);
        }
        self.flights.push_back(Flight { number, ticket, members, started, decoding, prompt_rows, prompt_tokens });
        Ok(())
    }

    /// Ends the oldest step: samples for its sequences. Returns false if they are to be computed again.
    ///
    /// # Errors
    /// [`Error::Interrupted`], and the step continues; those of [`Model::finish`](crate::model::Model::finish).
    pub(super) fn land(&mut self, events: &mut Vec<Event>, interrupted: Interrupted<'_>) -> Result<bool> {
        let Some(flight) = self.flights.front() else { return Ok(true) };
        let overflows = match &flight.ticket {
            None => Ok(Vec::new()),
            Some(ticket) => {
                self.logits.clear();
                self.model.finish(ticket, &mut self.logits, interrupted)
            }
        };
        let overflows = match overflows {
            Err(error @ (Error::Interrupted | Error::StageLost(_))) => return Err(error),
            others => others,
        };
        let Some(flight) = self.flights.pop_front() else { return Ok(true) };
        let overflows = match overflows {
            Ok(overflows) => overflows,
            Err(error) => {
                // Some stages have computed the step, and others have not.
                let members = self.running.iter_mut().filter(|entry| entry.flight == Some(flight.number));
                members.for_each(Entry::reset);
                match error {
                    Error::OutOfMemory { .. } => self.make_place(events, error),
                    error => return Err(error),
                }
                return Ok(self.running.is_empty());
            }
        };
        self.receive(&flight, &overflows);
        self.prefill.observe(flight.decoding, flight.prompt_rows, flight.started.elapsed().as_secs_f64());
        self.counts.steps += 1;
        self.counts.prompt_tokens += flight.prompt_tokens;
        self.collect(flight.number, events);
        Ok(true)
    }

    /// Removes the logits of sequences that have left since the step began, and hands out what the stages say about the others.
    fn receive(&mut self, flight: &Flight, mut overflows: &[Option<usize>]) {
        let (mut at, vocabulary) = (0, self.model.vocabulary());
        for member in &flight.members {
            let numbers = member.rows * vocabulary;
            let own = overflows.split_off(..member.inputs).unwrap_or_default();
            let mut present = self.running.iter_mut().filter(|entry| entry.flight == Some(flight.number));
            match present.find(|entry| entry.id == member.id) {
                Some(entry) => {
                    entry.note_overflows(own);
                    at += numbers;
                }
                None => drop(self.logits.drain(at..at + numbers)),
            }
        }
    }

    /// Frees memory after `error`: evicts the prefix cache, or else forgets recurrent states, or else preempts the youngest
    /// sequence.
    fn make_place(&mut self, events: &mut Vec<Event>, error: Error) {
        if self.prefixes.evict(usize::MAX) == 0 && !self.forget_snapshots() {
            self.preempt(events, |_| error);
        }
    }

    /// Begins anew if somebody else has had stages of a pipeline started again.
    pub(super) fn keep_up(&mut self) {
        if self.model.epoch() != self.epoch {
            self.begin_anew();
        }
    }

    /// Starts stages of a pipeline that have ended again. All sequences are computed again from their tokens.
    ///
    /// # Errors
    /// `cause`, if they have ended too often, and [`Error::StageLost`] if they do not start.
    pub(super) fn recover(&mut self, cause: Error) -> Result<()> {
        let restarted = self.model.restart_stages(self.epoch, cause);
        self.begin_anew();
        restarted
    }

    /// Forgets all that the stages of a pipeline have computed.
    fn begin_anew(&mut self) {
        self.forget_flights();
        self.epoch = self.model.epoch();
        self.prefixes.clear();
        self.running.iter_mut().for_each(Entry::reset);
        self.waiting.iter_mut().filter(|entry| entry.sequence.session.is_lost()).for_each(Entry::reset);
    }

    fn forget_flights(&mut self) {
        for flight in self.flights.drain(..) {
            flight.ticket.iter().for_each(|ticket| self.model.forget(ticket));
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.forget_flights();
    }
}
