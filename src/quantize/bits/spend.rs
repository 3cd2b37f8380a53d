//! Spends a number of bits per weight on the most sensitive layers.

use super::sensitivity::plan;
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::layerwise::Layerwise;
use crate::quantize::calibration::check_windows;
use crate::quantize::context::{OpenRun, RunContext};
use crate::quantize::overrides::TensorFormats;
use crate::quantize::pipeline::exceptions::without_f16_scales;
use crate::quantize::resume::{ResumeFiles, ResumeLog, run_key};

/// Windows on which sensitivity is measured, and tokens of each.
const SAMPLE: (usize, usize) = (2, 128);

impl TensorFormats {
    /// The formats with overrides that give the most sensitive linear layers finer formats, so that all linear layers together have at
    /// most `bits` per weight, scales included. Sensitivity is measured on the first windows of the context.
    ///
    /// Measurements stay in a file next to the output until [`quantize`](crate::quantize::quantize) has written it, so that an
    /// interrupted run continues with them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the format of linear layers already takes more bits, and for too little text; those of
    /// [`quantize`](crate::quantize::quantize).
    pub fn spend_bits(&self, context: &RunContext<'_>, bits: f64) -> Result<TensorFormats> {
        self.spend(context, Some(bits), false)
    }

    /// As [`spend_bits`](TensorFormats::spend_bits), but embedding and output, where they would be stored in Q8_0, may have fewer bits,
    /// too. What they leave goes to the linear layers, and the file keeps its size. Without `bits`, that is its size with these formats.
    ///
    /// # Errors
    /// Those of [`spend_bits`](TensorFormats::spend_bits).
    pub fn spend_all_bits(&self, context: &RunContext<'_>, bits: impl Into<Option<f64>>) -> Result<TensorFormats> {
        self.spend(context, bits.into(), true)
    }

    /// The formats with overrides. `bits` is `None` for those that the formats take.
    fn spend(&self, context: &RunContext<'_>, bits: Option<f64>, chooses_head: bool) -> Result<TensorFormats> {
        let formats = self;
        formats.check()?;
        context.check_out(&[ResumeFiles::next_to(context.out)])?;
        let (windows, tokens) = SAMPLE;
        let sample = context.windows.iter().take(windows).map(|window| window[..window.len().min(tokens)].to_vec());
        let sample: Vec<Vec<u32>> = sample.collect();
        if sample.iter().all(Vec::is_empty) {
            return Err(Error::argument("calibration", "no text", "a text on which sensitivity is measured"));
        }
        context.with_checkpoint(|checkpoint: &dyn Checkpoint| {
            let layers = &Layerwise::load(checkpoint, &context.load_options())?;
            check_windows(layers, context.windows)?;
            formats.check_names(checkpoint)?;
            let files = &ResumeFiles::next_to(context.out);
            let mut log = ResumeLog::open(&files.sensitivity(), context.out, run_key(checkpoint, formats, &sample))?;
            let run =
                OpenRun { context: RunContext { windows: &sample, ..*context }, checkpoint, layers, formats, files };
            let (mut formats, _) = without_f16_scales(&run)?;
            let finer = plan(&OpenRun { formats: &formats, ..run }, bits, chooses_head, &mut log)?;
            formats.overrides.extend(finer);
            Ok(formats)
        })
    }
}
