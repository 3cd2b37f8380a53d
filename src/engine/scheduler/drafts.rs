//! Draft tokens of a step: from the sequences themselves, their constraints, the model's own head, or the draft model.

use std::sync::Arc;

use super::super::sampler::Sampler;
use super::super::speculation::{MAX_AUTO_ROWS, MAX_DRAFT, MAX_DRAFT_ROWS, MAX_HEAD_DRAFT, Speculation, ngram_lookup};
use super::entry::Entry;
use crate::error::{Error, Result};
use crate::model::{HeadDraft, Input, Logits, Model, Session};

/// Tokens of a sequence that the draft model computes in each step until it has caught up and can draft.
const CATCH_UP: usize = 64;

/// Adds draft tokens to sequences before a step.
#[derive(Debug)]
pub(super) struct Drafter {
    speculation: Speculation,
    /// Largest number of draft tokens of a sequence.
    draft_tokens: Option<usize>,
    source: Source,
}

/// Where draft tokens come from, besides constraints and the sequences themselves.
#[derive(Debug)]
enum Source {
    None,
    /// A draft model.
    Model(Arc<Model>),
    /// The head of the model itself.
    Head(Arc<Model>),
}

impl Drafter {
    /// A drafter for `model`, with a draft model or without.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without a head where its drafts are asked for; those of loading it.
    pub(super) fn new(
        model: &Arc<Model>,
        draft: Option<Arc<Model>>,
        speculation: Speculation,
        draft_tokens: Option<usize>,
    ) -> Result<Drafter> {
        let source = match (draft, speculation) {
            (Some(_), Speculation::Mtp) => {
                return Err(Error::argument("draft", "a model", "none, as speculation is \"mtp\""));
            }
            (Some(draft), _) => Source::Model(draft),
            (None, Speculation::Mtp) => Source::Head(model.clone()),
            (None, Speculation::Auto) if model.has_mtp() => Source::Head(model.clone()),
            (None, _) => Source::None,
        };
        if let Source::Head(model) = &source {
            model.load_mtp()?;
        }
        Ok(Drafter { speculation, draft_tokens, source })
    }

    /// Lets the model's head follow a session, or frees what it keeps for one that is not used.
    ///
    /// # Errors
    /// Those of loading the head.
    pub(super) fn prepare(&self, session: &mut Session) -> Result<()> {
        match &self.source {
            Source::Head(model) => model.follow(session),
            Source::None | Source::Model(_) => {
                session.drop_head();
                Ok(())
            }
        }
    }

    /// Appends draft tokens to the pending tokens of the sequences that decode.
    ///
    /// # Errors
    /// [`Error::Interrupted`], without any draft tokens.
    pub(super) fn propose(&self, running: &mut [Entry], interrupted: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        if self.speculation == Speculation::Off {
            return Ok(());
        }
        let decoding = running.iter().filter(|entry| entry.is_chosen && entry.is_decoding()).count();
        let mut budget = match self.speculation {
            Speculation::Auto => MAX_AUTO_ROWS.saturating_sub(decoding),
            Speculation::On | Speculation::Mtp | Speculation::Off => MAX_DRAFT_ROWS,
        };
        let mut wanted = Vec::with_capacity(running.len());
        for entry in running.iter_mut() {
            if !entry.is_chosen {
                wanted.push(0);
                continue;
            }
            entry.by_head = false;
            let count = if entry.is_decoding() && entry.search.is_none() {
                // The last token of the limit is sampled but never computed, so it needs no draft.
                self.draft(entry, (entry.remaining - 1).min(budget))
            } else {
                0
            };
            budget -= entry.drafted + count;
            wanted.push(count);
        }
        match &self.source {
            Source::None => Ok(()),
            Source::Model(model) => ask(model, running, wanted, interrupted),
            Source::Head(model) => draft_by_head(model, running, wanted, interrupted),
        }
    }

    /// Appends up to `limit` draft tokens from the sequence itself and from its constraint, or returns how many are wanted of the
    /// draft model or the head.
    fn draft(&self, entry: &mut Entry, limit: usize) -> usize {
        let most = self.draft_tokens.unwrap_or(MAX_DRAFT);
        let is_constrained = entry.sequence.sampler.constraint().is_some();
        match &self.source {
            Source::Model(_) if !is_constrained => entry.acceptance.draft_len(self.speculation, most).min(limit),
            Source::Head(_) if !is_constrained => self.choose(entry, limit),
            // A constraint predicts the next tokens better than a model does.
            _ => {
                let count = entry.acceptance.draft_len(self.speculation, most).min(limit);
                let draft = look_ahead(entry, count);
                entry.add_drafts(&draft);
                0
            }
        }
    }

    /// Returns how many draft tokens of the head are wanted. Appends draft tokens from the sequence itself instead where they promise
    /// at least as many accepted ones, and may be used.
    fn choose(&self, entry: &mut Entry, limit: usize) -> usize {
        let by_head = match (self.speculation, self.draft_tokens) {
            (Speculation::Mtp, Some(count)) => count,
            (_, most) => entry.head_acceptance.draft_len(self.speculation, most.unwrap_or(MAX_HEAD_DRAFT)),
        };
        let by_head = if entry.sequence.session.can_draft() { by_head.min(limit) } else { 0 };
        entry.by_head = true;
        if self.speculation != Speculation::Auto {
            return by_head;
        }
        let most = self.draft_tokens.unwrap_or(MAX_DRAFT);
        let count = entry.acceptance.draft_len(self.speculation, most).min(limit);
        let draft = look_ahead(entry, count);
        if by_head > 0 && entry.head_acceptance.expected(by_head) > entry.acceptance.expected(draft.len()) {
            entry.unused = draft;
            return by_head;
        }
        entry.by_head = false;
        entry.add_drafts(&draft);
        0
    }
}

/// Up to `count` draft tokens from the sequence itself and from its constraint.
fn look_ahead(entry: &mut Entry, count: usize) -> Vec<u32> {
    let sequence = &mut entry.sequence;
    match sequence.sampler.constraint() {
        _ if count == 0 => Vec::new(),
        None => ngram_lookup(&sequence.tokens, count),
        Some(constraint) => constraint.draft(count, |draft| ngram_lookup(&[&sequence.tokens, draft].concat(), count)),
    }
}

/// Lets the model's head draft up to `wanted` tokens for each sequence.
fn draft_by_head(
    model: &Model,
    running: &mut [Entry],
    mut wanted: Vec<usize>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let mut samplers: Vec<_> = running.iter().map(|_| None).collect();
    let drafting: Vec<bool> = wanted.iter().map(|wanted| *wanted > 0).collect();
    for round in 0..MAX_DRAFT {
        let (mut logits, mut drafts, mut asked) = (Vec::new(), Vec::new(), Vec::new());
        for (i, entry) in running.iter_mut().enumerate().filter(|(i, _)| round < wanted[*i]) {
            let Some(token) = entry.sequence.pending.last().copied() else { continue };
            drafts.push(HeadDraft { session: &mut entry.sequence.session, token, round });
            asked.push(i);
        }
        if drafts.is_empty() {
            break;
        }
        let result = model.draft(&mut drafts, &mut logits, interrupted);
        if !has_drafted(result, running)? {
            break;
        }
        sample(model, running, &mut samplers, &asked, &mut logits, &mut wanted);
    }
    for (entry, _) in running.iter_mut().zip(drafting).filter(|(_, drafting)| *drafting) {
        if let Some(token) = entry.sequence.tokens.last() {
            entry.sequence.session.end_drafts(*token);
        }
    }
    Ok(())
}

/// Whether a round of drafting has logits. Without memory for the head or the draft model, sequences continue without it.
///
/// # Errors
/// All others. No drafts are left.
fn has_drafted(result: Result<()>, running: &mut [Entry]) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(Error::OutOfMemory { .. }) => Ok(false),
        Err(error) => {
            running.iter_mut().filter(|entry| entry.is_chosen).for_each(Entry::forget_drafts);
            Err(error)
        }
    }
}

/// Samples a draft token for each sequence in `asked` from its row of logits. It samples like the sequence's own sampler, with the
/// random numbers that the sequence will use, so good drafts are right with seeds, too.
fn sample(
    model: &Model,
    running: &mut [Entry],
    samplers: &mut [Option<Sampler>],
    asked: &[usize],
    logits: &mut [f32],
    wanted: &mut [usize],
) {
    for (i, row) in asked.iter().zip(logits.chunks_mut(model.vocabulary())) {
        let entry = &mut running[*i];
        let sampler = samplers[*i].get_or_insert_with(|| entry.sequence.sampler.unconstrained().clone());
        // Without usable logits, the model continues alone.
        let Ok(sampled) = sampler.sample(row) else {
            wanted[*i] = 0;
            continue;
        };
        sampler.accept(sampled.token);
        entry.add_drafts(&[sampled.token]);
    }
}

/// Lets the draft model generate up to `wanted` tokens for each sequence.
fn ask(
    model: &Model,
    running: &mut [Entry],
    mut wanted: Vec<usize>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let mut samplers: Vec<_> = running.iter().map(|_| None).collect();
    for round in 0..MAX_DRAFT {
        let mut logits = Vec::new();
        let mut inputs = Vec::new();
        let mut asked = Vec::new();
        for (i, entry) in running.iter_mut().enumerate() {
            if round >= wanted[i] {
                continue;
            }
            let Entry { draft_session, draft_before, sequence, drafted, .. } = entry;
            let session = draft_session.get_or_insert_with(|| model.session());
            // Recurrent states do not go back over several steps.
            if round == 1 && model.state_bytes() > 0 {
                *draft_before = Some(session.fork());
            }
            // After the first round only the last draft token is new to the draft model.
            let new = if round == 0 { &sequence.tokens[session.len()..] } else { &sequence.pending[*drafted..] };
            let is_behind = round == 0 && new.len() > CATCH_UP;
            let new = &new[..new.len().min(CATCH_UP)];
            if new.len() > session.context() - session.len() {
                wanted[i] = 0;
                continue;
            }
            if is_behind {
                wanted[i] = 0;
            }
            asked.push((i, !is_behind));
            let logits = if is_behind { Logits::None } else { Logits::Last };
            inputs.push(Input::new(session, new, logits));
        }
        if inputs.is_empty() {
            break;
        }
        let result = model.forward(&mut inputs, &mut logits, interrupted);
        if !has_drafted(result, running)? {
            break;
        }
        let asked: Vec<usize> = asked.into_iter().filter_map(|(i, has_logits)| has_logits.then_some(i)).collect();
        sample(model, running, &mut samplers, &asked, &mut logits, &mut wanted);
    }
    Ok(())
}
