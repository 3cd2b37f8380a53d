//! Models for embeddings and classification against the results of transformers with the same tiny checkpoint, see
//! tests/data/README.md.

use std::path::{Path, PathBuf};

use crate::goldens::converted;
use crate::logits::{bits, distance, load};
use crate::rewrite::rewrite;
use nybble::format::gguf::{Gguf, NewTensor, Value, Writer};
use nybble::kernels;
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model, Pooling, Quantize, Session};
use safetensors::SafeTensors;

/// A checkpoint, its documents in tokens, and what transformers computes of them.
struct Golden {
    name: String,
    folder: PathBuf,
    texts: Vec<Vec<u32>>,
    bytes: Vec<u8>,
}

impl Golden {
    fn read(name: &str) -> Golden {
        let folder = data().join(name);
        let bytes = std::fs::read(folder.join("golden.bin")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("input_ids").unwrap();
        let all: Vec<u32> = bytemuck::pod_collect_to_vec(ids.data());
        let lengths: Vec<u32> = bytemuck::pod_collect_to_vec(file.tensor("lengths").unwrap().data());
        let texts = all.chunks(ids.shape()[1]).zip(lengths).map(|(row, len)| row[..len as usize].to_vec()).collect();
        Golden { name: name.to_owned(), folder, texts, bytes: bytes.clone() }
    }

    fn array(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        file.tensor(name).ok().map(|tensor| bytemuck::pod_collect_to_vec(tensor.data()))
    }

    fn documents(&self) -> Vec<&[u32]> {
        self.texts.iter().map(Vec::as_slice).collect()
    }

    /// All that the model returns for its documents: scores, or the vectors of each pooling.
    fn outputs(&self, model: &Model) -> Vec<(&'static str, Vec<f32>)> {
        if model.labels() > 0 {
            return vec![("logits", classify(model, &self.documents()))];
        }
        let mut all: Vec<(&'static str, Vec<f32>)> =
            [("mean", Pooling::Mean), ("cls", Pooling::Cls), ("last", Pooling::Last)]
                .map(|(name, pooling)| (name, embed(model, &self.documents(), Some(pooling))))
                .to_vec();
        if self.array("sentence").is_some() {
            // Dense modules follow the pooling, and the other arrays are without them.
            all = vec![("sentence", embed(model, &self.documents(), None))];
        }
        all
    }

    /// The largest difference between the model's results and those of transformers.
    fn worst(&self, model: &Model) -> f32 {
        let found = self.outputs(model);
        found.iter().map(|(name, found)| distance(found, &self.array(name).unwrap())).fold(0.0, f32::max)
    }
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/encoders")
}

fn goldens() -> Vec<Golden> {
    let folders = std::fs::read_dir(data()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = folders.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|name| name != "gguf");
    names.sort();
    assert_eq!(names.len(), 15);
    names.iter().map(|name| Golden::read(name)).collect()
}

fn embed(model: &Model, texts: &[&[u32]], pooling: Option<Pooling>) -> Vec<f32> {
    model.embed(texts, pooling, true, &|| false).unwrap_or_else(|error| panic!("{error}"))
}

fn classify(model: &Model, texts: &[&[u32]]) -> Vec<f32> {
    let texts: Vec<_> = texts.iter().map(|tokens| (*tokens, None)).collect();
    model.classify(&texts, &|| false).unwrap_or_else(|error| panic!("{error}"))
}

/// Copies a GGUF file with other values of some keys.
fn copy(file: &Gguf, path: &Path, changes: &[(&str, Value)]) {
    let mut metadata = file.metadata().clone();
    for (key, value) in changes {
        metadata.set((*key).to_owned(), value.clone());
    }
    let tensors = file.tensors().iter().map(|tensor| NewTensor::new(tensor.name(), tensor.block_type(), tensor.dims()));
    let mut writer = Writer::create(path, &metadata, tensors).unwrap();
    for tensor in file.tensors() {
        writer.write_tensor(tensor.name(), file.data(tensor)).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn every_encoder_computes_what_transformers_computes() {
    let mut faults = Vec::new();
    for golden in goldens() {
        let model = match Model::load(&golden.folder, &LoadOptions::default().with_quantize(Quantize::Stored)) {
            Ok(model) => model,
            Err(error) => {
                faults.push(format!("{}: {error}", golden.name));
                continue;
            }
        };
        let worst = golden.worst(&model);
        println!("{}: {worst}", golden.name);
        if worst.is_nan() || worst > 1e-4 {
            faults.push(format!("{}: {worst}", golden.name));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn files_of_other_converters_compute_what_transformers_computes() {
    let mut faults = Vec::new();
    let mut count = 0;
    for entry in std::fs::read_dir(data().join("gguf")).unwrap() {
        let file = entry.unwrap().path();
        let golden = Golden::read(&file.file_stem().unwrap().to_string_lossy());
        let model = match Model::load(&file, &LoadOptions::default()) {
            Ok(model) => model,
            Err(error) => {
                faults.push(format!("{}: {error}", golden.name));
                continue;
            }
        };
        count += 1;
        let found = if golden.name == "gemma3-embedding" {
            // The converter leaves the dense modules out.
            distance(&embed(&model, &golden.documents(), None), &golden.array("mean").unwrap())
        } else {
            golden.worst(&model)
        };
        println!("{}: {found}", golden.name);
        if found.is_nan() || found > 1e-4 {
            faults.push(format!("{}: {found}", golden.name));
        }
    }
    assert!(count >= 9 && faults.is_empty(), "{count} files: {faults:#?}");
}

#[test]
fn every_encoder_converts_to_gguf_and_computes_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for golden in goldens() {
        let path = converted(&golden.folder, folder.path());
        let (stored, model) = (load(&golden.folder, Quantize::Stored, 1, None), load(&path, Quantize::Auto, 1, None));
        for ((name, before), (_, after)) in golden.outputs(&stored).iter().zip(golden.outputs(&model)) {
            assert!(bits(before) == bits(&after), "{}, {name}", golden.name);
        }
        assert_eq!(stored.label_names(), model.label_names());
    }
}

#[test]
fn every_kernel_and_any_batch_give_the_same_bits() {
    for golden in goldens() {
        for quantize in [Quantize::Stored, Quantize::Int4] {
            let scalar = LoadOptions::default().with_kernel("scalar".to_owned()).with_quantize(quantize);
            let scalar = Model::load(&golden.folder, &scalar.with_threads(1)).unwrap();
            let expected = golden.outputs(&scalar);
            for (i, kernel) in kernels::available().iter().enumerate() {
                let options = LoadOptions::default().with_kernel(kernel.name().to_owned()).with_threads(1 + i % 3);
                let model = Model::load(&golden.folder, &options.with_quantize(quantize)).unwrap();
                for ((name, expected), (_, found)) in expected.iter().zip(golden.outputs(&model)) {
                    assert!(bits(expected) == bits(&found), "{}, {name}, {quantize:?}, {}", golden.name, kernel.name());
                }
                // One at a time, and each among many.
                let texts = golden.documents();
                let width = expected[0].1.len() / texts.len();
                // More tokens than a step of embeddings takes; on the scalar kernel, than a batch of rows.
                let count = if kernel.name() == "scalar" { 12 } else { 45 };
                let many: Vec<&[u32]> = texts.iter().copied().cycle().take(count).collect();
                let of = |texts: &[&[u32]]| match model.labels() {
                    0 => embed(&model, texts, if expected[0].0 == "sentence" { None } else { Some(Pooling::Mean) }),
                    _ => classify(&model, texts),
                };
                let many = of(&many);
                for (at, own) in many.chunks(width).enumerate() {
                    let alone = &expected[0].1[at % texts.len() * width..][..width];
                    assert!(bits(own) == bits(alone), "{}, {quantize:?}, text {at} of many", golden.name);
                }
                assert!(bits(&of(&texts[1..2])) == bits(&expected[0].1[width..2 * width]), "{}", golden.name);
            }
        }
    }
}

#[test]
fn int8_weights_and_caches_stay_close() {
    for golden in goldens() {
        let exact = load(&golden.folder, Quantize::Stored, 2, None);
        let exact = golden.outputs(&exact);
        let options = LoadOptions::default().with_quantize(Quantize::Int8).with_cache_type(CacheType::Int8);
        let model = Model::load(&golden.folder, &options).unwrap();
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        for ((name, exact), (_, found)) in exact.iter().zip(golden.outputs(&model)) {
            let error = squares(&mut exact.iter().zip(&found).map(|(a, b)| a - b));
            let share = error / squares(&mut exact.iter().copied());
            println!("{}, {name}: {share:.4}", golden.name);
            assert!(share > 0.0 && share < 0.15, "{}, {name}: off by {share} of its size", golden.name);
        }
    }
}

#[test]
fn all_tokens_of_a_text_see_each_other_and_a_session_cannot_continue() {
    let golden = Golden::read("bert");
    let model = load(&golden.folder, Quantize::Stored, 2, None);
    let tokens = &golden.texts[0];
    let hidden = |tokens: &[u32]| {
        let (mut session, mut states) = (model.session(), Vec::new());
        model.forward(&mut [Input::new(&mut session, tokens, Logits::Hidden)], &mut states, &|| false).unwrap();
        states
    };
    let mut other = tokens.clone();
    *other.last_mut().unwrap() = (other[tokens.len() - 1] + 1) % 200;
    assert!(distance(&hidden(tokens)[..32], &hidden(&other)[..32]) > 1e-4);
    // A text that is longer than a batch of a causal model.
    let mut session = model.session();
    let refused = |session: &mut Session, logits: Logits| {
        let result = model.forward(&mut [Input::new(session, tokens, logits)], &mut Vec::new(), &|| false);
        result.unwrap_err().to_string()
    };
    for logits in [Logits::Last, Logits::All] {
        let message = refused(&mut session, logits);
        assert!(message.starts_with("logits: found logits of bert, a model without an output matrix"), "{message}");
    }
    model.forward(&mut [Input::new(&mut session, &tokens[..20], Logits::None)], &mut Vec::new(), &|| false).unwrap();
    let message = refused(&mut session, Logits::Hidden);
    assert!(message.starts_with("session: found 20 tokens, and attention in both directions"), "{message}");
}

#[test]
fn a_second_text_has_a_token_type_of_its_own() {
    for (name, has_types) in [("bert-classify", true), ("xlm_roberta-classify", false)] {
        let golden = Golden::read(name);
        let model = load(&golden.folder, Quantize::Stored, 2, None);
        let tokens = &golden.texts[0][..];
        let of = |second| model.classify(&[(tokens, second)], &|| false).unwrap();
        assert_eq!(bits(&of(None)) != bits(&of(Some(10))), has_types, "{name}");
        assert_eq!(bits(&of(None)), bits(&of(Some(tokens.len()))), "{name}");
    }
}

#[test]
fn keys_that_change_what_is_computed_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, changes: &[(&str, Value)]| {
        let path = folder.path().join("model.gguf");
        let file = Gguf::open(data().join(format!("gguf/{name}.gguf"))).unwrap();
        copy(&file, &path, changes);
        Model::load(&path, &LoadOptions::default())
    };
    let golden = Golden::read("bert");
    let plain = read("bert", &[]).unwrap();
    let expected = embed(&plain, &golden.documents(), None);
    assert!(distance(&expected, &golden.array("cls").unwrap()) < 1e-4);
    let mean = read("bert", &[("bert.pooling_type", Value::U32(1))]).unwrap();
    assert!(distance(&embed(&mean, &golden.documents(), None), &golden.array("mean").unwrap()) < 1e-4);
    let causal = read("bert", &[("bert.attention.causal", Value::Bool(true))]).unwrap();
    assert!(distance(&embed(&causal, &golden.documents(), None), &expected) > 1e-3);
    let wrong = [
        ("bert.pooling_type", Value::U32(9)),
        ("bert.attention.causal", Value::from("no")),
        ("bert.classifier.pooling_type", Value::U32(7)),
        ("bert.classifier.activation", Value::from("cube")),
        ("bert.dense_2_activation", Value::from("tanh")),
        ("bert.attention.max_alibi_bias", Value::F32(8.0)),
    ];
    for (key, value) in wrong {
        let message = read("bert", &[(key, value)]).unwrap_err().to_string();
        let named = if key.contains("dense_2") { "dense_2.weight" } else { key.trim_start_matches("bert.") };
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn damaged_files_are_refused_or_run_but_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut refused = 0;
    for name in ["bert-classify", "modernbert-classify", "jina_embeddings_v3", "gemma3-embedding"] {
        let whole = std::fs::read(data().join(format!("gguf/{name}.gguf"))).unwrap();
        for _ in 0..60 {
            let mut bytes = whole.clone();
            for _ in 0..=random(3) {
                // Most keys and shapes are in the first half.
                let at = random(bytes.len() / 2);
                bytes[at] = random(256) as u8;
            }
            rewrite(&path, &bytes);
            match Model::load(&path, &LoadOptions::default().with_threads(1)) {
                Err(_) => refused += 1,
                Ok(model) => {
                    let tokens: Vec<u32> = (5..15).collect();
                    // NaN is an error, too.
                    _ = model.embed(&[&tokens], None, true, &|| false);
                    _ = model.classify(&[(&tokens, Some(3))], &|| false);
                }
            }
        }
    }
    assert!(refused > 20, "{refused}");
}
