//! Every kernel that this CPU can run is bit-identical to the scalar one, and the scalar one is correct.

mod accuracy;
mod attention;
mod attention_int8;
mod choice;
mod elementwise;
mod product;
mod quantize;
mod random;
mod recurrence;
mod sparse;
mod support;
