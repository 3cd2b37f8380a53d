//! Writes a 4-bit GGUF file: `cargo run --release --example quantize -- checkpoint model.gguf`.

use std::path::Path;

use nybble::quantize::{Format, QuantizeOptions, Recipe, RunContext, TensorFormats, quantize};

fn main() -> nybble::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, out] = arguments.as_slice() else {
        eprintln!("usage: quantize SOURCE OUT");
        std::process::exit(2);
    };
    // Rounding to the nearest code needs no calibration text. Other recipes take the token ids of one.
    let options = QuantizeOptions::new(Recipe::by_name("rtn")?, TensorFormats::new(Format::Q4_0));
    let report = quantize(&RunContext::new(Path::new(source), Path::new(out), &[]), &options)?;
    println!("{} tensors, written to {out}", report.tensors.len());
    Ok(())
}
