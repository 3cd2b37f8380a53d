//! Results are bit-identical on every kernel, with any number of threads, in any batching, alone or among other sessions.

use std::path::Path;

use crate::tiny_model::{ODD, Shape, llama, metadata, tensors, write, write_sparse};
use nybble::kernels;
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Session};
use nybble::quant::block::BlockType;

/// Block types with a layout of their own, and for types of more than 32 columns a shape that allows them.
const TYPES: [BlockType; 20] = [
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
    BlockType::TQ2_0,
    BlockType::Q2_0,
    BlockType::PQ2_0,
    BlockType::IQ2_XS,
];

const WIDE: Shape = Shape { hidden: 256, heads: 8, kv_heads: 2, head_dim: 32, ffn: 256, layers: 1, ..ODD };

fn shape_of(block_type: BlockType) -> Shape {
    if block_type.block_len() > 32 { WIDE } else { ODD }
}

/// All cache types, the model's default first.
const CACHES: [Option<CacheType>; 4] = [None, Some(CacheType::F32), Some(CacheType::F16), Some(CacheType::Int8)];

fn load(path: &Path, kernel: &str, threads: usize) -> Model {
    load_cached(path, kernel, threads, None)
}

fn load_cached(path: &Path, kernel: &str, threads: usize, cache_type: Option<CacheType>) -> Model {
    let (kernel, threads) = (Some(kernel.to_owned()), Some(threads));
    Model::load(path, &LoadOptions::default().with_kernel(kernel).with_threads(threads).with_cache_type(cache_type))
        .unwrap()
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) % 101).collect()
}

/// The bits of all logits, with the tokens in pieces of `piece`.
fn logits(model: &Model, tokens: &[u32], piece: usize) -> Vec<u32> {
    let mut session = model.session();
    let mut logits = Vec::new();
    for tokens in tokens.chunks(piece) {
        let input = Input::new(&mut session, tokens, Logits::All);
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
    }
    assert!(logits.iter().all(|x| x.is_finite()));
    assert!(logits.iter().any(|x| x.abs() > 0.01), "logits of zeros prove nothing");
    logits.into_iter().map(f32::to_bits).collect()
}

/// The kernel that `NYBBLE_KERNEL` names, or the best.
fn chosen() -> &'static str {
    kernels::choose(None).unwrap().name()
}

#[test]
fn every_kernel_has_the_bits_of_scalar_for_every_block_type() {
    let folder = tempfile::tempdir().unwrap();
    for block_type in TYPES {
        let path = llama(folder.path(), &shape_of(block_type), block_type);
        // In steps of 33 rows and fewer: kernels may treat many rows in another way.
        let tokens = tokens(97, 1);
        let expected = logits(&load(&path, "scalar", 1), &tokens, 97);
        for kernel in kernels::available() {
            let found = logits(&load(&path, kernel.name(), 2), &tokens, 33);
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
fn every_kernel_has_the_bits_of_scalar_for_weights_with_many_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.gguf");
    write_sparse(&path, &metadata(&ODD), &tensors(&ODD), BlockType::Q4_0, 0.55);
    let (tokens, scalar) = (tokens(97, 8), load(&path, "scalar", 1));
    let expected = logits(&scalar, &tokens, 97);
    for kernel in kernels::available() {
        let mut options = LoadOptions::default().with_kernel(kernel.name().to_owned()).with_threads(2);
        options.sparse = Some(true);
        let model = Model::load(&path, &options).unwrap();
        assert!(model.weight_bytes() < scalar.weight_bytes(), "{} stores zeros", kernel.name());
        assert_eq!(model.fingerprint(), scalar.fingerprint(), "{}", kernel.name());
        for piece in [1, 33, 97] {
            assert!(logits(&model, &tokens, piece) == expected, "{}, steps of {piece}", kernel.name());
        }
    }
}

#[test]
fn every_kernel_has_the_bits_of_scalar_for_every_cache_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q8_0);
    let tokens = tokens(300, 5);
    for cache_type in CACHES {
        let expected = logits(&load_cached(&path, "scalar", 2, cache_type), &tokens, 300);
        for kernel in kernels::available() {
            let found = logits(&load_cached(&path, kernel.name(), 2, cache_type), &tokens, 300);
            assert!(found == expected, "{cache_type:?} on {}", kernel.name());
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_and_batches() {
    let folder = tempfile::tempdir().unwrap();
    // With many query heads per key/value head attention has few tasks, which are then split by segments.
    let multi_query = Shape { kv_heads: 1, ..ODD };
    let (odd, one) = (folder.path().join("odd"), folder.path().join("one"));
    let cases = [
        (&odd, &ODD, BlockType::Q4_0, None),
        (&odd, &ODD, BlockType::F32, None),
        (&odd, &ODD, BlockType::Q4_0, Some(CacheType::Int8)),
        (&odd, &ODD, BlockType::F32, Some(CacheType::Int8)),
        (&one, &multi_query, BlockType::Q4_0, None),
        (&one, &multi_query, BlockType::Q4_0, Some(CacheType::Int8)),
    ];
    for (folder, shape, block_type, cache) in cases {
        std::fs::create_dir_all(folder).unwrap();
        let path = llama(folder, shape, block_type);
        let kernel = chosen();
        // Longer than two segments of attention and than a batch of rows.
        let tokens = tokens(600, 2);
        let expected = logits(&load_cached(&path, kernel, 1, cache), &tokens, tokens.len());
        let what = format!("{}, {cache:?}, {} heads of keys", block_type.name(), shape.kv_heads);
        for threads in [2, 3, 7] {
            let model = load_cached(&path, kernel, threads, cache);
            for piece in [7, 64, 600] {
                let found = logits(&model, &tokens, piece);
                assert!(found == expected, "{what}: {threads} threads, pieces of {piece}");
            }
        }
        // Also token by token, from the middle of the third segment.
        let model = load_cached(&path, kernel, 2, cache);
        let found = logits(&model, &tokens[..130], 1);
        assert!(found == expected[..found.len()], "{what}: token by token");
        let (mut session, mut found) = (model.session(), Vec::new());
        for tokens in [&tokens[..590]].into_iter().chain(tokens[590..].chunks(1)) {
            let input = Input::new(&mut session, tokens, Logits::Last);
            model.forward(&mut [input], &mut found, &|| false).unwrap();
        }
        let last = &expected[589 * model.vocabulary()..];
        assert!(found.iter().map(|x| x.to_bits()).eq(last.iter().copied()), "{what}: the last tokens");
    }
}

#[test]
fn a_window_hides_earlier_tokens_in_any_batching() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = chosen();
    let tokens = tokens(600, 6);
    // Windows within a page, over pages and over segments, which skip whole pages and segments.
    for window in [40, 150, 300] {
        let mut metadata = metadata(&ODD);
        metadata.set("llama.attention.sliding_window", window as u32);
        let path = write(&folder.path().join("window.gguf"), &metadata, &tensors(&ODD), BlockType::Q8_0);
        let model = load(&path, kernel, 1);
        let expected = logits(&model, &tokens, 600);
        for (kernel, threads, pieces) in [(kernel, 3, [600, 7, 64]), ("scalar", 2, [600, 300, 100])] {
            let model = load(&path, kernel, threads);
            for piece in pieces {
                let found = logits(&model, &tokens, piece);
                assert!(found == expected, "window of {window}, {kernel}, {threads} threads, pieces of {piece}");
            }
        }
        // Two layers see two windows back. Earlier tokens have no influence, the first visible one has.
        let reach = 2 * (window - 1);
        let changed = |at: usize| {
            let mut tokens = tokens.clone();
            tokens[at] = (tokens[at] + 1) % 101;
            logits(&model, &tokens, 600)[599 * model.vocabulary()..] != expected[599 * model.vocabulary()..]
        };
        if reach < 599 {
            assert!(!changed(599 - reach - 1), "window of {window}: a hidden token has an influence");
        }
        assert!(changed(599 - window + 1), "window of {window}: the last visible token has no influence");
    }
}

#[test]
fn a_session_has_the_same_bits_alone_and_among_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q4_1);
    for cache_type in CACHES {
        among_others(&load_cached(&path, chosen(), 2, cache_type));
    }
}

fn among_others(model: &Model) {
    let prompts: Vec<Vec<u32>> = [1, 40, 3, 300, 17].iter().zip(3..).map(|(n, seed)| tokens(*n, seed)).collect();
    let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| logits(model, prompt, prompt.len())).collect();

    // Together, first all but the last token of each, then the last tokens as one batch.
    let mut sessions: Vec<_> = prompts.iter().map(|_| model.session()).collect();
    let mut together: Vec<Vec<f32>> = vec![Vec::new(); prompts.len()];
    let mut all = Vec::new();
    let pairs = prompts.iter().zip(&mut sessions).filter(|(prompt, _)| prompt.len() > 1);
    let mut inputs: Vec<_> =
        pairs.map(|(prompt, session)| Input::new(session, &prompt[..prompt.len() - 1], Logits::All)).collect();
    model.forward(&mut inputs, &mut all, &|| false).unwrap();
    let mut rows = all.chunks(model.vocabulary());
    for (prompt, logits) in prompts.iter().zip(&mut together) {
        (1..prompt.len()).for_each(|_| logits.extend_from_slice(rows.next().unwrap()));
    }
    all.clear();
    let pairs = prompts.iter().zip(&mut sessions);
    let mut inputs: Vec<_> =
        pairs.map(|(prompt, session)| Input::new(session, &prompt[prompt.len() - 1..], Logits::Last)).collect();
    model.forward(&mut inputs, &mut all, &|| false).unwrap();
    for (logits, row) in together.iter_mut().zip(all.chunks(model.vocabulary())) {
        logits.extend_from_slice(row);
    }
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert!(together.iter().map(|x| x.to_bits()).eq(alone.iter().copied()), "session {i}");
    }
}

#[test]
fn a_truncated_session_continues_as_if_it_had_been_shorter() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q8_0);
    let model = load(&path, chosen(), 2);
    let (first, wrong, right) = (tokens(70, 1), tokens(90, 2), tokens(33, 3));
    let expected = logits(&model, &[&first[..], &right].concat(), 103);
    let mut session = model.session();
    let mut found = Vec::new();
    for tokens in [&first, &wrong] {
        let input = Input::new(&mut session, tokens, Logits::None);
        model.forward(&mut [input], &mut found, &|| false).unwrap();
    }
    assert!(found.is_empty());
    session.truncate(70);
    let input = Input::new(&mut session, &right, Logits::All);
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    assert!(found.iter().map(|x| x.to_bits()).eq(expected[70 * 101..].iter().copied()));
}

/// The bits of the logits after each of `tokens`.
fn continue_with(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<u32> {
    let mut logits = Vec::new();
    model.forward(&mut [Input::new(session, tokens, Logits::All)], &mut logits, &|| false).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

#[test]
fn forked_sessions_have_the_bits_of_independent_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q8_0);
    for cache_type in CACHES {
        let model = load_cached(&path, chosen(), 2, cache_type);
        // In the middle of a page, at its end, and with nothing in common.
        for shared in [300, 128, 0] {
            let (start, ends) = (tokens(shared, 1), [tokens(90, 2), tokens(70, 3), tokens(5, 4)]);
            let alone = ends.each_ref().map(|end| {
                let all = logits(&model, &[&start[..], end].concat(), shared + end.len());
                all[shared * model.vocabulary()..].to_vec()
            });
            let mut first = model.session();
            if shared > 0 {
                continue_with(&model, &mut first, &start);
            }
            let mut second = first.fork();
            assert_eq!((second.len(), second.context()), (shared, first.context()));
            let what = format!("{cache_type:?}, {shared} tokens in common");
            // Each writes where the other reads, unless pages are copied; one is truncated into the shared part, too.
            let halves = ends.each_ref().map(|end| end.split_at(end.len() / 2));
            let mut found = [vec![], vec![]];
            for half in [|(half, _): (_, _)| half, |(_, half): (_, _)| half] {
                found[0].extend(continue_with(&model, &mut first, half(halves[0])));
                found[1].extend(continue_with(&model, &mut second, half(halves[1])));
            }
            assert!(found[0] == alone[0] && found[1] == alone[1], "{what}");
            let mut third = first.fork();
            third.truncate(shared);
            assert!(continue_with(&model, &mut third, &ends[2]) == alone[2], "{what}: truncated");
            drop(third);
            first.truncate(shared);
            assert!(continue_with(&model, &mut first, &ends[2]) == alone[2], "{what}: the shared tokens are unchanged");
        }
    }
}

#[test]
fn an_interrupted_step_leaves_the_session_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q4_0);
    let model = load(&path, chosen(), 2);
    let prompt = tokens(40, 1);
    let expected = logits(&model, &prompt, 40);
    let mut session = model.session();
    let mut found = Vec::new();
    let input = Input::new(&mut session, &prompt[..20], Logits::All);
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let second_layer = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1;
    let input = Input::new(&mut session, &prompt[20..], Logits::All);
    let error = model.forward(&mut [input], &mut found, &second_layer).unwrap_err();
    assert!(matches!(error, nybble::Error::Interrupted), "{error}");
    assert_eq!((session.len(), found.len()), (20, 20 * 101));
    let input = Input::new(&mut session, &prompt[20..], Logits::All);
    model.forward(&mut [input], &mut found, &|| false).unwrap();
    assert!(found.iter().map(|x| x.to_bits()).eq(expected.iter().copied()));
}
