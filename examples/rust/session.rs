//! Keeps the KV cache of a prompt on disk: `cargo run --release --example session -- model.gguf prompt.session`.

use nybble::{LoadOptions, Model, SamplingOptions, Sequence, Session, step};

fn main() -> nybble::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let model = Model::load(path, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let file = arguments.next().unwrap_or_else(|| "prompt.session".to_owned());

    // The first run computes the prompt. Later ones continue where the last one stopped.
    let (session, tokens) = match std::fs::exists(&file) {
        Ok(true) => Session::load(&model, &file)?,
        _ => (model.session(), tokenizer.encode("Once upon a time there was a small model that lived in a file.")?),
    };
    println!("{} of {} tokens are computed", session.len(), tokens.len());
    let mut text = tokenizer.decoder_after(&tokens);
    let mut sequence = Sequence::resume(&model, session, &tokens, SamplingOptions::greedy())?;
    for _ in 0..16 {
        if sequence.has_ended() {
            break;
        }
        let sampled = step(&model, &mut [&mut sequence], &|| false)?;
        print!("{}", text.push(sampled[0].token)?);
    }
    println!("{}", text.finish());
    sequence.session().save(&model, sequence.tokens(), &file)
}
