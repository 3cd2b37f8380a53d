//! What sentence-transformers adds to a model: `modules.json` lists a pooling, dense matrices and a normalization that follow it,
//! each in a folder of its own.

use std::path::{Component, Path};

use serde_json::{Map, Value};

use super::metadata::MetadataWriter;
use super::settings::Settings;
use crate::error::{Error, Place, Result};
use crate::format::safetensors::SafeTensors;
use crate::format::{Tensor, json};
use crate::quant::block::BlockType;
use crate::quant::pack::Rows;

/// The largest size of a file in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The largest number of modules.
const MAX_MODULES: usize = 64;

/// A tensor of a module, in F32.
#[derive(Debug)]
pub(super) struct ModuleTensor {
    /// GGUF's name.
    pub(super) name: String,
    /// GGUF's dimensions, the fastest-varying first.
    dims: Vec<usize>,
    values: Vec<f32>,
}

impl ModuleTensor {
    /// The tensor, to be read.
    pub(super) fn tensor(&self) -> Tensor<'_> {
        let columns = self.dims.first().copied().unwrap_or(1);
        Tensor { dims: self.dims.clone(), rows: Box::new(ModuleRows { values: &self.values, columns }) }
    }
}

struct ModuleRows<'a> {
    values: &'a [f32],
    columns: usize,
}

impl Rows for ModuleRows<'_> {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        scratch.clear();
        let row = self.values.chunks(self.columns).nth(index).unwrap_or_default();
        scratch.extend(row.iter().flat_map(|value| value.to_le_bytes()));
        scratch
    }
}

/// Reads the modules of the folder at `path`, writes their keys and returns their tensors. A folder without a list has none.
///
/// # Errors
/// Those of [`SafeTensors::open`]; [`Error::Malformed`], [`Error::Missing`] and [`Error::Unsupported`] with the file.
pub(super) fn read(path: &Path, keys: &mut MetadataWriter<'_>) -> Result<Vec<ModuleTensor>> {
    let list = path.join("modules.json");
    if !list.is_file() {
        return Ok(Vec::new());
    }
    let wrong = |part: String, found: &dyn std::fmt::Display, expected: &str| {
        Error::malformed(&list, Place::Part(part), found, expected)
    };
    let modules = match json::read_value(&list, MAX_BYTES)? {
        Value::Array(modules) if modules.len() <= MAX_MODULES => modules,
        other => return Err(wrong("the list".to_owned(), &json::brief(&other), "a list of up to 64 modules")),
    };
    let mut tensors = Vec::new();
    let mut is_normalized = false;
    for (number, module) in modules.iter().enumerate() {
        let text = |key: &str| {
            let found = module.get(key).and_then(Value::as_str);
            found.ok_or_else(|| wrong(format!("module {number}, {key}"), &"no text", "a string"))
        };
        let (kind, folder) = (text("type")?, text("path")?);
        let inside =
            Path::new(folder).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !inside {
            return Err(wrong(format!("module {number}, path"), &folder, "a folder inside of this one"));
        }
        let place = || Place::Part(format!("module {number}"));
        let unsupported = |what: String, supported: &str| Error::Unsupported {
            path: list.clone(),
            place: place(),
            what,
            supported: supported.to_owned(),
        };
        let folder = path.join(folder);
        let name = kind.rsplit('.').next().unwrap_or_default();
        match name {
            "Transformer" if number == 0 => {}
            "Pooling" if number == 1 => pooling(&folder, keys)?,
            "Dense" if number > 1 && !is_normalized => dense(&folder, keys, &mut tensors)?,
            "Normalize" if number > 1 => is_normalized = true,
            "Dropout" => {}
            _ => {
                let supported = "supported: Transformer, Pooling, Dense and Normalize, in this order";
                return Err(unsupported(format!("{kind:?} at this place"), supported));
            }
        }
    }
    Ok(tensors)
}

/// The settings of the module in `folder`.
fn settings(folder: &Path) -> Result<Settings> {
    let path = folder.join("config.json");
    let values: Map<String, Value> = json::read(&path, MAX_BYTES)?;
    Ok(Settings::new(path, String::new(), values))
}

/// Writes how hidden states become one vector.
fn pooling(folder: &Path, keys: &mut MetadataWriter<'_>) -> Result<()> {
    /// The switches of the modes, the newer names of the modes, and llama.cpp's numbers of those that are supported.
    const MODES: &[(&str, &str, Option<u32>)] = &[
        ("pooling_mode_mean_tokens", "mean", Some(1)),
        ("pooling_mode_cls_token", "cls", Some(2)),
        ("pooling_mode_lasttoken", "lasttoken", Some(3)),
        ("pooling_mode_max_tokens", "max", None),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", "weightedmean", None),
    ];
    let settings = settings(folder)?;
    let mut chosen = Vec::new();
    let named = settings.text(&["pooling_mode"])?;
    for (switch, name, number) in MODES {
        if settings.switch(switch, false)? || named.as_deref() == Some(name) {
            chosen.push((*switch, *number));
        }
    }
    let supported = "supported: one of mean, cls and lasttoken";
    if !settings.switch("include_prompt", true)? {
        return Err(settings.unsupported("include_prompt", "pooling without the prompt", "supported: true"));
    }
    match (chosen.as_slice(), named) {
        ([(_, Some(number))], _) => keys.set("pooling_type", *number),
        ([(switch, None)], _) => return Err(settings.unsupported(switch, "this pooling", supported)),
        ([], Some(name)) => return Err(settings.unsupported("pooling_mode", format_args!("{name:?}"), supported)),
        // The mean, as sentence-transformers has it.
        ([], None) => keys.set("pooling_type", 1u32),
        _ => return Err(settings.unsupported(chosen[1].0, "several poolings one after the other", supported)),
    }
    Ok(())
}

/// Reads a dense module: writes its keys and adds its tensors.
fn dense(folder: &Path, keys: &mut MetadataWriter<'_>, tensors: &mut Vec<ModuleTensor>) -> Result<()> {
    let settings = settings(folder)?;
    let (input, output) = (settings.count(&["in_features"])?, settings.count(&["out_features"])?);
    let key = "activation_function";
    let class = settings.text(&[key])?.unwrap_or_else(|| "torch.nn.modules.activation.Tanh".to_owned());
    let activation = match class.rsplit('.').next().unwrap_or_default() {
        "Identity" => "identity",
        "Tanh" => "tanh",
        "GELU" => "gelu",
        "ReLU" => "relu",
        "SiLU" => "silu",
        "Sigmoid" => "sigmoid",
        _ => {
            let supported = "supported: Identity, Tanh, GELU, ReLU, SiLU, Sigmoid";
            return Err(settings.unsupported(key, format_args!("{class:?}"), supported));
        }
    };
    let number = keys.dense_module([input, output], activation);
    let files = SafeTensors::open_with(folder, false)?;
    let mut parts = vec![("linear.weight", "weight", vec![input, output])];
    if settings.switch("bias", true)? {
        parts.push(("linear.bias", "bias", vec![output]));
    }
    for (source, suffix, dims) in &parts {
        let place = || Place::Tensor((*source).to_owned());
        let shape: Vec<usize> = dims.iter().rev().copied().collect();
        let Some(tensor) = files.tensor(source) else {
            let expected = format!("a tensor of shape {shape:?}");
            return Err(Error::Missing { path: folder.to_path_buf(), place: place(), expected });
        };
        if tensor.shape() != shape {
            let found = format!("shape {:?}", tensor.shape());
            return Err(Error::malformed(files.path(tensor), place(), found, format_args!("{shape:?}")));
        }
        let Some(block_type) = tensor.block_type() else {
            let expected = "F32, F16 or BF16";
            return Err(Error::malformed(files.path(tensor), place(), tensor.dtype(), expected));
        };
        let mut values = vec![0.0; dims.iter().product()];
        block_type.decode(files.data(tensor), &mut values)?;
        tensors.push(ModuleTensor { name: format!("dense_{number}.{suffix}"), dims: dims.clone(), values });
    }
    match files.tensors().iter().find(|tensor| !parts.iter().any(|(source, ..)| *source == tensor.name())) {
        None => Ok(()),
        Some(other) => {
            let place = Place::Tensor(other.name().to_owned());
            Err(Error::malformed(files.path(other), place, "a tensor", "only linear.weight and linear.bias"))
        }
    }
}
