//! Input as a session file of a tiny model, unchanged, and with valid magic, version, model and checksum, so that the rest is
//! parsed too.
#![no_main]

#[path = "../../tests/common/tiny_model.rs"]
mod tiny_model;

use std::cell::OnceCell;

use libfuzzer_sys::fuzz_target;
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Session};
use nybble::quant::block::BlockType;
use nybble_fuzz::saved;
use tiny_model::{ODD, Shape};

/// The shape whose pages `scripts/fuzz_seeds.py` counts.
const SHAPE: Shape = Shape { hidden: 32, heads: 2, kv_heads: 1, head_dim: 4, ffn: 32, layers: 1, ..ODD };
const CHECKSUM: usize = 32;

thread_local! {
    static MODELS: OnceCell<[Model; 3]> = const { OnceCell::new() };
}

fn load(cache_type: CacheType) -> Model {
    let file = saved("model.gguf", &[]);
    tiny_model::write(&file, &tiny_model::metadata(&SHAPE), &tiny_model::tensors(&SHAPE), BlockType::Q4_0);
    let options = LoadOptions::default().with_threads(1).with_cache_type(cache_type);
    Model::load(&file, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// Loads a session. If that works, saves it unchanged and computes one more token.
fn check(model: &Model, bytes: &[u8]) {
    let Ok((session, tokens)) = Session::load(model, saved("session", bytes)) else { return };
    assert!(session.len() <= tokens.len() && session.bytes() <= bytes.len());
    let copy = saved("copy", &[]);
    session.save(model, &tokens, &copy).unwrap_or_else(|error| panic!("{error}"));
    let (again, text) = Session::load(model, &copy).unwrap_or_else(|error| panic!("{error}"));
    assert!(again.len() == session.len() && text == tokens);
    let (mut session, mut logits) = (session.fork(), Vec::new());
    let input = Input::new(&mut session, &[7], Logits::Last);
    if model.forward(&mut [input], &mut logits, &|| false).is_ok() {
        assert_eq!(logits.len(), model.vocabulary());
    }
}

fuzz_target!(|bytes: &[u8]| {
    MODELS.with(|models| {
        let models = models.get_or_init(|| [CacheType::F32, CacheType::F16, CacheType::Int8].map(load));
        let which = usize::from(bytes.get(12).copied().unwrap_or(0)) % models.len();
        let model = &models[which];
        check(model, bytes);
        let mut bytes = bytes.to_vec();
        let Some(end) = bytes.len().checked_sub(CHECKSUM).filter(|end| *end >= 64) else { return };
        bytes[..12].copy_from_slice(b"NYBBLEKV\x01\0\0\0");
        bytes[12..16].copy_from_slice(&(which as u32).to_le_bytes());
        bytes[16..48].copy_from_slice(model.fingerprint());
        let checksum = blake3::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(checksum.as_bytes());
        check(model, &bytes);
    });
});
