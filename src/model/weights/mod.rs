//! Tensors by name: read, checked and packed. The file of a layer lists its tensors.

pub(super) mod expert_cache;
pub(super) mod expert_files;
pub(super) mod load_options;
pub(super) mod loader;
pub(super) mod sizes;
