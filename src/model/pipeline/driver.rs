//! Steps of a model whose layers are in the stages of a pipeline.

use std::time::Duration;

use super::held::Held;
use super::plan::Reply;
use super::remote::{Remote, Stages};
use crate::error::{Error, Result};
use crate::model::batch::Input;
use crate::model::model::{Model, open};
use crate::model::weights::load_options::LoadOptions;

/// How long a step waits for its reply before it asks again whether it is interrupted.
const PATIENCE: Duration = Duration::from_millis(20);

/// A step that the stages compute.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: u64,
    inputs: usize,
    /// Numbers of all results.
    numbers: usize,
}

impl Model {
    /// A model whose layers are in `stages`, each a [`Stage`](super::Stage) of the same file or folder with the same options and
    /// [`cache_type`](Model::cache_type). Only its header is read here.
    ///
    /// # Errors
    /// Those of [`Model::load`]; [`Error::InvalidArgument`] for a model that does not generate text.
    #[doc(hidden)]
    pub fn pipeline(
        path: impl AsRef<std::path::Path>,
        options: &LoadOptions,
        stages: Box<dyn Stages>,
    ) -> Result<Model> {
        let options = options.clone().with_mtp(false);
        open(path.as_ref(), &options, |checkpoint| {
            let model = Model::with_part(checkpoint, &options, None, |_| Held::nothing())?;
            if !model.generates() || !model.config().causal {
                let found = format_args!("a pipeline of {}, which does not generate text", model.config().family.name);
                return Err(Error::argument("stages", found, "a model that generates text"));
            }
            Ok(model.driving(Remote::new(stages)))
        })
    }

    /// Checks that the model is not a pipeline, for `what`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(in crate::model) fn check_whole(&self, what: &'static str) -> Result<()> {
        match self.remote() {
            Some(_) => Err(Error::argument(what, "a pipeline of stages", "a model in one process")),
            None => Ok(()),
        }
    }

    /// Number of stages that compute at the same time; 1 for a model that is not a pipeline.
    pub(crate) fn stages(&self) -> usize {
        self.remote().map_or(1, Remote::count)
    }

    /// Whether its layers are in stages, and its sessions have no memory.
    pub(crate) fn is_pipeline(&self) -> bool {
        self.remote().is_some()
    }

    /// How often the stages have lost their sessions.
    pub(crate) fn epoch(&self) -> u64 {
        self.remote().map_or(0, Remote::epoch)
    }

    /// Starts stages that have ended again because of `cause`, unless that has happened since `epoch`. All sessions are lost then.
    ///
    /// # Errors
    /// [`Error::StageLost`] if they do not start, and `cause` if they have ended too often.
    pub(crate) fn restart_stages(&self, epoch: u64, cause: Error) -> Result<()> {
        match self.remote() {
            Some(remote) => remote.restart(epoch, cause),
            None => Err(cause),
        }
    }

    /// Begins a step, as [`Model::forward`]. A pipeline returns a ticket, with which [`Model::finish`] waits for the results; the tokens
    /// count as computed. A model that is not a pipeline has appended the results to `logits`.
    ///
    /// # Errors
    /// Those of [`Model::forward`]
    pub(crate) fn begin(
        &self,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Ticket>> {
        self.check_inputs(inputs)?;
        match self.remote() {
            Some(remote) => self.send(remote, inputs).map(Some),
            None => self.compute(inputs, logits, interrupted).map(|()| None),
        }
    }

    /// Sends a step to the stages. Its tokens count as computed.
    fn send(&self, remote: &Remote, inputs: &mut [Input<'_>]) -> Result<Ticket> {
        let id = remote.send(inputs, |inputs| self.transformer.count(inputs))?;
        let numbers = inputs.iter().map(|input| self.transformer.result_len(input));
        Ok(Ticket { id, inputs: inputs.len(), numbers: numbers.fold(0, usize::saturating_add) })
    }

    /// Waits for the results of a step and appends them to `logits`. Returns for each input the first position whose keys or values the
    /// cache type does not hold.
    ///
    /// # Errors
    /// [`Error::Interrupted`], after which it can be called again; [`Error::StageLost`]; [`Error::OutOfMemory`], after which the
    /// sessions of the step are to be truncated to nothing.
    pub(crate) fn finish(
        &self,
        ticket: &Ticket,
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<usize>>> {
        let Some(remote) = self.remote() else { return Ok(Vec::new()) };
        loop {
            if let Some(Reply { header, numbers }) = remote.receive(ticket.id, PATIENCE)? {
                let (found, expected) = (numbers.len(), ticket.numbers);
                if found != expected || header.overflows.len() != ticket.inputs {
                    return Err(Error::StageLost(format!(
                        "the last stage returned {found} numbers, expected {expected}"
                    )));
                }
                if logits.is_empty() {
                    *logits = numbers;
                } else {
                    logits.extend_from_slice(&numbers);
                }
                return Ok(header.overflows);
            }
            if interrupted() {
                return Err(Error::Interrupted);
            }
        }
    }

    /// Nobody will call [`Model::finish`] for a step.
    pub(crate) fn forget(&self, ticket: &Ticket) {
        self.remote().into_iter().for_each(|remote| remote.forget(ticket.id));
    }

    /// A step of a pipeline from beginning to end.
    ///
    /// # Errors
    /// Those of [`Model::forward`], and [`Error::StageLost`]. The sessions may hold fewer tokens than before then.
    pub(in crate::model) fn forward_by_stages(
        &self,
        remote: &Remote,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let (before, epoch) = (logits.len(), remote.epoch());
        let result = self.send(remote, inputs).and_then(|ticket| {
            let result = self.finish(&ticket, logits, interrupted);
            if matches!(result, Err(Error::Interrupted)) {
                remote.forget(ticket.id);
            }
            result
        });
        match result {
            Ok(overflows) => {
                for (input, overflow) in inputs.iter_mut().zip(overflows) {
                    overflow.into_iter().for_each(|position| input.session.overflowed_at(position));
                }
                self.transformer.invalidate_overflowed(inputs, &mut logits[before..]);
                Ok(())
            }
            Err(error) => {
                if let Error::StageLost(cause) = &error {
                    remote.restart(epoch, Error::StageLost(cause.clone()))?;
                }
                for input in inputs.iter_mut() {
                    input.session.truncate(0);
                }
                Err(error)
            }
        }
    }
}
