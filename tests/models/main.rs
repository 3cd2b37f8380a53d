//! Models: logits against transformers, the same bits for every kernel, and what is refused when a model is loaded.

#[path = "../common/hf_folder.rs"]
mod hf_folder;
#[path = "../common/logits.rs"]
mod logits;
#[path = "../common/mtp.rs"]
mod mtp_goldens;
#[path = "../common/rewrite.rs"]
mod rewrite;
#[path = "../common/tiny_model.rs"]
mod tiny_model;

mod adapter_damage;
mod adapter_families;
mod adapters;
mod bits;
mod encoders;
mod errors;
mod experts;
mod gguf_files;
mod goldens;
mod hf_convert;
mod hf_packings;
mod mtp;
mod packed_folder;
mod session_files;
mod variants;
