//! Chats on standard input, and streams the answers: `cargo run --release --example chat -- model.gguf`.

use std::io::{BufRead, Write};

use nybble::{ChatOptions, LoadOptions, Message, Model, SamplingOptions, Sequence, step};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "model.gguf".to_owned());
    let model = Model::load(path, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let (mut messages, mut session) = (Vec::new(), model.session());
    let mut known: Vec<u32> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        messages.push(Message::user(&line?));
        let prompt = tokenizer.encode_prompt(&tokenizer.apply_chat_template(&messages, &ChatOptions::default())?)?;
        // The session keeps what the conversation so far and the new prompt have in common.
        session.truncate(known.iter().zip(&prompt).take_while(|(old, new)| old == new).count());
        let mut sequence = Sequence::resume(&model, session, &prompt, SamplingOptions::default())?;
        let (mut text, mut answer) = (tokenizer.decoder_after(&prompt), String::new());
        while !sequence.has_ended() && sequence.len() < model.context() {
            let sampled = step(&model, &mut [&mut sequence], &|| false)?;
            let piece = text.push(sampled[0].token)?;
            print!("{piece}");
            std::io::stdout().flush()?;
            answer += &piece;
        }
        println!();
        messages.push(Message::assistant(&answer));
        known = sequence.tokens().to_vec();
        session = sequence.into_session();
    }
    Ok(())
}
