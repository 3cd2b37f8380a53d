//! Checkpoints whose linear layers are in 4 bits already, read without rounding them again.
//!
//! | method | codes | scales | zero points |
//! | --- | --- | --- | --- |
//! | `gptq`, `auto-round` | `qweight (in / 8, out)`, columns in a word | `scales (groups, out)` | `qzeros (groups, out / 8)`, in version 1 stored minus one |
//! | `awq`, `auto-round` | `qweight (in, out / 8)`, rows in a word, even ones first | `scales (groups, out)` | `qzeros (groups, out / 8)`, in the same order |
//! | `compressed-tensors` | `weight_packed (out, in / 8)`, columns in a word | `weight_scale (out, groups)` | `weight_zero_point (out / 8, groups)`, or 8 |
//!
//! A weight is `scale * (code - zero)`, which a block type represents exactly: Q4_0 where the zero point is 8, Q4_1 where
//! F16 represents `scale * zero`, Q5_0 with any other zero point. Groups whose size is not a multiple of 32, and scales that
//! F16 does not represent, become F32.
//!
//! With `desc_act`, the columns of a group are not adjacent (`g_idx` has the group of each column). GGUF has no blocks for
//! that, so such rows become F32, too, when they are converted. A model that is loaded reorders the columns, and its inputs,
//! by [`Rows::reordered`](crate::quant::pack::Rows::reordered).
//!
//! Sources: AutoGPTQ's and GPTQModel's `QuantLinear`, AutoAWQ's `WQLinear_GEMM`, compressed-tensors' `pack_quantized`,
//! auto-round's `inference/backend.py`.

use std::path::Path;

mod layout;
pub(super) mod matrix;
pub(super) mod mxfp4;
mod parts;

use serde_json::Value;

use super::settings::Settings;
use crate::error::Result;
use crate::format::json;
use crate::format::safetensors::{SafeTensors, TensorInfo};
use layout::Layout;
use matrix::Matrix;
use parts::Parts;

/// How a checkpoint packs its linear layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packing {
    layout: Layout,
    /// Columns that share a scale. `None` where whole rows do.
    group: Option<usize>,
    /// As `group`, for the layers of single rules. A matrix's scales show which one it has.
    other_groups: Vec<Option<usize>>,
    /// Whether the columns of a group are not adjacent. A tensor must then hold the group of each column.
    scattered: bool,
}

const SUPPORTED: &str = "supported: gptq, awq, auto-round and compressed-tensors with 4 bits, mxfp4, and F32, F16 and BF16; take \
                         the original checkpoint, or a GGUF file";

impl Packing {
    /// The packing that `quantization_config` of `config.json` describes, or a file of the first versions of AutoGPTQ or
    /// AutoAWQ in `folder`, if there is one.
    pub(super) fn read(settings: &Settings, folder: &Path) -> Result<Option<Packing>> {
        let (config, default) = match settings.object("quantization_config")? {
            Some(config) => (config, None),
            None => match Packing::older_file(folder)? {
                Some((config, method)) => (config, Some(method.to_owned())),
                None => return Ok(None),
            },
        };
        let method = config.text(&["quant_method"])?.or(default);
        let method = method.ok_or_else(|| config.missing("quant_method", "a method"))?;
        let packing = match method.as_str() {
            "gptq" => Packing::gptq(&config)?,
            "awq" => Packing::awq(&config)?,
            "auto-round" | "auto_round" | "intel/auto-round" => Packing::auto_round(&config)?,
            "compressed-tensors" => Packing::compressed(&config)?,
            // Its tensors show which matrices are in blocks.
            "mxfp4" => return Ok(None),
            other => {
                return Err(config.unsupported("quant_method", format_args!("the method {other:?}"), SUPPORTED));
            }
        };
        Ok(Some(packing))
    }

    /// The file in which the first versions of AutoGPTQ or AutoAWQ describe the packing, and the name of the method.
    fn older_file(folder: &Path) -> Result<Option<(Settings, &'static str)>> {
        for (name, method) in [("quantize_config.json", "gptq"), ("quant_config.json", "awq")] {
            let path = folder.join(name);
            if path.is_file() {
                return Ok(Some((Settings::read(&path)?, method)));
            }
        }
        Ok(None)
    }

    fn gptq(config: &Settings) -> Result<Packing> {
        four_bits(config, "bits")?;
        let rules = match config.get("dynamic") {
            // Layers of a rule without settings are not packed.
            None | Some(Value::Bool(false)) => Vec::new(),
            Some(Value::Object(rules)) => rules.into_iter().filter(|rule| !rule.0.starts_with("-:")).collect(),
            Some(other) => return Err(config.malformed("dynamic", json::brief(&other), "an object of rules")),
        };
        let mut other_groups = Vec::new();
        let mut scattered = config.switch("desc_act", false)?;
        for (pattern, rule) in &rules {
            let unsupported = |what: String, supported: &str| config.unsupported("dynamic", what, supported);
            match rule.get("bits").map(Value::as_u64) {
                None | Some(Some(4)) => {}
                _ => return Err(unsupported(format!("{} bits for {pattern:?}", rule["bits"]), "supported: 4")),
            }
            let others = ["format", "method", "quant_method", "pack_dtype"];
            if let Some(key) = others.into_iter().find(|key| rule.get(key).is_some()) {
                return Err(unsupported(format!("{key} for {pattern:?}"), "supported: group_size, desc_act and sym"));
            }
            if let Some(size) = rule.get("group_size") {
                other_groups.push(columns_of(config, size)?);
            }
            scattered |= rule.get("desc_act").and_then(Value::as_bool).unwrap_or(false);
        }
        let format = config.text(&["checkpoint_format"])?.unwrap_or_else(|| "gptq".to_owned());
        let one_less = match format.as_str() {
            _ if config.switch("is_marlin_format", false)? => {
                return Err(config.unsupported("is_marlin_format", "Marlin's layout", "supported: gptq and gptq_v2"));
            }
            "gptq" => true,
            "gptq_v2" => false,
            other => {
                let what = format_args!("the format {other:?}");
                return Err(config.unsupported("checkpoint_format", what, "supported: gptq and gptq_v2"));
            }
        };
        Ok(Packing { layout: Layout::Gptq { one_less }, group: group_size(config)?, other_groups, scattered })
    }

    fn awq(config: &Settings) -> Result<Packing> {
        four_bits(config, if config.get("w_bit").is_some() { "w_bit" } else { "bits" })?;
        let version = config.text(&["version"])?.unwrap_or_else(|| "gemm".to_owned());
        if !version.eq_ignore_ascii_case("gemm") {
            return Err(config.unsupported("version", format_args!("the layout {version:?}"), "supported: gemm"));
        }
        if !config.switch("zero_point", true)? {
            return Err(config.unsupported("zero_point", "a layer without zero points", "supported: true"));
        }
        Ok(Packing { layout: Layout::Awq, group: group_size(config)?, other_groups: Vec::new(), scattered: false })
    }

    fn auto_round(config: &Settings) -> Result<Packing> {
        four_bits(config, "bits")?;
        let data_type = config.text(&["data_type"])?.unwrap_or_else(|| "int".to_owned());
        if data_type != "int" {
            return Err(config.unsupported("data_type", format_args!("the type {data_type:?}"), "supported: int"));
        }
        if let Some(bits) = config.optional_count(&["act_bits"])?
            && bits < 16
        {
            return Err(config.unsupported("act_bits", format_args!("activations of {bits} bits"), "supported: 16"));
        }
        let format = config.text(&["packing_format"])?.unwrap_or_else(|| "auto_round:auto_gptq".to_owned());
        let layout = match format.as_str() {
            "auto_round:auto_gptq" => Layout::Gptq { one_less: true },
            "auto_round" | "auto_round:gptqmodel" => Layout::Gptq { one_less: false },
            "auto_round:auto_awq" => Layout::Awq,
            other => {
                let supported =
                    "supported: auto_round, auto_round:gptqmodel, auto_round:auto_gptq, auto_round:auto_awq";
                return Err(config.unsupported("packing_format", format_args!("the format {other:?}"), supported));
            }
        };
        Ok(Packing {
            layout,
            group: group_size(config)?,
            other_groups: Vec::new(),
            scattered: config.switch("desc_act", false)?,
        })
    }

    fn compressed(config: &Settings) -> Result<Packing> {
        let format = config.text(&["format"])?.ok_or_else(|| config.missing("format", "\"pack-quantized\""))?;
        if format != "pack-quantized" {
            return Err(config.unsupported(
                "format",
                format_args!("the format {format:?}"),
                "supported: pack-quantized",
            ));
        }
        let groups = config.object("config_groups")?.ok_or_else(|| config.missing("config_groups", "an object"))?;
        let names = match config.get("config_groups") {
            Some(Value::Object(groups)) => groups.keys().cloned().collect::<Vec<_>>(),
            _ => Vec::new(),
        };
        let [name] = names.as_slice() else {
            let what = format!("{} groups of layers", names.len());
            return Err(config.unsupported("config_groups", what, "supported: one, all layers alike"));
        };
        let group = groups.object(name)?.ok_or_else(|| groups.missing(name, "an object"))?;
        if group.get("input_activations").is_some() {
            let supported = "supported: weights alone";
            return Err(group.unsupported("input_activations", "a type for activations", supported));
        }
        let weights = group.object("weights")?.ok_or_else(|| group.missing("weights", "an object"))?;
        four_bits(&weights, "num_bits")?;
        let kind = weights.text(&["type"])?.unwrap_or_else(|| "int".to_owned());
        if kind != "int" {
            return Err(weights.unsupported("type", format_args!("the type {kind:?}"), "supported: int"));
        }
        let strategy = weights.text(&["strategy"])?.unwrap_or_default();
        let group = match strategy.as_str() {
            "channel" => None,
            "group" => {
                let group = group_size(&weights)?;
                Some(group.ok_or_else(|| weights.malformed("group_size", -1, "columns in a group, from 1"))?)
            }
            other => {
                let what = format_args!("the strategy {other:?}");
                return Err(weights.unsupported("strategy", what, "supported: group and channel"));
            }
        };
        // With "weight" and "static", columns were quantized in another order, but stored in their own.
        let scattered = match weights.get("actorder") {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(Value::String(order)) if ["group", "dynamic"].iter().any(|o| order.eq_ignore_ascii_case(o)) => true,
            Some(Value::String(order)) if ["weight", "static"].iter().any(|o| order.eq_ignore_ascii_case(o)) => false,
            Some(other) => {
                let what = format!("the order {}", json::brief(&other));
                return Err(weights.unsupported("actorder", what, "supported: group, dynamic, weight, static, null"));
            }
        };
        Ok(Packing {
            layout: Layout::Compressed { symmetric: weights.switch("symmetric", true)? },
            group,
            other_groups: Vec::new(),
            scattered,
        })
    }

    /// The suffix of the name of the codes, instead of `.weight`.
    fn codes(&self) -> &'static str {
        match self.layout {
            Layout::Gptq { .. } | Layout::Awq => ".qweight",
            Layout::Compressed { .. } => ".weight_packed",
        }
    }

    /// The codes of the matrix `name`, if the checkpoint has it packed.
    pub(super) fn find<'a>(&self, files: &'a SafeTensors, name: &str) -> Option<&'a TensorInfo> {
        files.tensor(&format!("{}{}", name.strip_suffix(".weight")?, self.codes()))
    }

    /// The packed matrix `name`, `(rows, columns)`. All shapes and numbers are checked.
    pub(super) fn matrix(&self, files: &SafeTensors, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let parts = Parts { files, stem };
        let group = self.group_of(&parts, columns)?;
        let groups = columns.div_ceil(group);
        let mut matrix = match self.layout {
            Layout::Gptq { .. } | Layout::Awq => {
                if !rows.is_multiple_of(8) || !columns.is_multiple_of(8) {
                    let found = format_args!("{rows} rows of {columns}");
                    return Err(parts.malformed(".qweight", found, "multiples of 8, the numbers in a word"));
                }
                let words = if self.layout == Layout::Awq { [columns, rows / 8] } else { [columns / 8, rows] };
                let codes = parts.words(".qweight", &words)?;
                let zeros = parts.words(".qzeros", &[groups, rows / 8])?;
                let (scales, scale_type) = parts.scales(".scales", &[groups, rows])?;
                Matrix::new(self.layout, [rows, columns], groups, codes, Some(zeros), scales, scale_type)
            }
            Layout::Compressed { symmetric } => {
                parts.shape([rows, columns])?;
                let codes = parts.words(".weight_packed", &[rows, columns.div_ceil(8)])?;
                let (scales, scale_type) = parts.scales(".weight_scale", &[rows, groups])?;
                let zeros = match symmetric {
                    true => None,
                    false => Some(parts.words(".weight_zero_point", &[rows.div_ceil(8), groups])?),
                };
                Matrix::new(self.layout, [rows, columns], groups, codes, zeros, scales, scale_type)
            }
        };
        if matches!(self.layout, Layout::Compressed { .. }) {
            matrix.add_checked(parts.at(".weight_shape")?);
        }
        matrix.group = group;
        let order = match self.layout {
            Layout::Gptq { .. } => ".g_idx",
            Layout::Awq => return matrix.classified(files, &parts),
            Layout::Compressed { .. } => ".weight_g_idx",
        };
        if self.scattered && groups > 1 || files.tensor(&parts.name(order)).is_some() {
            matrix.add_checked(parts.at(order)?);
            matrix.order(parts.order(order, columns, groups)?);
        }
        matrix.classified(files, &parts)
    }
}

impl Packing {
    /// The columns of a group of a matrix: of the sizes that the rules allow, the one that it has as many scales for.
    fn group_of(&self, parts: &Parts<'_>, columns: usize) -> Result<usize> {
        let mut sizes: Vec<usize> = Vec::new();
        for size in std::iter::once(self.group).chain(self.other_groups.iter().copied()) {
            let size = size.unwrap_or(columns).clamp(1, columns.max(1));
            if !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        let shape = parts.files.tensor(&parts.name(".scales")).map(TensorInfo::shape);
        let fits = |size: &&usize| shape.and_then(|shape| shape.first()) == Some(&columns.div_ceil(**size));
        match (sizes.as_slice(), sizes.iter().filter(fits).copied().collect::<Vec<_>>().as_slice()) {
            ([only], _) | (_, [only]) => Ok(*only),
            (_, found) => {
                let what = format!("{} of the group sizes {sizes:?} fit, for {columns} columns", found.len());
                Err(parts.malformed(".scales", what, "one: quantization_config.dynamic of config.json has these sizes"))
            }
        }
    }
}

/// The columns of a group. `None` for whole rows.
fn group_size(config: &Settings) -> Result<Option<usize>> {
    let value = config.find(&["group_size", "q_group_size"]).map(|found| found.1);
    let value = value.ok_or_else(|| config.missing("group_size", "columns in a group, or -1"))?;
    columns_of(config, &value)
}

fn columns_of(config: &Settings, value: &Value) -> Result<Option<usize>> {
    match value.as_i64() {
        Some(-1) => Ok(None),
        // A group of more columns than any matrix has is a whole row, too.
        Some(size) if size > 0 => Ok(Some(usize::try_from(size).unwrap_or(usize::MAX))),
        _ => Err(config.malformed("group_size", value, "columns in a group, or -1 for whole rows")),
    }
}

fn four_bits(config: &Settings, key: &str) -> Result<()> {
    match config.count(&[key])? {
        4 => Ok(()),
        other => Err(config.unsupported(key, format_args!("a checkpoint of {other} bits"), "supported: 4")),
    }
}
