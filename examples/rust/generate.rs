//! Continues a prompt: `cargo run --release --example generate -- model.gguf "Once upon a time"`.

use nybble::{LoadOptions, Model, SamplingOptions, Sequence, step};

fn main() -> nybble::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let prompt = arguments.next().unwrap_or_else(|| "Once upon a time".to_owned());

    let model = Model::load(path, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode(&prompt)?;
    let mut text = tokenizer.decoder_after(&prompt);
    let mut sequence = Sequence::new(&model, &prompt, SamplingOptions::greedy())?;
    while !sequence.has_ended() && sequence.len() < prompt.len() + 64 {
        let sampled = step(&model, &mut [&mut sequence], &|| false)?;
        print!("{}", text.push(sampled[0].token)?);
    }
    println!("{}", text.finish());
    Ok(())
}
