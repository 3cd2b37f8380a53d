//! Tiny Hugging Face checkpoints, built in a temporary folder.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::path::Path;

use nybble::format::Checkpoint as _;
use nybble::model::hf::HfFolder;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint to be written.
#[derive(Clone)]
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Stored>,
    /// Number of tensors added so far, including removed ones.
    added: usize,
}

impl Checkpoint {
    pub(crate) fn new(config: Value) -> Self {
        Checkpoint { config, tensors: Vec::new(), added: 0 }
    }

    /// Adds an F32 tensor whose values count up from 1000 times the number of tensors added before.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize]) -> Self {
        let first = self.added * 1000;
        self.added += 1;
        let values = (0..shape.iter().product()).map(|i: usize| (first + i) as f32);
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        self.tensors.push(Stored { name: name.to_owned(), shape: shape.to_vec(), dtype: Dtype::F32, bytes });
        self
    }

    /// Adds several tensors.
    pub(crate) fn tensors<'a>(self, tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Self {
        tensors.into_iter().fold(self, |all, (name, shape)| all.tensor(name, shape))
    }

    /// Adds tensors that are listed as `name rows x columns`, or `name length`, separated by commas. `prefix` comes before
    /// each name, and `.weight` after those that do not end in `.bias`.
    pub(crate) fn listed(self, prefix: &str, list: &str) -> Self {
        list.split(',').fold(self, |all, entry| {
            let (name, shape) = entry.trim().split_once(' ').expect("a name and a shape");
            let shape: Vec<usize> = shape.split('x').map(|n| n.trim().parse().expect("a number")).collect();
            let end = if name.ends_with(".bias") { "" } else { ".weight" };
            all.tensor(&format!("{prefix}{name}{end}"), &shape)
        })
    }

    /// Sets a key of `config.json`.
    pub(crate) fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Removes a key of `config.json`.
    pub(crate) fn unset(mut self, key: &str) -> Self {
        self.config.as_object_mut().expect("an object").remove(key);
        self
    }

    /// Returns the tensor `name`.
    pub(crate) fn find(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of that name")
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.find(name);
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    /// Returns the value at index `i` of an F32 tensor.
    pub(crate) fn value(&self, name: &str, i: usize) -> f32 {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name).expect("a tensor of that name");
        f32::from_le_bytes(tensor.bytes[4 * i..][..4].try_into().expect("four bytes"))
    }

    /// Writes `config.json` and `model.safetensors`.
    pub(crate) fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        self.write_to(folder.path());
        folder
    }

    pub(crate) fn write_to(&self, folder: &Path) {
        fs::write(folder.join("config.json"), self.config.to_string()).expect("config.json is written");
        fs::write(folder.join("model.safetensors"), file(&self.tensors)).expect("the tensors are written");
    }
}

/// Encodes a safetensors file.
pub(crate) fn file(tensors: &[Stored]) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (tensor.name.as_str(), view.expect("bytes that fill the shape"))
    });
    safetensors::serialize(views, None).expect("a file")
}

/// Values that no key expects, as JSON.
pub(crate) const ODD_VALUES: [&str; 8] = ["null", "0", "3", "-1", "16777216", "1e300", "\"x\"", "[]"];

/// The checkpoint of a family with recurrent layers from the folder `name` of the test data.
pub(crate) fn recurrent(name: &str) -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens").join(name);
    let config = serde_json::from_slice(&fs::read(path.join("config.json")).expect("test data")).expect("test data");
    let bytes = fs::read(path.join("model.safetensors")).expect("test data");
    let file = SafeTensors::deserialize(&bytes).expect("test data");
    let mut folder = Checkpoint::new(config);
    folder.tensors = file
        .iter()
        .map(|(name, tensor)| Stored {
            name: name.to_owned(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            bytes: tensor.data().to_vec(),
        })
        .collect();
    folder
}

/// A one-layer Llama: 2 heads of width 4, one KV head, hidden size 8, feed-forward size 6, vocabulary of 5.
pub(crate) fn llama() -> Checkpoint {
    Checkpoint::new(json!({
        "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 1, "intermediate_size": 6, "vocab_size": 5, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 5000.0, "tie_word_embeddings": false,
    }))
    .listed("model.", "embed_tokens 5x8, norm 8")
    .listed("", "lm_head 5x8")
    .listed(
        "model.layers.0.",
        "input_layernorm 8, post_attention_layernorm 8, self_attn.q_proj 8x8, self_attn.k_proj 4x8, \
         self_attn.v_proj 4x8, self_attn.o_proj 8x8, mlp.gate_proj 6x8, mlp.up_proj 6x8, mlp.down_proj 8x6",
    )
}

/// A one-layer GPT-2, with a prefix for all tensor names.
pub(crate) fn gpt2(base: &str) -> Checkpoint {
    let config = json!({
        "model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "vocab_size": 5, "n_positions": 6,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    });
    Checkpoint::new(config).listed(base, "wte 5x4, wpe 6x4, ln_f 4, ln_f.bias 4").listed(
        &format!("{base}h.0."),
        "ln_1 4, ln_1.bias 4, attn.c_attn 4x12, attn.c_attn.bias 12, attn.c_proj 4x4, attn.c_proj.bias 4, ln_2 4, \
             ln_2.bias 4, mlp.c_fc 4x16, mlp.c_fc.bias 16, mlp.c_proj 16x4, mlp.c_proj.bias 4",
    )
}

/// A Llama under the name of another family, with its names of norms.
pub(crate) fn renamed(model_type: &str, norms: &[(&str, usize)]) -> Checkpoint {
    let mut folder = llama()
        .set("model_type", json!(model_type))
        .without("model.layers.0.input_layernorm.weight")
        .without("model.layers.0.post_attention_layernorm.weight");
    for (norm, width) in norms {
        folder = folder.tensor(&format!("model.layers.0.{norm}.weight"), &[*width]);
    }
    folder
}

/// A one-layer Gemma 3.
pub(crate) fn gemma3() -> Checkpoint {
    let norms = [
        ("input_layernorm", 8),
        ("post_attention_layernorm", 8),
        ("pre_feedforward_layernorm", 8),
        ("post_feedforward_layernorm", 8),
        ("self_attn.q_norm", 4),
        ("self_attn.k_norm", 4),
    ];
    renamed("gemma3_text", &norms)
        .without("lm_head.weight")
        .set("head_dim", json!(4))
        .set("query_pre_attn_scalar", json!(16))
        .set("sliding_window", json!(3))
        .unset("tie_word_embeddings")
}

/// A three-layer Qwen 3.
pub(crate) fn qwen3() -> Checkpoint {
    let one = llama().set("model_type", json!("qwen3")).set("head_dim", json!(4)).set("num_hidden_layers", json!(3));
    let layers: Vec<_> = one.tensors.iter().filter(|tensor| tensor.name.contains("layers.0.")).cloned().collect();
    let mut folder = one;
    for layer in 0..3 {
        for tensor in layers.iter().filter(|_| layer > 0) {
            folder = folder.tensor(&tensor.name.replace("layers.0.", &format!("layers.{layer}.")), &tensor.shape);
        }
        folder = folder.tensor(&format!("model.layers.{layer}.self_attn.q_norm.weight"), &[4]);
        folder = folder.tensor(&format!("model.layers.{layer}.self_attn.k_norm.weight"), &[4]);
    }
    folder
}

/// Writes and opens a checkpoint.
pub(crate) fn open(folder: &Checkpoint) -> HfFolder {
    HfFolder::open(folder.write().path()).expect("a folder that opens")
}

/// Returns the error message of opening a checkpoint.
pub(crate) fn refusal(folder: &Checkpoint) -> String {
    HfFolder::open(folder.write().path()).expect_err("a folder that is refused").to_string()
}

/// Asserts that the checkpoint is refused with a message that contains all `parts`.
pub(crate) fn assert_refused(folder: &Checkpoint, parts: &[&str]) {
    let message = refusal(folder);
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// Returns the dimensions and values of a tensor.
pub(crate) fn read(folder: &HfFolder, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = folder.tensor(name).unwrap_or_else(|| panic!("{name} is there"));
    let (mut scratch, mut values) = (Vec::new(), Vec::new());
    for row in 0..tensor.dims[1..].iter().product() {
        let mut decoded = vec![0.0; tensor.dims[0]];
        tensor.rows.block_type().decode(tensor.rows.row(row, &mut scratch), &mut decoded).expect("a row");
        values.extend(decoded);
    }
    (tensor.dims, values)
}

/// Returns the row of `source` that each row of `name` comes from.
pub(crate) fn order(folder: &Checkpoint, name: &str, source: &str) -> Vec<usize> {
    let (dims, values) = read(&open(folder), name);
    let columns = if dims.len() == 1 { 1 } else { dims[0] };
    let first = folder.value(source, 0);
    values.chunks(columns).map(|row| ((row[0] - first) / columns as f32) as usize).collect()
}

/// Returns the number under a key.
pub(crate) fn number(folder: &HfFolder, key: &str) -> f32 {
    let value = folder.metadata().get(key).unwrap_or_else(|| panic!("{key} is there"));
    value.as_f32().or_else(|| value.as_u32().map(|value| value as f32)).expect("a number")
}

/// Returns whether a key exists.
pub(crate) fn has(folder: &HfFolder, key: &str) -> bool {
    folder.metadata().contains(key)
}
