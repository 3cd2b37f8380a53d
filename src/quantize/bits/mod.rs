//! Mixed formats: which linear layers get 5 or 8 bits when the mean number of bits per weight is limited.

mod allocate;
mod sensitivity;
mod spend;

pub use spend::spend_bits;
