//! Chooses tokens by the logits of the forward pass: `cargo run --release --example logits -- model.gguf 1 2 3`.

use std::io::Write;
use std::time::Instant;

use nybble::model::{Input, LoadOptions, Logits, Model};

fn main() -> nybble::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let prompt: Vec<u32> = arguments.filter_map(|id| id.parse().ok()).collect();
    let prompt = if prompt.is_empty() { vec![1] } else { prompt };

    let start = Instant::now();
    let model = Model::load(&path, &LoadOptions::default())?;
    println!(
        "{} threads, kernel {}, loaded in {:.3} s",
        model.threads(),
        model.kernel().name(),
        start.elapsed().as_secs_f64()
    );
    let mut session = model.session();
    let mut next = prompt;
    let mut logits = Vec::new();
    let (start, count) = (Instant::now(), 64);
    for _ in 0..count {
        logits.clear();
        let input = Input::new(&mut session, &next, Logits::Last);
        model.forward(&mut [input], &mut logits, &|| false)?;
        let best = (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
        print!("{best} ");
        let _ = std::io::stdout().flush();
        next = vec![best as u32];
    }
    println!("\n{:.1} tokens per second", f64::from(count) / start.elapsed().as_secs_f64());
    Ok(())
}
