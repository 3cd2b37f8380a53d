//! Token ids and sampling options from Python, sampled tokens to Python.

use std::collections::HashMap;

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::Error;
use crate::engine::sampler::{self, EarlyStopping, SamplingOptions};

/// Token ids. Python's integers have any size: one that does not fit here is an unknown id like any other.
pub(super) struct TokenIds(Vec<i64>);

impl<'a, 'py> FromPyObject<'a, 'py> for TokenIds {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let ids = object.extract::<Vec<i64>>();
        ids.map(TokenIds).map_err(|error| match error.is_instance_of::<PyOverflowError>(object.py()) {
            true => Error::argument("token", "an integer of more than 64 bits", "an id of the vocabulary").into(),
            false => error,
        })
    }
}

impl TokenIds {
    /// The ids, checked to fit into 32 bits.
    pub(super) fn checked(self) -> crate::Result<Vec<u32>> {
        let id = |id| u32::try_from(id).map_err(|_| Error::argument("token", id, "an id of the vocabulary"));
        self.0.into_iter().map(id).collect()
    }
}

/// The attributes of the package's `SamplingOptions`, which documents them.
#[derive(FromPyObject)]
pub(super) struct Options {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    top_n_sigma: f32,
    xtc_probability: f32,
    xtc_threshold: f32,
    dynatemp_range: f32,
    dynatemp_exponent: f32,
    mirostat: u32,
    mirostat_tau: f32,
    mirostat_eta: f32,
    dry_multiplier: f32,
    dry_base: f32,
    dry_allowed_length: u32,
    dry_window: u32,
    ignore_eos: bool,
    num_beams: u32,
    length_penalty: f32,
    early_stopping: Stopping,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    penalty_window: u32,
    logit_bias: HashMap<u32, f32>,
    min_tokens: u32,
    seed: Option<u64>,
    logprobs: Option<u32>,
}

/// `early_stopping` of the package's `SamplingOptions`: False, True or "never".
#[derive(FromPyObject)]
enum Stopping {
    Switch(bool),
    Name(String),
}

impl Stopping {
    fn checked(self) -> crate::Result<EarlyStopping> {
        match self {
            Stopping::Switch(false) => Ok(EarlyStopping::Heuristic),
            Stopping::Switch(true) => Ok(EarlyStopping::Always),
            Stopping::Name(name) if name == "never" => Ok(EarlyStopping::Never),
            Stopping::Name(name) => Err(Error::argument("early_stopping", name, "False, True or \"never\"")),
        }
    }
}

impl Options {
    /// The options of a sampler. `dry_breakers` are the token sequences that end a repetition.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown `early_stopping`.
    pub(super) fn sampling(self, dry_breakers: Vec<Vec<u32>>) -> crate::Result<SamplingOptions> {
        let options = self;
        let early_stopping = options.early_stopping.checked()?;
        // Sorted: a map has no order, and results must not depend on one.
        let mut logit_bias: Vec<_> = options.logit_bias.into_iter().collect();
        logit_bias.sort_by_key(|(token, _)| *token);
        Ok(SamplingOptions {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            typical_p: options.typical_p,
            top_n_sigma: options.top_n_sigma,
            xtc_probability: options.xtc_probability,
            xtc_threshold: options.xtc_threshold,
            dynatemp_range: options.dynatemp_range,
            dynatemp_exponent: options.dynatemp_exponent,
            mirostat: options.mirostat,
            mirostat_tau: options.mirostat_tau,
            mirostat_eta: options.mirostat_eta,
            dry_multiplier: options.dry_multiplier,
            dry_base: options.dry_base,
            dry_allowed_length: options.dry_allowed_length,
            dry_window: options.dry_window,
            dry_sequence_breakers: dry_breakers,
            ignore_eos: options.ignore_eos,
            num_beams: options.num_beams,
            length_penalty: options.length_penalty,
            early_stopping,
            repetition_penalty: options.repetition_penalty,
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            penalty_window: options.penalty_window,
            logit_bias,
            min_tokens: options.min_tokens,
            seed: options.seed,
            logprobs: options.logprobs,
        })
    }
}

/// A sampled token, its log-probability, and the most likely tokens with theirs.
#[pyclass(frozen, get_all, module = "nybble._native")]
pub(super) struct Sampled {
    id: u32,
    logprob: Option<f32>,
    top: Vec<(u32, f32)>,
    beam_score: Option<f64>,
}

impl From<sampler::Sampled> for Sampled {
    fn from(sampled: sampler::Sampled) -> Sampled {
        let sampler::Sampled { token, logprob, top, beam_score } = sampled;
        Sampled { id: token, logprob, top, beam_score }
    }
}
