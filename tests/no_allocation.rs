//! A step of a size that occurred before allocates nothing. A separate binary, because it replaces the allocator.

#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::alloc::System;
use std::path::Path;

use nybble::model::{Input, LoadOptions, Logits, Model, Session};
use nybble::quant::block::BlockType;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tiny_model::{ODD, llama};

// With the feature `python` the crate has an allocator of its own, and the test is ignored.
#[cfg_attr(not(feature = "python"), global_allocator)]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Feeds `tokens` and returns the number of allocations.
fn allocations(model: &Model, session: &mut Session, tokens: &[u32], logits: &mut Vec<f32>) -> usize {
    logits.clear();
    let region = Region::new(ALLOCATOR);
    model.forward(&mut [Input::new(session, tokens, Logits::Last)], logits, &|| false).unwrap();
    let change = region.change();
    change.allocations + change.reallocations
}

/// The allocations of one prompt step and a few decode steps inside pages of the cache that already exist.
fn round(model: &Model, session: &mut Session, logits: &mut Vec<f32>) -> usize {
    session.truncate(1); // Keeps the page of the remaining token.
    let prompt: Vec<u32> = (1..40).collect();
    let mut count = allocations(model, session, &prompt, logits);
    for token in [3, 1, 4, 1, 5, 9] {
        count += allocations(model, session, &[token], logits);
    }
    count
}

fn load(path: &Path, threads: usize) -> Model {
    Model::load(path, &LoadOptions::default().with_threads(threads)).unwrap()
}

/// Asserts that three consecutive rounds allocate nothing. With several threads this takes some rounds: a thread grows its
/// buffers when it first gets each kind of task.
fn assert_allocations_stop(what: &str, path: &Path, adapter: Option<&Path>) {
    for threads in [1, 2] {
        let mut model = load(path, threads);
        if let Some(adapter) = adapter {
            (model, _) = model.with_adapter(adapter).unwrap();
        }
        let (mut session, mut logits) = (model.session(), Vec::new());
        allocations(&model, &mut session, &[7], &mut logits);
        let mut counts = Vec::new();
        let quiet = (0..200).any(|_| {
            counts.push(round(&model, &mut session, &mut logits));
            counts.ends_with(&[0, 0, 0])
        });
        assert!(quiet, "{what}, {threads} threads: allocations per round {counts:?}");
    }
}

#[test]
#[cfg_attr(feature = "python", ignore = "the crate's own allocator is in use")]
fn a_step_of_a_known_size_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for block_type in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0, BlockType::F32] {
        assert_allocations_stop(block_type.name(), &llama(folder.path(), &ODD, block_type), None);
    }
    // With norms of queries, keys and branch outputs, learned positions, experts.
    for family in ["gemma3", "qwen3", "qwen2_moe", "gpt2"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(family);
        assert_allocations_stop(family, &path, None);
    }
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for (family, adapter) in [("llama", "llama-embeddings"), ("mixtral", "mixtral-experts")] {
        let (path, adapter) = (data.join("goldens").join(family), data.join("adapters").join(adapter));
        assert_allocations_stop("with an adapter", &path, Some(&adapter));
    }
}
