//! Token ids and sampling options from Python, sampled tokens to Python.

use std::collections::HashMap;

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::Error;
use crate::engine::sampler::{self, SamplingOptions};

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
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    penalty_window: u32,
    logit_bias: HashMap<u32, f32>,
    min_tokens: u32,
    seed: Option<u64>,
    logprobs: Option<u32>,
}

impl From<Options> for SamplingOptions {
    fn from(options: Options) -> SamplingOptions {
        // Sorted: a map has no order, and results must not depend on one.
        let mut logit_bias: Vec<_> = options.logit_bias.into_iter().collect();
        logit_bias.sort_by_key(|(token, _)| *token);
        SamplingOptions {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            typical_p: options.typical_p,
            repetition_penalty: options.repetition_penalty,
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            penalty_window: options.penalty_window,
            logit_bias,
            min_tokens: options.min_tokens,
            seed: options.seed,
            logprobs: options.logprobs,
        }
    }
}

/// A sampled token, its log-probability, and the most likely tokens with theirs.
#[pyclass(frozen, get_all, module = "nybble._native")]
pub(super) struct Sampled {
    id: u32,
    logprob: Option<f32>,
    top: Vec<(u32, f32)>,
}

impl From<sampler::Sampled> for Sampled {
    fn from(sampled: sampler::Sampled) -> Sampled {
        Sampled { id: sampled.token, logprob: sampled.logprob, top: sampled.top }
    }
}
