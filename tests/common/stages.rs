//! Stages of a pipeline in the process of the test, which can end or lack memory at a given plan.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::HashMap;
use std::fmt::{Debug, Formatter};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nybble::Error;
use nybble::model::pipeline::{Cuts, Stage, Stages};
use nybble::model::{LoadOptions, Model};

/// What goes wrong, by the number of the plan, counted over all restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// This stage ends before the plan.
    Ends(usize),
    /// This stage has no memory for the plan.
    LacksMemory(usize),
    /// The plan never reaches this stage.
    Misses(usize),
}

#[derive(Default)]
struct State {
    stages: Vec<Option<Stage>>,
    replies: HashMap<u64, Option<Vec<u8>>>,
    plans: u64,
    pub(crate) restarts: usize,
}

/// Stages that compute when a plan is sent.
#[derive(Clone)]
pub(crate) struct Here {
    path: PathBuf,
    options: LoadOptions,
    units: Vec<Range<usize>>,
    state: Arc<Mutex<State>>,
    faults: Arc<Mutex<HashMap<u64, Fault>>>,
}

impl Debug for Here {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "stages of {}", self.path.display())
    }
}

impl Here {
    pub(crate) fn new(path: &Path, options: &LoadOptions, units: Vec<Range<usize>>) -> Here {
        let here = Here {
            path: path.to_path_buf(),
            options: options.clone(),
            units,
            state: Arc::default(),
            faults: Arc::default(),
        };
        here.state.lock().unwrap().stages = here.units.iter().map(|_| None).collect();
        here.start();
        here
    }

    fn start(&self) {
        let mut state = self.state.lock().unwrap();
        for (stage, units) in state.stages.iter_mut().zip(&self.units) {
            let load = || Stage::load(&self.path, &self.options, units.clone(), None).unwrap();
            stage.get_or_insert_with(load);
        }
    }

    pub(crate) fn fault(&self, plan: u64, fault: Fault) {
        self.faults.lock().unwrap().insert(plan, fault);
    }

    pub(crate) fn restarts(&self) -> usize {
        self.state.lock().unwrap().restarts
    }

    pub(crate) fn plans(&self) -> u64 {
        self.state.lock().unwrap().plans
    }

    /// Replies that nobody has received.
    pub(crate) fn left(&self) -> usize {
        self.state.lock().unwrap().replies.len()
    }

    pub(crate) fn weight_bytes(&self) -> Vec<usize> {
        let state = self.state.lock().unwrap();
        state.stages.iter().flatten().map(|stage| stage.model().weight_bytes()).collect()
    }
}

impl Stages for Here {
    fn count(&self) -> usize {
        self.units.len()
    }

    fn send(&self, plan: &[u8]) -> Result<u64, Error> {
        let mut state = self.state.lock().unwrap();
        state.plans += 1;
        let number = state.plans;
        let fault = self.faults.lock().unwrap().remove(&number);
        let mut reply = Some(Vec::new());
        for (at, stage) in state.stages.iter_mut().enumerate() {
            if fault == Some(Fault::Ends(at)) {
                *stage = None;
            }
            reply = match (fault, stage, reply) {
                (Some(Fault::Misses(stage)), _, reply) if stage == at => reply,
                (Some(Fault::LacksMemory(stage)), Some(own), Some(_)) if stage == at => {
                    // As if memory was missing: sessions stay, and the stages after it know.
                    let header = br#"{"failure":{"Memory":{"bytes":64,"left":null}},"overflows":[]}"#;
                    let failed = [&(header.len() as u32).to_le_bytes()[..], header].concat();
                    let followed = own.run(plan, &failed);
                    Some(if at == 0 { failed } else { followed })
                }
                (_, Some(stage), Some(received)) => Some(stage.run(plan, &received)),
                _ => None,
            };
        }
        state.replies.insert(number, reply);
        Ok(number)
    }

    fn receive(&self, ticket: u64, _: Duration) -> Result<Option<Vec<u8>>, Error> {
        match self.state.lock().unwrap().replies.remove(&ticket) {
            Some(Some(reply)) => Ok(Some(reply)),
            _ => Err(Error::StageLost("it ended".to_owned())),
        }
    }

    fn forget(&self, ticket: u64) {
        self.state.lock().unwrap().replies.remove(&ticket);
    }

    fn restart(&self) -> Result<(), Error> {
        self.state.lock().unwrap().restarts += 1;
        self.state.lock().unwrap().replies.clear();
        self.start();
        Ok(())
    }
}

/// A pipeline of the model at `path` in up to `stages` stages, if its cuts allow that.
pub(crate) fn pipeline(path: &Path, options: &LoadOptions, stages: usize) -> (Arc<Model>, Here) {
    let cuts = Cuts::read(path, options).unwrap();
    let units = cuts.divide(stages.min(cuts.possible.len() + 1)).unwrap();
    let cache_type = options.cache_type.or_else(|| Some(Model::load(path, options).unwrap().cache_type()));
    let here = Here::new(path, &options.clone().with_cache_type(cache_type), units);
    (Arc::new(Model::pipeline(path, options, Box::new(here.clone())).unwrap()), here)
}
