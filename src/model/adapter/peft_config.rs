//! `adapter_config.json` of PEFT.

use std::path::{Path, PathBuf};

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::error::{Error, Place, Result};
use crate::format::json;

/// The largest size of the file in bytes.
const MAX_BYTES: u64 = 4 << 20;
/// The largest size of a compiled pattern in bytes.
const MAX_PATTERN: usize = 1 << 16;
/// The largest number of patterns of a key.
const MAX_PATTERNS: usize = 1 << 12;

/// Keys without influence on what a trained adapter computes: they say which modules have matrices, which the file shows, or how
/// it was trained.
const WITHOUT_INFLUENCE: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    // How the matrices start, for values of `init_lora_weights` that leave the base as it is.
    "eva_config",
];
/// Keys that are read.
const READ: &[&str] = &[
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_rslora",
];

/// What the configuration says about the scales of matrices.
pub(super) struct PeftConfig {
    path: PathBuf,
    rank: f64,
    alpha: f64,
    /// Whether scales are divided by the root of the rank instead of the rank.
    is_rank_stabilized: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
    /// Parameters with matrices, where the module has several.
    pub(super) parameters: Vec<String>,
}

impl PeftConfig {
    /// Reads the configuration in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`], [`Error::Missing`] and [`Error::Unsupported`] with the key.
    pub(super) fn read(folder: &Path) -> Result<PeftConfig> {
        let path = folder.join("adapter_config.json");
        let values = json::read(&path, MAX_BYTES)?;
        let keys = Keys { path: &path, values: &values };
        let kind = keys.text("peft_type")?;
        if kind != Some("LORA") {
            let found = kind.map_or("no type".to_owned(), |kind| format!("the type {kind:?}"));
            return Err(keys.unsupported("peft_type", &found, "LORA"));
        }
        keys.check()?;
        let is_none = |key: &str| values.get(key).is_none_or(is_off);
        if let Some(bias) = keys.text("bias")?.filter(|bias| *bias != "none") {
            return Err(keys.unsupported("bias", &format!("{bias:?}: trained biases"), "none"));
        }
        if !is_none("use_dora") {
            return Err(keys.unsupported("use_dora", "DoRA", "false"));
        }
        match values.get("init_lora_weights") {
            None | Some(Value::Bool(_) | Value::Null) => {}
            Some(Value::String(text)) if matches!(text.as_str(), "gaussian" | "eva" | "orthogonal") => {}
            Some(other) => {
                let found = format!("{}, which may change the base", json::brief(other));
                return Err(keys.unsupported("init_lora_weights", &found, "true, false, gaussian, eva and orthogonal"));
            }
        }
        Ok(PeftConfig {
            rank: keys.number("r")?.unwrap_or(8.0),
            alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
            is_rank_stabilized: keys.switch("use_rslora")?,
            ranks: keys.patterns("rank_pattern")?,
            alphas: keys.patterns("alpha_pattern")?,
            parameters: keys.strings("target_parameters")?,
            path,
        })
    }

    /// The scale of the matrices of `module`, whose rank in the file is `rank`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for another rank than the configuration says.
    pub(super) fn scale(&self, module: &str, rank: usize) -> Result<f32> {
        // PEFT takes the first pattern in the order of the file.
        let of = |key: &str, patterns: &[(Regex, f64)], default: f64| {
            let mut found = patterns.iter().filter(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value);
            let first = found.next().unwrap_or(default);
            match found.find(|other| *other != first) {
                None => Ok(first),
                Some(other) => {
                    let found = format!("{first} and {other} for {module}");
                    Err(Error::malformed(&self.path, Place::Key(key.to_owned()), found, "one value for each module"))
                }
            }
        };
        let expected = of("rank_pattern", &self.ranks, self.rank)?;
        if expected != rank as f64 {
            let place = Place::Part(format!("the matrices of {module}"));
            let expected = format!("{expected}, as r and rank_pattern of adapter_config.json say");
            return Err(Error::malformed(&self.path, place, format_args!("rank {rank}"), expected));
        }
        let divisor = if self.is_rank_stabilized { expected.sqrt() } else { expected };
        Ok((of("alpha_pattern", &self.alphas, self.alpha)? / divisor) as f32)
    }
}

/// Whether a setting is off: null, false, or empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

struct Keys<'a> {
    path: &'a Path,
    values: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// Checks that no key is on that changes results in a way that is not computed.
    fn check(&self) -> Result<()> {
        let known = |key: &str| READ.contains(&key) || WITHOUT_INFLUENCE.contains(&key);
        match self.values.iter().find(|(key, value)| !known(key) && !is_off(value)) {
            None => Ok(()),
            Some((key, value)) => Err(self.unsupported(key, &json::brief(value), "adapters without this setting")),
        }
    }

    fn unsupported(&self, key: &str, what: &str, supported: &str) -> Error {
        let (what, supported) = (what.to_owned(), format!("supported: {supported}"));
        Error::Unsupported { path: self.path.to_path_buf(), place: Place::Key(key.to_owned()), what, supported }
    }

    fn malformed(&self, key: &str, found: &Value, expected: &str) -> Error {
        Error::malformed(self.path, Place::Key(key.to_owned()), json::brief(found), expected)
    }

    /// The value of a key, `None` for null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.malformed(key, value, "a string"))
    }

    fn switch(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.malformed(key, value, "true or false"))
    }

    /// A number above 0.
    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|value| self.positive(key, value)).transpose()
    }

    fn positive(&self, key: &str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0 && *number < 1e9);
        number.ok_or_else(|| self.malformed(key, value, "a number above 0"))
    }

    fn strings(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let strings = value.as_array().and_then(|values| {
            values.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        strings.ok_or_else(|| self.malformed(key, value, "a list of strings"))
    }

    /// Numbers by patterns of modules' names: a pattern matches the last parts of a name, or, if it begins with `^`, a beginning.
    fn patterns(&self, key: &str) -> Result<Vec<(Regex, f64)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let Value::Object(patterns) = value else { return Err(self.malformed(key, value, "an object")) };
        if patterns.len() > MAX_PATTERNS {
            let found = Value::from(patterns.len());
            return Err(self.malformed(key, &found, &format!("at most {MAX_PATTERNS} patterns")));
        }
        let compiled = patterns.iter().map(|(pattern, value)| {
            let whole = match pattern.starts_with('^') {
                true => pattern.clone(),
                false => format!(r"^(?:.*\.)?(?:{pattern})$"),
            };
            let regex = RegexBuilder::new(&whole).size_limit(MAX_PATTERN).build();
            let regex = regex.map_err(|_| {
                let found = Value::String(pattern.clone());
                self.malformed(key, &found, "a regular expression without look-around and references to groups")
            })?;
            Ok((regex, self.positive(key, value)?))
        });
        compiled.collect()
    }
}
