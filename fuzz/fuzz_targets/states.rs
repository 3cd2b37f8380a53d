//! Input as calls to sessions of models with recurrent states: steps of one or several sessions, forks, truncation, files, and
//! damaged files. In the end, every session computes what a new one computes from its tokens.
#![no_main]

use std::cell::OnceCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session};
use nybble_fuzz::saved;

/// One for each kind of state that is stored differently.
const MODELS: [&str; 5] = ["qwen3_5", "kimi_linear", "lfm2", "mamba2", "falcon_h1"];
const SESSIONS: usize = 4;
/// Tokens of a session: pages have 64, and snapshots lie between them.
const MOST: usize = 200;
const CHECKSUM: usize = 32;

thread_local! {
    static LOADED: OnceCell<[Model; MODELS.len()]> = const { OnceCell::new() };
}

fn load(name: &str) -> Model {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/gguf").join(format!("{name}.gguf"));
    let options = LoadOptions::default().with_threads(1).with_quantize(Quantize::Stored);
    Model::load(&file, &options).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A session and what it was fed.
struct Fed {
    session: Session,
    tokens: Vec<u32>,
}

impl Fed {
    fn new(model: &Model) -> Fed {
        Fed { session: model.session(), tokens: Vec::new() }
    }

    /// The next tokens that `argument` asks for, as long as there is space.
    fn next(&self, argument: u8) -> Vec<u32> {
        let count = (1 + usize::from(argument) % 40).min(MOST - self.tokens.len());
        (0..count as u32).map(|i| 3 + (u32::from(argument) + i * 7) % 280).collect()
    }
}

/// Computes a step of several sessions, each with its tokens, and returns the bits of its logits.
fn step(model: &Model, fed: &mut [Fed], tokens: &[Vec<u32>]) -> Vec<u32> {
    let with_tokens = fed.iter_mut().zip(tokens).filter(|(_, tokens)| !tokens.is_empty());
    let mut inputs: Vec<_> =
        with_tokens.map(|(fed, tokens)| Input::new(&mut fed.session, tokens, Logits::Last)).collect();
    let mut logits = Vec::new();
    if !inputs.is_empty() {
        model.forward(&mut inputs, &mut logits, &|| false).unwrap_or_else(|error| panic!("{error}"));
    }
    drop(inputs);
    for (fed, tokens) in fed.iter_mut().zip(tokens) {
        fed.tokens.extend(tokens);
    }
    logits.into_iter().map(f32::to_bits).collect()
}

/// Loads a file whose byte `at` was changed, with a checksum that is right. It is refused, or computes something.
fn damaged(model: &Model, mut bytes: Vec<u8>, at: usize, argument: u8) {
    let Some(end) = bytes.len().checked_sub(CHECKSUM).filter(|end| *end > 0) else { return };
    bytes[at % end] ^= argument | 1;
    let checksum = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(checksum.as_bytes());
    let Ok((mut session, _)) = Session::load(model, saved("damaged", &bytes)) else { return };
    let mut logits = Vec::new();
    if model.forward(&mut [Input::new(&mut session, &[7], Logits::Last)], &mut logits, &|| false).is_ok() {
        assert_eq!(logits.len(), model.vocabulary());
    }
}

fn play(model: &Model, calls: &[u8]) {
    let mut all = vec![Fed::new(model)];
    for [call, argument] in calls.as_chunks::<2>().0.iter().take(64) {
        let chosen = usize::from(call / 8) % all.len();
        match call % 8 {
            0 | 1 => {
                let tokens: Vec<_> =
                    all.iter().enumerate().map(|(i, fed)| if i == chosen { fed.next(*argument) } else { vec![] }).collect();
                step(model, &mut all, &tokens);
            }
            2 => {
                // All together, each another number of tokens.
                let tokens: Vec<_> =
                    all.iter().enumerate().map(|(i, fed)| fed.next(argument.wrapping_add(13 * i as u8))).collect();
                step(model, &mut all, &tokens);
            }
            3 if all.len() < SESSIONS => {
                let copy = Fed { session: all[chosen].session.fork(), tokens: all[chosen].tokens.clone() };
                all.push(copy);
            }
            4 => {
                let Fed { session, tokens } = &mut all[chosen];
                let wanted = tokens.len().saturating_sub(usize::from(argument % 24));
                let left = session.truncate(wanted);
                assert!(left <= wanted, "{left} tokens left of {wanted}");
                tokens.truncate(left);
            }
            5 => {
                let Fed { session, tokens } = &mut all[chosen];
                let file = saved("states", &[]);
                session.save(model, tokens, &file).unwrap_or_else(|error| panic!("{error}"));
                let (loaded, text) = Session::load(model, &file).unwrap_or_else(|error| panic!("{error}"));
                assert!(loaded.len() == session.len() && text == *tokens);
                *session = loaded;
            }
            6 => {
                let file = saved("states", &[]);
                all[chosen].session.save(model, &all[chosen].tokens, &file).unwrap_or_else(|error| panic!("{error}"));
                let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{error}"));
                damaged(model, bytes, usize::from(*argument) * 37, *call);
            }
            7 if all.len() > 1 => drop(all.swap_remove(chosen)),
            _ => {}
        }
    }
    for fed in all {
        assert_eq!(fed.session.len(), fed.tokens.len());
        let whole = [fed.tokens.as_slice(), &[5]].concat();
        let expected = step(model, &mut [Fed::new(model)], &[whole]);
        assert!(step(model, &mut [fed], &[vec![5]]) == expected, "other bits than a new session");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, calls)) = bytes.split_first() else { return };
    LOADED.with(|loaded| {
        let models = loaded.get_or_init(|| MODELS.map(load));
        play(&models[usize::from(*which) % models.len()], calls);
    });
});
