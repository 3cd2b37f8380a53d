//! Answers `POST /generate` by one batch: `cargo run --release --example server -- model.gguf 127.0.0.1:8000`.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};

use axum::{Router, extract::State, http::StatusCode, routing::post};
use nybble::{LoadOptions, Model, SamplingOptions, Scheduler, SchedulerOptions, Sequence, Tokenizer};
use tokio::sync::oneshot;

/// A prompt, and where its completion goes.
type Job = (String, oneshot::Sender<nybble::Result<String>>);

/// Computes all requests together, on a thread of its own.
fn compute(model: Arc<Model>, tokenizer: Tokenizer, jobs: mpsc::Receiver<Job>) -> nybble::Result<()> {
    let mut scheduler = Scheduler::new(model.clone(), None, SchedulerOptions::default())?;
    let mut waiting = HashMap::new();
    loop {
        // Waits for a request only if there is nothing to compute.
        let first = if scheduler.is_idle() { Some(jobs.recv()) } else { None };
        if matches!(first, Some(Err(_))) {
            return Ok(());
        }
        for (prompt, reply) in first.into_iter().flatten().chain(jobs.try_iter()) {
            let tokens = tokenizer.encode(&prompt);
            let sequence = tokens.and_then(|tokens| Sequence::new(&model, &tokens, SamplingOptions::default()));
            match sequence.and_then(|sequence| Ok((sequence.len(), scheduler.submit(sequence, 128)?))) {
                Ok((start, id)) => drop(waiting.insert(id, (start, reply))),
                Err(error) => drop(reply.send(Err(error))),
            }
        }
        for event in scheduler.step(&|| false)? {
            if let Some(sequence) = event.sequence
                && let Some((start, reply)) = waiting.remove(&event.id)
            {
                let _ = reply.send(event.result.and_then(|_| tokenizer.decode(&sequence.tokens()[start..])));
            }
        }
    }
}

async fn generate(State(jobs): State<mpsc::Sender<Job>>, prompt: String) -> Result<String, (StatusCode, String)> {
    let (reply, completion) = oneshot::channel();
    let unavailable = || (StatusCode::SERVICE_UNAVAILABLE, "the server has stopped".to_owned());
    jobs.send((prompt, reply)).map_err(|_| unavailable())?;
    let completion = completion.await.map_err(|_| unavailable())?;
    completion.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "model.gguf".to_owned());
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let model = Arc::new(Model::load(path, &LoadOptions::default())?);
    let tokenizer = model.tokenizer()?;
    let (jobs, received) = mpsc::channel();
    std::thread::spawn(move || compute(model, tokenizer, received));
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    Ok(axum::serve(listener, Router::new().route("/generate", post(generate)).with_state(jobs)).await?)
}
