//! Stops a generation from another thread, within a layer: `cargo run --release --example cancel -- model.gguf`.

use std::sync::atomic::{AtomicBool, Ordering};

use nybble::{Error, LoadOptions, Model, SamplingOptions, Sequence, step};

fn main() -> nybble::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "model.gguf".to_owned());
    let model = Model::load(path, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode("Once upon a time")?;
    let mut sequence = Sequence::new(&model, &prompt, SamplingOptions::greedy())?.with_ends([]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
        });
        while sequence.len() < model.context() {
            match step(&model, &mut [&mut sequence], &|| stop.load(Ordering::Relaxed)) {
                // The sequence is as it was before the step, and could continue.
                Err(Error::Interrupted) => break,
                sampled => sampled.map(drop)?,
            }
        }
        println!("{}", tokenizer.decode(sequence.tokens())?);
        Ok(())
    })
}
