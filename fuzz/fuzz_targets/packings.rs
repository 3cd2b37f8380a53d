//! Any bytes as a checkpoint of packed tensors: a line of JSON for `config.json`, one for the header of `model.safetensors`, whose
//! length is made right, and the tensors' data. Loaded as it is and in 8 bits, and a forward step computed.
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
        let options = LoadOptions { threads: Some(1), quantize, ..LoadOptions::default() };
        if let Ok(model) = Model::load(folder, &options) {
            step(&model);
        }
    }
});
