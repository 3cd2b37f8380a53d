//! The model's own end tokens end a sequence, alone and in a scheduler, and the session is handed back.

use std::sync::Arc;

use crate::jobs::{greedy, seeded, tokens};
use crate::tiny_model::{self, ODD};
use nybble::engine::{SchedulerOptions, Sequence, Speculation, step};
use nybble::format::gguf::StringArray;
use nybble::model::{LoadOptions, Model};
use nybble::quant::block::BlockType;
use nybble::{Error, Scheduler, Tokenizer};

/// A model with a SentencePiece vocabulary of `count` tokens. `end` ends a text.
fn model(count: usize, end: u32) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let mut metadata = tiny_model::metadata(&ODD);
    let texts: StringArray = (0..count).map(|id| format!("t{id}")).collect();
    metadata
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", texts)
        .set("tokenizer.ggml.token_type", vec![1i32; count])
        .set("tokenizer.ggml.scores", vec![0f32; count])
        .set("tokenizer.ggml.eos_token_id", end);
    let path = folder.path().join("model.gguf");
    tiny_model::write(&path, &metadata, &tiny_model::tensors(&ODD), BlockType::Q4_0);
    Arc::new(Model::load(path, &LoadOptions::default().with_threads(2)).unwrap())
}

fn next(model: &Model, sequence: &mut Sequence) -> u32 {
    step(model, &mut [sequence], &|| false).unwrap()[0].token
}

/// What greedy sampling gives for `prompt` if nothing ends it, and the position of a token that occurs there first.
fn written(prompt: &[u32]) -> (Vec<u32>, usize) {
    let model = model(ODD.vocabulary, 0);
    let mut sequence = Sequence::new(&model, prompt, greedy()).unwrap().with_ends([]);
    let written: Vec<u32> = (0..24).map(|_| next(&model, &mut sequence)).collect();
    let fresh = |at: &usize| !written[..*at].contains(&written[*at]);
    let at = (2..written.len() - 1).rev().find(fresh).expect("a token that is new");
    (written, at)
}

#[test]
fn a_sequence_ends_with_the_model_s_own_token_unless_told_otherwise() {
    let prompt = tokens(9, 3);
    let (written, at) = written(&prompt);
    let model = model(ODD.vocabulary, written[at]);
    assert_eq!(model.ends().unwrap(), [written[at]]);
    let mut sequence = Sequence::new(&model, &prompt, greedy()).unwrap();
    for (i, expected) in written[..=at].iter().enumerate() {
        assert!(!sequence.has_ended());
        assert_eq!(next(&model, &mut sequence), *expected, "{i}");
    }
    assert!(sequence.has_ended());
    assert_eq!(sequence.tokens(), [&prompt, &written[..=at]].concat());
    let refused = step(&model, &mut [&mut sequence], &|| false).unwrap_err();
    assert!(matches!(&refused, Error::InvalidArgument { name: "sequence", .. }), "{refused}");
    sequence.push(&[5]).unwrap();
    assert!(!sequence.has_ended(), "it continues with the next turn");
    next(&model, &mut sequence);

    let mut endless = Sequence::new(&model, &prompt, greedy()).unwrap().with_ends([]);
    let all: Vec<u32> = written.iter().map(|_| next(&model, &mut endless)).collect();
    assert_eq!(all, written, "ends never change tokens");
}

#[test]
fn a_scheduler_hands_back_a_sequence_that_has_ended() {
    let prompt = tokens(9, 3);
    let (written, at) = written(&prompt);
    let model = model(ODD.vocabulary, written[at]);
    for speculation in [Speculation::Off, Speculation::On] {
        let options = SchedulerOptions::default().with_speculation(speculation);
        let mut scheduler = Scheduler::new(model.clone(), None, options).unwrap();
        let id = scheduler.submit(Sequence::new(&model, &prompt, greedy()).unwrap(), 24).unwrap();
        let other =
            scheduler.submit(Sequence::new(&model, &tokens(3, 9), seeded(1)).unwrap().with_ends([]), 30).unwrap();
        let (mut got, mut back, mut others) = (Vec::new(), None, 0);
        while !scheduler.is_idle() {
            for event in scheduler.step(&|| false).unwrap() {
                others += usize::from(event.id == other);
                if event.id == id {
                    assert!(back.is_none(), "no event after the end");
                    got.push(event.result.unwrap().token);
                    back = event.sequence;
                }
            }
        }
        let sequence = back.expect("the last event has the sequence");
        assert!(sequence.has_ended());
        assert_eq!((got.as_slice(), others), (&written[..=at], 30), "{speculation:?}");
        assert!(matches!(scheduler.submit(sequence, 1), Err(Error::InvalidArgument { name: "sequence", .. })));
    }
}

#[test]
fn a_session_that_is_handed_back_continues_without_computing_its_tokens() {
    let prompt = tokens(9, 3);
    let (written, at) = written(&prompt);
    let model = model(ODD.vocabulary, written[at]);
    let mut scheduler = Scheduler::new(model.clone(), None, SchedulerOptions::default()).unwrap();
    scheduler.submit(Sequence::new(&model, &prompt, greedy()).unwrap(), 24).unwrap();
    let mut back = None;
    while !scheduler.is_idle() {
        back = scheduler.step(&|| false).unwrap().pop().and_then(|event| event.sequence).or(back);
    }
    let sequence = back.unwrap();
    let known = sequence.tokens().to_vec();
    let session = sequence.into_session();
    assert_eq!(session.len(), known.len() - 1, "all but the token that was sampled last");
    let mut resumed = Sequence::resume(&model, session, &known, greedy()).unwrap().with_ends([]);
    assert_eq!(next(&model, &mut resumed), written[at + 1]);
}

#[test]
fn rows_without_a_token_are_never_sampled() {
    let model = model(7, 1);
    let tokenizer = model.tokenizer().unwrap();
    let mut sequence = Sequence::new(&model, &[2, 3], seeded(5)).unwrap().with_ends([]);
    for _ in 0..40 {
        let token = next(&model, &mut sequence);
        assert!((token as usize) < tokenizer.len());
    }
    tokenizer.decode(sequence.tokens()).unwrap();
}

#[test]
fn the_tokenizer_of_a_model_comes_from_its_metadata() {
    let model = model(7, 1);
    assert!(!model.path().exists(), "the file is gone");
    let tokenizer: Tokenizer = model.tokenizer().unwrap();
    assert_eq!((tokenizer.len(), tokenizer.ends()), (7, model.ends().unwrap()));
    let name = model.metadata().get("general.architecture").and_then(|value| value.as_str());
    assert_eq!(name, Some("llama"));
}
