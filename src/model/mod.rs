//! Models: from a checkpoint to logits.
//!
//! | module | contents |
//! | --- | --- |
//! | `arch/` | the model families as data |
//! | `config/`, `rope` | hyperparameters, read from GGUF's keys and checked once |
//! | `hf/` | Hugging Face folders, presented as GGUF files |
//! | `weights/` | reads tensors, checks and packs them |
//! | `mixers/`, `ffn/` | the two halves of a layer: each kind with its weights, its workspace and its computation |
//! | `state/` | the state of a sequence, in memory and on disk |
//! | `batch`, `buffer`, `linear`, `norm`, `pass` | shared parts of a forward pass: rows, memory, products, norms |
//! | `transformer`, `forward` | a model in memory, and one step of it |
//! | `mtp/` | heads for multi-token prediction, which draft tokens for the engine |
//! | `outputs/` | what hidden states of a whole document become: embeddings and scores of labels |
//! | `per_layer`, `streams` | a vector of the token for each layer, and several residual streams |
//! | `model` | the interface: loading, sessions, logits |
//! | `needs` | the memory that a model takes, from the headers of its files |
//! | `layerwise` | the same step one layer at a time, for calibration |
//! | `adapter/` | low-rank adapters: reads their files, adds their products, merges them into a checkpoint |
//! | `convert/` | any checkpoint to a GGUF file, or to another type while it is loaded |

mod adapter;
#[doc(hidden)]
pub mod arch;
mod batch;
mod buffer;
#[doc(hidden)]
pub mod config;
pub mod convert;
mod ffn;
mod fingerprint;
mod forward;
#[doc(hidden)]
pub mod hf;
pub(crate) mod layerwise;
mod linear;
mod mixers;
#[allow(clippy::module_inception, reason = "the file is named after its type")]
mod model;
mod mtp;
mod needs;
mod norm;
mod outputs;
mod pass;
mod per_layer;
#[doc(hidden)]
pub mod pipeline;
mod rope;
mod state;
mod streams;
mod transformer;
mod weights;

pub use batch::{Input, Logits};
pub use config::Pooling;
#[doc(hidden)]
pub use convert::requantize;
#[doc(hidden)]
pub use ffn::expert_use::ExpertUse;
pub use model::Model;
pub(crate) use mtp::HeadDraft;
#[doc(hidden)]
pub use needs::Needs;
pub use outputs::embedding::TextTokens;
pub(crate) use pipeline::Ticket;
#[doc(hidden)]
pub use rope::{RopeConfig, Scaling};
pub use state::cache::CacheType;
pub(crate) use state::page_file::{PageFault, PageId, WeakPage, distrust, distrust_owner, is_page_file, next_prefix};
pub use state::session::Session;
#[doc(hidden)]
pub use state::shared_page::SharedPage;
#[doc(hidden)]
pub use weights::load_options::ExpertMemory;
pub use weights::load_options::{LoadOptions, Quantize};
pub use weights::loader::Progress;
pub(crate) use weights::loader::layer_of;
