//! A stage of a pipeline: some layers of a model, and the keys, values and states of these layers.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::held::Held;
use super::plan::{Failure, Header, Plan, Reply};
use crate::error::{Error, Result};
use crate::model::batch::Input;
use crate::model::model::{Model, open};
use crate::model::state::journal::Change;
use crate::model::state::session::Session;
use crate::model::state::shared_page::SharedPage;
use crate::model::weights::load_options::LoadOptions;
use crate::model::weights::loader::Progress;

/// Some layers of a model, which follow the plans of a driver.
#[derive(Debug)]
pub struct Stage {
    model: Model,
    sessions: HashMap<u64, Session>,
    pages: HashMap<u64, SharedPage>,
    /// The epoch of the plan before, and the number of the next one.
    next: Option<(u64, u64)>,
}

impl Stage {
    /// Loads these units of a model: its layers, counted from 0, and its output as the last one. Nothing else of the file is read but
    /// its header and small tensors.
    ///
    /// # Errors
    /// Those of [`Model::load`]; [`Error::InvalidArgument`] for units that the model does not have or cannot be cut at.
    pub fn load(
        path: impl AsRef<Path>,
        options: &LoadOptions,
        units: Range<usize>,
        progress: Option<Progress<'_>>,
    ) -> Result<Stage> {
        let options = options.clone().with_mtp(false);
        let model = open(path.as_ref(), &options, |checkpoint| {
            Model::with_part(checkpoint, &options, progress, |config| Held::units(&units, config.layers.len()))
        })?;
        let layers = model.config().layers.len();
        if units.is_empty() || units.end > layers + 1 {
            return Err(Error::argument(
                "layers",
                format_args!("{units:?}"),
                format_args!("some of 0..{}", layers + 1),
            ));
        }
        for cut in [units.start, units.end] {
            super::cuts::check(model.config(), cut)?;
        }
        Ok(Stage { model, sessions: HashMap::new(), pages: HashMap::new(), next: None })
    }

    /// The part of the model that it holds.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Follows a plan. `received` is the reply of the stage before it, or empty for the first one. What fails is in the reply, too.
    pub fn run(&mut self, plan: &[u8], received: &[u8]) -> Vec<u8> {
        let reply = self.follow(plan, received).unwrap_or_else(|error| {
            Reply::failed(match error {
                Error::OutOfMemory { bytes, left, .. } => Failure::Memory { bytes, left },
                Error::StageLost(cause) => Failure::Lost(cause),
                error => Failure::Lost(error.to_string()),
            })
        });
        reply.to_bytes()
    }

    fn follow(&mut self, plan: &[u8], received: &[u8]) -> Result<Reply> {
        let plan: Plan = serde_json::from_slice(plan).map_err(|error| Error::StageLost(format!("a plan: {error}")))?;
        if plan.number == 0 {
            // The driver begins anew.
            self.sessions.clear();
            self.pages.clear();
            self.next = Some((plan.epoch, 0));
        }
        let expected = self.next.replace((plan.epoch, plan.number + 1));
        if expected != Some((plan.epoch, plan.number)) {
            self.next = None;
            let found = (plan.epoch, plan.number);
            return Err(Error::StageLost(format!("plan {found:?} came, expected {expected:?}")));
        }
        // Also when a stage before this one has failed: the sessions of all stages stay the same.
        plan.changes.iter().try_for_each(|change| self.apply(change))?;
        let received =
            if self.model.transformer.held.embedding { Reply::default() } else { Reply::from_bytes(received)? };
        if received.header.failure.is_some() {
            return Ok(received);
        }
        let mut sessions = Vec::with_capacity(plan.inputs.len());
        for planned in &plan.inputs {
            let session = self.sessions.remove(&planned.session).unwrap_or_else(|| self.model.session());
            sessions.push((planned.session, session));
        }
        let result = self.step(&plan, &mut sessions, received);
        self.sessions.extend(sessions);
        result
    }

    /// Computes the inputs of a plan, whose sessions are `sessions`.
    fn step(&self, plan: &Plan, sessions: &mut [(u64, Session)], received: Reply) -> Result<Reply> {
        let transformer = &self.model.transformer;
        let mut inputs = Vec::with_capacity(sessions.len());
        let mut rows = 0;
        for (planned, (id, session)) in plan.inputs.iter().zip(sessions) {
            if session.len() != planned.len {
                let (found, expected) = (session.len(), planned.len);
                return Err(diverged(*id, format_args!("{found} tokens, expected {expected}")));
            }
            let [keeps_unseen, keeps_state] = planned.keeps;
            if keeps_unseen {
                session.keep_unseen();
            }
            if keeps_state {
                session.keep_state();
            }
            rows += planned.tokens.len();
            let input = Input::new(session, &planned.tokens, planned.logits());
            inputs.push(input.with_second_text(planned.second_text()));
        }
        let width = transformer.handover.width(transformer.held.layers.start);
        if !transformer.held.embedding && received.numbers.len() != rows * width {
            let found = format!("{} numbers", received.numbers.len());
            return Err(Error::StageLost(format!("{found} of the stage before, expected {rows} rows of {width}")));
        }
        self.model.check_inputs(&inputs)?;
        let mut numbers = Vec::new();
        self.model.compute_from(&mut inputs, &received.numbers, &mut numbers, &|| false)?;
        let before = received.header.overflows.into_iter().chain(std::iter::repeat(None));
        let overflows = inputs.iter().zip(before).map(|(input, before)| match (input.session.overflow(), before) {
            (Some(own), Some(before)) => Some(own.min(before)),
            (own, before) => own.or(before),
        });
        let overflows = overflows.collect();
        Ok(Reply { header: Header { failure: None, overflows }, numbers })
    }

    /// The session with this id, a new one if there is none.
    fn session(&mut self, id: u64) -> &mut Session {
        self.sessions.entry(id).or_insert_with(|| self.model.session())
    }

    fn page(&self, id: u64) -> Result<SharedPage> {
        self.pages.get(&id).cloned().ok_or_else(|| Error::StageLost(format!("page {id} does not exist here")))
    }

    /// Repeats a call of the driver.
    fn apply(&mut self, change: &Change) -> Result<()> {
        match *change {
            Change::Fork { from, to } => {
                let fork = self.session(from).fork();
                self.sessions.insert(to, fork);
            }
            Change::Truncate { session: id, len } => {
                let session = self.session(id);
                let left = session.truncate(len);
                if left != len {
                    return Err(diverged(id, format_args!("{left} tokens after a truncation, expected {len}")));
                }
            }
            Change::Attach { session, page, tokens } => {
                let page = self.page(page)?;
                self.session(session).attach(&page, tokens, None)?;
            }
            Change::FreeUnseen { session } => self.session(session).free_unseen(),
            Change::Share { session: id, index, page } => {
                let shared = self.session(id).shared_page(index);
                let shared = shared.ok_or_else(|| diverged(id, format_args!("no page {index}")))?;
                self.pages.insert(page, shared);
            }
            Change::Replace { session, index, page } => {
                let page = self.page(page)?;
                self.session(session).replace_page(index, &page);
            }
            Change::ForgetSnapshot { session, index } => self.session(session).forget_snapshot(index),
            Change::Complete { page, from } => {
                let from = self.page(from)?;
                let page = self.pages.get_mut(&page);
                page.ok_or_else(|| Error::StageLost("a page does not exist here".to_owned()))?.complete_from(&from);
            }
            Change::Free { page, ref parts, snapshot } => {
                if let Some(page) = self.pages.get_mut(&page) {
                    page.free(parts, snapshot);
                }
            }
            Change::DropSession { session } => drop(self.sessions.remove(&session)),
            Change::DropPage { page } => drop(self.pages.remove(&page)),
        }
        Ok(())
    }
}

/// The error that a session is not that of the driver.
fn diverged(id: u64, what: std::fmt::Arguments<'_>) -> Error {
    Error::StageLost(format!("session {id} has {what}"))
}
