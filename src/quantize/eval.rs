//! Perplexity of a model on a text, and its divergence from a reference model.
//!
//! The figures are defined as in llama.cpp's perplexity tool (`tools/perplexity/perplexity.cpp`), so that tables can be compared.
//! The tokens of a text are cut into windows that do not overlap, each window is a separate sequence, and the second half of
//! each is scored. A [`Reference`] keeps the log-probabilities of a model in 16 bits; those below -16 do not count.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::model::{CacheType, Input, Logits, Model, Session};

/// Bytes of logits in memory at a time.
const LOGIT_BYTES: usize = 32 << 20;
/// Log-probabilities of the reference up to this do not count in the divergence and are stored as one value.
const NEGLIGIBLE: f32 = -16.0;
/// Bytes before the codes of a row of the reference, three F32: step, offset, and the negative log-likelihood of the token that
/// follows, which 16 bits would clip for the least likely tokens.
const ROW_HEADER: usize = 12;

/// Called with the number of windows that are done and the total, on the calling thread. An error ends the measurement.
pub type WindowProgress<'a> = &'a dyn Fn(usize, usize) -> Result<()>;

/// A figure with its standard error: the spread between documents of that length.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
}

/// The perplexity of a model, and its divergence from a reference.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Scored tokens: the last `n - 1 - n / 2` of each window of `n`.
    pub tokens: usize,
    /// The exponential of the mean negative log-likelihood.
    pub perplexity: Estimate,
    /// The divergence from the reference; `None` without one.
    pub divergence: Option<Divergence>,
}

/// The divergence of a model's predictions from those of a reference.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Divergence {
    /// The perplexity of the reference.
    pub reference: Estimate,
    /// The perplexity divided by that of the reference. The error accounts for both being measured on the same text.
    pub ratio: Estimate,
    /// Mean Kullback-Leibler divergence of the model's distribution from that of the reference, in nats per token.
    pub kl_mean: Estimate,
    /// Median of the divergence.
    pub kl_median: f64,
    /// 90th percentile of the divergence.
    pub kl_p90: f64,
    /// 99th percentile of the divergence.
    pub kl_p99: f64,
    /// Maximum of the divergence.
    pub kl_max: f64,
    /// Share of positions at which both predict the same token.
    pub top_agreement: Estimate,
    /// Root mean square difference of the probabilities of the token that follows.
    pub rms_dp: Estimate,
    /// Mean divergence at each scored position of a window.
    pub kl_by_position: Vec<f64>,
}

/// Cuts the tokens of a text into windows of `window` tokens and drops an incomplete one at the end. `start` replaces the first
/// token of each window, for models that expect a start token; the first token is never scored.
///
/// # Errors
/// [`Error::InvalidArgument`] for windows of fewer than 4 tokens and for a text that does not fill one.
pub fn windows(tokens: &[u32], window: usize, start: Option<u32>) -> Result<Vec<Vec<u32>>> {
    if window < 4 {
        return Err(Error::argument("window", window, "at least 4 tokens"));
    }
    if tokens.len() < window {
        let expected = format!("at least {window}, one window: use a longer text or shorter windows");
        return Err(Error::argument("text", format_args!("{} tokens", tokens.len()), expected));
    }
    let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(window).map(<[u32]>::to_vec).collect();
    if let Some(start) = start {
        windows.iter_mut().for_each(|window| window[0] = start);
    }
    Ok(windows)
}

/// Measures the perplexity of `model` on `windows`, all of one length.
///
/// # Errors
/// Those of [`Model::forward`]; [`Error::InvalidArgument`] without windows, for windows of different lengths or of fewer than 4
/// tokens; [`Error::BadLogits`].
pub fn perplexity(
    model: &Model,
    windows: &[Vec<u32>],
    progress: WindowProgress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<Evaluation> {
    let mut scores = Vec::new();
    for_each_chunk(model, windows, progress, interrupted, |rows| {
        let new = rows.map(model, Score::of);
        check(&new)?;
        scores.extend(new);
        Ok(())
    })?;
    Ok(Evaluation { tokens: scores.len(), perplexity: exponential(&scores, |score| score.nll), divergence: None })
}

/// The log-probabilities of a model on a text, in a temporary file without a name: about two bytes per scored token and token of
/// the vocabulary.
#[derive(Debug)]
pub struct Reference {
    file: File,
    windows: Vec<Vec<u32>>,
    vocabulary: usize,
    evaluation: Evaluation,
}

impl Reference {
    /// Records the predictions of `model` on `windows`. The file is in the system's folder for temporary files.
    ///
    /// # Errors
    /// Those of [`perplexity`]; [`Error::Io`] if the file cannot be written.
    pub fn record(
        model: &Model,
        windows: &[Vec<u32>],
        progress: WindowProgress<'_>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Reference> {
        let vocabulary = model.vocabulary();
        let mut writer = BufWriter::with_capacity(1 << 20, tempfile::tempfile().map_err(unwritable)?);
        let mut scores = Vec::new();
        for_each_chunk(model, windows, progress, interrupted, |rows| {
            for (score, row) in rows.map(model, Score::and_row) {
                check([&score])?;
                scores.push(score);
                writer.write_all(&row).map_err(unwritable)?;
            }
            Ok(())
        })?;
        let file = writer.into_inner().map_err(|error| unwritable(error.into_error()))?;
        let perplexity = exponential(&scores, |score| score.nll);
        let evaluation = Evaluation { tokens: scores.len(), perplexity, divergence: None };
        Ok(Reference { file, windows: windows.to_vec(), vocabulary, evaluation })
    }

    /// The perplexity of the reference itself.
    pub fn evaluation(&self) -> &Evaluation {
        &self.evaluation
    }

    /// Measures the perplexity of `model` on the same windows, and its divergence from the reference.
    ///
    /// # Errors
    /// Those of [`perplexity`]; [`Error::InvalidArgument`] for a model with another vocabulary; [`Error::Io`] if the file cannot
    /// be read.
    pub fn compare(
        &mut self,
        model: &Model,
        progress: WindowProgress<'_>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Evaluation> {
        if model.vocabulary() != self.vocabulary {
            let expected = format!("{} tokens, like the reference", self.vocabulary);
            return Err(Error::argument("vocabulary", format_args!("{} tokens", model.vocabulary()), expected));
        }
        self.file.seek(SeekFrom::Start(0)).map_err(unwritable)?;
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let row_bytes = ROW_HEADER + 2 * self.vocabulary;
        let (mut scores, mut bytes) = (Vec::new(), Vec::new());
        for_each_chunk(model, &self.windows, progress, interrupted, |rows| {
            bytes.resize(rows.tokens.len() * row_bytes, 0u8);
            reader.read_exact(&mut bytes).map_err(unwritable)?;
            let new = rows.map_with(model, &bytes, row_bytes, Score::against);
            check(&new)?;
            scores.extend(new);
            Ok(())
        })?;
        let scored = self.windows.first().map_or(1, |window| window.len() - 1 - window.len() / 2);
        Ok(Evaluation {
            tokens: scores.len(),
            perplexity: exponential(&scores, |score| score.nll),
            divergence: Some(Divergence::of(&scores, scored)),
        })
    }
}

fn unwritable(source: std::io::Error) -> Error {
    Error::io(std::env::temp_dir(), source)
}

/// Rows of logits, and the token that follows each.
struct Chunk<'a> {
    /// `(tokens, vocabulary)`
    logits: &'a [f32],
    tokens: &'a [u32],
}

impl Chunk<'_> {
    /// Calls `score` for each row, on the threads of the model.
    fn map<T: Default + Send>(&self, model: &Model, score: impl Fn(&Kernel, &[f32], u32) -> T + Sync) -> Vec<T> {
        self.map_with(model, &[], 0, |kernel, logits, token, _| score(kernel, logits, token))
    }

    /// [`Chunk::map`] with `width` bytes of `extra` per row.
    fn map_with<T: Default + Send>(
        &self,
        model: &Model,
        extra: &[u8],
        width: usize,
        score: impl Fn(&Kernel, &[f32], u32, &[u8]) -> T + Sync,
    ) -> Vec<T> {
        let vocabulary = model.vocabulary();
        let mut scores: Vec<T> = self.tokens.iter().map(|_| T::default()).collect();
        model.pool().run(|scope| {
            scope.for_each_chunk(&mut scores, 1, |row, out| {
                let logits = &self.logits[row * vocabulary..][..vocabulary];
                out[0] = score(model.kernel(), logits, self.tokens[row], &extra[row * width..][..width]);
            });
        });
        scores
    }
}

/// Passes each window through the model and calls `take` with the logits of its second half, except the last row, in chunks.
fn for_each_chunk(
    model: &Model,
    windows: &[Vec<u32>],
    progress: WindowProgress<'_>,
    interrupted: &(dyn Fn() -> bool + Sync),
    mut take: impl FnMut(Chunk<'_>) -> Result<()>,
) -> Result<()> {
    if !model.generates() {
        let found = format_args!("{}, which generates no text", model.config().family.name);
        return Err(Error::argument("model", found, "a model that predicts the next token"));
    }
    let Some(length) = windows.first().map(Vec::len).filter(|length| *length >= 4) else {
        return Err(Error::argument("windows", "none, or one below 4 tokens", "at least one window"));
    };
    if let Some(other) = windows.iter().find(|window| window.len() != length) {
        return Err(Error::argument("window", other.len(), format_args!("{length} tokens, like the first")));
    }
    // The model checks every token that it reads. The last one of a window is only scored.
    if let Some(token) =
        windows.iter().filter_map(|window| window.last()).find(|id| **id as usize >= model.vocabulary())
    {
        return Err(Error::argument("token", token, format_args!("an id below {}", model.vocabulary())));
    }
    let rows = (LOGIT_BYTES / (model.vocabulary() * size_of::<f32>()).max(1)).max(1);
    let mut logits = Vec::new();
    for (done, window) in windows.iter().enumerate() {
        progress(done, windows.len())?;
        let mut session = model.session();
        let (unscored, scored) = window[..length - 1].split_at(length / 2);
        advance(model, &mut session, (&[], unscored), Logits::None, &mut logits, interrupted)?;
        let mut at = unscored.len();
        for (tokens, next) in scored.chunks(rows).zip(window[length / 2 + 1..].chunks(rows)) {
            advance(model, &mut session, (&window[..at], tokens), Logits::All, &mut logits, interrupted)?;
            at += tokens.len();
            take(Chunk { logits: &logits, tokens: next })?;
        }
        logits.clear();
    }
    progress(windows.len(), windows.len())?;
    Ok(())
}

/// Computes `tokens`, which follow the tokens `before` in a session, and replaces `logits` by the wanted ones.
///
/// Where the cache type does not hold their keys or values, the session becomes one in F32, which holds all: a measurement is
/// about the weights.
fn advance(
    model: &Model,
    session: &mut Session,
    (before, tokens): (&[u32], &[u32]),
    wanted: Logits,
    logits: &mut Vec<f32>,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    logits.clear();
    model.forward(&mut [Input::new(session, tokens, wanted)], logits, interrupted)?;
    if session.check_cache().is_ok() {
        return Ok(());
    }
    logits.clear();
    *session = model.session_in(CacheType::F32);
    if !before.is_empty() {
        model.forward(&mut [Input::new(session, before, Logits::None)], logits, interrupted)?;
    }
    model.forward(&mut [Input::new(session, tokens, wanted)], logits, interrupted)
}

/// The score of one token.
#[derive(Debug, Clone, Copy, Default)]
struct Score {
    /// Negative log-likelihood.
    nll: f64,
    /// That of the reference.
    base: f64,
    kl: f64,
    same_top: bool,
    /// Probability minus that of the reference.
    dp: f64,
}

/// The largest logit, its first index, and the logarithm of the sum of all exponentials.
struct Normal {
    max: f32,
    top: usize,
    log_sum: f32,
}

impl Normal {
    fn of(kernel: &Kernel, logits: &[f32]) -> Normal {
        let (max, sum) = kernel.exp_segment(&mut logits.to_vec());
        let top = logits.iter().position(|logit| *logit == max).unwrap_or_default();
        Normal { max, top, log_sum: max + libm::logf(sum) }
    }
}

/// The scale of a row of the reference: the log-probability is `step * code + offset`. [`NEGLIGIBLE`] ones have code 0.
#[derive(Debug, Clone, Copy)]
struct Scale {
    step: f32,
    offset: f32,
}

impl Score {
    fn of(kernel: &Kernel, logits: &[f32], token: u32) -> Score {
        let normal = Normal::of(kernel, logits);
        // `for_each_chunk` and the model have checked all tokens.
        Score { nll: f64::from(normal.log_sum - logits[token as usize]), ..Score::default() }
    }

    /// The score, and the row that a reference stores.
    fn and_row(kernel: &Kernel, logits: &[f32], token: u32) -> (Score, Vec<u8>) {
        let normal = Normal::of(kernel, logits);
        let smallest = logits.iter().copied().fold(f32::INFINITY, f32::min).max(normal.max + NEGLIGIBLE);
        let step = (normal.max - smallest) / f32::from(u16::MAX);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let mut row = Vec::with_capacity(ROW_HEADER + 2 * logits.len());
        row.extend(step.to_le_bytes());
        row.extend((smallest - normal.log_sum).to_le_bytes());
        row.extend((normal.log_sum - logits[token as usize]).to_le_bytes());
        // The cast saturates.
        row.extend(
            logits.iter().flat_map(|logit| (((logit - smallest) * inverse).round_ties_even() as u16).to_le_bytes()),
        );
        (Score { nll: f64::from(normal.log_sum - logits[token as usize]), ..Score::default() }, row)
    }

    /// The score compared with a row of a reference.
    fn against(kernel: &Kernel, logits: &[f32], token: u32, row: &[u8]) -> Score {
        let normal = Normal::of(kernel, logits);
        let (header, codes) = row.split_at(ROW_HEADER);
        let float = |at: usize| f32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let scale = Scale { step: float(0), offset: float(4) };
        let codes = codes.as_chunks::<2>().0;
        let log = |code: &[u8; 2]| scale.step * f32::from(u16::from_le_bytes(*code)) + scale.offset;
        let mut weights: Vec<f32> = codes.iter().map(log).collect();
        let (largest, _) = kernel.exp_segment(&mut weights);
        let factor = f64::from(libm::expf(largest));
        let (mut kl, mut top, mut best) = (0.0, 0, 0);
        for (i, (code, logit)) in codes.iter().zip(logits).enumerate() {
            let number = u16::from_le_bytes(*code);
            if i == 0 || number > best {
                (top, best) = (i, number);
            }
            let base = log(code);
            if base > NEGLIGIBLE {
                kl += f64::from(weights[i]) * f64::from(base - (logit - normal.log_sum));
            }
        }
        let nll = f64::from(normal.log_sum - logits[token as usize]);
        let base = f64::from(float(8));
        let dp = libm::exp(-nll) - libm::exp(-base);
        Score { nll, base, kl: kl * factor, same_top: normal.top == top, dp }
    }
}

/// Checks that all scores are finite.
fn check<'a>(scores: impl IntoIterator<Item = &'a Score>) -> Result<()> {
    let all_finite = scores.into_iter().all(|score| score.nll.is_finite() && score.kl.is_finite());
    if all_finite { Ok(()) } else { Err(Error::BadLogits) }
}

/// The mean of `of` with its standard error, which is 0 for ten values or fewer.
fn mean(scores: &[Score], of: impl Fn(&Score) -> f64) -> Estimate {
    let count = scores.len() as f64;
    let (sum, squares) = scores.iter().map(of).fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    let value = sum / count;
    let variance = squares / count - value * value;
    let error = if scores.len() > 10 && variance > 0.0 { (variance / (count - 1.0)).sqrt() } else { 0.0 };
    Estimate { value, error }
}

/// The exponential of the mean.
fn exponential(scores: &[Score], of: impl Fn(&Score) -> f64) -> Estimate {
    let log = mean(scores, of);
    let value = libm::exp(log.value);
    Estimate { value, error: value * log.error }
}

/// The value below which `fraction` of the sorted values are, interpolated.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let position = fraction * (sorted.len() - 1) as f64;
    let below = position as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let share = position - below as f64;
    (1.0 - share) * sorted[below] + share * sorted[above]
}

impl Divergence {
    /// The divergence of at least one window with `scored` scores each.
    fn of(scores: &[Score], scored: usize) -> Divergence {
        let count = scores.len() as f64;
        let mut sorted: Vec<f64> = scores.iter().map(|score| score.kl).collect();
        sorted.sort_by(f64::total_cmp);
        // Scores are paired, so the error of the difference of means is that of the mean difference.
        let ratio = exponential(scores, |score| score.nll - score.base);
        let agreement = mean(scores, |score| if score.same_top { 1.0 } else { 0.0 }).value;
        let square = mean(scores, |score| score.dp * score.dp);
        let rms = square.value.sqrt();
        let mut kl_by_position = vec![0.0; scored];
        for window in scores.chunks(scored) {
            kl_by_position.iter_mut().zip(window).for_each(|(sum, score)| *sum += score.kl);
        }
        kl_by_position.iter_mut().for_each(|sum| *sum /= count / scored as f64);
        Divergence {
            reference: exponential(scores, |score| score.base),
            ratio,
            kl_mean: mean(scores, |score| score.kl),
            kl_median: percentile(&sorted, 0.5),
            kl_p90: percentile(&sorted, 0.9),
            kl_p99: percentile(&sorted, 0.99),
            kl_max: percentile(&sorted, 1.0),
            top_agreement: Estimate {
                value: agreement,
                error: (agreement * (1.0 - agreement) / (count - 1.0).max(1.0)).sqrt(),
            },
            rms_dp: Estimate { value: rms, error: if rms > 0.0 { 0.5 / rms * square.error } else { 0.0 } },
            kl_by_position,
        }
    }
}
