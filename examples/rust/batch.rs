//! Continues several prompts as one batch: `cargo run --release --example batch -- model.gguf "One" "Two"`.

use std::collections::HashMap;
use std::sync::Arc;

use nybble::{LoadOptions, Model, SamplingOptions, Scheduler, SchedulerOptions, Sequence};

fn main() -> nybble::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let model = Arc::new(Model::load(path, &LoadOptions::default())?);
    let tokenizer = model.tokenizer()?;
    let mut scheduler = Scheduler::new(model.clone(), None, SchedulerOptions::default())?;
    let mut prompts = HashMap::new();
    for prompt in arguments {
        let sequence = Sequence::new(&model, &tokenizer.encode(&prompt)?, SamplingOptions::greedy())?;
        prompts.insert(scheduler.submit(sequence, 64)?, prompt);
    }
    while !scheduler.is_idle() {
        for event in scheduler.step(&|| false)? {
            event.result?;
            // The last event of a request hands its sequence back.
            if let Some(sequence) = event.sequence {
                println!("{}: {:?}", prompts[&event.id], tokenizer.decode(sequence.tokens())?);
            }
        }
    }
    Ok(())
}
