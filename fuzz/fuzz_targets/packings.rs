//! Input as a checkpoint of packed tensors: a line for `config.json`, a line for the header of `model.safetensors`, whose length
//! is computed, and the data. Loads it as stored and requantized, and computes steps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::model::{LoadOptions, Model, Quantize};
use nybble_fuzz::{saved, step};

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(3, |byte| *byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let (config, header, data) = (part(), part(), part());
    let file = saved("config.json", config);
    saved("model.safetensors", &[&(header.len() as u64).to_le_bytes(), header, data].concat());
    let Some(folder) = file.parent() else { return };
    for quantize in [Quantize::Auto, Quantize::Stored] {
        let options = LoadOptions::default().with_threads(1).with_quantize(quantize);
        if let Ok(model) = Model::load(folder, &options) {
            step(&model);
        }
    }
});
