//! x
/// m
#[derive(Debug)]
pub struct Message;
/// o
#[derive(Debug)]
pub struct ChatOptions;
