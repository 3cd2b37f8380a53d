//! Input as a checkpoint folder: the first line is `config.json`, the rest `model.safetensors`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::model::{LoadOptions, Model, Quantize};
use nybble_fuzz::{saved, step};

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (config, weights) = bytes.split_at(end);
    let file = saved("config.json", config);
    saved("model.safetensors", weights.get(1..).unwrap_or_default());
    let Some(folder) = file.parent() else { return };
    for quantize in [Quantize::Stored, Quantize::Int4] {
        let options = LoadOptions::default().with_threads(1).with_quantize(quantize);
        if let Ok(model) = Model::load(folder, &options) {
            step(&model);
        }
    }
});
