//! The rows of a GGUF tensor: their order in the checkpoint, and what is done with their values.

mod arranged;
mod mapped;
mod order;

pub(super) use arranged::{Arranged, Computed};
pub(super) use mapped::{Mapped, Mapping, TiledColumns};
pub(super) use order::{HeadOrder, RowOrder};
