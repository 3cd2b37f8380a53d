//! Every kernel that this CPU can run computes the same bits as the scalar one, and the scalar one computes what it says.

mod accuracy;
mod attention;
mod choice;
mod elementwise;
mod product;
mod quantize;
mod random;
mod support;
