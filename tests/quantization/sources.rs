//! Sources, windows and logits for these tests.

use std::path::{Path, PathBuf};

use nybble::format::gguf::Metadata;
use nybble::model::hf::HfFolder;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, convert};
use nybble::quant::block::BlockType;
use nybble::quantize::{QuantizeOptions, Report, RunContext, quantize};
use tempfile::TempDir;

/// Tokens in the vocabulary of the golden checkpoints.
pub(crate) const VOCABULARY: usize = 320;

/// The folder of a golden checkpoint.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(name)
}

/// A golden checkpoint as a GGUF file of F32, which needs no tokenizer.
pub(crate) fn source(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(format!("{name}-f32.gguf"));
    let checkpoint = HfFolder::open(golden(name)).unwrap();
    convert::convert(&checkpoint, &Metadata::new(), &path, BlockType::F32, None).unwrap();
    path
}

/// Windows of those lengths, always with the same tokens, which all checkpoints have.
pub(crate) fn windows(lengths: impl Iterator<Item = usize>) -> Vec<Vec<u32>> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % 288
    };
    lengths.map(|length| (0..length).map(|_| next()).collect()).collect()
}

/// Whether a run should stop.
pub(crate) type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

/// Quantizes, and overwrites `out` if it exists.
pub(crate) fn run_forced(
    source: &Path,
    out: &Path,
    windows: &[Vec<u32>],
    options: &QuantizeOptions,
    threads: usize,
    stop: Stop<'_>,
) -> nybble::Result<Report> {
    let context = RunContext::new(source, out, windows);
    quantize(&context.with_threads(threads).with_force(true).with_interrupted(stop), options)
}

/// The logits `(tokens of all windows, VOCABULARY)` of a file whose weights are computed in F32.
pub(crate) fn logits(file: &Path, windows: &[Vec<u32>]) -> Vec<f32> {
    let floats = file.with_extension("floats.gguf");
    convert::convert_path(file, &floats, BlockType::F32, None).unwrap();
    let options = LoadOptions::default().with_quantize(Quantize::Stored).with_threads(1);
    let model = Model::load(&floats, &options).unwrap();
    let mut all = Vec::new();
    for tokens in windows {
        let (mut session, mut logits) = (model.session(), Vec::new());
        let input = Input::new(&mut session, tokens, Logits::All);
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
        all.extend(logits);
    }
    all
}
