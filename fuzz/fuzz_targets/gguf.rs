//! Input as a GGUF file: opens it, reads every key and decodes every tensor.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nybble::format::gguf::Gguf;
use nybble_fuzz::saved;

fuzz_target!(|bytes: &[u8]| {
    let file = saved("file.gguf", bytes);
    let Ok(gguf) = Gguf::open(&file) else { return };
    for (key, value) in gguf.metadata().iter() {
        let _ = (key.len(), format!("{value:?}").len());
    }
    let mut values = Vec::new();
    for tensor in gguf.tensors() {
        let data = gguf.data(tensor);
        let kind = tensor.block_type();
        let blocks = (data.len() / kind.block_bytes()).min(1 << 12);
        values.resize(blocks * kind.block_len(), 0.0);
        let _ = kind.decode(&data[..blocks * kind.block_bytes()], &mut values);
    }
});
