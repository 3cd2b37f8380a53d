//! Layers with a window or chunks free the pages that no later query sees.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::jobs::{Job, PAGE, assert_same, greedy, seeded, tokens};
use crate::tiny_model::{ODD, Shape, metadata, tensors, write};
use nybble::engine::{Scheduler, SchedulerOptions, Speculation};
use nybble::model::{Input, LoadOptions, Logits, Model, Session};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};

/// One layer of six sees everything.
const SHAPE: Shape = Shape { layers: 6, context: 3000, ..ODD };

/// A model whose layers but every sixth see `window` tokens.
fn windowed(shape: &Shape, window: u32) -> Arc<Model> {
    with(shape, "llama.attention.sliding_window", window)
}

fn with(shape: &Shape, key: &str, length: u32) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let mut metadata = metadata(shape);
    metadata.set(key, length).set("llama.attention.sliding_window_pattern", shape.layers as u32);
    load(&write(&folder.path().join("model.gguf"), &metadata, &tensors(shape), BlockType::Q4_0))
}

fn load(path: &Path) -> Arc<Model> {
    Arc::new(Model::load(path, &LoadOptions::default().with_threads(2)).unwrap())
}

/// The bits of the logits of the last token.
fn feed(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<u32> {
    let mut logits = Vec::new();
    model.forward(&mut [Input::new(session, tokens, Logits::Last)], &mut logits, &|| false).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

/// A session that has seen `tokens`, a piece at a time.
fn session(model: &Model, tokens: &[u32], piece: usize) -> Session {
    let mut session = model.session();
    tokens.chunks(piece).for_each(|tokens| drop(feed(model, &mut session, tokens)));
    session
}

#[test]
fn a_long_sequence_keeps_the_window_of_most_layers() {
    let model = windowed(&SHAPE, 100);
    let text = tokens(1300, 1);
    // Layers are equal, so each has a sixth of a page.
    let layer = model.cache_bytes_per_page() / 6;
    let expected = |len: usize| {
        // A query at the last position but 64 still sees its window.
        let first = (len - PAGE + 1).saturating_sub(100) / PAGE;
        let pages = len.div_ceil(PAGE);
        layer * pages + 5 * layer * (pages - first)
    };
    let whole = feed(&model, &mut model.session(), &text);
    for piece in [1, 7, 64, 257, 1299] {
        let mut session = session(&model, &text[..1299], piece);
        assert_eq!(session.bytes(), expected(1299), "in pieces of {piece}");
        assert!(session.bytes() <= model.cache_bytes_per_page() * 21 / 3);
        assert!(feed(&model, &mut session, &text[1299..]) == whole, "in pieces of {piece}");
    }
}

#[test]
fn chunks_are_freed_after_their_end() {
    let model = with(&SHAPE, "llama.attention.chunk_length", 192);
    let text = tokens(1000, 1);
    let whole = feed(&model, &mut model.session(), &text);
    let mut session = session(&model, &text[..999], 50);
    // The chunk of positions 768 to 959 is seen once 64 tokens are taken back.
    let layer = model.cache_bytes_per_page() / 6;
    assert_eq!(session.bytes(), layer * 16 + 5 * layer * (16 - 12));
    let mut shorter = session.fork();
    assert_eq!(shorter.truncate(900), 900);
    // Its chunk is freed, but at the start of a chunk nothing before it is seen.
    assert_eq!(shorter.truncate(767), 576);
    assert!(feed(&model, &mut shorter, &text[576..]) == whole);
    assert!(feed(&model, &mut session, &text[999..]) == whole);
}

#[test]
fn a_session_is_truncated_as_far_as_its_pages_reach() {
    let model = windowed(&SHAPE, 100);
    let text = tokens(900, 2);
    let all = session(&model, &text, 90);
    for (wanted, kept) in [(2000, 900), (900, 900), (899, 899), (836, 836), (500, 0), (0, 0)] {
        let mut session = all.fork();
        assert_eq!(session.truncate(wanted), kept, "{wanted}");
        assert_eq!(session.len(), kept);
        let rest = [&text[kept..], &[5, 6]].concat();
        let expected = feed(&model, &mut model.session(), &[&text[..], &[5, 6]].concat());
        assert!(feed(&model, &mut session, &rest) == expected, "{wanted}");
    }
    // A fork keeps what it sees itself.
    let mut early = session(&model, &text[..500], 100);
    let mut late = early.fork();
    feed(&model, &mut late, &text[500..]);
    assert_eq!(early.truncate(499), 499);
    assert!(feed(&model, &mut early, &text[499..]) == feed(&model, &mut model.session(), &text));
}

#[test]
fn a_failed_step_leaves_the_session_as_it_was() {
    let model = windowed(&SHAPE, 100);
    let text = tokens(1500, 3);
    let expected = feed(&model, &mut model.session(), &text);
    // Within the first batch of rows, and after it.
    for layers in [2, 8] {
        let mut session = session(&model, &text[..300], 300);
        let calls = AtomicUsize::new(0);
        let interrupted = || calls.fetch_add(1, Ordering::Relaxed) > layers;
        let input = Input::new(&mut session, &text[300..], Logits::Last);
        let error = model.forward(&mut [input], &mut Vec::new(), &interrupted).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
        assert_eq!(session.len(), 300);
        // What the step has reserved is not shared with a fork.
        let mut fork = session.fork();
        for session in [&mut session, &mut fork] {
            assert!(feed(&model, session, &text[300..]) == expected, "{layers}");
        }
    }
}

#[test]
fn a_page_with_a_freed_part_is_not_attached() {
    let model = windowed(&SHAPE, 100);
    let session = session(&model, &tokens(400, 1), 100);
    let (first, last) = (session.page(0).unwrap(), session.page(5).unwrap());
    let error = model.session().attach_page(&first, PAGE).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument { name, .. } if *name == "page"), "{error}");
    model.session().attach_page(&last, PAGE).unwrap();
}

#[test]
fn prefixes_are_shared_where_their_windows_are_there() {
    let model = windowed(&SHAPE, 100);
    let shared = tokens(700, 1);
    let with = |length: usize, last: u32, limit| Job::new([&shared[..length], &[last]].concat(), seeded(3), limit);
    for speculation in [Speculation::Off, Speculation::On] {
        let options = SchedulerOptions::default().with_speculation(speculation);
        let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
        assert_same(&model, &[with(700, 5, 90)], &mut scheduler);
        assert_eq!(scheduler.stats().reused_tokens, 0);
        assert_same(&model, &[with(650, 7, 3), with(300, 8, 200), with(700, 9, 40)], &mut scheduler);
        assert!(scheduler.stats().reused_tokens >= 640 + 256 + 640, "{:?}", scheduler.stats());
    }
}

#[test]
fn a_full_cache_frees_unseen_parts_of_the_sequences_that_run() {
    let model = windowed(&SHAPE, 100);
    let text = tokens(1400, 1);
    let page = model.cache_bytes_per_page();
    // The sequence alone takes 23 pages of one layer, and 5 of five: about 8 whole pages.
    let options = SchedulerOptions::default().with_cache_bytes(14 * page).with_prefill_chunk(100);
    let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
    let id = scheduler.submit(Job::new(text.clone(), greedy(), 20).sequence(&model), 20).unwrap();
    let mut written = Vec::new();
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false).unwrap() {
            assert_eq!(event.id, id);
            written.push(event.result.unwrap());
        }
        assert!(scheduler.stats().cache_bytes <= 14 * page);
    }
    assert!(written == Job::new(text.clone(), greedy(), 20).alone(&model));
    // What is left of it continues only where the window is there.
    let jobs = [Job::new(text[..500].to_vec(), greedy(), 5), Job::new(text, seeded(1), 5)];
    assert_same(&model, &jobs, &mut scheduler);
}

#[test]
fn a_session_file_holds_the_pages_that_are_left() {
    let folder = tempfile::tempdir().unwrap();
    let (path, model) = (folder.path().join("session"), windowed(&SHAPE, 100));
    let text = tokens(1000, 2);
    let whole = feed(&model, &mut model.session(), &text);
    for seen in [0, 1, 64, 130, 999] {
        let session = session(&model, &text[..seen], 64);
        session.save(&model, &text, &path).unwrap();
        let (mut loaded, read) = Session::load(&model, &path).unwrap();
        assert_eq!((loaded.len(), &read, loaded.bytes()), (seen, &text, session.bytes()));
        assert!(feed(&model, &mut loaded, &text[seen..]) == whole, "{seen}");
    }
    assert!(std::fs::metadata(&path).unwrap().len() < 8 * model.cache_bytes_per_page() as u64);
    let bytes = std::fs::read(&path).unwrap();
    // A part that begins later than the next query sees, a part of a full layer that lacks pages, a file that is too short.
    let first = |part: usize, first: u64| {
        let mut bytes = bytes.clone();
        bytes[64 + 8 * part..][..8].copy_from_slice(&first.to_le_bytes());
        bytes
    };
    for (bytes, key) in [
        (first(0, 15), "first page of part 0"),
        (first(0, u64::MAX), "first page of part 0"),
        (first(1, 1), "first page of part 1"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = Session::load(&model, &path).unwrap_err();
        assert!(matches!(&error, Error::Malformed { place: Place::Key(at), .. } if at == key), "{error}");
    }
    for bytes in [first(0, 1), bytes[..70].to_vec(), bytes[..bytes.len() - 1].to_vec()] {
        std::fs::write(&path, bytes).unwrap();
        let error = Session::load(&model, &path).unwrap_err();
        assert!(matches!(&error, Error::Malformed { place: Place::File, .. }), "{error}");
    }
}

#[test]
fn a_session_file_with_whole_pages_still_loads() {
    let folder = tempfile::tempdir().unwrap();
    // The first layer has the window, so both versions have the same order of layers.
    let (path, model) = (folder.path().join("session"), windowed(&Shape { layers: 2, ..SHAPE }, 100));
    let text = tokens(150, 2);
    let session = session(&model, &text[..140], 64);
    session.save(&model, &text, &path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] = 1;
    bytes.drain(64..80);
    let end = bytes.len() - 32;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(hash.as_bytes());
    std::fs::write(&path, bytes).unwrap();
    let (mut loaded, _) = Session::load(&model, &path).unwrap();
    assert!(feed(&model, &mut loaded, &text[140..]) == feed(&model, &mut model.session(), &text));
}
