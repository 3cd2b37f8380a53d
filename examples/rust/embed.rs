//! Compares sentences by their hidden states: `cargo run --release --example embed -- model.gguf "a cat" "a kitten"`.

use nybble::{Input, LoadOptions, Logits, Model};

fn main() -> nybble::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let model = Model::load(path, &LoadOptions::default())?;
    let tokenizer = model.tokenizer()?;
    let mut vectors: Vec<(String, Vec<f32>)> = Vec::new();
    for text in arguments {
        let (tokens, mut session, mut rows) = (tokenizer.encode(&text)?, model.session(), Vec::new());
        model.forward(&mut [Input::new(&mut session, &tokens, Logits::Hidden)], &mut rows, &|| false)?;
        // The mean over all tokens, of length 1.
        let width = rows.len() / tokens.len();
        let mut mean: Vec<f32> = (0..width).map(|i| rows.iter().skip(i).step_by(width).sum()).collect();
        let norm = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
        mean.iter_mut().for_each(|x| *x /= norm);
        for (other, vector) in &vectors {
            let cosine: f32 = mean.iter().zip(vector).map(|(a, b)| a * b).sum();
            println!("{cosine:.3} {other:?} {text:?}");
        }
        vectors.push((text, mean));
    }
    Ok(())
}
