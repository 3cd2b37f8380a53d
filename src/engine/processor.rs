//! Logits processors: functions of the caller that change logits before sampling.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};

/// What a processor fails with.
pub(super) type Failure = Box<dyn std::error::Error + Send + Sync>;

type Process = dyn Fn(&[u32], &mut [f32]) -> std::result::Result<(), Failure> + Send + Sync;

/// A function that changes the logits of a sequence before each token is sampled.
#[derive(Clone)]
pub(super) struct LogitsProcessor(Arc<Process>);

impl LogitsProcessor {
    pub(super) fn new(
        process: impl Fn(&[u32], &mut [f32]) -> std::result::Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        LogitsProcessor(Arc::new(process))
    }

    /// Changes the logits.
    ///
    /// # Errors
    /// [`Error::LogitsProcessor`] when the function fails; [`Error::InvalidArgument`] when it leaves logits that cannot be sampled.
    pub(super) fn apply(&self, tokens: &[u32], logits: &mut [f32]) -> Result<()> {
        self.0(tokens, logits).map_err(Error::LogitsProcessor)?;
        let bad = |(_, logit): &(usize, &f32)| logit.is_nan() || **logit == f32::INFINITY;
        if let Some((token, logit)) = logits.iter().enumerate().find(bad) {
            let found = format_args!("a processor that sets the logit of token {token} to {logit}");
            return Err(Error::argument("logits_processor", found, "a finite number or minus infinity"));
        }
        if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            let found = "a processor that sets all logits to minus infinity";
            return Err(Error::argument("logits_processor", found, "at least one finite logit"));
        }
        Ok(())
    }
}

impl fmt::Debug for LogitsProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogitsProcessor")
    }
}
