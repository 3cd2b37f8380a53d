//! Files: bytes to metadata and named tensors, and back. Nothing here knows what a model is.

pub mod gguf;
