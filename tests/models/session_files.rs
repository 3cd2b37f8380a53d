//! Sessions on disk: a loaded session continues with the same bits, and any other file is refused.

use std::fs;
use std::path::{Path, PathBuf};

use crate::rewrite::rewrite;
use crate::tiny_model::{ODD, Shape, llama, metadata, tensors, write};
use nybble::engine::{Sequence, sampler::SamplingOptions, step};
use nybble::kernels;
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Session};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};
use tempfile::TempDir;

const CACHES: [CacheType; 3] = [CacheType::F32, CacheType::F16, CacheType::Int8];
/// A shape whose files are small enough to change every byte.
const SMALL: Shape = Shape { hidden: 32, heads: 2, kv_heads: 1, head_dim: 4, ffn: 32, layers: 1, ..ODD };

fn load(path: &Path, cache_type: CacheType) -> Model {
    let options = LoadOptions::default().with_threads(2).with_cache_type(cache_type);
    Model::load(path, &options).unwrap()
}

/// A folder, a small model in it, and the path of a session.
fn small() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = llama(folder.path(), &SMALL, BlockType::Q4_0);
    let session = folder.path().join("session");
    (folder, file, session)
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| i.wrapping_mul(2_654_435_761) % 101).collect()
}

/// The bits of the logits of each token.
fn feed(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<u32> {
    let mut logits = Vec::new();
    model.forward(&mut [Input::new(session, tokens, Logits::All)], &mut logits, &|| false).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

/// The bytes of a file with a session that has seen `seen` tokens, of one more.
fn saved(model: &Model, path: &Path, seen: u32) -> Vec<u8> {
    let text = tokens(seen + 1);
    let mut session = model.session();
    if seen > 0 {
        feed(model, &mut session, &text[..seen as usize]);
    }
    session.save(model, &text, path).unwrap();
    fs::read(path).unwrap()
}

/// Asserts that the file is refused at `place`, with its name, what was found and what was expected.
fn assert_refused(model: &Model, path: &Path, place: &Place, found: &str, expected: &str) {
    let error = Session::load(model, path).unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, Error::Malformed { place: at, .. } if at == place), "{text}");
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    assert!(text.contains(&format!("found {found}")) && text.contains(&format!("expected {expected}")), "{text}");
}

fn field(name: &str) -> Place {
    Place::Key(name.to_owned())
}

#[test]
fn a_saved_session_continues_with_the_same_bits_on_every_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let (path, text) = (folder.path().join("session"), tokens(200));
    for block_type in [BlockType::Q4_0, BlockType::F32] {
        let file = llama(folder.path(), &ODD, block_type);
        for cache_type in CACHES {
            let model = load(&file, cache_type);
            // Nothing, the middle of a page, its end, and beyond.
            for seen in [0, 1, 50, 64, 130] {
                let mut session = model.session();
                if seen > 0 {
                    feed(&model, &mut session, &text[..seen]);
                }
                session.save(&model, &text, &path).unwrap();
                let expected = feed(&model, &mut session.fork(), &text[seen..]);
                // By another model of the same file, with another kernel and other threads.
                for kernel in kernels::available() {
                    let options = LoadOptions::default()
                        .with_kernel(kernel.name().to_owned())
                        .with_threads(1)
                        .with_cache_type(cache_type);
                    let other = Model::load(&file, &options).unwrap();
                    let (mut loaded, read) = Session::load(&other, &path).unwrap();
                    assert_eq!((loaded.len(), loaded.context(), &read), (seen, model.context(), &text));
                    let what = format!("{} {cache_type:?} after {seen} on {}", block_type.name(), kernel.name());
                    assert!(feed(&other, &mut loaded, &text[seen..]) == expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_resumed_sequence_writes_the_same_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(&llama(folder.path(), &ODD, BlockType::Q4_0), CacheType::F16);
    let options = SamplingOptions::default().with_repetition_penalty(1.3).with_temperature(0.0);
    let run = |sequence: &mut Sequence, count: usize| {
        let each = (0..count).map(|_| step(&model, &mut [&mut *sequence], &|| false).unwrap()[0].token);
        each.collect::<Vec<u32>>()
    };
    let prompt = tokens(70);
    let expected = run(&mut Sequence::new(&model, &prompt, options.clone()).unwrap(), 30);

    let mut first = Sequence::new(&model, &prompt, options.clone()).unwrap();
    let mut found = run(&mut first, 12);
    let (path, text) = (folder.path().join("session"), [&prompt[..], &found].concat());
    first.session().save(&model, &text, &path).unwrap();
    let (session, text) = Session::load(&model, &path).unwrap();
    assert_eq!((session.len(), text.len()), (81, 82), "the last token was sampled, but not fed");
    found.extend(run(&mut Sequence::resume(&model, session.fork(), &text, options.clone()).unwrap(), 18));
    assert_eq!(found, expected);

    // Where the session has seen all tokens, the last one is computed again.
    let again = Sequence::resume(&model, session, &text[..81], options.clone()).unwrap();
    assert_eq!((again.session().len(), again.pending()), (80, &text[80..81]));
    let nothing = Sequence::resume(&model, model.session(), &[], options).unwrap_err();
    assert!(matches!(nothing, Error::InvalidArgument { name: "prompt", .. }), "{nothing}");
}

#[test]
fn a_file_with_any_byte_changed_is_refused() {
    let (_folder, file, path) = small();
    for cache_type in CACHES {
        let model = load(&file, cache_type);
        let bytes = saved(&model, &path, 3);
        assert!(Session::load(&model, &path).is_ok());
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= [1, 0x80, 0xff][at % 3];
            rewrite(&path, &bytes);
            let error = Session::load(&model, &path).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "byte {at}: {error}");
        }
    }
}

#[test]
fn a_file_of_another_length_is_refused_with_its_length() {
    let (_folder, file, path) = small();
    let model = load(&file, CacheType::F16);
    let bytes = saved(&model, &path, 3);
    for length in 0..bytes.len() {
        rewrite(&path, &bytes[..length]);
        let (found, expected) = match length {
            0..64 => (format!("a file of {length} bytes"), "64 bytes for the header".to_owned()),
            _ => (format!("{length} bytes"), format!("{} bytes for 4 tokens, 3 of them in the cache", bytes.len())),
        };
        assert_refused(&model, &path, &Place::File, &found, &expected);
    }
    fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    assert_refused(
        &model,
        &path,
        &Place::File,
        &format!("{} bytes", bytes.len() + 1),
        &format!("{} bytes", bytes.len()),
    );
}

#[test]
fn another_format_or_version_is_refused() {
    let (_folder, file, path) = small();
    let model = load(&file, CacheType::F16);
    assert_refused(&model, &file, &field("magic"), "\"GGUF", "\"NYBBLEKV\"");
    let mut bytes = saved(&model, &path, 3);
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    assert_refused(&model, &path, &field("version"), "2", "1");
}

#[test]
fn a_session_of_another_model_is_refused_with_both_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let model = load(&llama(folder.path(), &SMALL, BlockType::Q4_0), CacheType::F16);
    saved(&model, &path, 3);
    // Other weights of the same shape; the same weights with another configuration.
    let mut changed = metadata(&SMALL);
    changed.set("llama.attention.layer_norm_rms_epsilon", 1e-6f32);
    let (weights, config) = (folder.path().join("weights.gguf"), folder.path().join("config.gguf"));
    write(&weights, &metadata(&SMALL), &tensors(&SMALL), BlockType::Q8_0);
    write(&config, &changed, &tensors(&SMALL), BlockType::Q4_0);
    for other in [weights, config] {
        let other = load(&other, CacheType::F16);
        let hex = |hash: &[u8; 32]| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (found, expected) = (hex(model.fingerprint()), hex(other.fingerprint()));
        assert_ne!(found, expected);
        assert_refused(&other, &path, &field("model"), &format!("the hash {found}"), &expected);
    }
}

#[test]
fn fingerprints_do_not_depend_on_kernel_and_cache_type() {
    let folder = tempfile::tempdir().unwrap();
    let file = llama(folder.path(), &ODD, BlockType::Q4_1);
    let expected = *load(&file, CacheType::F16).fingerprint();
    for kernel in kernels::available() {
        for cache_type in CACHES {
            let kernel = Some(kernel.name().to_owned());
            let options = LoadOptions::default().with_kernel(kernel).with_cache_type(cache_type);
            assert_eq!(*Model::load(&file, &options).unwrap().fingerprint(), expected);
        }
    }
}

#[test]
fn a_session_with_another_cache_type_is_refused() {
    let (_folder, file, path) = small();
    let (f16, int8) = (load(&file, CacheType::F16), load(&file, CacheType::Int8));
    let mut bytes = saved(&f16, &path, 3);
    assert_refused(&int8, &path, &field("cache_type"), "f16", "int8, that of the loaded model");
    bytes[12] = 9;
    fs::write(&path, &bytes).unwrap();
    assert_refused(&f16, &path, &field("cache_type"), "type 9", "f16");
}

#[test]
fn counts_beyond_the_file_are_refused_and_allocate_nothing() {
    let (_folder, file, path) = small();
    let model = load(&file, CacheType::F16);
    let bytes = saved(&model, &path, 3);
    let with = |tokens: u64, seen: u64| {
        let mut bytes = bytes.clone();
        bytes[48..56].copy_from_slice(&tokens.to_le_bytes());
        bytes[56..64].copy_from_slice(&seen.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
    };
    for huge in [1 << 32, 1 << 61, 1 << 62, 1 << 63, u64::MAX] {
        with(huge, 3);
        assert_refused(&model, &path, &Place::File, &format!("{} bytes", bytes.len()), "");
        with(huge, huge);
        assert_refused(&model, &path, &field("tokens in the cache"), &huge.to_string(), "at most 700, the context");
    }
    with(2, 3);
    assert_refused(&model, &path, &field("tokens"), "2", "at least the 3 in the cache");
    // A whole page more than there is.
    with(700, 700);
    assert_refused(&model, &path, &Place::File, &format!("{} bytes", bytes.len()), "");
}

#[test]
fn a_session_longer_than_the_context_is_refused() {
    let (_folder, file, path) = small();
    saved(&load(&file, CacheType::F16), &path, 100);
    let options = LoadOptions::default().with_context(80).with_cache_type(CacheType::F16);
    let short = Model::load(&file, &options).unwrap();
    assert_refused(
        &short,
        &path,
        &field("tokens in the cache"),
        "100",
        "at most 80, the context that the model was loaded with",
    );
}

#[test]
fn an_unknown_token_is_refused_despite_a_correct_checksum() {
    let (_folder, file, path) = small();
    let model = load(&file, CacheType::F16);
    model.session().save(&model, &[1, 101], &path).unwrap();
    assert_refused(&model, &path, &field("tokens"), "101", "ids below 101");
}

#[test]
fn a_file_contains_nothing_of_truncated_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (path, text) = (folder.path().join("session"), tokens(60));
    for cache_type in CACHES {
        let model = load(&llama(folder.path(), &ODD, BlockType::Q4_0), cache_type);
        for kept in [1, 15, 16, 17, 40] {
            let (mut long, mut short) = (model.session(), model.session());
            feed(&model, &mut long, &text);
            feed(&model, &mut short, &text[..kept]);
            long.truncate(kept);
            let bytes = [long, short].map(|session| {
                session.save(&model, &text[..kept], &path).unwrap();
                fs::read(&path).unwrap()
            });
            assert!(bytes[0] == bytes[1], "{cache_type:?}, {kept} kept");
        }
    }
}

#[test]
fn a_failed_save_names_the_file_and_leaves_the_old_one() {
    let (folder, file, path) = small();
    let (model, other) = (load(&file, CacheType::F16), load(&file, CacheType::F16));
    let bytes = saved(&model, &path, 3);
    let session = model.session();
    let missing = folder.path().join("no such folder").join("session");
    assert!(matches!(session.save(&model, &[], &missing), Err(Error::Io { path, .. }) if path == missing));
    let refused = session.save(&model, &[], folder.path()).unwrap_err().to_string();
    assert!(refused.contains("which is a folder"), "{refused}");
    assert!(matches!(session.save(&other, &[], &path), Err(Error::InvalidArgument { name: "session", .. })));
    let (seen, _) = Session::load(&model, &path).unwrap();
    assert!(matches!(seen.save(&model, &[1], &path), Err(Error::InvalidArgument { name: "tokens", .. })));
    assert!(matches!(Session::load(&model, folder.path()), Err(Error::Io { path, .. }) if path == folder.path()));
    assert!(matches!(Session::load(&model, &missing), Err(Error::Io { path, .. }) if path == missing));
    assert_eq!(fs::read(&path).unwrap(), bytes);
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "the model and the session, and nothing half-written");
}

/// The file of an F32 session of a model of [`ODD`]'s shape as an earlier version wrote the same session in INT8: with a scale
/// per position and head.
fn as_whole_head_int8(f32_file: &[u8], tokens: usize, seen: usize) -> Vec<u8> {
    const PAGE: usize = 64;
    let (dim, width) = (ODD.head_dim, ODD.head_dim.next_multiple_of(16));
    let start = 64 + 4 * tokens;
    let mut file = f32_file[..start].to_vec();
    file[12..16].copy_from_slice(&2u32.to_le_bytes());
    let pages: Vec<f32> =
        f32_file[start..f32_file.len() - 32].as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let head = PAGE * (dim + width);
    assert_eq!(pages.len(), seen.div_ceil(PAGE) * ODD.layers * ODD.kv_heads * head);
    for head in pages.chunks(head) {
        let (keys, values) = head.split_at(PAGE * dim);
        let key_at = |slot: usize, d: usize| (slot / 16 * dim + d) * 16 + slot % 16;
        let scale = |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0.0f32, |top, x| top.max(x.abs())) / 127.0;
        let key_scales: Vec<f32> = (0..PAGE).map(|slot| scale(&mut (0..dim).map(|d| keys[key_at(slot, d)]))).collect();
        let value_scales: Vec<f32> = values.chunks(width).map(|value| scale(&mut value.iter().copied())).collect();
        let code = |x: f32, scale: f32| if scale == 0.0 { 0 } else { (x / scale).round() as i8 as u8 };
        let mut codes = vec![0; PAGE * dim];
        for slot in 0..PAGE {
            (0..dim).for_each(|d| codes[key_at(slot, d)] = code(keys[key_at(slot, d)], key_scales[slot]));
        }
        file.extend(codes);
        file.extend(values.iter().enumerate().map(|(i, x)| code(*x, value_scales[i / width])));
        file.extend(key_scales.iter().chain(&value_scales).flat_map(|scale| scale.to_le_bytes()));
    }
    let hash = blake3::hash(&file);
    file.extend(hash.as_bytes());
    file
}

#[test]
fn an_int8_session_of_an_earlier_version_is_converted() {
    let folder = tempfile::tempdir().unwrap();
    let file = llama(folder.path(), &ODD, BlockType::F32);
    let (exact, int8) = (load(&file, CacheType::F32), load(&file, CacheType::Int8));
    let path = folder.path().join("session");
    for seen in [0, 1, 64, 100] {
        let bytes = as_whole_head_int8(&saved(&exact, &path, seen), seen as usize + 1, seen as usize);
        fs::write(&path, &bytes).unwrap();
        let (mut session, read) = Session::load(&int8, &path).unwrap();
        assert_eq!((session.len(), &read), (seen as usize, &tokens(seen + 1)));
        let (mut reference, last) = (exact.session(), read[seen as usize]);
        if seen > 0 {
            feed(&exact, &mut reference, &read[..seen as usize]);
        }
        let expected = feed(&exact, &mut reference, &[last]);
        let found = feed(&int8, &mut session, &[last]);
        for (found, expected) in found.iter().zip(&expected) {
            let (found, expected) = (f32::from_bits(*found), f32::from_bits(*expected));
            assert!((found - expected).abs() < 0.1, "{found} for {expected} after {seen}");
        }
        // Written again, it is in the present form.
        session.save(&int8, &read, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap()[12], 3);
    }
    let bytes = as_whole_head_int8(&saved(&exact, &path, 3), 4, 3);
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert_refused(&int8, &path, &Place::File, &format!("{} bytes", bytes.len() - 1), "");
    fs::write(&path, &bytes).unwrap();
    assert_refused(&exact, &path, &field("cache_type"), "int8", "f32, that of the loaded model");
}
