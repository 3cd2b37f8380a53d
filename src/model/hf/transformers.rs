//! What the classes of transformers define: the keys of `config.json`, and their defaults.
//!
//! `scripts/transformers_keys.py` writes `transformers.json` from an installed transformers.

use serde_json::{Map, Value};

use super::families::HfFamily;

/// The classes: keys that all of them have under `base`, and under `families` those of each with their defaults.
const CLASSES: &str = include_str!("transformers.json");

/// The keys of a family's class and their defaults. Those without a default are null.
pub(super) fn defaults(family: &HfFamily) -> Map<String, Value> {
    let mut families = part("families");
    // The first name is that of transformers.
    match family.model_types.first().and_then(|name| families.get_mut(*name)) {
        Some(Value::Object(defaults)) => std::mem::take(defaults),
        _ => Map::new(),
    }
}

/// The keys that every class has.
#[cfg(test)]
pub(super) fn base() -> Vec<String> {
    let classes: Value = serde_json::from_str(CLASSES).unwrap();
    serde_json::from_value(classes["base"].clone()).unwrap()
}

fn part(name: &str) -> Map<String, Value> {
    // The file is part of the program, and a test reads all of it.
    let classes: Option<Map<String, Value>> = serde_json::from_str(CLASSES).ok();
    match classes.and_then(|mut classes| classes.remove(name)) {
        Some(Value::Object(part)) => part,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_class_and_every_class_a_family() {
        let families = super::super::families::all();
        let mut ours: Vec<&str> = families.iter().map(|family| family.model_types[0]).collect();
        ours.sort_unstable();
        let theirs: Vec<String> = part("families").keys().cloned().collect();
        assert_eq!(ours, theirs);
    }
}
