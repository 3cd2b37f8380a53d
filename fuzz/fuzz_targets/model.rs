//! Input as a GGUF file: loads it as a model and computes two steps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::model::{LoadOptions, Model};
use nybble_fuzz::{saved, step};

fuzz_target!(|bytes: &[u8]| {
    let options = LoadOptions::default().with_threads(1);
    if let Ok(model) = Model::load(saved("file.gguf", bytes), &options) {
        step(&model);
    }
});
