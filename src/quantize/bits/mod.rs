//! Mixed formats: gives sensitive linear layers 5 or 8 bits, up to a mean number of bits per weight.

mod allocate;
mod choose;
mod head;
mod importance;
mod measure;
mod sensitivity;
mod spend;

pub use choose::choose_formats;
pub use importance::write_importance;
