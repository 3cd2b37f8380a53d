//! Hugging Face checkpoints, presented as GGUF files.
//!
//! [`HfFolder::open`] reads `config.json` and the headers of the safetensors files. The folder is then a [`Checkpoint`] like
//! any other: metadata under the keys that llama.cpp's converter would write, tensors under GGUF's names with GGUF's
//! dimensions and order of rows. Nothing is copied: rows are read from the mapped files on demand.
//!
//! A family is an entry in `families/`: the names in its configuration, and the tensors of GGUF that its tensors become
//! (`entry.rs`). `planner.rs` finds the tensors, `rows/` arranges their rows, `packings/` reads those that are in 4 bits
//! already, `keys.rs` and `rope.rs` write the metadata.
//!
//! # Keys
//! In addition to `general.architecture`, `general.type` and `general.name`, each under the architecture's name:
//!
//! | key | in | |
//! | --- | --- | --- |
//! | `vocab_size`, `context_length`, `embedding_length`, `block_count`, `feed_forward_length` | all | |
//! | `attention.head_count`, `.head_count_kv`, `.key_length`, `.value_length` | all | |
//! | `attention.layer_norm_rms_epsilon`, or `attention.layer_norm_epsilon` | all | |
//! | `hidden_activation` | all | `silu`, `gelu` (by erf), `gelu_tanh` or `relu` |
//! | `rope.dimension_count`, `rope.freq_base` | where there is rotation | |
//! | `rope.freq_base_swa` | gemma3 | base in layers with a window |
//! | `rope.scaling.type`, `.factor`, `.original_context_length` | linear, YaRN, LongRoPE | tensors hold LongRoPE's factors, the divisors of Llama 3 and of YaRN without `truncate` |
//! | `rope.scaling.yarn_beta_fast`, `.yarn_beta_slow` | YaRN | where the configuration has them |
//! | `rope.scaling.attn_factor` | YaRN, LongRoPE | a factor of `1 + 0.1 ln(factor)` for YaRN, the whole magnitude for LongRoPE |
//! | `rope.scaling.extended_context_length` | YaRN without `truncate` | nybble's own: the context with the stretching, which divisors do |
//! | `rope.scaling.dynamic_factor` | dynamic NTK | nybble's own, with the type `none` for other readers |
//! | `attention.sliding_window` | where transformers applies it | |
//! | `attention.sliding_window_pattern` | where not all layers have it | the `n` of "all but every nth", or a switch per layer |
//! | `attention.rope_pattern` | smollm3 | a switch per layer: whether it rotates |
//! | `attention.scale` | granite, gemma2, gemma3, mpt | factor of the scores |
//! | `attention.max_alibi_bias` | bloom, mpt, falcon | 0 for none |
//! | `attention.alibi_scale` | falcon with ALiBi | nybble's own: factor of the slopes |
//! | `attention.clamp_kqv` | mpt | |
//! | `attn_logit_softcapping`, `final_logit_softcapping` | gemma2, gemma3 | 0 for none |
//! | `embedding_scale`, `residual_scale`, `logit_scale` | granite | logits are divided by the last |
//! | `use_parallel_residual` | gptneox, falcon, stablelm | |
//! | `tensor_data_layout` | falcon | `jploski` |
//! | `expert_count`, `expert_used_count`, `expert_feed_forward_length`, `expert_weights_norm` | with experts | |
//! | `expert_shared_feed_forward_length` | qwen2moe | |
//! | `nextn_predict_layers` | with a head for multi-token prediction | 1; `block_count` and lists per layer include its layer |
//!
//! Families with recurrent layers have llama.cpp's keys: `ssm.*`, `shortconv.l_cache`, `kda.head_dim`, and which layers are
//! recurrent, by zeros in `attention.head_count_kv` or by `attention.recurrent_layers`. In addition, nybble's own:
//!
//! | key | in | |
//! | --- | --- | --- |
//! | `ssm.time_step_min`, `ssm.time_step_max` | Mamba-2 | bounds of time steps, where there are any |
//! | `ssm.norm_before_gate` | falcon-h1 | whether the norm of a mixer that has one comes before its gate |
//! | `ssm.dt_b_c_rms_epsilon` | mamba | epsilon of the norms of time steps, what is written and what is read |
//! | `ssm.norm_epsilon` | olmo-hybrid | epsilon of `ssm_norm` |
//! | `ssm.beta_scale` | olmo-hybrid | factor of beta, 1 without the key |
//! | `output_norm_epsilon` | rwkv4 | epsilon of the last norm |
//! | `rescale_every` | rwkv4 | layers after which transformers halves the residual stream; 0 for none |
//!
//! # Tensors
//! Tensors have llama.cpp's names. It does not know `olmo-hybrid`, which has the names of `qwen35` with heads of values in the
//! order of the checkpoint, `rwkv4`, which has those of `rwkv6`, and `opt`, which has the names of its relatives, those of BERT
//! (`attn_output_norm`, `layer_output_norm`) where norms follow the layers, and nybble's own `token_embd_proj` and
//! `output_proj` where embedding and layers have different widths.

mod entry;
mod families;
mod heads;
#[cfg(test)]
mod key_tests;
mod keys;
mod metadata;
mod modules;
mod mtp;
mod packings;
pub(in crate::model) mod placement;
mod planner;
mod rope;
mod rows;
mod settings;
mod sizes;
mod switches;
mod tokenizer;
mod transformers;
mod xielu;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::format::gguf::Metadata;
use crate::format::safetensors::SafeTensors;
use crate::format::{Checkpoint, Tensor};
use crate::quant::pack::Rows;
use families::ActivationSource;
use metadata::ComputedTensor;
use modules::ModuleTensor;
use packings::Packing;
use packings::matrix::PackedRows;
use planner::{Planned, Planner};
use rows::{Arranged, Computed, Mapped, TiledColumns};
use settings::Settings;
use sizes::Sizes;

/// A folder with `config.json` and safetensors files.
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    metadata: Metadata,
    files: SafeTensors,
    tensors: Vec<Planned>,
    computed: Vec<ComputedTensor>,
    /// Those of the folders of modules that follow the model.
    modules: Vec<ModuleTensor>,
    /// The index of each name: among the tensors, then among the computed ones.
    index: HashMap<String, usize>,
    /// Rows of the embedding.
    rows: usize,
    /// Why the head for multi-token prediction is left out, where the files have a part of one.
    mtp_fault: Option<String>,
}

impl HfFolder {
    /// Opens the checkpoint in the folder at `path`. Checks that it has every tensor of its family in the shape that
    /// `config.json` implies, and no others.
    ///
    /// # Errors
    /// Those of [`SafeTensors::open`]; [`Missing`](crate::Error::Missing), [`Malformed`](crate::Error::Malformed) and
    /// [`Unsupported`](crate::Error::Unsupported) with the key of
    /// `config.json`, or the tensor under the checkpoint's own name.
    pub fn open(path: impl AsRef<Path>) -> Result<HfFolder> {
        HfFolder::open_with(path, true)
    }

    /// As [`HfFolder::open`]. Maps the files of weights, or reads them into memory where `mmap` is false.
    ///
    /// # Errors
    /// Those of [`HfFolder::open`].
    pub fn open_with(path: impl AsRef<Path>, mmap: bool) -> Result<HfFolder> {
        let path = path.as_ref();
        let files = SafeTensors::open_with(path, mmap)?;
        let settings = Settings::read(&path.join("config.json"))?;
        let model_type = settings.text(&["model_type"])?.ok_or_else(|| settings.missing("model_type", "a family"))?;
        let Some(family) = families::by_model_type(&model_type) else {
            let mut known: Vec<_> = families::model_types().collect();
            known.sort_unstable();
            let supported = format!("supported: {}", known.join(", "));
            return Err(settings.unsupported("model_type", format_args!("the family {model_type:?}"), &supported));
        };
        // Some families have another form for attention in both directions.
        let family = match (heads::is_bidirectional(&settings)?, family.bidirectional) {
            (false, _) => family,
            (true, Some(other)) => other,
            (true, None) => {
                let supported = "supported in this family: false";
                return Err(settings.unsupported("use_bidirectional_attention", true, supported));
            }
        };
        let settings = settings.with_defaults(family.defaults, transformers::defaults(family));
        let family = (family.variant)(&settings)?.unwrap_or(family);
        let packing = Packing::read(&settings, path)?;
        let mut sizes = Sizes::read(&settings, family.attends, family.adjust)?;
        sizes.rotary = rope::rotary(family.rotation, &settings, &sizes)?;
        sizes.window_rotary = rope::window_rotary(family.rotation, &settings, &sizes)?;
        let (mut metadata, computed, modules) = keys::write(family, &settings, &sizes, path, &name(path))?;
        if let ActivationSource::Xielu = family.activation {
            xielu::write(family, &files, sizes.layers, &mut metadata)?;
        }
        let rows = sizes.vocabulary;
        let (tensors, head) = Planner::plan(family, &settings, sizes, &files, packing)?;
        if let Some(Ok(sizes)) = &head
            && let Some(head) = &family.mtp
        {
            mtp::write_keys(head, &settings, sizes, family.architecture, &mut metadata)?;
        }
        let has_output = tensors.iter().any(|tensor| tensor.name == "output.weight");
        if heads::is_headless(&settings)? && !has_output && !settings.switch("tie_word_embeddings", false)? {
            metadata.set(format!("{}.generates", family.architecture), false);
        }
        let names = tensors.iter().map(|tensor| &tensor.name).chain(computed.iter().map(|tensor| &tensor.0));
        let names = names.chain(modules.iter().map(|tensor| &tensor.name));
        let index = names.enumerate().map(|(at, name)| (name.clone(), at)).collect();
        Ok(HfFolder {
            path: path.to_path_buf(),
            metadata,
            files,
            tensors,
            computed,
            modules,
            index,
            rows,
            mtp_fault: head.and_then(Result::err).map(|error| error.to_string()),
        })
    }

    /// Whether linear layers are in 4 bits already.
    pub fn has_packed_layers(&self) -> bool {
        self.tensors.iter().any(Planned::is_packed)
    }

    /// The folder's tokenizer and chat templates under GGUF's keys. They are not part of [`Checkpoint::metadata`], because
    /// models run without them.
    ///
    /// # Errors
    /// [`Missing`](crate::Error::Missing) when there is no `tokenizer.json`; [`Malformed`](crate::Error::Malformed) with the key
    /// when it is damaged; [`Unsupported`](crate::Error::Unsupported) with the key when GGUF has no name for its kind.
    pub fn tokenizer(&self) -> Result<Metadata> {
        tokenizer::metadata(&self.path, self.metadata.get("general.name").and_then(|name| name.as_str()), self.rows)
    }
}

impl HfFolder {
    /// The rows of a tensor as they are in the files, in their order.
    fn rows_of<'a>(&'a self, planned: &'a Planned) -> Option<Box<dyn Rows + 'a>> {
        let Planned { dims, block_type, parts, packed, order, blocks, .. } = planned;
        if let Some(blocks) = blocks {
            return Some(Box::new(blocks.rows(&self.files)?));
        }
        if !packed.is_empty() {
            return Some(Box::new(PackedRows::new(&self.files, packed, *order)));
        }
        let bytes = parts.iter().map(|part| self.files.tensors().get(*part).map(|tensor| self.files.data(tensor)));
        Some(Box::new(Arranged {
            block_type: *block_type,
            parts: bytes.collect::<Option<_>>()?,
            order: *order,
            columns: *dims.first()?,
            is_vector: dims.len() == 1,
        }))
    }
}

/// The name of the model in a folder: that of the folder, or in the cache of the Hub that of the repository.
fn name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let names: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    match names.as_slice() {
        [.., repository, snapshots, _] if snapshots == "snapshots" && repository.starts_with("models--") => {
            repository.rsplit("--").next().unwrap_or_default().to_owned()
        }
        [.., last] => last.clone().into_owned(),
        [] => String::new(),
    }
}

impl Checkpoint for HfFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let at = *self.index.get(name)?;
        let Some(planned) = self.tensors.get(at) else {
            let at = at - self.tensors.len();
            if let Some(module) = at.checked_sub(self.computed.len()) {
                return self.modules.get(module).map(ModuleTensor::tensor);
            }
            let values = &self.computed.get(at)?.1;
            return Some(Tensor { dims: vec![values.len()], rows: Box::new(Computed(values)) });
        };
        let mut rows = self.rows_of(planned)?;
        let dims = planned.dims.clone();
        let columns = *dims.first()?;
        if let Some(order) = planned.columns {
            rows = Box::new(TiledColumns { rows, order, columns });
        }
        if let Some(mapping) = &planned.mapping {
            rows = Box::new(Mapped { rows, mapping, columns, is_vector: dims.len() == 1 });
        }
        Some(Tensor { dims, rows })
    }

    fn names(&self) -> Vec<&str> {
        let stored = self.tensors.iter().map(|tensor| tensor.name.as_str());
        let modules = self.modules.iter().map(|tensor| tensor.name.as_str());
        stored.chain(self.computed.iter().map(|tensor| tensor.0.as_str())).chain(modules).collect()
    }

    fn mtp_fault(&self) -> Option<&str> {
        self.mtp_fault.as_deref()
    }

    fn is_quantized(&self, name: &str) -> bool {
        self.index.get(name).and_then(|at| self.tensors.get(*at)).is_some_and(Planned::is_packed)
    }

    fn release(&self, name: &str) {
        let Some(tensor) = self.index.get(name).and_then(|at| self.tensors.get(*at)) else { return };
        let packed = tensor.packed.iter().flat_map(|matrix| matrix.tensors());
        for part in tensor.parts.iter().copied().chain(packed) {
            if let Some(tensor) = self.files.tensors().get(part) {
                self.files.release(tensor);
            }
        }
    }
}
