//! Adapters of every linear layer of every family: they add what merging them into the checkpoint gives.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::goldens::converted;
use crate::hf_folder::{Checkpoint, Stored, file, recurrent};
use crate::logits::{distance, load, logits};
use crate::tiny_model::Random;
use nybble::model::{Model, Quantize};
use safetensors::Dtype;
use serde_json::json;

const RANK: usize = 3;
/// A scale of 2.
const ALPHA: usize = 2 * RANK;
/// Families whose linear layers have a row per input in the checkpoint.
const TRANSPOSED: [&str; 1] = ["gpt2"];

/// Families whose linear layers are all computed, in either format of the model.
const WHOLE: [&str; 14] = [
    "cohere",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
];

/// A linear layer: the name of its weight, and its shape in the checkpoint.
struct Module {
    name: String,
    shape: [usize; 2],
}

impl Module {
    fn path(&self) -> &str {
        self.name.strip_suffix(".weight").expect("a weight")
    }

    /// Its name without the numbers of layers and experts.
    fn kind(&self) -> String {
        let parts: Vec<&str> = self.path().split('.').filter(|part| part.parse::<usize>().is_err()).collect();
        let after = parts.iter().rposition(|part| matches!(*part, "layers" | "h" | "blocks")).map_or(0, |at| at + 1);
        parts[after..].join(".")
    }

    /// Columns and rows.
    fn size(&self, is_transposed: bool) -> [usize; 2] {
        let [first, second] = self.shape;
        if is_transposed { [first, second] } else { [second, first] }
    }

    /// The matrices of its adapter, `(RANK, columns)` and `(rows, RANK)`.
    fn factors(&self, [columns, rows]: [usize; 2]) -> [Vec<f32>; 2] {
        let seed = self.name.bytes().fold(1u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let mut random = Random(seed);
        [random.values(RANK * columns, 0.2 / (columns as f32).sqrt()), random.values(rows * RANK, 0.3)]
    }
}

/// The linear layers within the layers of a checkpoint, by kind.
fn modules(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<Module>> {
    let mut found: BTreeMap<String, Vec<Module>> = BTreeMap::new();
    for tensor in &checkpoint.tensors {
        let in_layer = tensor.name.split('.').any(|part| part.parse::<usize>().is_ok());
        if let (true, true, &[first, second]) = (in_layer, tensor.name.ends_with(".weight"), &tensor.shape[..]) {
            let module = Module { name: tensor.name.clone(), shape: [first, second] };
            found.entry(module.kind()).or_default().push(module);
        }
    }
    found
}

fn stored(name: String, shape: [usize; 2], values: &[f32]) -> Stored {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Stored { name, shape: shape.to_vec(), dtype: Dtype::F32, bytes }
}

/// Writes an adapter of these modules as PEFT does.
fn write_adapter<'a>(folder: &Path, modules: impl Iterator<Item = &'a Module>, is_transposed: bool) {
    let tensors = modules.flat_map(|module| {
        let [columns, rows] = module.size(is_transposed);
        let [a, b] = module.factors([columns, rows]);
        let name = |end| format!("base_model.model.{}.{end}.weight", module.path());
        [stored(name("lora_A"), [RANK, columns], &a), stored(name("lora_B"), [rows, RANK], &b)]
    });
    fs::write(folder.join("adapter_model.safetensors"), file(&tensors.collect::<Vec<_>>())).unwrap();
    let config = json!({ "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none" });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

/// Adds the adapter of a module to its weight.
fn merge(checkpoint: &mut Checkpoint, module: &Module, is_transposed: bool) {
    let [columns, rows] = module.size(is_transposed);
    let [a, b] = module.factors([columns, rows]);
    let weight = checkpoint.find(&module.name);
    assert_eq!(weight.dtype, Dtype::F32);
    for (at, bytes) in weight.bytes.as_chunks_mut().0.iter_mut().enumerate() {
        let (row, column) = if is_transposed { (at % rows, at / rows) } else { (at / columns, at % columns) };
        let change: f32 = (0..RANK).map(|k| b[row * RANK + k] * a[k * columns + column]).sum();
        *bytes = (f32::from_le_bytes(*bytes) + change * (ALPHA / RANK) as f32).to_le_bytes();
    }
}

/// Asserts that `model`, of the checkpoint called `name`, computes with an adapter of all modules that it takes what the merged
/// checkpoint computes. Returns the kinds of modules that it refuses.
fn assert_adds(name: &str, model: &Model, checkpoint: &Checkpoint, what: &str) -> BTreeSet<String> {
    let folder = tempfile::tempdir().unwrap();
    let is_transposed = TRANSPOSED.contains(&name);
    let modules = modules(checkpoint);
    let (mut taken, mut refused) = (Vec::new(), BTreeSet::new());
    for (kind, own) in &modules {
        write_adapter(folder.path(), own.iter(), is_transposed);
        match model.load_adapter("own", folder.path()) {
            Ok(_) => taken.extend(own),
            Err(nybble::Error::Unsupported { .. }) => drop(refused.insert(kind.clone())),
            Err(error) => panic!("{name}, {what}, {kind}: {error}"),
        }
    }
    if taken.is_empty() {
        return refused;
    }
    write_adapter(folder.path(), taken.iter().copied(), is_transposed);
    model.load_adapter("own", folder.path()).unwrap();
    let mut merged = checkpoint.clone();
    taken.iter().for_each(|module| merge(&mut merged, module, is_transposed));
    merged.write_to(folder.path());
    let tokens: Vec<u32> = (0..12).map(|i| (i * 37 + 5) % 250).collect();
    let expected = logits(&load(folder.path(), Quantize::Stored, 1, None), &tokens, 12);
    let base = logits(model, &tokens, 12);
    let mut session = model.session_with_adapter("own").unwrap();
    let found = crate::logits::feed(model, &mut session, &tokens);
    let change = distance(&base, &expected);
    let error = distance(&found, &expected);
    assert!(error < 0.01 * change, "{name}, {what}: differs by {error}, where the adapter changes {change}");
    refused
}

#[test]
fn adapters_of_every_family_add_what_merging_gives() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let mut names: Vec<String> =
        fs::read_dir(&goldens).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut lines = Vec::new();
    for name in &names {
        let checkpoint = recurrent(name);
        let path = goldens.join(name);
        let in_folder = assert_adds(name, &load(&path, Quantize::Stored, 2, None), &checkpoint, "folder");
        let folder = tempfile::tempdir().unwrap();
        let gguf = converted(&path, folder.path());
        let in_gguf = assert_adds(name, &load(&gguf, Quantize::Auto, 1, None), &checkpoint, "GGUF");
        let line = format!("{name}: refused for a folder {in_folder:?}, for GGUF {in_gguf:?}");
        let is_whole = in_folder.is_empty() && in_gguf.is_empty();
        assert!(is_whole || !WHOLE.contains(&name.as_str()), "{line}");
        lines.push(line);
    }
    println!("{}", lines.join("\n"));
}
