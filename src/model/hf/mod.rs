//! Checkpoints of Hugging Face, presented as GGUF files would be.
//!
//! [`HfFolder::open`] reads `config.json` and the headers of the safetensors files, and from then on the folder is a
//! [`Checkpoint`] like any other: metadata under the keys that llama.cpp's converter would write, tensors under GGUF's names
//! with GGUF's dimensions and order of rows. Nothing is copied: rows are taken from the mapped files as they are asked for.

mod families;
mod keys;
mod map;
mod pretokenizer;
mod rope;
mod settings;
mod sizes;
mod tokenizer;
mod transform;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::format::gguf::Metadata;
use crate::format::safetensors::SafeTensors;
use crate::format::{Checkpoint, Tensor};
use families::Rotation;
use keys::{ComputedTensor, Keys};
use map::{Planned, Planner};
use settings::Settings;
use sizes::Sizes;
use transform::{Arranged, Computed};

/// A folder with `config.json` and safetensors files.
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    metadata: Metadata,
    files: SafeTensors,
    tensors: Vec<Planned>,
    computed: Vec<ComputedTensor>,
    /// Places of the names: among the tensors, then among the computed ones.
    index: HashMap<String, usize>,
    /// Rows of the embedding.
    rows: usize,
}

impl HfFolder {
    /// Opens the checkpoint in the folder at `path` and checks that every tensor of its family is there in the shape that
    /// `config.json` says, and no other.
    ///
    /// # Errors
    /// Those of [`SafeTensors::open`]; [`Missing`](crate::Error::Missing), [`Malformed`](crate::Error::Malformed) and
    /// [`Unsupported`](crate::Error::Unsupported) with the key of
    /// `config.json`, or the tensor under the checkpoint's own name.
    pub fn open(path: impl AsRef<Path>) -> Result<HfFolder> {
        let path = path.as_ref();
        let files = SafeTensors::open(path)?;
        let settings = Settings::read(&path.join("config.json"))?;
        let model_type = settings.text(&["model_type"])?.ok_or_else(|| settings.missing("model_type", "a family"))?;
        let Some(family) = families::by_model_type(&model_type) else {
            let mut known: Vec<_> = families::model_types().collect();
            known.sort_unstable();
            let supported = format!("supported: {}", known.join(", "));
            return Err(settings.unsupported("model_type", format_args!("the family {model_type:?}"), &supported));
        };
        let settings = settings.with_defaults(family.defaults);
        if settings.get("quantization_config").is_some() {
            let supported = "supported: F32, F16 and BF16; take the original checkpoint, or a GGUF file";
            return Err(settings.unsupported("quantization_config", "a checkpoint that is quantized", supported));
        }
        let mut sizes = Sizes::read(&settings, family.adjust)?;
        let rotates = match family.rotation {
            Rotation::Never => false,
            Rotation::Always => true,
            Rotation::Unless(key) => !settings.switch(key, false)?,
        };
        if rotates {
            sizes.rotary = rope::rotary(&settings, &sizes)?;
        }
        let tensors = Planner::plan(family, &settings, &sizes, &files)?;
        let (metadata, computed) = Keys::write(family, &settings, &sizes, &name(path))?;
        let names = tensors.iter().map(|tensor| &tensor.name).chain(computed.iter().map(|tensor| &tensor.0));
        let index = names.enumerate().map(|(at, name)| (name.clone(), at)).collect();
        Ok(HfFolder { path: path.to_path_buf(), metadata, files, tensors, computed, index, rows: sizes.vocabulary })
    }

    /// The folder's tokenizer and chat templates under GGUF's keys, which [`Checkpoint::metadata`] lacks: models run without.
    ///
    /// # Errors
    /// [`Missing`](crate::Error::Missing) when there is no `tokenizer.json`, [`Malformed`](crate::Error::Malformed) and
    /// [`Unsupported`](crate::Error::Unsupported) with its key when it is damaged, or of a kind that GGUF has no name for.
    pub fn tokenizer(&self) -> Result<Metadata> {
        tokenizer::metadata(&self.path, self.metadata.get("general.name").and_then(|name| name.as_str()), self.rows)
    }
}

/// What to call the model in a folder: the folder's name, or in the Hub's cache the repository's.
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
        let Some(Planned { dims, block_type, parts, order, .. }) = self.tensors.get(at) else {
            let values = &self.computed.get(at - self.tensors.len())?.1;
            return Some(Tensor { dims: vec![values.len()], rows: Box::new(Computed(values)) });
        };
        let bytes = parts.iter().map(|part| self.files.tensors().get(*part).map(|tensor| self.files.data(tensor)));
        let rows = Arranged {
            block_type: *block_type,
            parts: bytes.collect::<Option<_>>()?,
            order: *order,
            columns: *dims.first()?,
            is_vector: dims.len() == 1,
        };
        Some(Tensor { dims: dims.clone(), rows: Box::new(rows) })
    }

    fn names(&self) -> Vec<&str> {
        let stored = self.tensors.iter().map(|tensor| tensor.name.as_str());
        stored.chain(self.computed.iter().map(|tensor| tensor.0.as_str())).collect()
    }

    fn release(&self, name: &str) {
        let tensor = self.index.get(name).and_then(|at| self.tensors.get(*at));
        for part in tensor.iter().flat_map(|tensor| &tensor.parts) {
            if let Some(tensor) = self.files.tensors().get(*part) {
                self.files.release(tensor);
            }
        }
    }
}
