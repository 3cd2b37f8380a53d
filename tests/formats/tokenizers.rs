//! Tokenizers give the ids and strings of the Python package, whole and in pieces.
//!
//! `tests/data/tokenizers.json` holds what both must give. `NYBBLE_TEST_TOKENIZERS` names a folder with llama.cpp's
//! vocabularies and the ids that it gives (`NAME.gguf`, `NAME.gguf.inp` and `NAME.gguf.out`), which are checked, too.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nybble::Error;
use nybble::format::gguf::{Array, Metadata, StringArray, Value};
use nybble::tokenizer::{EncodeOptions, Tokenizer};
use proptest::prelude::*;
use serde_json::Value as Json;

pub(crate) fn golden() -> &'static Json {
    static GOLDEN: OnceLock<Json> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizers.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    })
}

pub(crate) fn list(value: &Json) -> &[Json] {
    value.as_array().unwrap()
}

fn ids(value: &Json) -> Vec<u32> {
    list(value).iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The metadata of a GGUF file, from JSON.
pub(crate) fn metadata(json: &Json) -> Metadata {
    let mut metadata = Metadata::new();
    for (key, value) in json.as_object().unwrap() {
        let value: Value = match value {
            Json::String(text) => text.as_str().into(),
            Json::Bool(flag) => (*flag).into(),
            Json::Number(number) => (number.as_u64().unwrap() as u32).into(),
            Json::Array(elements) if elements[0].is_string() => {
                Array::String(elements.iter().map(|text| text.as_str().unwrap()).collect::<StringArray>()).into()
            }
            Json::Array(elements) if elements[0].is_f64() => {
                elements.iter().map(|number| number.as_f64().unwrap() as f32).collect::<Vec<f32>>().into()
            }
            Json::Array(elements) => {
                elements.iter().map(|number| number.as_i64().unwrap() as i32).collect::<Vec<i32>>().into()
            }
            other => panic!("{key}: {other}"),
        };
        metadata.set(key.as_str(), value);
    }
    metadata
}

/// All tokenizers of the golden file, with their entries.
fn all() -> &'static [(Tokenizer, &'static Json)] {
    static ALL: OnceLock<Vec<(Tokenizer, &'static Json)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let files = list(&golden()["files"]).iter();
        let files = files.map(|file| (Tokenizer::from_metadata(&metadata(&file["metadata"]), "model.gguf"), file));
        let folders = list(&golden()["folders"]).iter().map(|file| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), file["tokenizer"].to_string()).unwrap();
            std::fs::write(folder.path().join("tokenizer_config.json"), file["config"].to_string()).unwrap();
            (Tokenizer::load(folder.path()), file)
        });
        files.chain(folders).map(|(tokenizer, file)| (tokenizer.unwrap(), file)).collect()
    })
}

fn literal() -> EncodeOptions {
    EncodeOptions::default().with_add_special(false).with_parse_special(false)
}

/// The text of `ids`, decoded one at a time.
fn in_pieces(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let text: String = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
    text + &decoder.finish()
}

#[test]
fn ids_strings_and_ends_are_those_of_python() {
    for (tokenizer, file) in all() {
        assert_eq!(tokenizer.ends(), ids(&file["ends"]));
        for case in list(&file["cases"]) {
            let (text, expected) = (case["text"].as_str().unwrap(), ids(&case["ids"]));
            let special = case["special"].as_bool().unwrap();
            let options = EncodeOptions::default().with_add_special(special).with_parse_special(special);
            assert_eq!(tokenizer.encode_with(text, options).unwrap(), expected, "{text:?}");
            assert_eq!(tokenizer.decode(&expected).unwrap(), case["decoded"].as_str().unwrap());
            assert_eq!(in_pieces(tokenizer, &expected), case["decoded"].as_str().unwrap());
        }
    }
}

#[test]
fn every_pre_tokenizer_splits_as_in_python() {
    let mut file = metadata(&golden()["files"][0]["metadata"]);
    for rule in list(&golden()["rules"]) {
        for name in list(&rule["names"]) {
            let name = name.as_str().unwrap();
            file.set("tokenizer.ggml.pre", name);
            let tokenizer = Tokenizer::from_metadata(&file, "model.gguf").unwrap();
            assert!(tokenizer.warnings().is_empty(), "{:?}", tokenizer.warnings());
            for (text, expected) in list(&golden()["strings"]).iter().zip(list(&rule["ids"])) {
                let text = text.as_str().unwrap();
                assert_eq!(tokenizer.encode_with(text, literal()).unwrap(), ids(expected), "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn an_unclear_file_has_warnings() {
    let mut file = metadata(&golden()["files"][0]["metadata"]);
    file.set("tokenizer.ggml.pre", "no-such");
    let tokenizer = Tokenizer::from_metadata(&file, "model.gguf").unwrap();
    assert!(tokenizer.warnings()[0].starts_with("unknown pre-tokenizer 'no-such'"), "{:?}", tokenizer.warnings());
}

#[test]
fn malformed_keys_are_refused_by_name() {
    let base = metadata(&golden()["files"][1]["metadata"]);
    let refused = |key: &str, value: Value, expected: &str| {
        let mut file = base.clone();
        file.set(key, value);
        let error = Tokenizer::from_metadata(&file, "model.gguf").unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }));
        assert_eq!(error.to_string(), format!("model.gguf: key {key:?}: {expected}"));
    };
    let count = all()[1].0.len();
    refused(
        "tokenizer.ggml.model",
        "rwkv".into(),
        "found 'rwkv', expected 'gpt2' (byte-level BPE), 'gemma4' (BPE), 'llama' (SentencePiece), 'bert' (WordPiece) or 't5' \
         (Unigram)",
    );
    refused("tokenizer.ggml.tokens", 5u32.into(), "found 5, expected an array of str");
    let few = format!("found 1 elements, expected {count}, one per token");
    refused("tokenizer.ggml.scores", vec![0f32].into(), &few);
    let text = format!("found 'a', expected a token id below {count}");
    refused("tokenizer.ggml.eot_token_id", "a".into(), &text);
    refused("tokenizer.ggml.add_bos_token", 1u32.into(), "found 1, expected true or false");
}

#[test]
fn ids_beyond_the_vocabulary_are_ignored_with_a_warning() {
    let mut file = metadata(&golden()["files"][1]["metadata"]);
    let count = all()[1].0.len();
    file.set("tokenizer.ggml.eot_token_id", count as u32);
    file.set("tokenizer.ggml.eos_token_ids", vec![2i32, -1, 1 << 30]);
    let tokenizer = Tokenizer::from_metadata(&file, "model.gguf").unwrap();
    assert!(tokenizer.ends().contains(&2) && tokenizer.ends().iter().all(|id| (*id as usize) < count));
    let warned = |text: &str| tokenizer.warnings().iter().any(|warning| warning.contains(text));
    assert!(warned("eot_token_id") && warned("1073741824 in tokenizer.ggml.eos_token_ids"));
}

#[test]
fn unknown_ids_are_refused_and_special_ones_are_silent() {
    let tokenizer = &all()[0].0;
    let count = tokenizer.len() as u32;
    let error = tokenizer.decode(&[0, count]).unwrap_err();
    assert_eq!(error.to_string(), format!("token: found {count}, expected an id below {count}"));
    assert_eq!(tokenizer.decode(&[tokenizer.bos().unwrap(), tokenizer.eos().unwrap()]).unwrap(), "");
    assert_eq!(tokenizer.token_id("<|start|>"), tokenizer.bos());
}

#[test]
fn a_decoder_after_a_prompt_keeps_the_space_of_its_first_word() {
    let tokenizer = &all()[1].0;
    let prompt = tokenizer.encode("Once").unwrap();
    let more = tokenizer.encode_with("time", literal()).unwrap();
    assert_eq!(tokenizer.decoder().push(more[0]).unwrap().chars().next(), Some('t'));
    assert_eq!(tokenizer.decoder_after(&prompt).push(more[0]).unwrap().chars().next(), Some(' '));
}

proptest! {
    #[test]
    fn any_ids_decode_alike_whole_and_in_pieces(which in 0usize..5, seeds in prop::collection::vec(any::<u32>(), 0..24)) {
        let tokenizer = &all()[which].0;
        let ids: Vec<u32> = seeds.iter().map(|seed| seed % tokenizer.len() as u32).collect();
        let whole = tokenizer.decode(&ids).unwrap();
        prop_assert_eq!(in_pieces(tokenizer, &ids), whole.clone());
        // A decoder that starts in the middle of the ids completes the text, where no character is split.
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|id| !tokenizer.is_special(**id))
            .flat_map(|id| tokenizer.token_bytes(*id).unwrap())
            .collect();
        let expected = String::from_utf8_lossy(&bytes).into_owned();
        let with_space = [" ", &whole].concat();
        prop_assert!(whole == expected || with_space == expected, "{:?} is not {:?}", whole, expected);
    }

    #[test]
    fn any_text_survives_encoding_and_decoding(which in 0usize..5, text in any::<String>()) {
        let tokenizer = &all()[which].0;
        let ids = tokenizer.encode_with(&text, literal()).unwrap();
        let decoded = tokenizer.decode(&ids).unwrap();
        // U+2581 stands for a space in pieces.
        let plain = |text: &str| text.replace('\u{2581}', " ");
        prop_assert_eq!(plain(&decoded), plain(&text));
    }
}

#[test]
fn real_vocabularies_give_the_ids_of_llama_cpp() {
    let Some(folder) = std::env::var_os("NYBBLE_TEST_TOKENIZERS").map(PathBuf::from) else { return };
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (inp, out) = (path.with_extension("gguf.inp"), path.with_extension("gguf.out"));
        if path.extension().is_none_or(|extension| extension != "gguf") || !out.exists() {
            continue;
        }
        let tokenizer = Tokenizer::load(&path).unwrap();
        let texts = std::fs::read_to_string(inp).unwrap();
        let expected = std::fs::read_to_string(out).unwrap();
        let options = EncodeOptions::default().with_add_special(false);
        for (text, line) in texts.split("\n__ggml_vocab_test__\n").zip(expected.lines()) {
            let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(tokenizer.encode_with(text, options).unwrap(), expected, "{}: {text:?}", path.display());
            assert_eq!(in_pieces(&tokenizer, &expected), text, "{}", path.display());
            checked += 1;
        }
    }
    assert!(checked > 200, "{checked} strings");
}
