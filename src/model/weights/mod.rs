//! Tensors by name: read, checked and packed. Which tensors a layer consists of is said where the layer is.

pub(super) mod loader;
