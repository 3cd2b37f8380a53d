//! Files: GGUF, checkpoint folders and vocabularies are read, written and refused. Nothing here runs a kernel.

#[path = "../common/gguf_builder.rs"]
mod gguf_builder;
#[path = "../common/hf_folder.rs"]
mod hf_folder;

mod block_types;
#[cfg(all(feature = "chat", feature = "tokenizers"))]
mod chat_templates;
mod gguf_malformed;
mod gguf_reader;
mod gguf_writer;
mod hf_families;
mod hf_folders;
mod hf_recurrent;
mod hf_recurrent_settings;
mod hf_safetensors;
mod shared_ids;
#[cfg(feature = "tokenizers")]
mod tokenizers;
mod vocab;
