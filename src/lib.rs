//! nybble runs language models on CPUs from 4-bit weights.
//!
//! [`Model::load`] reads a GGUF file or a Hugging Face folder, and a [`Tokenizer`] turns text into token ids and back. A
//! [`Sequence`] is a prompt with its completion so far, and [`step`] computes one token for each of several sequences. A
//! [`Scheduler`] batches many requests, reuses common prefixes and can speculate. [`quantize()`] writes 4-bit files.
//!
//! Results are bit-identical across thread counts, batch sizes, prompt chunks and CPUs.
//!
//! ```no_run
//! use nybble::{LoadOptions, Model, SamplingOptions, Sequence, step};
//!
//! let model = Model::load("model.gguf", &LoadOptions::default().with_threads(4))?;
//! let tokenizer = model.tokenizer()?;
//! let prompt = tokenizer.encode("Once upon a time")?;
//! let mut text = tokenizer.decoder_after(&prompt);
//! let options = SamplingOptions::default().with_temperature(0.7).with_seed(7);
//! let mut sequence = Sequence::new(&model, &prompt, options)?;
//! while !sequence.has_ended() && sequence.len() < model.context() {
//!     let sampled = step(&model, &mut [&mut sequence], &|| false)?;
//!     print!("{}", text.push(sampled[0].token)?);
//! }
//! # Ok::<(), nybble::Error>(())
//! ```
//!
//! | to | use |
//! | --- | --- |
//! | load a model | [`Model`], [`LoadOptions`] |
//! | encode and decode text, apply a chat template | [`Tokenizer`], from [`Model::tokenizer`] |
//! | compute logits or hidden states | [`Model::forward`] with an [`Input`] per [`Session`] |
//! | generate | [`Sequence`], [`step`], [`SamplingOptions`] |
//! | serve many requests | [`Scheduler`], [`SchedulerOptions`], [`Event`] |
//! | restrict the output | `Grammar`, `Vocabulary` and `Constraint`, with the feature `grammar` |
//! | quantize and evaluate | [`quantize()`], [`QuantizeOptions`], [`mod@quantize`] |
//! | read and write GGUF | [`format::gguf`] |
//! | decode and encode block types | [`BlockType`] |
//! | choose an instruction set | [`kernels`] |
//! | handle errors | [`Error`], [`Place`] |
//!
//! Structs of options have a setter for each field, such as [`LoadOptions::with_threads`]. Errors name the file or the argument,
//! what was found and what was expected. Long calls take a closure that can interrupt them.
//!
//! # Features
//!
//! | feature | default | effect |
//! | --- | --- | --- |
//! | `chat` | yes | chat templates: `Tokenizer::apply_chat_template` |
//! | `grammar` | yes | constraints: JSON Schema, regular expressions, grammars |
//! | `tokenizers` | yes | encodes byte-level BPE and `tokenizer.json`; SentencePiece needs no feature, nor does decoding |
//! | `python` | no | the Python module; needs an installed Python |

#![cfg_attr(docsrs, feature(doc_cfg))]

#[macro_use]
mod setters;

pub mod engine;
pub mod error;
pub mod format;
pub mod kernels;
pub mod model;
#[cfg(feature = "python")]
mod python;
pub mod quant;
pub mod quantize;
mod system;
#[doc(hidden)]
pub mod threads;
pub mod tokenizer;

#[cfg(feature = "grammar")]
pub use engine::constraint::{Constraint, Grammar, Vocabulary};
pub use engine::sampler::{Sampled, SamplingOptions};
pub use engine::{Event, Scheduler, SchedulerOptions, Sequence, Speculation, step};
pub use error::{Error, Place, Result};
pub use model::{CacheType, Input, LoadOptions, Logits, Model, Pooling, Quantize, Session, TextTokens};
pub use quant::block::BlockType;
pub use quantize::{QuantizeOptions, Recipe, RunContext, TensorFormats, quantize};
#[cfg(feature = "chat")]
pub use tokenizer::{ChatOptions, Message};
pub use tokenizer::{EncodeOptions, StreamDecoder, Tokenizer};

// Compiles the examples of the README with those of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
