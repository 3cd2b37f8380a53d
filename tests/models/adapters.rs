//! Adapters against PEFT's results: added to the products, merged, from PEFT's folders and from GGUF. See tests/data/README.md.

use std::path::{Path, PathBuf};

use crate::goldens::converted;
use crate::logits::{bits, distance, feed, load, top};
use nybble::kernels;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session, convert};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};
use safetensors::SafeTensors;
use tempfile::TempDir;

/// Adapters that are refused, and the setting that says why.
const REFUSED: [(&str, &str); 2] = [("llama-bias", "bias"), ("llama-dora", "use_dora")];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// An adapter and PEFT's results.
struct Golden {
    name: String,
    folder: PathBuf,
    /// The checkpoint that it was trained for.
    base: PathBuf,
    /// `(rows, tokens)`
    input: Vec<Vec<u32>>,
    /// `(rows, tokens, vocabulary)`
    logits: Vec<f32>,
}

impl Golden {
    fn read(name: &str) -> Golden {
        let folder = data().join("adapters").join(name);
        let bytes = std::fs::read(folder.join("golden.bin")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids: Vec<u32> = bytemuck::pod_collect_to_vec(file.tensor("input_ids").unwrap().data());
        let count = file.tensor("input_ids").unwrap().shape()[1];
        let config = std::fs::read(folder.join("adapter_config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        Golden {
            name: name.to_owned(),
            base: data().join("goldens").join(config["base_model_name_or_path"].as_str().unwrap()),
            input: ids.chunks(count).map(<[u32]>::to_vec).collect(),
            logits: bytemuck::pod_collect_to_vec(file.tensor("logits").unwrap().data()),
            folder,
        }
    }

    /// The adapters that are computed.
    fn all() -> Vec<Golden> {
        let mut names: Vec<String> = std::fs::read_dir(data().join("adapters"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name != "gguf" && !REFUSED.iter().any(|(refused, _)| refused == name))
            .collect();
        names.sort();
        assert_eq!(names.len(), 13);
        names.iter().map(|name| Golden::read(name)).collect()
    }

    /// The adapter as llama.cpp's converter writes it, if it can.
    fn gguf(&self) -> Option<PathBuf> {
        Some(data().join("adapters/gguf").join(format!("{}.gguf", self.name))).filter(|path| path.is_file())
    }

    /// What the converter leaves out: GGUF has one `alpha` for all matrices, which is divided by the rank.
    fn without_scales(&self) -> TempDir {
        changed(&self.name, &|config| {
            config["alpha_pattern"] = serde_json::json!({});
            config["use_rslora"] = serde_json::json!(false);
        })
    }

    /// Whether GGUF has its scales.
    fn fits_gguf(&self) -> bool {
        !matches!(self.name.as_str(), "llama-patterns" | "llama-rslora")
    }

    /// The logits of its first row.
    fn first(&self, model: &Model) -> Vec<f32> {
        feed(model, &mut model.session(), &self.input[0])
    }

    /// The files of the adapter with the scales that PEFT's results have.
    fn files(&self) -> impl Iterator<Item = PathBuf> {
        let gguf = self.gguf().filter(|_| self.fits_gguf());
        [Some(self.folder.clone()), gguf].into_iter().flatten()
    }

    /// Asserts that the sessions that `session` makes have PEFT's logits, and its first choices wherever they are clear.
    fn assert_agrees(&self, model: &Model, session: &dyn Fn() -> Session, what: &str) {
        let name = &self.name;
        let bound = 1e-5 * self.logits.iter().fold(20.0f32, |most, logit| most.max(logit.abs()));
        for (row, expected) in self.input.iter().zip(self.logits.chunks(self.logits.len() / self.input.len())) {
            let found = feed(model, &mut session(), row);
            let worst = distance(&found, expected);
            assert!(worst <= bound, "{name}, {what}: the logits differ by up to {worst}, more than {bound}");
            let size = expected.len() / row.len();
            for (found, expected) in found.chunks(size).zip(expected.chunks(size)) {
                let best = top(expected);
                let next = (0..size as u32).filter(|id| *id != best).map(|id| expected[id as usize]);
                let gap = expected[best as usize] - next.fold(f32::MIN, f32::max);
                assert!(gap <= 2.0 * bound || top(found) == best, "{name}, {what}: another first choice");
            }
        }
    }
}

fn stored(path: &Path) -> Model {
    load(path, Quantize::Stored, 2, None)
}

#[test]
fn every_adapter_computes_what_peft_computes() {
    for golden in Golden::all() {
        let (model, _) = stored(&golden.base).with_adapter(&golden.folder).unwrap();
        golden.assert_agrees(&model, &|| model.session(), "for everything");
        let model = stored(&golden.base);
        model.load_adapter("own", &golden.folder).unwrap();
        golden.assert_agrees(&model, &|| model.session_with_adapter("own").unwrap(), "by name");
    }
}

#[test]
fn adapters_in_gguf_compute_what_peft_computes() {
    let goldens = Golden::all();
    let files: Vec<_> = goldens.iter().filter_map(|golden| Some((golden, golden.gguf()?))).collect();
    assert_eq!(files.len(), 12);
    for (golden, path) in files {
        let (model, _) = stored(&golden.base).with_adapter(path).unwrap();
        if golden.fits_gguf() {
            golden.assert_agrees(&model, &|| model.session(), "in GGUF");
            continue;
        }
        let (other, _) = stored(&golden.base).with_adapter(golden.without_scales().path()).unwrap();
        assert!(distance(&golden.first(&model), &golden.first(&other)) < 1e-5, "{}", golden.name);
    }
}

#[test]
fn adapters_apply_to_models_in_gguf() {
    let folder = tempfile::tempdir().unwrap();
    for golden in Golden::all() {
        let base = converted(&golden.base, folder.path());
        for path in golden.files() {
            let (model, _) = stored(&base).with_adapter(&path).unwrap();
            golden.assert_agrees(&model, &|| model.session(), &format!("{} for GGUF", path.display()));
        }
        std::fs::remove_file(base).unwrap();
    }
}

#[test]
fn merged_adapters_compute_what_peft_computes() {
    let folder = tempfile::tempdir().unwrap();
    for golden in Golden::all() {
        let base = converted(&golden.base, folder.path());
        let out = folder.path().join("merged.gguf");
        for source in [&with_tokenizer(&golden.base, folder.path()), &base] {
            for adapter in golden.files() {
                convert::convert_with_adapter(source, &adapter, &out, BlockType::F32, None).unwrap();
                let model = stored(&out);
                let what = format!("{} merged into {}", adapter.display(), source.display());
                golden.assert_agrees(&model, &|| model.session(), &what);
            }
        }
        std::fs::remove_file(base).unwrap();
    }
}

/// A copy of a checkpoint of 320 tokens, with a tokenizer, in the folder `to`.
fn with_tokenizer(checkpoint: &Path, to: &Path) -> PathBuf {
    let copy = to.join("checkpoint");
    std::fs::create_dir_all(&copy).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(checkpoint.join(name), copy.join(name)).unwrap();
    }
    let vocabulary: serde_json::Map<_, _> =
        (0..320u32).map(|id| (char::from_u32(0x100 + id).unwrap().to_string(), serde_json::json!(id))).collect();
    let tokenizer = serde_json::json!({
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
        "decoder": { "type": "ByteLevel" },
    });
    std::fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    copy
}

/// The adapters for the same tiny model, whose names are those of the folders.
fn of_llama(model: &Model) -> Vec<Golden> {
    let names = ["llama", "llama-all", "llama-embeddings", "llama-patterns", "llama-regex", "llama-rslora"];
    let goldens: Vec<Golden> = names.iter().map(|name| Golden::read(name)).collect();
    for golden in &goldens {
        model.load_adapter(&golden.name, &golden.folder).unwrap();
    }
    goldens
}

/// A session with the adapter of this name; of the base without a name.
fn session(model: &Model, name: Option<&str>) -> Session {
    name.map_or_else(|| model.session(), |name| model.session_with_adapter(name).unwrap())
}

/// The bits of the logits of each token, for several sequences in batches, in pieces of these numbers of tokens.
fn together(model: &Model, adapters: &[Option<&str>], input: &[u32], pieces: &[usize]) -> Vec<Vec<u32>> {
    let mut sessions: Vec<Session> = adapters.iter().map(|name| session(model, *name)).collect();
    let mut found = vec![Vec::new(); adapters.len()];
    let mut at = 0;
    for piece in pieces.iter().cycle() {
        let tokens = &input[at..input.len().min(at + piece)];
        if tokens.is_empty() {
            break;
        }
        at += tokens.len();
        let mut inputs: Vec<_> = sessions.iter_mut().map(|session| Input::new(session, tokens, Logits::All)).collect();
        let mut logits = Vec::new();
        model.forward(&mut inputs, &mut logits, &|| false).unwrap();
        for (found, own) in found.iter_mut().zip(logits.chunks(logits.len() / adapters.len())) {
            found.extend(bits(own));
        }
    }
    found
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_without_it() {
    let base = data().join("goldens/llama");
    for quantize in [Quantize::Stored, Quantize::Auto] {
        for kernel in kernels::available() {
            let load = |threads| {
                let options = LoadOptions::default().with_quantize(quantize).with_threads(threads);
                Model::load(&base, &options.with_kernel(Some(kernel.name().to_owned()))).unwrap()
            };
            let model = load(1);
            let input: Vec<u32> = of_llama(&model).iter().flat_map(|golden| golden.input.concat()).take(70).collect();
            let names = model.adapter_names();
            let mut order: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
            order.extend([None, Some("llama"), None, Some("llama-all"), Some("llama"), Some("llama-embeddings")]);
            let alone: Vec<_> =
                order.iter().map(|name| together(&model, &[*name], &input, &[input.len()]).remove(0)).collect();
            // Without any adapters, the base computes the same.
            let at = order.iter().position(Option::is_none).unwrap();
            assert_eq!(together(&load(2), &[None], &input, &[7]).remove(0), alone[at]);
            for threads in [1, 3] {
                let model = load(threads);
                of_llama(&model);
                for pieces in [&[70][..], &[1, 9, 2]] {
                    let found = together(&model, &order, &input, pieces);
                    assert!(found == alone, "{}, {threads} threads, pieces {pieces:?}", kernel.name());
                }
            }
            // Every adapter changes the result.
            let mut different = alone[..=at].to_vec();
            different.sort();
            different.dedup();
            assert_eq!(different.len(), names.len() + 1);
        }
    }
}

#[test]
fn rows_of_experts_have_the_same_bits_in_any_batch() {
    let golden = Golden::read("mixtral-experts");
    let model = stored(&golden.base);
    model.load_adapter("own", &golden.folder).unwrap();
    let order = [Some("own"), None, Some("own"), None, Some("own")];
    let alone: Vec<_> = order
        .iter()
        .map(|name| together(&model, &[*name], &golden.input[0], &[golden.input[0].len()]).remove(0))
        .collect();
    assert!(together(&model, &order, &golden.input[0], &[5, 1]) == alone);
    assert!(alone[0] != alone[1]);
}

#[test]
fn a_session_file_names_its_adapter_and_refuses_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let base = data().join("goldens/llama");
    let model = stored(&base);
    let golden = of_llama(&model).remove(1);
    let input = &golden.input[0];
    let mut own = model.session_with_adapter(&golden.name).unwrap();
    feed(&model, &mut own, &input[..20]);
    own.save(&model, input, &path).unwrap();
    let expected = bits(&feed(&model, &mut own, &input[20..]));
    let (mut read, tokens) = Session::load(&model, &path).unwrap();
    assert_eq!((read.adapter_name(), &tokens), (Some("llama-all"), input));
    assert_eq!(bits(&feed(&model, &mut read, &input[20..])), expected);
    // The weights count, not the name.
    let (same, _) = stored(&base).with_adapter(&golden.folder).unwrap();
    let (mut read, _) = Session::load(&same, &path).unwrap();
    assert_eq!(bits(&feed(&same, &mut read, &input[20..])), expected);
    let other = stored(&base);
    other.load_adapter("llama-all", data().join("adapters/llama-rslora")).unwrap();
    let refused = |model: &Model, found: &str, expected: &str| {
        let error = Session::load(model, &path).unwrap_err();
        let text = error.to_string();
        assert!(matches!(&error, Error::Malformed { place: Place::Key(key), .. } if key == "adapter"), "{text}");
        assert!(text.contains(found) && text.contains(expected), "{text}");
    };
    refused(&other, "the adapter \"llama-all\"", "a loaded adapter (llama-all)");
    refused(&stored(&base), "the adapter \"llama-all\"", "none is loaded");
    // A session of the base is refused where an adapter applies to everything.
    model.session().save(&model, input, &path).unwrap();
    assert!(Session::load(&stored(&base), &path).is_ok());
    refused(&same, "a session without an adapter", "adapters/llama-all, which applies to everything");
    // Every damaged byte is noticed.
    own.save(&model, input, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for at in 0..bytes.len().min(400) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        std::fs::write(&path, damaged).unwrap();
        assert!(Session::load(&model, &path).is_err(), "byte {at}");
        std::fs::write(&path, &bytes[..at]).unwrap();
        assert!(Session::load(&model, &path).is_err(), "the first {at} bytes");
    }
}

#[test]
fn pages_of_one_adapter_are_not_attached_to_another() {
    let model = stored(&data().join("goldens/llama"));
    of_llama(&model);
    let input: Vec<u32> = (0..64).map(|i| i * 7 % 300).collect();
    let mut own = model.session_with_adapter("llama").unwrap();
    feed(&model, &mut own, &input);
    let page = own.page(0).unwrap();
    assert!(session(&model, Some("llama")).attach_page(&page, 64).is_ok());
    for other in [None, Some("llama-all")] {
        let error = session(&model, other).attach_page(&page, 64).unwrap_err().to_string();
        assert!(error.contains("a page of another adapter"), "{error}");
    }
}

#[test]
fn adapters_are_loaded_replaced_and_removed_by_name() {
    let model = stored(&data().join("goldens/llama"));
    let golden = Golden::read("llama-all");
    let error = |result: nybble::Result<Session>| result.unwrap_err().to_string();
    assert!(error(model.session_with_adapter("a")).contains("no adapters that are chosen by name"));
    model.load_adapter("a", data().join("adapters/llama")).unwrap();
    let before = model.session_with_adapter("a").unwrap();
    model.load_adapter("a", &golden.folder).unwrap();
    golden.assert_agrees(&model, &|| model.session_with_adapter("a").unwrap(), "replaced");
    // A session keeps the adapter that it has.
    Golden::read("llama").assert_agrees(&model, &|| before.fork(), "before");
    assert!(error(model.session_with_adapter("b")).contains("one of a"));
    assert!(model.adapter_bytes() > 0);
    assert!(model.unload_adapter("a") && !model.unload_adapter("a"));
    assert_eq!((model.adapter_names(), model.adapter_bytes()), (vec![], 0));
    for name in ["", "a b", "a:b", "ä", &"x".repeat(129)] {
        assert!(model.load_adapter(name, &golden.folder).unwrap_err().to_string().contains("1 to 128 characters"));
    }
    let (model, _) = model.with_adapter(&golden.folder).unwrap();
    assert!(model.load_adapter("a", &golden.folder).unwrap_err().to_string().contains("applies to everything"));
}

/// A copy of an adapter whose configuration `change` changes.
fn changed(name: &str, change: &dyn Fn(&mut serde_json::Value)) -> TempDir {
    let (folder, source) = (tempfile::tempdir().unwrap(), data().join("adapters").join(name));
    let file = "adapter_model.safetensors";
    std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    let config = std::fs::read(source.join("adapter_config.json")).unwrap();
    let mut config = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let model = stored(&data().join("goldens/llama"));
    for (name, key) in REFUSED {
        let error = model.load_adapter("a", data().join("adapters").join(name)).unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported { place: Place::Key(at), .. } if at.contains(key)),
            "{name}: {error}"
        );
    }
    let settings = [
        ("use_dora", "true"),
        ("bias", "\"all\""),
        ("modules_to_save", "[\"lm_head\"]"),
        ("peft_type", "\"IA3\""),
        ("init_lora_weights", "\"pissa\""),
        ("trainable_token_indices", "[1]"),
        ("layer_replication", "[[0, 1]]"),
        ("use_qalora", "true"),
        ("a_setting_of_tomorrow", "1"),
        ("r", "0"),
        ("r", "\"8\""),
        ("r", "7"),
        ("lora_alpha", "-1"),
        ("use_rslora", "1"),
        ("rank_pattern", "{\"(\": 4}"),
        ("rank_pattern", "[1]"),
        ("alpha_pattern", "{\"q_proj\": 1, \".*_proj\": 2}"),
    ];
    for (key, value) in settings {
        let value: serde_json::Value = serde_json::from_str(value).unwrap();
        let folder = changed("llama", &|config| config[key] = value.clone());
        let error = model.load_adapter("a", folder.path()).unwrap_err().to_string();
        assert!(error.contains(key), "{key} = {value}: {error}");
    }
    assert!(model.adapter_names().is_empty());
}
