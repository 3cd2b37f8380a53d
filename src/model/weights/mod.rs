//! Tensors by name: read, checked and packed. The file of a layer lists its tensors.

pub(super) mod load_options;
pub(super) mod loader;
