//! The connection of a driver to its stages.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::plan::{Plan, PlannedInput, Reply};
use crate::error::{Error, Result};
use crate::model::batch::Input;
use crate::model::state::journal::{Journal, Mirror};
use crate::model::state::session::Session;

/// The stages of a pipeline, wherever they run. [`Stage::run`](super::Stage::run) is what each does with a plan.
pub trait Stages: Debug + Send + Sync {
    /// Number of stages.
    fn count(&self) -> usize;

    /// Hands a plan to all stages and returns its ticket without waiting for them. Each stage gets all plans in order: the first one with an
    /// empty message, each other one with the reply of the stage before it to the same plan.
    ///
    /// # Errors
    /// [`Error::StageLost`]
    fn send(&self, plan: &[u8]) -> Result<u64>;

    /// Waits for the last stage's reply to the plan with this ticket, at most this long. `None` if it is not there yet. A reply is
    /// received once.
    ///
    /// # Errors
    /// [`Error::StageLost`]
    fn receive(&self, ticket: u64, patience: Duration) -> Result<Option<Vec<u8>>>;

    /// Nobody will receive the reply to the plan with this ticket.
    fn forget(&self, ticket: u64);

    /// Starts the stages that have ended again. Plans that were sent before are forgotten.
    ///
    /// # Errors
    /// [`Error::StageLost`] if that is not possible.
    fn restart(&self) -> Result<()>;
}

/// How often stages are started again without a reply in between.
const RESTARTS: u32 = 3;

/// The driver's side of the stages.
#[derive(Debug)]
pub(in crate::model) struct Remote {
    stages: Box<dyn Stages>,
    journal: Arc<Journal>,
    sent: Mutex<Sent>,
}

#[derive(Debug, Default)]
struct Sent {
    /// Plans sent in this epoch.
    plans: u64,
    /// Restarts since the latest reply.
    restarts: u32,
}

impl Remote {
    pub(in crate::model) fn new(stages: Box<dyn Stages>) -> Remote {
        Remote { stages, journal: Arc::default(), sent: Mutex::default() }
    }

    /// Number of stages.
    pub(in crate::model) fn count(&self) -> usize {
        self.stages.count()
    }

    /// How often the stages have lost their sessions.
    pub(in crate::model) fn epoch(&self) -> u64 {
        self.journal.epoch()
    }

    /// An empty session of the stages.
    pub(in crate::model) fn mirror(&self) -> Mirror {
        Mirror::session(&self.journal)
    }

    /// Sends a step. `advance` is called before that, to count the tokens of the inputs as computed. Returns the ticket.
    ///
    /// # Errors
    /// [`Error::StageLost`], and those of `advance`.
    pub(super) fn send(
        &self,
        inputs: &mut [Input<'_>],
        advance: impl FnOnce(&mut [Input<'_>]) -> Result<()>,
    ) -> Result<u64> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let planned = |input: &Input<'_>| match &input.session.mirror {
            Some(mirror) if mirror.is_lost() => {
                Err(Error::StageLost("a session is older than the restart of its stages".to_owned()))
            }
            Some(mirror) => Ok(PlannedInput::of(input, mirror.id())),
            None => Err(Error::argument("session", "a session with another cache type", "one of the pipeline")),
        };
        let planned = inputs.iter().map(planned).collect::<Result<_>>()?;
        advance(inputs)?;
        let (epoch, changes) = (self.journal.epoch(), self.journal.take());
        let plan = Plan { epoch, number: sent.plans, changes, inputs: planned };
        sent.plans += 1;
        let plan = serde_json::to_vec(&plan).map_err(|error| Error::StageLost(error.to_string()))?;
        self.stages.send(&plan)
    }

    /// Waits a moment for the reply to a step. `None` if it is not there yet.
    ///
    /// # Errors
    /// [`Error::StageLost`], [`Error::OutOfMemory`]
    pub(super) fn receive(&self, ticket: u64, patience: Duration) -> Result<Option<Reply>> {
        let Some(bytes) = self.stages.receive(ticket, patience)? else { return Ok(None) };
        let mut reply = Reply::from_bytes(&bytes)?;
        if let Some(failure) = reply.header.failure.take() {
            return Err(failure.into_error());
        }
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).restarts = 0;
        Ok(Some(reply))
    }

    /// Nobody will receive the reply to a step.
    pub(super) fn forget(&self, ticket: u64) {
        self.stages.forget(ticket);
    }

    /// Starts stages that have ended again, unless that has happened since `epoch`. All sessions are lost then.
    ///
    /// # Errors
    /// [`Error::StageLost`] if they do not start, or have ended too often.
    pub(super) fn restart(&self, epoch: u64, cause: Error) -> Result<()> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if self.journal.epoch() != epoch {
            return Ok(());
        }
        if sent.restarts >= RESTARTS {
            // The next caller may try again.
            sent.restarts = 0;
            return Err(cause);
        }
        sent.restarts += 1;
        self.stages.restart()?;
        self.journal.forget();
        sent.plans = 0;
        Ok(())
    }
}

/// An empty session of a pipeline.
pub(in crate::model) fn mirrored(session: Session, remote: Option<&Remote>) -> Session {
    match remote {
        Some(remote) => session.mirrored(remote.mirror()),
        None => session,
    }
}
