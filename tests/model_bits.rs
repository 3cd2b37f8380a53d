//! The same tokens give the same bits: on every kernel, with any number of threads, in one piece or several, alone or
//! with others.

#[path = "common/tiny_model.rs"]
mod tiny_model;

use std::path::Path;

use nybble::kernels;
use nybble::model::{Input, LoadOptions, Logits, Model};
use nybble::quant::block::BlockType;
use tiny_model::{ODD, Shape, llama};

/// Types with a layout of their own, those of 256 with a shape that allows them.
const TYPES: [BlockType; 16] = [
    BlockType::F32,
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q2_K,
    BlockType::Q3_K,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::IQ4_NL,
    BlockType::IQ4_XS,
    BlockType::MXFP4,
];

const WIDE: Shape = Shape { hidden: 256, heads: 8, kv_heads: 2, head_dim: 32, ffn: 256, layers: 1, ..ODD };

fn shape_of(block_type: BlockType) -> Shape {
    if block_type.block_len() == 256 { WIDE } else { ODD }
}

fn load(path: &Path, kernel: &str, threads: usize) -> Model {
    let options = LoadOptions { kernel: Some(kernel.to_owned()), threads: Some(threads), ..LoadOptions::default() };
    Model::load(path, &options).unwrap()
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % 101).collect()
}

/// Bits of all logits, the tokens fed in pieces of `piece`.
fn logits(model: &Model, tokens: &[u32], piece: usize) -> Vec<u32> {
    let mut session = model.session();
    let mut logits = Vec::new();
    for tokens in tokens.chunks(piece) {
        let input = Input { session: &mut session, tokens, logits: Logits::All };
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
    }
    assert!(logits.iter().all(|x| x.is_finite()));
    assert!(logits.iter().any(|x| x.abs() > 0.01), "logits of zeros would prove nothing");
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_kernel_gives_the_bits_of_the_scalar_one_for_every_type() {
    let folder = tempfile::tempdir().unwrap();
    for block_type in TYPES {
        let path = llama(folder.path(), &shape_of(block_type), block_type);
        let tokens = tokens(19, 1);
        let expected = logits(&load(&path, "scalar", 1), &tokens, 19);
        for kernel in kernels::available() {
            let found = logits(&load(&path, kernel.name(), 2), &tokens, 19);
            assert!(found == expected, "{} on {}", block_type.name(), kernel.name());
        }
    }
    let ran: Vec<&str> = kernels::available().iter().map(|kernel| kernel.name()).collect();
    println!("kernels that ran: {}", ran.join(", "));
    for wanted in std::env::var("NYBBLE_REQUIRE_KERNELS").unwrap_or_default().split(',').filter(|name| !name.is_empty())
    {
        assert!(ran.contains(&wanted), "kernel {wanted} did not run");
    }
}

#[test]
fn threads_and_pieces_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    for block_type in [BlockType::Q4_0, BlockType::F32] {
        let path = llama(folder.path(), &ODD, block_type);
        let kernel = kernels::best().name();
        // Longer than a segment of attention and than a batch of rows.
        let tokens = tokens(600, 2);
        let expected = logits(&load(&path, kernel, 1), &tokens, tokens.len());
        for threads in [2, 3] {
            let model = load(&path, kernel, threads);
            for piece in [7, 64, 600] {
                let found = logits(&model, &tokens, piece);
                assert!(found == expected, "{}: {threads} threads, pieces of {piece}", block_type.name());
            }
        }
        let found = logits(&load(&path, kernel, 2), &tokens[..130], 1);
        assert!(found == expected[..found.len()], "{}: token by token", block_type.name());
    }
}

#[test]
fn a_session_among_others_gives_the_bits_that_it_gives_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q4_1);
    let model = load(&path, kernels::best().name(), 2);
    let prompts: Vec<Vec<u32>> = [1, 40, 3, 300, 17].iter().zip(3..).map(|(n, seed)| tokens(*n, seed)).collect();
    let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| logits(&model, prompt, prompt.len())).collect();

    // Together, first all but the last token of each, then the last tokens as one batch.
    let mut sessions: Vec<_> = prompts.iter().map(|_| model.session()).collect();
    let mut together: Vec<Vec<f32>> = vec![Vec::new(); prompts.len()];
    let mut all = Vec::new();
    let pairs = prompts.iter().zip(&mut sessions).filter(|(prompt, _)| prompt.len() > 1);
    let mut inputs: Vec<_> = pairs
        .map(|(prompt, session)| Input { session, tokens: &prompt[..prompt.len() - 1], logits: Logits::All })
        .collect();
    model.forward(&mut inputs, &mut all, &|| false).unwrap();
    let mut rows = all.chunks(model.vocabulary());
    for (prompt, logits) in prompts.iter().zip(&mut together) {
        (1..prompt.len()).for_each(|_| logits.extend_from_slice(rows.next().unwrap()));
    }
    all.clear();
    let pairs = prompts.iter().zip(&mut sessions);
    let mut inputs: Vec<_> = pairs
        .map(|(prompt, session)| Input { session, tokens: &prompt[prompt.len() - 1..], logits: Logits::Last })
        .collect();
    model.forward(&mut inputs, &mut all, &|| false).unwrap();
    for (logits, row) in together.iter_mut().zip(all.chunks(model.vocabulary())) {
        logits.extend_from_slice(row);
    }
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert!(together.iter().map(|x| x.to_bits()).eq(alone.iter().copied()), "session {i}");
    }
}

#[test]
fn a_session_cut_back_goes_on_as_if_the_rest_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q8_0);
    let model = load(&path, kernels::best().name(), 2);
    let (first, wrong, right) = (tokens(70, 1), tokens(90, 2), tokens(33, 3));
    let expected = logits(&model, &[&first[..], &right].concat(), 103);
    let mut session = model.session();
    let mut found = Vec::new();
    for tokens in [&first, &wrong] {
        let input = Input { session: &mut session, tokens, logits: Logits::None };
        model.forward(&mut [input], &mut found, &|| false).unwrap();
    }
    assert!(found.is_empty());
    session.truncate(70);
    let input = Input { session: &mut session, tokens: &right, logits: Logits::All };
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    assert!(found.iter().map(|x| x.to_bits()).eq(expected[70 * 101..].iter().copied()));
}

#[test]
fn a_step_that_is_interrupted_leaves_the_session_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q4_0);
    let model = load(&path, kernels::best().name(), 2);
    let prompt = tokens(40, 1);
    let expected = logits(&model, &prompt, 40);
    let mut session = model.session();
    let mut found = Vec::new();
    let input = Input { session: &mut session, tokens: &prompt[..20], logits: Logits::All };
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let second_layer = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1;
    let input = Input { session: &mut session, tokens: &prompt[20..], logits: Logits::All };
    let error = model.forward(&mut [input], &mut found, &second_layer).unwrap_err();
    assert!(matches!(error, nybble::Error::Interrupted), "{error}");
    assert_eq!((session.len(), found.len()), (20, 20 * 101));
    let input = Input { session: &mut session, tokens: &prompt[20..], logits: Logits::All };
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    assert!(found.iter().map(|x| x.to_bits()).eq(expected.iter().copied()));
}
