//! Numbers: F32 values and the blocks of few bits that stand for them.

pub mod block;
mod blocks256;
mod blocks32;
