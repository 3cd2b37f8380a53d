//! Computes and compares logits of small models.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;

use nybble::kernels;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session};

/// Loads the model at `path`, for sessions of `context` tokens or its default.
pub(crate) fn load(path: &Path, quantize: Quantize, threads: usize, context: Option<usize>) -> Model {
    let options = LoadOptions::default().with_quantize(quantize).with_threads(threads).with_context(context);
    Model::load(path, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// Every eighth of `all` if the scalar kernel is the default, otherwise all: for promises that involve a kernel only through
/// operations whose bits are compared on every kernel. The scalar one takes ten times as long.
pub(crate) fn sample_if_scalar<T>(all: Vec<T>) -> impl Iterator<Item = T> {
    let is_scalar = kernels::choose(None).unwrap().name() == "scalar";
    all.into_iter().step_by(if is_scalar { 8 } else { 1 })
}

/// Feeds `tokens` to `session` and returns logits (tokens, vocabulary).
pub(crate) fn feed(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    let input = Input::new(session, tokens, Logits::All);
    model.forward(&mut [input], &mut logits, &|| false).unwrap();
    logits
}

/// Returns logits (tokens, vocabulary), computed in chunks of `piece` tokens.
pub(crate) fn logits(model: &Model, tokens: &[u32], piece: usize) -> Vec<f32> {
    let mut session = model.session();
    tokens.chunks(piece).flat_map(|tokens| feed(model, &mut session, tokens)).collect()
}

/// Returns the largest absolute difference, NaN included.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Unlike `f32::max`, this keeps a NaN.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

/// Returns the bit patterns.
pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Returns the token with the largest logit.
pub(crate) fn top(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best }) as u32
}

/// The line of `tests/data/fingerprints.txt` that a model called `name` would need, unless the file has it: session files of
/// earlier versions carry these fingerprints.
pub(crate) fn unknown_fingerprint(name: &str, model: &Model) -> Option<String> {
    let known = include_str!("../data/fingerprints.txt");
    let hash: String = model.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    let line = format!("{name} {hash}");
    (!known.lines().any(|known| known == line)).then_some(line)
}
