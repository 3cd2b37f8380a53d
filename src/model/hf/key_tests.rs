//! The lists of keys against the classes of transformers.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::switches::WITHOUT_INFLUENCE;
use crate::model::arch;
use crate::model::hf::entry::{Need, Values};
use crate::model::hf::families::{self, HfFamily};
use crate::model::hf::packings::Packing;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::Sizes;
use crate::model::hf::{heads, keys, rope, transformers};

/// The `config.json` of every test model.
fn configs() -> Vec<Map<String, Value>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let list = |folder: &str| std::fs::read_dir(data.join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let encoders = list("encoders").filter(|folder| folder.join("config.json").is_file());
    let goldens = list("goldens").chain(encoders).map(|folder| std::fs::read(folder.join("config.json")).unwrap());
    let variants = list("variants").map(|file| {
        let bytes = std::fs::read(file).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
        header["__metadata__"]["config"].as_str().unwrap().as_bytes().to_vec()
    });
    goldens.chain(variants).map(|bytes| serde_json::from_slice(&bytes).unwrap()).collect()
}

/// The keys that reading `config` as a model of `family` looks for.
fn keys_read(family: &HfFamily, mut config: Map<String, Value>) -> BTreeSet<String> {
    if let Some(Value::Object(text)) = config.remove("text_config") {
        config.extend(text);
    }
    let settings = Settings::new("config.json".into(), String::new(), config);
    let settings = settings.with_defaults(family.defaults, transformers::defaults(family));
    Packing::read(&settings, Path::new("")).unwrap();
    // A configuration that is refused has been read that far.
    let Ok(mut sizes) = Sizes::read(&settings, family.attends, family.adjust) else { return settings.keys_read() };
    sizes.rotary = rope::rotary(family.rotation, &settings, &sizes).unwrap();
    sizes.window_rotary = rope::window_rotary(family.rotation, &settings, &sizes).unwrap();
    _ = heads::is_bidirectional(&settings);
    _ = keys::write(family, &settings, &sizes, Path::new(""), "");
    for entry in [family.outside, family.layer].into_iter().flatten().copied().flatten() {
        if let Values::Scaled(factors) = entry.values {
            _ = factors(&settings, &sizes);
        }
        for need in [entry.weight, entry.bias] {
            match need {
                Need::If(key) | Need::Unless(key) => _ = settings.get(key),
                Need::IfSo(is_so) => _ = is_so(&settings),
                Need::Both(key, other) => _ = settings.get(key).and(settings.get(other)),
                Need::Untied => _ = settings.get("tie_word_embeddings"),
                Need::Never | Need::Always | Need::Optional | Need::Sparse | Need::Dense | Need::Where(_) => {}
            }
        }
    }
    settings.keys_read()
}

#[test]
fn every_key_of_transformers_is_read_listed_or_refused() {
    let mut faults = Vec::new();
    for family in families::all() {
        let is_of = |config: &Map<String, Value>| {
            family.model_types.iter().any(|name| config["model_type"].as_str() == Some(name))
        };
        let own = configs().into_iter().filter(is_of);
        // Without lists per layer, rules and periods are read instead.
        let plain = |config: &Map<String, Value>| {
            let mut plain = config.clone();
            plain.retain(|key, _| !["layer_types", "no_rope_layers"].contains(&key.as_str()));
            plain.insert("use_sliding_window".to_owned(), Value::Bool(true));
            plain
        };
        // The keys of windows are read where there is one.
        let windowed = |config: &Map<String, Value>| {
            let mut windowed = plain(config);
            windowed.insert("sliding_window".to_owned(), Value::from(8));
            windowed
        };
        let all = own.flat_map(|config| [plain(&config), windowed(&config), config]);
        let read: BTreeSet<String> = all.flat_map(|config| keys_read(family, config)).collect();
        let listed = || WITHOUT_INFLUENCE.iter().chain(family.without_influence).map(|key| (*key).to_owned());
        let name = family.model_types[0];
        let class = transformers::defaults(family).into_iter().map(|(key, _)| key).chain(transformers::base());
        let known: BTreeSet<String> = read.iter().cloned().chain(listed()).collect();
        faults.extend(class.filter(|key| !known.contains(key)).map(|key| format!("{name}: {key}: neither")));
        // A family may read what the others do not.
        let own = family.without_influence.iter().filter(|key| read.contains(**key));
        faults.extend(own.map(|key| format!("{name}: {key}: both")));
    }
    assert!(faults.is_empty(), "read or listed as without influence: {faults:#?}");
}

#[test]
fn defaults_differ_from_those_of_transformers_and_model_types_belong_to_one_family() {
    for family in families::all() {
        let class = transformers::defaults(family);
        for (key, value) in family.defaults.iter().copied().flatten() {
            let value: serde_json::Value = serde_json::from_str(value).unwrap();
            assert_ne!(class.get(*key), Some(&value), "{key} of {:?}", family.model_types);
        }
    }
    let mut names: Vec<_> = families::model_types().collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}

/// The page of models is made from this table.
#[test]
fn the_table_of_families_is_up_to_date() {
    let families = families::all().iter().map(|family| (family.architecture, family.model_types));
    let mut rows: Vec<String> = families.map(|(name, types)| format!("{name}: {}", types.join(" "))).collect();
    let read = |name: &str| rows.iter().any(|row| row.starts_with(&format!("{name}:")));
    let others: Vec<_> = arch::families().map(|family| family.name).filter(|name| !read(name)).collect();
    rows.extend(others.into_iter().map(|name| format!("{name}:")));
    rows.sort_unstable();
    let found = rows.join("\n") + "\n";
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families.txt");
    if std::env::var_os("NYBBLE_UPDATE").is_some() {
        std::fs::write(&file, &found).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), found, "NYBBLE_UPDATE=1 writes it again");
}
