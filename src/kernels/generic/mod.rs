//! Operations written once for all instruction sets.
//!
//! Code that the compiler vectorizes well is plain Rust (`elementwise.rs`). Code that needs tiles of registers is generic over a
//! [`Vector`](vector::Vector) (`attention.rs`, `attention_int8.rs`, `float.rs`, `convert.rs`). Both are compiled anew with the features of
//! every instruction set.

pub(super) mod attention;
pub(super) mod attention_int8;
pub(super) mod convert;
pub(super) mod elementwise;
pub(super) mod float;
pub(super) mod int8;
pub(super) mod math;
pub(super) mod product;
pub(super) mod recurrence;
pub(super) mod sparse;
pub(super) mod unpack;
pub(super) mod vector;
